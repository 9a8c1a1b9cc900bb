"""What the assignments' tests say when something is wrong: a sentence with a number that shows it.

The notebooks use it to check what a student wrote; `assignment.py grade` runs them with a fresh
copy of this file. Inputs are drawn from a seed that the teacher may change (`--seed`), so nobody
can fit a solution to the visible ones.
"""

import contextlib
import hashlib
import inspect
import math
import os

import numpy
import torch
import torch.nn.functional as F

import isa

SEED = os.environ.get("ASSIGNMENT_SEED", "0")
grading = False  # the grader sets it: a failing part then costs its own points and no others
lost, notes = {}, []  # what the grader reads after a test: part -> (points, reason); remarks


@contextlib.contextmanager
def part(points, name=None):
    """A part of a test that costs only its own points, once for all parts of the same name.

    In the student's notebook it fails as any other check.
    """
    try:
        yield
    except Exception as error:
        if not grading:
            raise
        said, kind = str(error).split("\n")[0][:300], type(error).__name__
        said = said if kind == "AssertionError" else f"{kind}: {said}"
        if kind == "NotImplementedError":
            said = f"{error} is not written yet"
        lost.setdefault(name or f"part {len(lost)}", (points, said))


def note(text):
    if text not in notes:
        notes.append(text)


def generator(seed=0):
    """A torch.Generator that also depends on the teacher's seed, however long that is."""
    digest = hashlib.sha256(f"{SEED} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def random(*shape, seed=0, dtype=torch.float64):
    """Normal numbers, the same for the same seed."""
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def unit(*shape, seed=0, dtype=torch.float64):
    """Rows of length 1, as v and t are."""
    return torch.nn.functional.normalize(random(*shape, seed=seed, dtype=dtype), dim=-1)


def expect(true, message):
    if not bool(true):
        raise AssertionError(message)


def expect_shape(got, shape, what):
    found = f"not {type(got).__name__}: is there a return?"
    expect(isinstance(got, torch.Tensor), f"{what} should be a tensor, {found}")
    shape, found = list(shape), list(got.shape)
    expect(found == shape, f"{what} should have the shape {shape}, not {found}")


def relative_error(got, want):
    """max |got - want| / max(|got| + |want|), in float64; 0 = equal, 1 = nothing in common."""
    got, want = (torch.as_tensor(x).detach().double().flatten().tolist() for x in (got, want))
    if not all(map(math.isfinite, got)):
        return math.inf
    pairs = list(zip(got, want, strict=True))
    difference = max((abs(a - b) for a, b in pairs), default=0.0)
    size = max((abs(a) + abs(b) for a, b in pairs), default=0.0)
    return difference / max(1e-12, size)


def expect_close(got, want, what, hint="", tolerance=1e-5):
    """Same shape, and a relative error below the tolerance. Numbers and NumPy arrays will do."""
    if isinstance(got, (int, float, numpy.generic, numpy.ndarray)) and not isinstance(got, bool):
        got = torch.as_tensor(numpy.asarray(got, dtype="float64"))
    want = torch.as_tensor(want)
    expect_shape(got, want.shape, what)
    error = relative_error(got, want)
    wrong = f"is off: relative error {error:.1e}, allowed {tolerance:.0e}"
    wrong = "contains nan or infinity" if error == math.inf else wrong
    expect(error <= tolerance, f"{what} {wrong}{hint and f' ({hint})'}")


def call(function, *arguments):
    """function(*arguments) on copies of the tensors; notes which of them it changes in place."""
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    result = function(*copies)
    for name, old, new in zip(parameters(function, len(copies)), arguments, copies, strict=True):
        if isinstance(old, torch.Tensor) and not torch.equal(old, new):
            note(f"{function.__name__} changes its argument {name} in place")
    return result


def parameters(function, count):
    names = list(inspect.signature(function).parameters)
    return [*names, *map(str, range(len(names) + 1, count + 1))][:count]


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple | list) else (outputs,)


