"""notebooks/assignments: releases; grades of right, wrong and hostile work; the leaderboard."""

import ast
import copy
import csv
import inspect
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

for module in ("matplotlib", "ipykernel", "nbformat", "nbclient"):
    pytest.importorskip(module, reason="notebooks/requirements.txt is not installed")

import nbformat  # noqa: E402

import benchmarks  # noqa: E402
from notebooks.assignments import assignment, checks, grading, leaderboard, suspicions  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "notebooks/assignments/assignment.py"


@pytest.fixture(scope="module", params=grading.NUMBERS)
def source(request):
    return grading.read_source(request.param)


def cell_of(notebook, name):
    return next(cell for cell in notebook.cells if grading.mark(cell).get("grade_id") == name)


# ---- sources and release
def test_marks_are_nbgraders(source):
    marks = [cell.metadata.nbgrader for cell in source.cells if "nbgrader" in cell.metadata]
    assert len({m.grade_id for m in marks}) == len(marks)
    keys = {"schema_version", "grade", "solution", "locked", "grade_id", "task", "cell_type"}
    for m in marks:
        assert m.keys() == keys | ({"points"} if m.grade else set()) and m.schema_version == 3
        assert m.locked != m.solution and not m.task
    assert sum(m.points for m in marks if m.grade and not m.solution) == 40
    assert sum(m.points for m in marks if m.grade and m.solution) == 5
    for cell in source.cells:
        kind = grading.mark(cell).get("cell_type")
        assert kind == cell.cell_type or cell.cell_type == "markdown" and kind is None


def test_sources_are_executed_and_small(source):
    assert len(nbformat.writes(source)) < 100_000
    for cell in filter(grading.is_test, source.cells):
        said = "".join(output.text for output in cell.outputs)
        assert ": passed" in said, cell.metadata.nbgrader.grade_id


def test_release_contains_no_solution_no_hidden_test_and_no_output(source):
    before, student = nbformat.writes(source), assignment.release(source)
    text = nbformat.writes(student)
    assert nbformat.writes(assignment.release(source)) == text and nbformat.writes(source) == before
    nbformat.validate(student)
    assert "BEGIN" not in text and "END SOLUTION" not in text and "HIDDEN" not in text
    whole, released = ("\n".join(cell.source for cell in n.cells) for n in (source, student))
    for what in ("SOLUTION", "HIDDEN TESTS"):
        region = re.compile(f"### BEGIN {what}\n(.*?)### END {what}", re.DOTALL)
        within, others, given = (set(map(str.strip, text.splitlines())) for text in
                                 ("".join(region.findall(whole)), region.sub("", whole), released))
        assert len(within - others) > 30 and not (within - others) & given
    for mine, theirs in zip(source.cells, student.cells, strict=True):
        assert mine.metadata == theirs.metadata
        if mine.cell_type == "code":
            assert not theirs.outputs and theirs.execution_count is None
            tree = ast.parse(theirs.source)
            if grading.mark(mine)["solution"]:
                assert "TODO" in theirs.source
                for function in (n for n in tree.body if isinstance(n, ast.FunctionDef)):
                    stub = f"raise NotImplementedError('{function.name}')"
                    assert ast.unparse(function.body[-1]) == stub
        elif grading.is_read_by_teacher(mine):
            assert theirs.source == grading.TO_BE_WRITTEN


def test_release_command(call_script, tmp_path):
    done = call_script(SCRIPT, "release", 1, "--out", tmp_path / "new")
    assert done.status == 0 and (tmp_path / "new/assignment1.ipynb").exists()
    done = call_script(SCRIPT, "release", 1, "--out", ROOT / "notebooks/assignments")
    assert done.status == 1 and "source with the solutions" in done.message
    assert "BEGIN SOLUTION" in (ROOT / "notebooks/assignments/assignment1.ipynb").read_text()


def test_what_is_not_a_notebook_is_reported_in_a_sentence(call_script, tmp_path):
    (tmp_path / "a.ipynb").write_text("dear teacher")
    (tmp_path / "b.ipynb").write_text('{"cells": 3}')
    (tmp_path / "c.ipynb").write_bytes(b"\xff\xfe\x00")
    paths = [tmp_path / f"{name}.ipynb" for name in ("a", "b", "c", "missing")]
    for path in paths:
        done = call_script(SCRIPT, "grade", 1, path)
        assert done.status == 1 and f"{path.name}: " in done.message and len(done.message) < 300
    done = call_script(SCRIPT, "grade", 1, *paths[:2])
    assert done.status == 2 and "more than one submission: give --out" in done.message
    done = call_script(SCRIPT, "grade", 1, *paths[:2], "--out", tmp_path / "grades")
    assert done.status == 1 and "a.ipynb: is not" in done.out and "b.ipynb: is not" in done.out
    rows = list(csv.DictReader((tmp_path / "grades/grades.csv").open()))
    assert [row["points"] for row in rows] == ["0", "0"]
    assert "is not a Jupyter notebook" in rows[0]["remarks"]


# ---- which cells run
def test_tests_and_setup_come_from_the_source_whatever_is_submitted(source):
    submission = copy.deepcopy(source)
    for cell in submission.cells:
        if grading.mark(cell).get("locked"):
            cell.source = "print('passed')"
    submission.cells = [cell for cell in submission.cells if not grading.is_test(cell)][::-1]
    steps, _ = grading.assemble(source, submission)
    right, remarks = grading.assemble(source, source)
    assert steps == right and not remarks


