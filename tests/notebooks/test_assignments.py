"""notebooks/assignments: what is handed out, what grading gives for right, empty, wrong and hostile work, and the leaderboard."""

import ast
import copy
import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

for module in ("matplotlib", "ipykernel", "nbformat", "nbclient"):
    pytest.importorskip(module, reason="notebooks/requirements.txt is not installed")

import nbformat  # noqa: E402

import benchmarks  # noqa: E402
from notebooks.assignments import assignment, leaderboard  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "notebooks/assignments/assignment.py"


@pytest.fixture(scope="module", params=assignment.NUMBERS)
def number(request):
    return request.param


@pytest.fixture(scope="module")
def source(number):
    return assignment.read_source(number)


def cell_of(notebook, name):
    return next(cell for cell in notebook.cells if assignment.mark(cell).get("grade_id") == name)


# ------------------------------------------------------------------------------------------- sources and release
def test_marks_are_nbgraders(source):
    marks = [cell.metadata.nbgrader for cell in source.cells if "nbgrader" in cell.metadata]
    names = [m.grade_id for m in marks]
    assert len(set(names)) == len(names)
    for m in marks:
        assert m.keys() - {"points"} == {"schema_version", "grade", "solution", "locked", "grade_id", "task", "cell_type"}
        assert m.schema_version == 3 and ("points" in m) == m.grade and m.locked != m.solution and not m.task
    assert sum(m.points for m in marks if m.grade and not m.solution) == 40
    assert sum(m.points for m in marks if m.grade and m.solution) == 5
    assert all(cell.metadata.nbgrader.cell_type == cell.cell_type for cell in source.cells if "nbgrader" in cell.metadata)
    assert all("nbgrader" in cell.metadata for cell in source.cells if cell.cell_type == "code")


def test_sources_are_executed_and_small(number, source):
    assert (ROOT / f"notebooks/assignments/assignment{number}.ipynb").stat().st_size < 100_000
    for cell in source.cells:
        if assignment.is_test(cell):
            assert ": passed" in "".join(o.text for o in cell.outputs), cell.metadata.nbgrader.grade_id


def lines_in_and_out(source, what):
    """The lines between "### BEGIN what" and its end, and all others, over all cells."""
    within, outside = set(), set()
    for cell in source.cells:
        inside = False
        for line in map(str.strip, cell.source.splitlines()):
            if line in (f"### BEGIN {what}", f"### END {what}"):
                inside = line.startswith("### BEGIN")
            else:
                (within if inside else outside).add(line)
    return within, outside


def test_release_holds_no_solution_and_no_hidden_test(source):
    student = assignment.release(source)
    text = nbformat.writes(student)
    assert "BEGIN" not in text and "END SOLUTION" not in text and "HIDDEN" not in text
    released = {line.strip() for cell in student.cells for line in cell.source.splitlines()}
    for what in ("SOLUTION", "HIDDEN TESTS"):
        within, outside = lines_in_and_out(source, what)
        assert len(within - outside) > 30
        assert not (within - outside) & released


def test_release_is_complete_deterministic_and_without_outputs(source):
    before = nbformat.writes(source)
    student = assignment.release(source)
    assert nbformat.writes(student) == nbformat.writes(assignment.release(source))
    assert nbformat.writes(source) == before
    nbformat.validate(student)
    assert [c.metadata for c in student.cells] == [c.metadata for c in source.cells]
    for mine, theirs in zip(source.cells, student.cells, strict=True):
        if mine.cell_type == "code":
            assert not theirs.outputs and theirs.execution_count is None
            tree = ast.parse(theirs.source)
            if assignment.mark(mine)["solution"]:
                assert "TODO" in theirs.source
                for function in (n for n in tree.body if isinstance(n, ast.FunctionDef)):
                    assert ast.unparse(function.body[-1]) == f"raise NotImplementedError('{function.name}')"
        elif assignment.is_read_by_teacher(mine):
            assert theirs.source == assignment.TO_BE_WRITTEN


def test_release_command(call_script, tmp_path):
    done = call_script(SCRIPT, "release", 1, "--out", tmp_path / "new")
    assert done.status == 0 and (tmp_path / "new/assignment1.ipynb").exists()
    done = call_script(SCRIPT, "release", 1, "--out", ROOT / "notebooks/assignments")
    assert done.status == 1 and "source with the solutions" in done.message
    assert "BEGIN SOLUTION" in (ROOT / "notebooks/assignments/assignment1.ipynb").read_text()


