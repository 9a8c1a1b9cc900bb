"""What the assignments' tests say when something is wrong: a sentence with a number that shows it.

The notebooks use it to check what a student wrote; `assignment.py grade` runs them with a fresh
copy of this file. Inputs are drawn from a seed that the teacher may change (`--seed`), so nobody
can fit a solution to the visible ones.
"""

import contextlib
import math
import os

import torch

import isa

SEED = int(os.environ.get("ASSIGNMENT_SEED", 0))


def generator(seed=0):
    """A torch.Generator that also depends on the teacher's seed."""
    return torch.Generator().manual_seed(1000 * SEED + seed)


def random(*shape, seed=0, dtype=torch.float64):
    """Normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


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
    """Same shape, and a relative error below the tolerance."""
    if isinstance(got, (int, float)) and not isinstance(got, bool):
        got = torch.tensor(float(got), dtype=torch.float64)
    want = torch.as_tensor(want)
    expect_shape(got, want.shape, what)
    error = relative_error(got, want)
    wrong = f"is off: relative error {error:.1e}, allowed {tolerance:.0e}"
    wrong = "contains nan or infinity" if error == math.inf else wrong
    expect(error <= tolerance, f"{what} {wrong}{hint and f' ({hint})'}")


def expect_gradients(function, inputs, what, hint=""):
    """Compare autograd's gradients of function(*inputs), in float64, with finite differences."""
    inputs = [x.detach().double().requires_grad_(True) for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    blocked = "no gradient flows to the inputs (detach, item or no_grad inside?)"
    expect(all(o.requires_grad for o in outputs), f"{what}: {blocked}")
    wrong = f"{what}: gradients differ from finite differences{hint and f' ({hint})'}"
    try:
        right = torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-5, rtol=1e-3)
    except RuntimeError as error:
        raise AssertionError(wrong) from error
    expect(right, wrong)


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
def using(namespace, **functions):
    """Replace the student's functions by right ones while one test runs: a mistake costs only its
    own points."""
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


def before_projection(made, pixels, A):
    """isa.py's tokens after Eq. 2-4 [B, L, d]: what the learner `made` speaks without its W_p."""
    made.W_p = torch.nn.Identity()
    return made.speak(pixels, A)[0]