def casts(function, inputs):
    """Does it miss a change of an input that float32 cannot hold, but see a larger one?"""

    def moved(which, step):
        copies = [x.clone() for x in inputs]
        copies[which] += step * random(*inputs[which].shape, seed=800)
        return as_tuple(function(*copies))

    def same(which, step):
        pairs = zip(moved(which, 0), moved(which, step), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    with torch.no_grad():
        return any(same(i, 1e-14) and not same(i, 1e-2) for i in range(len(inputs)))


def changed_in_place(function, inputs):
    """The first argument that the function overwrites, or None."""
    copies = [x.clone() for x in inputs]
    with torch.no_grad():
        function(*copies)
    pairs = zip(parameters(function, len(copies)), inputs, copies, strict=True)
    return next((name for name, old, new in pairs if not torch.equal(old, new)), None)


def expect_gradients(function, inputs, what, hint=""):
    """Compare autograd's gradients of function(*inputs), in float64, with finite differences."""
    inputs = [x.detach().double() for x in inputs]
    changed = changed_in_place(function, inputs)
    remedy = "which the caller still needs: write x = 2 * x, not x *= 2"
    expect(changed is None, f"{what} changes its argument {changed} in place, {remedy}")
    learnt = [x.clone().requires_grad_(True) for x in inputs]
    outputs = as_tuple(function(*learnt))
    blocked = "no gradient flows to the inputs (detach, item or no_grad inside?)"
    expect(all(o.requires_grad for o in outputs), f"{what}: {blocked}")
    rounds = casts(function, inputs)
    if rounds:
        note(f"{what} casts to float32")
    step, tolerance = (1e-2, 2e-2) if rounds else (1e-5, 1e-4)
    along = [random(*o.shape, seed=900 + i) for i, o in enumerate(outputs)]

    def scalar(*arguments):
        pairs = zip(as_tuple(function(*arguments)), along, strict=True)
        return sum((o.double() * a).sum() for o, a in pairs)

    try:
        got = torch.autograd.grad(scalar(*learnt), learnt, allow_unused=True)
    except RuntimeError as error:
        overwritten = "it overwrites in place what backward needs"
        why = overwritten if "inplace" in str(error) else error
        raise AssertionError(f"{what}: backward fails: {why}") from None
    for i, x in enumerate(inputs):
        def along_one(x, i=i):
            with torch.no_grad():
                return scalar(*inputs[:i], x.clone(), *inputs[i + 1 :])

        want = numeric_gradient(along_one, x, step)
        wrong = f"{what}: gradients differ from finite differences{hint and f' ({hint})'}"
        zero = torch.zeros_like(x) if got[i] is None else got[i]
        expect(relative_error(zero, want) <= tolerance, wrong)


def numeric_gradient(function, x, step=1e-5):
    """d function / d x by central differences; function: x (float64) -> scalar."""
    x, gradient = x.detach().clone(), torch.zeros_like(x)
    for i in range(x.numel()):
        old = x.view(-1)[i].item()
        sides = []
        for sign in (1, -1):
            x.view(-1)[i] = old + sign * step
            sides.append(float(function(x)))
        x.view(-1)[i] = old
        gradient.view(-1)[i] = (sides[0] - sides[1]) / (2 * step)
    return gradient


@contextlib.contextmanager
def using(namespace, *names, **functions):
    """Replace the student's functions by right ones while one test runs: a mistake costs only its
    own points. names: of STAND_INS; functions: a test's own, with the documented signature."""
    functions = {name: STAND_INS[name] for name in names} | functions
    before = {name: namespace[name] for name in functions if name in namespace}
    namespace.update(functions)
    try:
        yield
    finally:
        for name in functions:
            namespace.pop(name, None)
        namespace.update(before)


# -------------------------------------------------------------- assignment 1: isa.py as a reference
def learner(in_channels=5, word_dim=7, num_tokens=3, width=4, seed=0, dtype=torch.float64, **parts):
    """isa.py's adaptive token learner with weights of ordinary size, small by default."""
    made = isa.AdaptiveTokenLearner(in_channels, word_dim, num_tokens, width, self_hidden=6,
                                    cross_hidden=8, **parts).to(dtype)
    made.load_state_dict({name: random(*w.shape, seed=seed + i, dtype=dtype) * 0.7
                          for i, (name, w) in enumerate(made.state_dict().items())})
    return made.requires_grad_(False)


def weights(made):
    """The weights that the student's functions get: {name: tensor}."""
    return dict(made.state_dict())


def like(p):
    """isa.py's learner with the sizes and parts of the weights p = {name: tensor}."""
    (width, channels), tokens = p["project.weight"].shape[:2], len(p["W.weight"])
    made = isa.AdaptiveTokenLearner(
        channels, len(p["W_p.bias"]), tokens, width,
        self_hidden=len(p.get("W_r1.bias", ())), cross_hidden=len(p.get("W_c1.bias", ())),
        self_attention="Q_r.weight" in p, cross_attention="Q_c.weight" in p,
    )
    return made.to(p["W.weight"].dtype)


def right_token_learner(feature_map, p, self_attention=True, cross_attention=True):
    """isa.py's U for the weights p; gradients flow to p."""
    omitted = "_r" * (not self_attention), "_c" * (not cross_attention)
    p = {name: w for name, w in p.items() if name[1:3] not in omitted}
    return torch.func.functional_call(like(p), p, (feature_map,))


def loaded(p):
    made = like(p)
    made.load_state_dict(p)
    return made.requires_grad_(False)


def right_group(feature_map, p):
    return loaded(p).group(feature_map)


def right_pool(pixels, A, guard=1e-6):
    parts = dict(self_attention=False, cross_attention=False)
    made = isa.AdaptiveTokenLearner(1, 1, width=pixels.shape[-1], **parts)
    made.W_p = torch.nn.Identity()
    return made.speak(pixels, A)[0]


def refined(Z, keys, p, which, approximate="none"):
    """Eq. 3 (which = "r", keys = Z) or Eq. 4 (which = "c", keys = pixels) with isa.attend."""
    made = loaded(p)
    Q, K, V = (getattr(made, f"{name}_{which}") for name in "QKV")
    W1, W2 = (getattr(made, f"W_{which}{i}") for i in (1, 2))
    Z = Z + isa.attend(Q(Z), K(keys), V(keys))[0]
    return Z + W2(F.gelu(W1(Z), approximate=approximate))


def expect_gelu(got, Z, keys, p, which, what):
    """As expect_close for refined(...), whichever of the two GELUs was used."""
    exact, tanh = (refined(Z, keys, p, which, approximate) for approximate in ("none", "tanh"))
    close = relative_error(got, tanh) < relative_error(got, exact)
    expect_close(got, tanh if close else exact, what)


def switches(self_attention=True, cross_attention=True):
    """A variant as the last two arguments of token_learner."""
    return self_attention, cross_attention


def right_refine(Z, p):
    return refined(Z, Z, p, "r")


def right_look_back(Z, pixels, p):
    return refined(Z, pixels, p, "c")


def right_count(C, d_w, L=6, d=256, self_hidden=256, cross_hidden=512, self_attention=True,
                cross_attention=True):
    made = isa.AdaptiveTokenLearner(C, d_w, L, d, self_hidden, cross_hidden, self_attention,
                                    cross_attention)
    return sum(w.numel() for w in made.parameters())


# ------------------------------------------------------------------------------------ assignment 2
def right_probabilities(v, t, tau):
    """The scheme of section 3, number by number."""
    tables = []
    for rows, columns in ((t, v), (v, t)):
        share = torch.stack([F.softmax(columns @ row / tau, dim=0) for row in rows])
        for i in range(len(share)):
            others = [float(x) + 1e-4 if j != i else 0.0 for j, x in enumerate(share[i])]
            share[i] = torch.tensor([x / sum(others) for x in others], dtype=share.dtype)
        tables.append(share)
    return tuple(tables)


STAND_INS = {  # the student's function -> a right one with the same signature
    "group": right_group, "pool": right_pool, "refine": right_refine,
    "look_back": right_look_back, "token_learner": right_token_learner,
    "attend": lambda q, k, v: isa.attend(q, k, v), "count_parameters": right_count,
    "log_sum_exp": lambda x, dim: torch.logsumexp(x, dim),
    "negative_probabilities": right_probabilities,
}