def test_what_is_no_notebook_is_one_sentence(call_script, tmp_path):
    (tmp_path / "a.ipynb").write_text("dear teacher")
    (tmp_path / "b.ipynb").write_text('{"cells": 3}')
    (tmp_path / "c.ipynb").write_bytes(b"\xff\xfe\x00")
    for name in ("a", "b", "c", "missing"):
        done = call_script(SCRIPT, "grade", 1, tmp_path / f"{name}.ipynb")
        assert done.status == 1 and f"{name}.ipynb: " in done.message and len(done.message) < 300, done.message
    done = call_script(SCRIPT, "grade", 1, tmp_path / "a.ipynb", tmp_path / "b.ipynb", "--csv", tmp_path / "g.csv")
    assert done.status == 1 and "a.ipynb: is not" in done.out and "b.ipynb: is not" in done.out
    rows = list(csv.DictReader((tmp_path / "g.csv").open()))
    assert [row["points"] for row in rows] == ["0", "0"] and "is not a Jupyter notebook" in rows[0]["remarks"]


# ------------------------------------------------------------------------------------------- which cells are run
def test_tests_and_setup_come_from_the_source_whatever_is_handed_in(source):
    submission = copy.deepcopy(source)
    for cell in submission.cells:
        if assignment.mark(cell).get("locked"):
            cell.source = "print('passed')"
    submission.cells = [cell for cell in submission.cells if not assignment.is_test(cell)][::-1]
    steps, _ = assignment.assemble(source, submission)
    right, remarks = assignment.assemble(source, source)
    assert steps == right and not remarks
    assert not any("passed')" in step.source for step in steps)


def test_added_doubled_and_missing_cells():
    source = assignment.read_source(1)
    submission = copy.deepcopy(source)
    place = submission.cells.index(cell_of(submission, "pool"))
    submission.cells.insert(place, nbformat.v4.new_code_cell("helper = 1"))
    submission.cells.insert(place + 2, copy.deepcopy(submission.cells[place + 1]))
    submission.cells.remove(cell_of(submission, "attend"))
    steps, remarks = assignment.assemble(source, submission)
    order = [step.name for step in steps]
    at = order.index("a cell before pool")
    assert order[at : at + 4] == ["a cell before pool", "pool", "pool", "test-pool"] and steps[at].source == "helper = 1"
    assert remarks == ["the cell attend is missing"]
    for cell in submission.cells:  # an editor that drops all marks
        cell.metadata.pop("nbgrader", None)
    steps, remarks = assignment.assemble(source, submission)
    assert [s.kind for s in steps].index("test") > max(i for i, s in enumerate(steps) if s.kind == "student")
    assert any("def pool" in s.source for s in steps) and "the cell pool is missing" in remarks


def test_a_copy_of_isa_is_remarked():
    source = assignment.read_source(1)
    submission = copy.deepcopy(source)
    cell_of(submission, "attend").source = "import isa\nattend = isa.attend"
    assert assignment.assemble(source, submission)[1] == ["attend mentions isa, which holds a solution: read it"]


