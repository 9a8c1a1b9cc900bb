"""notebooks/assignments: what is handed out, what grading gives for right, empty, wrong and hostile work, and the leaderboard."""

import ast
import copy
import csv
from pathlib import Path

import pytest

for module in ("matplotlib", "ipykernel", "nbformat", "nbclient"):
    pytest.importorskip(module, reason="notebooks/requirements.txt is not installed")

import nbformat  # noqa: E402

from notebooks.assignments import assignment  # noqa: E402

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