def test_added_doubled_and_missing_cells():
    source = grading.read_source(1)
    submission = copy.deepcopy(source)
    place = submission.cells.index(cell_of(submission, "pool"))
    submission.cells.insert(place, nbformat.v4.new_code_cell("helper = 1"))
    submission.cells.insert(place + 2, copy.deepcopy(submission.cells[place + 1]))
    submission.cells.remove(cell_of(submission, "attend"))
    steps, remarks = grading.assemble(source, submission)
    order = [step.name for step in steps]
    at = order.index("a cell before pool")
    assert order[at : at + 4] == ["a cell before pool", "pool", "pool", "test-pool"]
    assert steps[at].source == "helper = 1"
    assert remarks == ["the cell attend is missing"]


def test_an_editor_that_drops_all_marks_costs_nothing_and_causes_no_remark(source):
    for submission in (copy.deepcopy(source), assignment.release(source)):
        right = grading.assemble(source, submission)
        answers = [grading.prose(source, submission, cell)
                   for cell in filter(grading.is_read_by_teacher, source.cells)]
        for cell in submission.cells:
            cell.metadata.clear()
        assert grading.assemble(source, submission) == right and not right[1]
        assert answers == [grading.prose(source, submission, cell)
                           for cell in filter(grading.is_read_by_teacher, source.cells)]


def test_a_function_without_mark_under_another_name_is_a_missing_cell():
    source = grading.read_source(1)
    submission = copy.deepcopy(source)
    for cell in submission.cells:
        cell.metadata.clear()
        cell.source = cell.source.replace("def pool(", "def my_pool(")
    steps, remarks = grading.assemble(source, submission)
    kinds = [step.kind for step in steps]
    assert remarks == ["the cell pool is missing"] and "student" in kinds[: kinds.index("test")]
    assert any("def my_pool" in step.source for step in steps)


def test_the_other_assignment_is_named_in_one_remark(source):
    for number in grading.NUMBERS:
        submission = grading.read_source(number)
        for cell in submission.cells if number == 2 else ():
            cell.metadata.clear()  # known even then
        if grading.other_assignment(source, submission) is None:
            assert cell_of(source, "setup") and submission.cells[0].source == source.cells[0].source
            continue
        result = grading.grade(source, submission)
        said = f"this is assignment {number}: grade it by `assignment.py grade {number}`"
        assert result["remarks"] == [said] and result["points"] == 0 and result["possible"] == 40
        assert len(result["tests"]) >= 10
        assert "this is assignment" in assignment.report(result)


def test_prose_counts_wherever_it_stands_below_its_question(source):
    cell = next(filter(grading.is_read_by_teacher, source.cells))
    place = source.cells.index(cell)
    for new, at in (("below", place + 1), ("above", place)):
        submission = assignment.release(source)
        assert grading.prose(source, submission, cell) == ""
        submission.cells.insert(at, nbformat.v4.new_markdown_cell(f"my answer {new}"))
        assert grading.prose(source, submission, cell) == f"my answer {new}"
    submission.cells[place + 1].source = "and here"
    assert grading.prose(source, submission, cell) == "my answer above\n\nand here"
    submission.cells.insert(2, nbformat.v4.new_markdown_cell("a note elsewhere"))
    assert "elsewhere" not in grading.prose(source, submission, cell)


# ---- stand-ins, parts and messages of the tests
def test_stand_ins_have_the_documented_signatures():
    documented = {}
    for number in grading.NUMBERS:
        for cell in filter(grading.is_answer, grading.read_source(number).cells):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef):
                    documented[node.name] = node.args
    for name, function in checks.STAND_INS.items():
        wanted = documented[name]
        names = list(inspect.signature(function).parameters.values())
        assert [p.name for p in names] == [a.arg for a in wanted.args], name
        given = [p.default for p in names if p.default is not p.empty]
        if given:
            assert given == [ast.literal_eval(d) for d in wanted.defaults], name


def test_right_stand_ins_are_isas_learner():
    made, x = checks.learner(seed=3), checks.random(2, 5, 3, 4, seed=1)
    p = checks.weights(made)
    pixels, A = checks.right_group(x, p)
    Z = checks.right_look_back(checks.right_refine(checks.right_pool(pixels, A), p), pixels, p)
    checks.expect_close(made.W_p(Z), made(x), "U")
    assert checks.right_count(5, 7, 3, 4, 6, 8) == sum(w.numel() for w in made.parameters())


def failure(*arguments):
    with pytest.raises(AssertionError) as failed:
        checks.expect_gradients(*arguments)
    return str(failed.value)


def test_gradients_name_what_is_wrong(monkeypatch):
    monkeypatch.setattr(checks, "notes", [])
    x = checks.random(3, 4, seed=1)
    checks.expect_gradients(lambda x: (x**3).sum(1), [x], "f")
    assert checks.notes == []
    assert "differ from finite" in failure(lambda x: (x * x.detach()).sum(1), [x], "f")
    assert "no gradient flows" in failure(lambda x: (x * x).detach(), [x], "f")
    said = failure(lambda x: x.mul_(2).sum(1), [x], "f")
    assert "f changes its argument x in place" in said and "write x = 2 * x" in said

    def overwrites(x):
        y = x.exp()
        return (y * y).sum() + y.mul_(2).sum()

    assert "overwrites in place what backward needs" in failure(overwrites, [x], "f")
    for cast in (lambda x: (x.float() ** 3).sum(1), lambda x: (x.float() ** 3).sum(1).double(),
                 lambda x: (x**3).float().sum(1)):
        checks.notes.clear()
        checks.expect_gradients(cast, [x], "f")
        assert checks.notes == ["f casts to float32"]