# ------------------------------------------------------------------------------------------- grading (slow: starts kernels)
# Typical mistakes: the test meant to catch it -> cell, what the solution says, what the student says, words of the message.
# The mistakes of one set are handed in together: each has to cost the points of its own test, and of no other.
MISTAKES = {
    1: [
        {
            "test-group": ("group", ".softmax(dim=1)", ".softmax(dim=2)", "groups"),
            "test-pool": ("pool", ".clamp_min(guard)", "", "owns nothing"),
            "test-pool-backward": ("pool-backward", " - (dZ * Z).sum(dim=2, keepdim=True)", "", "rho depends on A"),
            "test-attend": ("attend", "** 0.5", "", "square root"),
            "test-refine": ("refine", "Z = Z + attended", "Z = attended", "isa.py"),
            "test-look-back": ("look-back", 'F.linear(pixels, p["V_c.weight"])', 'F.linear(pixels, p["K_c.weight"])', "isa.py"),
            "test-token-learner": ("token-learner", "if self_attention:", "if True:", "without SA"),
            "test-count-parameters": ("count-parameters", "C * d + d + L * d", "C * d + L * d", "you count"),
            "test-width": ("width-that-fits", "min(widths", "max(widths", "256"),
            "test-train-learner": ("train-learner", "v[rows]", "v[rows.flip(0)]", "held-out R@1"),
        },
        {
            "test-group": ("group", ' + p["project.bias"][:, None, None]', "", "pixels of a 3 x 3 map"),
            "test-pool": ("pool", " / A.sum(dim=2, keepdim=True).clamp_min(guard)", "", "against a loop"),
            "test-attend": ("attend", "softmax(dim=-1)", "softmax(dim=1)", "summed over the keys"),
            "test-refine": ("refine", "F.gelu", "F.relu", "isa.py"),
            "test-look-back": ("look-back", "return Z + F.linear", "return F.linear", "isa.py"),
            "test-token-learner": ("token-learner", 'p["W_p.weight"], p["W_p.bias"]', 'p["W_p.weight"]', "bias"),
            "test-train-learner": ("train-learner", "p.values(), lr=lr", "p.values(), lr=0.0", "the loss should fall"),
        },
    ],
    2: [
        {
            "test-compose-modifiers": ("compose-query", "[seen, tail_mask]", "[seen, tail_mask * 0 + 1]", "are to be read"),
            "test-log-sum-exp": ("log-sum-exp", "keepdim=True).values", "keepdim=True).values * 0", "nan or infinity"),
            "test-gcd": ("gcd", "((log_sum_exp(s, 1) - own).mean() + (log_sum_exp(s, 0) - own).mean()) / 2",
                         "(log_sum_exp(s, 1) - own).mean()", "both directions"),
            "test-gcd-gradient": ("gcd-gradient", "(2 * len(v))", "2", "finite differences"),
            "test-negative-probabilities": ("negative-probabilities", ".fill_diagonal_(0)", "", "the other one is certain"),
            "test-hard-negatives": ("hard-negatives", "torch.multinomial(table, 1, generator=generator)[:, 0]",
                                    "table.argmax(dim=1)", "drawn"),
            "test-lar": ("lar", "(sentence == image)", "(sentence != image)", "index 1"),
            "test-rank": ("rank", " if names[i] != exclude", "", "excluded"),
            "test-average-precision": ("average-precision", "min(k, len(targets))", "k", "AP@5"),
            "test-blind-spots": ("blind-spots", '"c": {"i2t", "t2i"}', '"c": {"lar"}', "c is not right"),
        },
        {
            "test-compose-training": ("compose-query", "U, blip", "U.detach(), blip", "reach U"),
            "test-gcd": ("gcd", "own).mean() + ", "own).sum() + ", "orthogonal"),
            "test-negative-probabilities": ("negative-probabilities", " + 1e-4", "", "1e-4"),
            "test-lar": ("lar", "mask[sentence]", "mask[torch.cat([own, own, own])]", "own mask"),
            "test-average-precision": ("average-precision", "min(k, len(targets))", "max(hits, 1)", "not by K or by the hits"),
        },
    ],
}  # fmt: skip


def with_mistakes(source, mistakes):
    submission = copy.deepcopy(source)
    for cell, right, wrong, _ in mistakes.values():
        cell = cell_of(submission, cell)
        todo, solution = cell.source.split("### BEGIN SOLUTION", 1)
        assert solution.count(right) == 1, right
        cell.source = todo + solution.replace(right, wrong)
    return submission


@pytest.mark.slow
def test_the_solution_gets_all_points(source):
    for seed in (0, 7):
        result = assignment.grade(source, source, seed=seed)
        assert result["points"] == result["possible"] == 40, assignment.report(result)
        assert not result["remarks"] and [a["possible"] for a in result["to_read"]] == [5] and result["to_read"][0]["answer"]


@pytest.mark.slow
def test_the_empty_version_gets_none_and_is_told_why(source):
    result = assignment.grade(source, assignment.release(source))
    assert result["points"] == 0
    for test in result["tests"]:
        function, rest = test["message"].split(" ", 1)
        assert rest == "is not written yet" and f"def {function}(" in nbformat.writes(source)
    assert result["to_read"][0]["answer"] == "" and "no answer" in assignment.report(result)


@pytest.mark.slow
@pytest.mark.parametrize("number, chosen", [(1, 0), (1, 1), (2, 0), (2, 1)], indirect=["number"])
def test_a_mistake_costs_its_own_test(number, chosen):
    source, mistakes = assignment.read_source(number), MISTAKES[number][chosen]
    result = assignment.grade(source, with_mistakes(source, mistakes))
    lost = {test["name"]: test["message"] for test in result["tests"] if not test["points"]}
    assert lost.keys() == mistakes.keys(), assignment.report(result)
    for name, message in lost.items():
        assert mistakes[name][3] in message and "\n" not in message and len(message) < 330, (name, message)


