"""Answers of students, right but different, wrong and hostile: points given and deserved.

notebooks/assignments/answers.md is the table. Answers to different questions share a submission, so
each also shows that it costs no points of the others.
"""

import copy
from pathlib import Path

import pytest

for module in ("matplotlib", "ipykernel", "nbformat", "nbclient"):
    pytest.importorskip(module, reason="notebooks/requirements.txt is not installed")

from notebooks.assignments import assignment, grading  # noqa: E402

# A submission: rows (what it is, cell, its code, {test: points deserved}, part of a remark or
# None). In the code, SOLUTION stands for the public one.
DIFFERENT_1 = [
    ("Eq. 1 by F.conv2d", "group", """
def group(feature_map, p):
    x = F.conv2d(feature_map, p["project.weight"], p["project.bias"])
    A = F.conv2d(x, p["W.weight"]).flatten(2).exp()
    return x.flatten(2).mT, A / A.sum(1, keepdim=True)""", {"test-group": 4}, None),
    ("a where instead of a clamp", "pool", """
def pool(pixels, A, guard=1e-6):
    rho = A.sum(-1)[..., None]
    safe = torch.where(rho > 0, rho, torch.ones_like(rho))
    return torch.einsum("bln,bnd->bld", A, pixels) / safe""", {"test-pool": 4}, None),
    ("loops over the batch; helpers named as the tests' variables", "pool-backward", """
mean = lambda x, a: a @ x / a.sum(1, keepdim=True)
def want(x, a, dz):
    rho = a.sum(1, keepdim=True)
    return (a / rho).T @ dz, (dz @ x.T - (dz * mean(x, a)).sum(1, keepdim=True)) / rho
def pool_backward(pixels, A, dZ):
    both = [want(*one) for one in zip(pixels, A, dZ)]
    return torch.stack([x for x, _ in both]), torch.stack([a for _, a in both])
""", {"test-pool-backward": 5}, None),
    ("computed in float32", "attend", """
def attend(q, k, v):
    q, k = q.float(), k.float()
    weights = torch.softmax(torch.einsum("bld,bsd->bls", q, k) / math.sqrt(q.shape[2]), 2)
    return weights @ v.float(), weights
import math""", {"test-attend": 5}, "attend casts to float32"),
    ("without attend", "refine", """
def refine(Z, p):
    q, k, v = (Z @ p[f"{n}_r.weight"].T for n in "QKV")
    Z = Z + F.scaled_dot_product_attention(q, k, v)
    h = Z @ p["W_r1.weight"].T + p["W_r1.bias"]
    h = h * (1 + torch.erf(h / 2**0.5)) / 2
    return Z + h @ p["W_r2.weight"].T + p["W_r2.bias"]""", {"test-refine": 4}, None),
    ("everything inside, with other names", "token-learner", """
def token_learner(feature_map, p, self_attention=True, cross_attention=True):
    x, a = my_group(feature_map, p)
    z = a @ x / a.sum(2, keepdim=True)
    if self_attention:
        z = refine(z, p)
    return F.linear(look_back(z, x, p) if cross_attention else z, p["W_p.weight"], p["W_p.bias"])
my_group = group""", {"test-token-learner": 4}, None),
    ("a float from a table", "count-parameters", """
def count_parameters(C, d_w, L=6, d=256, self_hidden=256, cross_hidden=512, self_attention=True,
                     cross_attention=True):
    ffn = lambda h: 3 * d * d + 2 * d * h + h + d
    return (1.0 * (C + 1) * d + L * d + (d + 1) * d_w + self_attention * ffn(self_hidden)
            + cross_attention * ffn(cross_hidden))""", {"test-count-parameters": 4}, None),
    ("all arguments by name", "width-that-fits", """
def width_that_fits(encoders, widths):
    def error(d):
        counts = [(s + count_parameters(C=C, d_w=768, L=6, d=d, self_hidden=256)) / 1e6 - printed
                  for C, s, printed in encoders.values()]
        return max(map(abs, counts))
    return torch.tensor(sorted(widths, key=error)[0])""", {"test-width": 2}, None),
    ("gradients switched off afterwards", "train-learner", """SOLUTION
torch.set_grad_enabled(False)""", {"test-train-learner": 4},
     "train-learner: changes torch's gradient mode"),
]
MISTAKES_1 = [
    ("softmax over the pixels", "group", """
def group(feature_map, p):
    x = F.conv2d(feature_map, p["project.weight"], p["project.bias"])
    return x.flatten(2).transpose(1, 2), F.conv2d(x, p["W.weight"]).flatten(2).softmax(2)
""", {"test-group": 2}, None),
    ("no guard", "pool", """
def pool(pixels, A, guard=1e-6):
    return A @ pixels / A.sum(dim=2, keepdim=True)""", {"test-pool": 3}, None),
    ("rho taken for a constant", "pool-backward", """
def pool_backward(pixels, A, dZ):
    rho = A.sum(dim=2, keepdim=True)
    return (A / rho).transpose(1, 2) @ dZ, dZ @ pixels.transpose(1, 2) / rho""",
     {"test-pool-backward": 2}, None),
    ("the keys divided in place", "attend", """
def attend(q, k, v):
    k /= q.shape[-1] ** 0.5
    weights = (q @ k.transpose(1, 2)).softmax(dim=-1)
    return weights @ v, weights""", {"test-attend": 4}, "attend changes its argument k in place"),
    ("tanh GELU", "refine", """
def refine(Z, p):
    Z = Z + attend(*(F.linear(Z, p[f"{n}_r.weight"]) for n in "QKV"))[0]
    h = F.gelu(F.linear(Z, p["W_r1.weight"], p["W_r1.bias"]), approximate="tanh")
    return Z + F.linear(h, p["W_r2.weight"], p["W_r2.bias"])""", {"test-refine": 3}, None),
    ("keys and values exchanged", "look-back", """
def look_back(Z, pixels, p):
    K, V = F.linear(pixels, p["V_c.weight"]), F.linear(pixels, p["K_c.weight"])
    Z = Z + attend(F.linear(Z, p["Q_c.weight"]), K, V)[0]
    h = F.gelu(F.linear(Z, p["W_c1.weight"], p["W_c1.bias"]))
    return Z + F.linear(h, p["W_c2.weight"], p["W_c2.bias"])""", {"test-look-back": 0}, None),
    ("self-attention in every variant", "token-learner", """
def token_learner(feature_map, p, self_attention=True, cross_attention=True):
    pixels, A = group(feature_map, p)
    Z = refine(pool(pixels, A), p)
    Z = look_back(Z, pixels, p) if cross_attention else Z
    return F.linear(Z, p["W_p.weight"], p["W_p.bias"])""", {"test-token-learner": 2}, None),
    ("the bias of the projection forgotten", "count-parameters", """
def count_parameters(C, d_w, L=6, d=256, self_hidden=256, cross_hidden=512, self_attention=True,
                     cross_attention=True):
    total = C * d + L * d + d * d_w + d_w
    for there, h in ((self_attention, self_hidden), (cross_attention, cross_hidden)):
        total += there * (3 * d * d + d * h + h + h * d + d)
    return total""", {"test-count-parameters": 0}, None),
    ("losses as tensors, p left requiring gradients", "train-learner", """SOLUTION
_train = train_learner
def train_learner(maps, v, p, blip, **options):
    losses = [torch.tensor(x) for x in _train(maps, v, p, blip, **options)]
    for w in p.values():
        w.requires_grad_(True)
    return losses""", {"test-train-learner": 2}, None),
]
HOSTILE_1 = [
    ("directory, dtype and recursion limit changed", "group", """SOLUTION
import os, sys
os.chdir("/")
torch.set_default_dtype(torch.float64)
sys.setrecursionlimit(150)""", {"test-group": 4}, "the working directory, torch's default dtype"),
    ("F overwritten", "pool", "SOLUTION\nF = pool(torch.ones(1, 2, 2), torch.ones(1, 1, 2))",
     {"test-pool": 4}, "pool: changes the name F"),
    ("a list without end", "pool-backward", """
kept = []
while True:
    kept.append(torch.ones(1000, 1000))""", {"test-pool-backward": 0}, "MB of memory"),
    ("renamed", "attend", """
def attention(q, k, v):
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return weights @ v, weights""", {"test-attend": 0}, None),
    ("calls the renamed function", "refine", """
def refine(Z, p):
    Z = Z + attention(*(F.linear(Z, p[f"{n}_r.weight"]) for n in "QKV"))[0]
    h = F.gelu(F.linear(Z, p["W_r1.weight"], p["W_r1.bias"]))
    return Z + F.linear(h, p["W_r2.weight"], p["W_r2.bias"])""", {"test-refine": 4}, None),
    ("a method of torch removed", "count-parameters", """SOLUTION
torch.Tensor.softmax = torch.stack = sum = None""", {"test-count-parameters": 4},
     "changes torch.stack, torch.Tensor.softmax, the built-in sum"),
    ("the given tensors overwritten", "train-learner", """SOLUTION
maps *= 0
v = None
blip.train()""", {"test-train-learner": 4}, "the name v, the content of maps, the mode of blip"),
]
DIFFERENT_2 = [
    ("numpy mean, hits / n * 100", "rank", """
import numpy as np
def rank(q, gallery, names, exclude=None):
    order = np.argsort(-(gallery @ q).numpy(), kind="stable")
    return np.array([names[i] for i in order if names[i] != exclude])
def recall_at_k(rankings, targets, k):
    return np.mean([t in list(r)[:k] for r, t in zip(rankings, targets)]) * 100""",
     {"test-rank": 3}, None),
    ("binary cross-entropy on float32 labels", "lar", """
def lar(blip, words, mask, F_v, hard_image, hard_sentence):
    own = torch.arange(len(words))
    pairs = [(own, own, 1.0), (own, hard_image, 0.0), (hard_sentence, own, 0.0)]
    p = [blip.match(words[s], mask[s], F_v[i]).softmax(1)[:, 1] for s, i, _ in pairs]
    labels = torch.cat([torch.full((len(own),), y, dtype=torch.float32) for *_, y in pairs])
    return F.binary_cross_entropy(torch.cat(p), labels)""", {"test-lar": 5}, None),
    ("its own sum, in float32", "gcd", """
def gcd(v, t, tau):
    s = (v @ t.T).float() / tau
    lse = lambda s: s.amax(1) + (s - s.amax(1, keepdim=True)).exp().sum(1).log()
    return 0.5 * (lse(s) + lse(s.T) - 2 * s.diag()).mean()""", {"test-gcd": 5},
     "gcd casts to float32"),
    ("a tensor", "average-precision", """
def average_precision(names, targets, k):
    hit = torch.tensor([name in targets for name in names[:k]]).float()
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    return (hit * precision).sum() / min(k, len(targets))""", {"test-average-precision": 3}, None),
    ("its own probabilities", "hard-negatives", """
def hard_negatives(v, t, tau, generator=None):
    if len(v) == 1:
        raise ValueError("one image has no wrong pair")
    s = t @ v.T / tau
    w = [(torch.softmax(x, 1) + 1e-4) * (1 - torch.eye(len(v))) for x in (s, s.T)]
    return [torch.multinomial(x, 1, generator=generator).squeeze(1) for x in w]""",
     {"test-hard-negatives": 2}, None),
    ("tuples instead of sets", "blind-spots", """
def blind_spots():
    return dict(a=("i2t", "t2i", "lar"), b=["i2t", "t2i", "lar"], c=("i2t", "t2i"),
                d=("lar", "i2t"), e=("lar",))""", {"test-blind-spots": 3}, None),
]
MISTAKES_2 = [
    ("gradients stopped", "compose-query", "SOLUTION\n_compose = compose_query\n"
     "def compose_query(blip, U, modifiers=None, prompt='a photo of'):\n"
     "    return _compose(blip, U.detach(), modifiers, prompt)",
     {"test-compose-training": 2, "test-compose-modifiers": 5}, None),
    ("overflows", "log-sum-exp", "def log_sum_exp(x, dim):\n    return x.exp().sum(dim).log()",
     {"test-log-sum-exp": 2}, None),
    ("one direction", "gcd", """
def gcd(v, t, tau):
    s = v @ t.T / tau
    return (log_sum_exp(s, 1) - s.diagonal()).mean()""", {"test-gcd": 2}, None),
    ("without the 1e-4", "negative-probabilities", """
def negative_probabilities(v, t, tau):
    s = t @ v.T / tau
    w = [x.softmax(1) * (1 - torch.eye(len(v))) for x in (s, s.T)]
    return tuple(x / x.sum(1, keepdim=True) for x in w)""", {"test-negative-probabilities": 3},
     None),
    ("a share instead of percent, the reference kept", "rank", """
def rank(q, gallery, names, exclude=None):
    return [names[i] for i in torch.sort(gallery @ q, descending=True, stable=True).indices]
def recall_at_k(rankings, targets, k):
    return sum(t in r[:k] for r, t in zip(rankings, targets)) / len(targets)""",
     {"test-rank": 1}, None),
    ("divided by the hits", "average-precision", """
def average_precision(names, targets, k):
    at = [i for i, name in enumerate(names[:k], 1) if name in targets]
    return sum(n / i for n, i in enumerate(at, 1)) / max(1, len(at))""",
     {"test-average-precision": 2}, None),
    ("one letter of five wrong", "blind-spots", "SOLUTION\n_right = blind_spots()\n"
     "def blind_spots():\n    return _right | {'c': {'lar'}}", {"test-blind-spots": 2.4}, None),
]
SUBMISSIONS = {
    "different": (1, DIFFERENT_1), "mistakes": (1, MISTAKES_1), "hostile": (1, HOSTILE_1),
    "different 2": (2, DIFFERENT_2), "mistakes 2": (2, MISTAKES_2),
}