@pytest.mark.parametrize("seed", range(12))
def test_casts_are_found_with_any_seed(monkeypatch, seed):
    """Also of one argument only, or of a product; an argument without effect is none."""
    monkeypatch.setattr(checks, "SEED", str(seed))
    a, b = checks.unit(5, 6, seed=3), checks.unit(5, 6, seed=4)
    assert checks.casts(lambda a, b: (a @ b.T).float().logsumexp(1), [a, b])
    assert checks.casts(lambda a, b: (a @ b.float().double().T).logsumexp(1), [a, b])
    assert not checks.casts(lambda a, b: (a @ b.T).logsumexp(1), [a, b])
    assert not checks.casts(lambda a, b: a.softmax(1), [a, b])


def test_call_gives_copies_and_notes_what_is_overwritten(monkeypatch):
    monkeypatch.setattr(checks, "notes", [])

    def halve(a, b):
        return a + b.div_(2)

    a, b = torch.ones(2), torch.ones(2)
    assert checks.call(halve, a, b).tolist() == [1.5, 1.5] and b.tolist() == [1, 1]
    assert checks.notes == ["halve changes its argument b in place"]


def test_a_part_costs_its_points_once_and_fails_in_the_students_notebook(monkeypatch):
    monkeypatch.setattr(checks, "lost", {})
    with pytest.raises(AssertionError), checks.part(2):
        checks.expect(False, "no")
    monkeypatch.setattr(checks, "grading", True)
    for name in ("one", "one", None, None):
        with checks.part(2, name):
            checks.expect(False, f"no {name}")
    assert list(checks.lost.values()) == [(2, "no one"), (2, "no None"), (2, "no None")]


@pytest.mark.parametrize("seed", ["0", "7", "7265193408816", "9" * 30])
def test_any_seed_changes_the_inputs(monkeypatch, seed):
    before = checks.random(3, seed=1)
    monkeypatch.setattr(checks, "SEED", seed)
    assert torch.equal(checks.random(3, seed=1), before) == (seed == "0")
    assert not torch.equal(checks.random(3, seed=1), checks.random(3, seed=2))


# ---- what to look at
@pytest.mark.parametrize("cell, code, said", [
    ("attend", "import isa\nattend = isa.attend", "attend uses isa"),
    ("attend", "from isa import attend as mine", "attend uses isa"),
    ("attend", "m = __import__('is' + 'a')", "attend uses __import__, isa"),
    ("attend", "import importlib as i\nm = i.import_module(f'isa')", "attend uses importlib, isa"),
    ("attend", "exec('from isa import attend')", "attend uses exec, isa"),
    ("attend", "def attend(q, k, v):\n    return F.scaled_dot_product_attention(q, k, v)",
     "attend uses scaled_dot_product_attention"),
    ("refine", "checks.like(p)", "refine uses like"),
    ("refine", "from notebooks.assignments.checks import right_refine as refine",
     "refine uses right_refine"),
    ("refine", "grading.read_source(1)", "refine uses read_source"),
    ("refine", "torch.nn.GELU()(x)", "refine uses nn"),
    ("refine", "from torch import nn", "refine uses nn"),
    ("refine", "import torch.nn.functional as F\ny = torch.nn.functional.gelu(x)", None),
    ("pool-backward", "torch.autograd.grad(a, b)", "pool-backward uses autograd, grad"),
    ("gcd", "getattr(F, 'cross_entropy')(s, y)", "gcd uses cross_entropy, getattr"),
    ("lar", "F.cross_entropy(s, y)", None),
    ("train-learner", "t = isa.compose_query(blip, U)", None),
    ("pool", "sum = 0\nfor max in x: pass", "pool overwrites max; pool overwrites sum"),
    ("pool", "def pool(x):\n    max = 3\n    return [sum for sum in x]", None),
    ("pool", "torch.softmax = f", "pool sets torch.softmax"),
    ("pool", "def pool(x):\n    'isa, exec and open in a docstring'\n    return x  # isa", None),
])
def test_forbidden_names_are_found_in_any_disguise(cell, code, said):
    public = {grading.mark(c)["grade_id"]: c.source for number in grading.NUMBERS
              for c in filter(grading.is_answer, grading.read_source(number).cells)}
    assert "; ".join(suspicions.look([(cell, code)], public)) == (said or "")


def written_by(notebook, source):
    return [(step.name, step.source) for step in grading.assemble(source, notebook)[0]
            if step.kind == "student"]