@pytest.mark.slow
def test_hostile_work_costs_only_its_own_points():
    """Endless loops, exits, floods of output, tampering, deleted and split cells: the rest is graded as ever."""
    source = assignment.read_source(2)
    submission = copy.deepcopy(source)

    def prepend(name, code):
        cell_of(submission, name).source = f"{code}\n{cell_of(submission, name).source}"

    def append(name, code):
        cell_of(submission, name).source += f"\n{code}"

    prepend("compose-query", "import a_module_that_is_not_there")
    loop = "    while True:\n        try:\n            pass\n        except BaseException:\n            pass"
    append("log-sum-exp", f"def log_sum_exp(x, dim):\n{loop}")
    append("gcd", "def gcd(v, t, tau):\n    import sys\n    sys.exit(0)")
    append("gcd-gradient", "def gcd_gradient(v, t, tau):\n    import os\n    os._exit(0)")
    append("negative-probabilities", "for _ in range(3000):\n    print('x' * 3000)")
    append("hard-negatives", "checks.expect = checks.expect_shape = lambda *a: None\nhard_negatives = lambda *a: (v[:3], v[:3])")
    submission.cells.remove(cell_of(submission, "lar"))
    first, second = cell_of(submission, "rank").source.split("\n\n\n")
    cell_of(submission, "rank").source = first
    half = copy.deepcopy(cell_of(submission, "rank"))
    half.source = second
    submission.cells.insert(submission.cells.index(cell_of(submission, "rank")) + 1, half)
    append("average-precision", "average_precision = lambda *a: torch.tensor(1.0)")
    cell_of(submission, "test-average-precision").source = "print('passed')"
    prepend("blind-spots", "isa.compose_query = None\nexit = quit = None")
    result = assignment.grade(source, submission, timeout=10)
    says = {test["name"]: (bool(test["points"]), test["message"]) for test in result["tests"]}
    wrong = {
        "test-compose-training": "NameError: name 'compose_query'", "test-compose-modifiers": "NameError: name 'compose_query'",
        "test-log-sum-exp": "ran longer than 10 s", "test-gcd": "SystemExit", "test-gcd-gradient": "ended the Python process",
        "test-hard-negatives": "hard_image should have the shape", "test-lar": "NameError: name 'lar'",
        "test-average-precision": "AP@5 of x a y b z",
    }  # fmt: skip
    assert {name for name, (passed, _) in says.items() if not passed} == wrong.keys(), assignment.report(result)
    for name, message in wrong.items():
        assert says[name][1].startswith(message), says[name]
    assert "compose-query: ModuleNotFoundError: No module named 'a_module_that_is_not_there'" in result["remarks"]
    assert "the cell lar is missing" in result["remarks"] and any("blind-spots mentions isa" in r for r in result["remarks"])


# ------------------------------------------------------------------------------------------- leaderboard
BOARD = "notebooks/assignments/leaderboard.py"


@pytest.fixture(scope="module")
def held_out(small_world, tmp_path_factory):
    """A held-out world with its answers, and what students get of it."""
    folder = tmp_path_factory.mktemp("board")
    shutil.copytree(small_world, folder / "world", ignore=shutil.ignore_patterns("train"))
    leaderboard.handout(SimpleNamespace(world=folder / "world", out=folder / "students"))
    return folder