def cell_of(notebook, name):
    return next(cell for cell in notebook.cells if grading.mark(cell).get("grade_id") == name)


def possible(number):
    """{test: its points}"""
    marks = map(grading.mark, filter(grading.is_test, grading.read_source(number).cells))
    return {mark["grade_id"]: mark["points"] for mark in marks}


def rows(name, given):
    """The lines of answers.md for a submission; given: {test: points that the grader gives}."""
    number, answers = SUBMISSIONS[name]
    full = possible(number)
    return [f"| {name} | {what} | {test} | {full[test]:g} | {wanted:g} | {given[test]:g} |"
            for what, _, _, points, _ in answers for test, wanted in points.items()]


def test_the_table_lists_every_answer():
    """That the points are given is the slow test below."""
    table = Path(assignment.HERE, "answers.md").read_text()
    found = [line for line in table.splitlines() if line.startswith("|")][2:]
    wanted = []
    for name, (number, answers) in SUBMISSIONS.items():
        names = {grading.mark(cell).get("grade_id") for cell in grading.read_source(number).cells}
        assert {cell for _, cell, *_ in answers} <= names
        deserved = {test: points for *_, tests, _ in answers for test, points in tests.items()}
        assert all(points <= possible(number)[test] for test, points in deserved.items())
        assert len(deserved) == sum(len(tests) for *_, tests, _ in answers)  # no test twice
        wanted += rows(name, deserved)
    assert found == wanted and len(found) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBMISSIONS)
def test_points_given_are_points_deserved(name):
    number, answers = SUBMISSIONS[name]
    source = grading.read_source(number)
    submission, deserved = copy.deepcopy(source), {}
    for _, cell, code, points, _ in answers:
        found = cell_of(submission, cell)
        found.source = code.replace("SOLUTION", found.source)
        deserved |= points
    result = grading.grade(source, submission, timeout=60, seed=4711)
    given = {test["name"]: test["points"] for test in result["tests"]}
    assert given == possible(number) | deserved, assignment.report(result)
    assert "\n".join(rows(name, given)) in Path(assignment.HERE, "answers.md").read_text()
    remarks = "\n".join(result["remarks"])
    for *_, remark in answers:
        assert remark is None or remark in remarks, (remark, remarks)