def test_equal_submissions_are_found_though_names_and_comments_differ(source):
    answers = {grading.mark(c)["grade_id"]: c for c in filter(grading.is_answer, source.cells)}
    solutions = {name: cell.source for name, cell in answers.items()}
    stubs = {name: grading.stub(cell) for name, cell in answers.items()}
    copied = [(name, re.sub(r"\b(pixels|logits|s|Z|total|rho)\b", r"my_\1", text) + "\n# mine")
              for name, text in written_by(source, source)]
    (said,) = suspicions.look(copied, solutions)
    longer = len(suspicions.shapes(solutions.items(), {}))
    assert 0.5 * len(answers) < longer < len(answers)
    assert said == f"{longer} of {longer} longer answers are the public solution, but for names"
    assert suspicions.look(list(stubs.items()), solutions) == []
    assert suspicions.shapes(stubs.items(), stubs) == {}
    own = [(name, f"def f(x):\n    return {' + '.join(['x'] * 40)} + {name!r}") for name in answers]
    results = {name: {"shapes": suspicions.shapes(texts, stubs), "to_read": [{"answer": prose}]}
               for name, texts, prose in (("a", own, "x"), ("b", own, "y"), ("c", copied, "y"),
                                          ("d", stubs.items(), ""))}
    said = suspicions.equal_submissions(results, suspicions.shapes(solutions.items(), {}))
    assert said == {
        "a": [f"{len(answers)} answers equal those of b, but for names"],
        "b": [f"{len(answers)} answers equal those of a, but for names",
              "the answer in prose equals that of c"],
        "c": ["the answer in prose equals that of b"], "d": []}