def keys_and_values(value):
    """Every key and every string or number of a JSON document."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from keys_and_values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_and_values(inner)
    else:
        yield str(value)


def test_handout_holds_no_target(held_out):
    files = sorted((held_out / "students").rglob("*.json"))
    assert len(files) == 2 + 6 + 2 and not list((held_out / "students").rglob("captions.json"))
    allowed = {"pairid", "reference", "caption", "img_set", "id", "members", "candidate", "captions", "reference_img_id",
               "relative_caption", "shared_concept", "images", "file_name"}  # fmt: skip
    old = {name for part in ("cirr", "fashioniq")
           for file in (held_out / "world" / part).rglob("split.*.json") for name in json.loads(file.read_text())}  # fmt: skip
    for file in files:
        document = json.loads(file.read_text())
        assert not old & set(keys_and_values(document)), file
        if "captions" in file.parts or "annotations" in file.parts:
            entries = document["images"] if isinstance(document, dict) else document
            assert {key for entry in entries for key in entry} <= allowed, file
    for name, split, category in (("cirr", "test1", None), ("fashioniq", "test", "dress"), ("circo", "test", None)):
        handed = benchmarks.load(name, held_out / "students" / name, split, category)
        assert not benchmarks.missing_images(handed) and not any(q.targets or q.kind or q.aspects for q in handed.queries)
        assert handed.gallery == sorted(handed.gallery, key=int if name == "circo" else str)  # an order that says nothing
    assert not any(path.stat().st_mtime_ns == (held_out / "world" / "world.json").stat().st_mtime_ns for path in files)


def test_answers_are_the_worlds_own_targets(held_out):
    """The same picture is the target of the same question: images are compared by their bytes."""
    for name, split, category in (("cirr", "test1", None), ("fashioniq", "test", "shirt"), ("circo", "test", None)):
        old = benchmarks.load(name, held_out / "world" / name, split, category)
        new = benchmarks.load(name, held_out / "world/answers" / name, split, category)
        handed = benchmarks.load(name, held_out / "students" / name, split, category)
        assert [(q.id, q.reference, q.captions) for q in new.queries] == [(q.id, q.reference, q.captions) for q in handed.queries]
        look = lambda paths, *names: tuple(sorted(paths[n].read_bytes() for n in names))  # noqa: E731
        meant = sorted((*q.captions, look(old.paths, q.reference), look(old.paths, *q.targets)) for q in old.queries)
        assert meant == sorted((*q.captions, look(handed.paths, q.reference), look(handed.paths, *q.targets)) for q in new.queries)


def write_team(folder, world, hits):
    """A team that finds the target of the first `hits[name]` queries of each part, and never another."""
    folder.mkdir(parents=True)
    for name in leaderboard.HEADLINE:
        document = {}
        for part in leaderboard.load_answers(world, [name])[name]:
            rankings = {}
            for i, query in enumerate(part.queries):
                others = [x for x in part.gallery if x not in query.targets and x != query.reference][:49]
                rankings[query.id] = [query.targets[0], *others] if i < hits[name] else others
            if name == "cirr":
                document = {"version": "rc2", "metric": "recall"} | rankings
            elif name == "fashioniq":
                document[part.category] = rankings
            else:
                document = {k: [int(n) for n in names] for k, names in rankings.items()}
        (folder / f"{name}.json").write_text(json.dumps(document))


def test_ranking_against_a_hand_computation(held_out, tmp_path, call_script):
    world = held_out / "world"
    opened = leaderboard.load_answers(world, leaderboard.HEADLINE)
    counts = {name: [len(part.queries) for part in parts] for name, parts in opened.items()}
    write_team(tmp_path / "teams/some", world, {"cirr": 10, "fashioniq": 3, "circo": 0})
    write_team(tmp_path / "teams/same", world, {"cirr": 10, "fashioniq": 3, "circo": 0})
    write_team(tmp_path / "base/all", world, {"cirr": 999, "fashioniq": 999, "circo": 0})
    write_team(tmp_path / "teams/broken", world, {"cirr": 0, "fashioniq": 0, "circo": 0})
    (tmp_path / "teams/broken/cirr.json").write_text('{"version": "rc2", "metric": "recall"}')
    done = call_script(BOARD, "score", world, tmp_path / "teams", "--baselines", tmp_path / "base", "--json", "b.json",
                       "--markdown", "b.md")  # fmt: skip
    assert done.status == 1 and "1 of 4 teams" in done.message and "not scored: broken: " in done.out
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["team"] for row in rows] == ["all (baseline)", "same", "some"]
    cirr, fashioniq = 100 * 10 / counts["cirr"][0], sum(100 * 3 / n for n in counts["fashioniq"]) / 3
    assert rows[0]["score"] == pytest.approx(200 / 3) and rows[0]["interval"] == pytest.approx([200 / 3, 200 / 3])
    assert rows[1]["metrics"] == pytest.approx({"cirr": cirr, "fashioniq": fashioniq, "circo": 0})
    assert rows[1]["score"] == rows[2]["score"] == pytest.approx((cirr + fashioniq) / 3)
    assert [row["behind"] and row["behind"]["tie"] for row in rows] == [None, False, True]
    table = (tmp_path / "b.md").read_text().splitlines()
    assert table[2].startswith("| 1   | all (baseline)") and table[4].rstrip(" |").endswith("0.0 (0.0 to 0.0), a tie")


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
    done = call_script(BOARD, "baselines", held_out / "students", held_out / "baselines", "--cache-dir", held_out / "cache")
    assert done.status == 0, done.err
    opened = leaderboard.load_answers(held_out / "world", leaderboard.HEADLINE)
    score = {m: np.mean([v.mean() for v in leaderboard.read_team(held_out / "baselines" / m, opened)]) for m in ("image", "isa")}
    assert score["isa"] > 3 * score["image"] > 0
    done = call_script("evaluate.py", "submit", "--benchmark", "cirr", "--data", held_out / "students/cirr", "--split", "test1",
                       "--checkpoint", ROOT / "pocket/isa.pt", "--out", "mine.json", "--precision", "fp32")  # fmt: skip
    assert done.status == 0 and Path("mine.json").read_text() == (held_out / "baselines/isa/cirr.json").read_text()