def test_short_answers_equal_to_the_public_ones_say_nothing(source):
    """Right answers of one or two lines look alike; more than half of the longer ones do not."""
    solutions = {grading.mark(c)["grade_id"]: c.source
                 for c in filter(grading.is_answer, source.cells)}
    longer = list(suspicions.shapes(solutions.items(), {}))
    assert not {"pool", "attend", "log-sum-exp", "blind-spots"} & set(longer)

    def said(copied):
        own = [(name, text if name in copied else f"{text}\nown = 1")
               for name, text in solutions.items()]
        return suspicions.look(own, solutions)

    assert said(set(solutions) - set(longer)) == said(longer[: len(longer) // 2]) == []
    half = len(longer) // 2 + 1
    words = "longer answers are the public solution, but for names"
    assert said(longer[:half]) == [f"{half} of {len(longer)} {words}"]


# ---- grading (slow: starts kernels)
# Sets of typical mistakes: test, what the solution says, what the student says, part of message.
# Those of a set are submitted together: each has to cost its own test's points and no others.
MISTAKES = {
    1: [[
        ("group", ".softmax(dim=1)", ".softmax(dim=2)", "groups"),
        ("pool", ".clamp_min(guard)", "", "owns nothing"),
        ("pool-backward", " - (dZ * Z).sum(dim=2, keepdim=True)", "", "rho depends on A"),
        ("attend", "** 0.5", "", "square root"),
        ("refine", "Z = Z + attended", "Z = attended", "isa.py"),
        ("look-back", '(pixels, p["V_c.weight"])', '(pixels, p["K_c.weight"])', "isa.py"),
        ("token-learner", "if self_attention:", "if True:", "without SA"),
        ("count-parameters", "C * d + d + L * d", "C * d + L * d", "your count"),
        ("width", "min(widths", "max(widths", "256"),
        ("train-learner", "v[rows]", "v[rows.flip(0)]", "held-out R@1"),
    ], [
        ("group", ' + p["project.bias"][:, None, None]', "", "pixels of a 3 x 3 map"),
        ("pool", " / A.sum(dim=2, keepdim=True).clamp_min(guard)", "", "against a loop"),
        ("attend", "softmax(dim=-1)", "softmax(dim=1)", "summed over the keys"),
        ("refine", "F.gelu", "F.relu", "isa.py"),
        ("look-back", "return Z + F.linear", "return F.linear", "isa.py"),
        ("token-learner", ', p["W_p.bias"]', "", "bias"),
        ("train-learner", "lr=lr", "lr=0.0", "the loss should fall"),
    ]],
    2: [[
        ("compose-modifiers", "[seen, tail_mask]", "[seen, tail_mask * 0 + 1]", "are to be read"),
        ("log-sum-exp", "keepdim=True).values", "keepdim=True).values * 0", "nan or infinity"),
        ("gcd", " + (log_sum_exp(s, 0) - own).mean()) / 2", ")", "both directions"),
        ("gcd-gradient", "(2 * len(v))", "2", "finite differences"),
        ("negative-probabilities", ".fill_diagonal_(0)", "", "the other one has probability 1"),
        ("hard-negatives", "torch.multinomial(table, 1, generator=generator)[:, 0]",
         "table.argmax(dim=1)", "drawn"),
        ("lar", "(sentence == image)", "(sentence != image)", "index 1"),
        ("rank", " if names[i] != exclude", "", "excluded"),
        ("average-precision", "min(k, len(targets))", "k", "AP@5"),
        ("blind-spots", '"c": {"i2t", "t2i"}', '"c": {"lar"}', "c is not right"),
    ], [
        ("compose-training", "U, blip", "U.detach(), blip", "reach U"),
        ("gcd", "own).mean() + ", "own).sum() + ", "orthogonal"),
        ("negative-probabilities", " + 1e-4", "", "1e-4"),
        ("lar", "mask[sentence]", "mask[torch.cat([own, own, own])]", "own mask"),
        ("average-precision", "min(k, len(targets))", "max(hits, 1)", "not by K or by the hits"),
    ]],
}
CELL = {"width": "width-that-fits", "compose-modifiers": "compose-query",
        "compose-training": "compose-query"}  # of a test; all others have its name


@pytest.mark.slow
def test_the_solution_gets_all_points(source):
    result = grading.grade(source, source, seed=7265193408816)
    assert result["points"] == result["possible"] == 40, assignment.report(result)
    (prose,) = result["to_read"]
    assert not result["remarks"] and prose["possible"] == 5 and prose["answer"]
    assert f"{prose['name']} is the public solution" in result["look_at"]


@pytest.mark.slow
def test_the_empty_version_gets_none_and_the_messages_say_why(source):
    result = grading.grade(source, assignment.release(source))
    assert result["points"] == 0
    for test in result["tests"]:
        for part in test["message"].split("; "):
            function, rest = part.split(" ", 1)
            assert rest == "is not written yet" and f"def {function}(" in nbformat.writes(source)
    assert result["to_read"][0]["answer"] == "" and "no answer" in assignment.report(result)


@pytest.mark.slow
@pytest.mark.parametrize("number, chosen", [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_a_mistake_costs_its_own_test(number, chosen):
    source, mistakes = grading.read_source(number), MISTAKES[number][chosen]
    submission = copy.deepcopy(source)
    for test, right, wrong, _ in mistakes:
        cell = cell_of(submission, CELL.get(test, test))
        todo, solution = cell.source.split("### BEGIN SOLUTION", 1)
        assert solution.count(right) == 1, right
        cell.source = todo + solution.replace(right, wrong)
    result = grading.grade(source, submission)
    lost = {test["name"]: test["message"] for test in result["tests"]
            if test["points"] < test["possible"]}
    assert lost.keys() == {f"test-{test}" for test, *_ in mistakes}, assignment.report(result)
    for test, _, _, words in mistakes:
        message = lost[f"test-{test}"]
        assert words in message and "\n" not in message and len(message) < 330


@pytest.mark.slow
def test_hostile_work_costs_only_its_own_points():
    """Endless loops, exits, floods of output, tampering, deleted and split cells."""
    source = grading.read_source(2)
    submission = copy.deepcopy(source)

    def add(name, code, first=False):
        cell = cell_of(submission, name)
        cell.source = f"{code}\n{cell.source}" if first else f"{cell.source}\n{code}"

    add("compose-query", "import a_module_that_is_not_there", first=True)
    add("log-sum-exp", """def log_sum_exp(x, dim):
    while True:
        try:
            pass
        except BaseException:
            pass""")
    add("gcd", "def gcd(v, t, tau):\n    import sys\n    sys.exit(0)")
    add("gcd-gradient", "def gcd_gradient(v, t, tau):\n    import os\n    os._exit(0)")
    add("negative-probabilities", "for _ in range(3000):\n    print('x' * 3000)")
    add("hard-negatives", "checks.expect = checks.expect_shape = lambda *a: None\n"
                          "hard_negatives = lambda *a: (v[:3], v[:3])")
    submission.cells.remove(cell_of(submission, "lar"))
    first, second = cell_of(submission, "rank").source.split("\n\n\n")
    cell_of(submission, "rank").source = first
    half = copy.deepcopy(cell_of(submission, "rank"))
    half.source = second
    submission.cells.insert(submission.cells.index(cell_of(submission, "rank")) + 1, half)
    add("average-precision", "average_precision = lambda *a: torch.tensor(1.0)")
    cell_of(submission, "test-average-precision").source = "print('passed')"
    add("blind-spots", "isa.compose_query = None\nexit = quit = None", first=True)
    result = grading.grade(source, submission, timeout=10)
    lost = {test["name"]: test["message"] for test in result["tests"]
            if test["points"] < test["possible"]}
    wrong = {
        "test-compose-training": "NameError: name 'compose_query'",
        "test-compose-modifiers": "NameError: name 'compose_query'",
        "test-log-sum-exp": "ran longer than 10 s",
        "test-gcd": "SystemExit",
        "test-gcd-gradient": "ended the Python process",
        "test-hard-negatives": "hard_image should have the shape",
        "test-lar": "NameError: name 'lar'",
        "test-average-precision": "AP@5 of x a y b z",
    }
    assert lost.keys() == wrong.keys(), assignment.report(result)
    for name, message in wrong.items():
        assert lost[name].startswith(message), lost[name]
    remarks = "\n".join(result["remarks"])
    assert "compose-query: ModuleNotFoundError: No module named 'a_module_that_is_not" in remarks
    assert "the cell lar is missing" in remarks and "blind-spots: changes" not in remarks
    assert "blind-spots sets isa.compose_query" in result["look_at"]


# ---- grading a class
def pretend(number, path, timeout, seed, memory):
    """Instead of grade_file: no kernel; the points are in the notebook's first cell."""
    points = float(grading.read_notebook(path).cells[0].source)
    with open(Path(path).with_suffix(".ran"), "a") as file:
        file.write("x")
    tests = [{"name": "test-group", "points": points, "possible": 4, "message": "no | bias"}]
    return {"points": points, "possible": 40, "tests": tests, "shapes": {}, "look_at": [],
            "remarks": ["a remark"], "to_read": [{"name": "answer-softmax", "possible": 5,
                                                  "answer": "because"}]}


@pytest.fixture
def class_of_three(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assignment, "grade_file", pretend)
    for name, points in (("anna", 4), ("ben", 2.5), ("carl", 0)):
        (tmp_path / "in" / name).mkdir(parents=True)
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(str(points))])
        nbformat.write(notebook, tmp_path / "in" / name / "assignment1.ipynb")
    paths = sorted(map(str, Path("in").glob("*/*.ipynb")))
    return lambda *more: assignment.run_grade(assignment.parse_args(
        ["grade", "1", *paths, "--out", "grades", *more]))


def rows_of(folder):
    with open(Path(folder) / "grades.csv", newline="") as file:
        return list(csv.DictReader(file))


def ran():
    return [len(path.read_text()) for path in sorted(Path("in").glob("*/*.ran"))]


def test_a_class_gets_a_table_and_feedback_and_is_graded_once(class_of_three, capsys):
    class_of_three("--jobs", "2")
    rows = rows_of("grades")
    assert [(row["test-group"], row["points"]) for row in rows] == [
        ("4.0", "4.0"), ("2.5", "2.5"), ("0.0", "0.0")]
    assert list(rows[0])[-5:] == ["points", "possible", "answer-softmax (of 5)", "look at",
                                  "remarks"]
    assert "answer in prose equals that of in/ben" in rows[0]["look at"]
    assert sorted(path.name for path in Path("grades/feedback").iterdir()) == [
        f"{name}_assignment1.md" for name in ("anna", "ben", "carl")]
    text = Path("grades/feedback/ben_assignment1.md").read_text()
    assert "| test-group | 2.5 of 4 | no \\| bias |" in text and "- a remark" in text
    assert "look at" not in text and "equals" not in text
    assert "[3/3, 0 min left]" in capsys.readouterr().out
    before = Path("grades/results.jsonl").read_text()
    class_of_three("--jobs", "2")
    assert ran() == [1, 1, 1] and Path("grades/results.jsonl").read_text().count("\n") == 3
    assert "3 of 3 are graded already" in capsys.readouterr().out
    class_of_three("--seed", "5")  # another seed is another grade
    assert ran() == [2, 2, 2] and before[:200] in Path("grades/results.jsonl").read_text()


def test_a_cut_line_is_graded_again_and_typed_points_are_kept(class_of_three):
    class_of_three()
    results, grades = Path("grades/results.jsonl"), Path("grades/grades.csv")
    results.write_text(results.read_text()[:-40])  # a kill while the last line was written
    rows = list(csv.reader(grades.open()))
    column = rows[0].index("answer-softmax (of 5)")
    rows[1][column] = "4.5"
    with grades.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    class_of_three()
    assert ran() == [1, 1, 2] and len(assignment.read_results(results)) == 3
    assert [row["answer-softmax (of 5)"] for row in rows_of("grades")] == ["4.5", "", ""]


def test_submissions_with_the_same_content_have_results_of_their_own(class_of_three):
    shutil.copy("in/anna/assignment1.ipynb", "in/ben/assignment1.ipynb")
    class_of_three()
    class_of_three()
    rows = assignment.read_results(Path("grades/results.jsonl")).values()
    assert sorted(Path(row["submission"]).parent.name for row in rows) == ["anna", "ben", "carl"]
    assert ran() == [1, 1, 1]


@pytest.mark.slow
def test_an_interrupted_class_keeps_what_it_has_and_resumes(tmp_path):
    source = grading.read_source(2)
    for i in range(4):
        source.cells[0].source += f" (student {i})"
        nbformat.write(source, tmp_path / f"s{i}.ipynb")
    command = [sys.executable, str(ROOT / SCRIPT), "grade", "2",
               *(str(tmp_path / f"s{i}.ipynb") for i in range(4)), "--out", str(tmp_path / "out"),
               "--jobs", "2"]
    log, results = tmp_path / "log", tmp_path / "out/results.jsonl"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, text=True)
        while not assignment.read_results(results):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    assert log.read_text().splitlines()[-1] == (
        f"assignment.py: interrupted; {tmp_path / 'out'} keeps what is graded; the same command "
        "resumes")
    kept = assignment.read_results(results)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = assignment.read_results(results)
    assert len(after) == 4 > len(kept) > 0 and kept.items() <= after.items()
    assert f"{len(kept)} of 4 are graded already" in done.stdout
    rows = rows_of(tmp_path / "out")
    assert [row["points"] for row in rows] == ["40"] * 4
    for row in rows:
        assert "longer answers are the public solution" in row["look at"]
        assert "the answer in prose equals that of" in row["look at"]


# ---- the documented workflow
def commands_of(readme):
    blocks = re.findall(r"^```\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    commands = [line.split("    #")[0].strip() for line in text.splitlines() if line.strip()]
    return commands + re.findall(r"`(jupyter [^`]+)`", readme)


@pytest.fixture
def committed(tmp_path):
    """A clone of the repository's working tree with a commit of its own, as a teacher's."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT,
                            capture_output=True)
    if listed.returncode:
        pytest.skip("not a git repository, so what belongs to the source is unknown")
    clone = tmp_path / "clone"
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    who = ["-c", "user.name=teacher", "-c", "user.email=teacher@school"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    return clone


def test_the_hand_out_contains_no_solution(committed, tmp_path):
    readme = (committed / "notebooks/assignments/README.md").read_text()
    pack, release, *_ = commands_of(readme)
    for command in (pack, release):
        command = command.replace("python", sys.executable, 1)
        subprocess.run(command, shell=True, cwd=committed, check=True)
    shutil.unpack_archive(committed / "handout.zip", tmp_path / "students")
    students = {path.relative_to(tmp_path / "students").as_posix()
                for path in (tmp_path / "students").rglob("*") if path.is_file()}
    everything = {path.relative_to(committed).as_posix() for path in committed.rglob("*")
                  if path.is_file() and ".git" not in path.parts}
    missing = {name for name in everything - students if not name.startswith("handout")}
    assert missing == {f"notebooks/assignments/assignment{n}.ipynb" for n in grading.NUMBERS} | {
        name for name in everything if name.startswith("tests/notebooks/")}
    solutions = [match[0] for number in grading.NUMBERS
                 for cell in filter(grading.is_answer, grading.read_source(number).cells)
                 for match in grading.SOLUTION.finditer(cell.source)]
    lines = {line.strip() for text in solutions for line in text.splitlines() if len(line) > 60}
    for name in students:
        text = (tmp_path / "students" / name).read_bytes().decode(errors="replace")
        found = {line for line in lines if line in text or json.dumps(line)[1:-1] in text}
        assert not found or name == "isa.py", (name, found)
    assert not (tmp_path / "students/.git").exists()
    assert (committed / "handout/assignment1.ipynb").exists()


@pytest.mark.slow
def test_every_command_of_the_readme_runs(committed):
    """In the README's order; the world is drawn at a fiftieth of its size, to save time."""
    if not (ROOT / "data/pocket/world.json").exists():
        pytest.skip("data/pocket is not drawn")
    (committed / "data").mkdir()
    (committed / "data/pocket").symlink_to((ROOT / "data/pocket").resolve())
    (committed / "submissions").mkdir()
    source = committed / "notebooks/assignments/assignment1.ipynb"
    for copied in ("anna.ipynb", "submissions/ben.ipynb"):
        shutil.copy(source, committed / copied)
    readme = (committed / "notebooks/assignments/README.md").read_text()
    commands = commands_of(readme)
    assert len(commands) == 9 and "7265193408816" in commands[4]
    for command in commands:
        line = command.replace("python", sys.executable, 1)
        if command.startswith("jupyter"):
            line = command.replace("jupyter", f"{sys.executable} -m jupyter", 1)
        line += " --scale 0.02" * ("pocket.world" in command)
        if "leaderboard.py score" in command:
            shutil.copytree(committed / "reference/isa", committed / "teams/ours")
        done = subprocess.run(line, shell=True, cwd=committed, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert (committed / "grades/feedback/ben.md").exists()
    assert "ours" in (committed / "board.md").read_text()


@pytest.mark.parametrize("absent", ["nbformat", "ipykernel", "torch"])
def test_missing_requirements_are_one_sentence(absent, tmp_path):
    hide = (f"import importlib.util as u, sys, runpy; find = u.find_spec\n"
            f"u.find_spec = lambda name, *a: None if name == {absent!r} else find(name, *a)\n"
            f"sys.modules[{absent!r}] = None\nsys.argv = ['assignment.py', 'release', '1']\n"
            f"runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == (
        f"assignment.py: {absent} missing; pip install -r requirements.txt "
        "-r notebooks/requirements.txt\n")


# ---- leaderboard
BOARD = "notebooks/assignments/leaderboard.py"
PARTS = (("cirr", "test1", None), ("fashioniq", "test", "dress"), ("circo", "test", None))


@pytest.fixture(scope="module")
def held_out(small_world, tmp_path_factory):
    """A held-out world with its answers, and what students get from it."""
    folder = tmp_path_factory.mktemp("board")
    shutil.copytree(small_world, folder / "world", ignore=shutil.ignore_patterns("train"))
    leaderboard.handout(SimpleNamespace(world=folder / "world", out=folder / "students"))
    return folder


def test_handout_contains_no_target(held_out):
    files = sorted((held_out / "students").rglob("*.json"))
    assert len(files) == 2 + 6 + 2 and not list((held_out / "students").rglob("captions.json"))
    allowed = {
        "pairid", "reference", "caption", "img_set", "id", "members", "candidate", "captions",
        "reference_img_id", "relative_caption", "shared_concept", "images", "file_name",
    }
    splits = [file for part in ("cirr", "fashioniq")
              for file in (held_out / "world" / part).rglob("split.*.json")]
    old = {name for file in splits for name in json.loads(file.read_text())}
    for file in files:
        document = json.loads(file.read_text())
        assert not old & set(re.findall('"(.*?)"', file.read_text())), file
        if "captions" in file.parts or "annotations" in file.parts:
            entries = document["images"] if isinstance(document, dict) else document
            assert {key for entry in entries for key in entry} <= allowed, file
    for name, split, category in PARTS:
        handed = benchmarks.load(name, held_out / "students" / name, split, category)
        assert not benchmarks.missing_images(handed)
        assert not any(q.targets or q.kind or q.aspects for q in handed.queries)
        key = int if name == "circo" else str
        assert handed.gallery == sorted(handed.gallery, key=key)  # an order without meaning
    drawn = (held_out / "world/world.json").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns != drawn for path in files)


def test_answers_are_the_worlds_own_targets(held_out):
    """The same picture is the target of the same question: images are compared by their bytes."""

    def questions(benchmark, answers):
        """Captions, and the bytes of the reference and the targets, of every query."""
        def look(*names):
            return sorted(benchmark.paths[name].read_bytes() for name in names)
        return sorted((q.captions, look(q.reference), look(*q.targets)) for q in answers.queries)

    for name, split, category in PARTS:
        old, new, handed = (benchmarks.load(name, held_out / part / name, split, category)
                            for part in ("world", "world/answers", "students"))
        given = [(q.id, q.reference, q.captions) for q in handed.queries]
        assert [(q.id, q.reference, q.captions) for q in new.queries] == given
        assert questions(old, old) == questions(handed, new)


def write_team(folder, world, hits):
    """A team that ranks the targets of the first hits[name] queries of each part first, or last."""
    folder.mkdir(parents=True)
    for name, parts in leaderboard.load_answers(world, leaderboard.HEADLINE).items():
        document = {}
        for part in parts:
            rankings = {}
            for i, query in enumerate(part.queries):
                others = [x for x in part.gallery if x not in query.targets]
                first = i < hits[name]
                rankings[query.id] = query.targets * first + others + query.targets * (not first)
            document |= benchmarks.predictions(part, rankings)
        (folder / f"{name}.json").write_text(json.dumps(document))


def test_ranking_against_a_hand_computation(held_out, tmp_path, call_script):
    world = held_out / "world"
    hits = {"cirr": 10, "fashioniq": 3, "circo": 0}
    write_team(tmp_path / "teams/some", world, hits)
    write_team(tmp_path / "teams/same", world, hits)
    write_team(tmp_path / "base/all", world, {"cirr": 999, "fashioniq": 999, "circo": 0})
    write_team(tmp_path / "teams/broken", world, {"cirr": 0, "fashioniq": 0, "circo": 0})
    (tmp_path / "teams/broken/cirr.json").write_text('{"version": "rc2", "metric": "recall"}')
    done = call_script(BOARD, "score", world, tmp_path / "teams", "--baselines", tmp_path / "base",
                       "--json", "b.json", "--markdown", "b.md")
    assert done.status == 1 and "1 of 4 teams" in done.message
    assert "not scored: broken: " in done.out
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["team"] for row in rows] == ["all (baseline)", "same", "some"]
    assert [rows[0]["score"], *rows[0]["interval"]] == pytest.approx([200 / 3] * 3)
    opened = leaderboard.load_answers(world, leaderboard.HEADLINE)
    count = {name: [len(part.queries) for part in parts] for name, parts in opened.items()}
    want = {"cirr": 1000 / count["cirr"][0],
            "fashioniq": np.mean([300 / n for n in count["fashioniq"]]), "circo": 0}
    assert rows[1]["metrics"] == pytest.approx(want)
    assert rows[1]["score"] == rows[2]["score"] == pytest.approx(sum(want.values()) / 3)
    assert [row["behind"] and row["behind"]["tie"] for row in rows] == [None, False, True]
    table = (tmp_path / "b.md").read_text().splitlines()
    assert table[2].startswith("| 1   | all (baseline)")
    assert table[4].rstrip(" |").endswith("0.0 (0.0 to 0.0), a tie")


def test_bootstrap_agrees_with_the_normal_approximation():
    rng = np.random.default_rng(3)
    one, two = (100.0 * (rng.random(400) < share) for share in (0.6, 0.3))
    draws = leaderboard.bootstrap({"a": [one, two]}, [0.5, 0.5], draws=4000)["a"]
    assert draws.mean() == pytest.approx((one.mean() + two.mean()) / 2, abs=0.2)
    assert draws.std() == pytest.approx(np.sqrt(one.var() / 400 + two.var() / 400) / 2, rel=0.05)


def test_handout_refuses_what_would_give_answers_away(held_out, call_script):
    for out in (held_out / "students", held_out / "world/for_students"):
        done = call_script(BOARD, "handout", held_out / "world", out)
        assert done.status == 1 and str(out) in done.message
    done = call_script(BOARD, "handout", held_out / "nothing", held_out / "x")
    assert done.status == 1 and "world.json" in done.message and not (held_out / "x").exists()
    done = call_script(BOARD, "score", held_out / "students", held_out / "students")
    assert done.status == 1 and "answers" in done.message


@pytest.mark.slow
def test_baselines_are_what_evaluate_says(held_out, call_script):
    students, out = held_out / "students", held_out / "baselines"
    done = call_script(BOARD, "baselines", students, out, "--cache-dir", held_out / "cache")
    assert done.status == 0, done.err
    opened = leaderboard.load_answers(held_out / "world", leaderboard.HEADLINE)
    teams = {method: leaderboard.read_team(out / method, opened) for method in ("image", "isa")}
    score = {method: np.mean([part.mean() for part in values]) for method, values in teams.items()}
    assert score["isa"] > 3 * score["image"] > 0
    done = call_script("evaluate.py", "submit", "--benchmark", "cirr", "--data", students / "cirr",
                       "--split", "test1", "--checkpoint", ROOT / "pocket/isa.pt",
                       "--out", "mine.json", "--precision", "fp32")
    assert done.status == 0
    assert Path("mine.json").read_text() == (out / "isa/cirr.json").read_text()
