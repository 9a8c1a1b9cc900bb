"""Run one submission in a kernel of its own -> its points, and why it lost some.

A submission's own cells run, but every locked cell (set-up, tests with their hidden part) comes
from the source: what a student changes or deletes there does not count. Each test starts from fresh
copies of isa.py and checks.py; inside.py puts back what a student's cell changed. Student code
still runs with your rights: grade strangers in a container.
"""

import copy
import json
import logging
import os
import re
import secrets
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from notebooks.assignments import suspicions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NUMBERS = (1, 2)
SETUP_SECONDS = 600  # the set-up may have to draw the pocket world
LONGEST_OUTPUT = 20_000  # characters of a cell's output that are kept
REGION = r"^([ \t]*)### BEGIN {0}\n.*?^[ \t]*### END {0}[ \t]*"
SOLUTION = re.compile(REGION.format("SOLUTION") + "$", re.DOTALL | re.MULTILINE)
HIDDEN = re.compile(REGION.format("HIDDEN TESTS") + r"\n?", re.DOTALL | re.MULTILINE)
FUNCTION = re.compile(r"^def (\w+)", re.MULTILINE)
TO_BE_WRITTEN = "YOUR ANSWER HERE"
NO_MEMORY = re.compile(r"MemoryError|bad_alloc|can(?:'|no)t allocate memory", re.IGNORECASE)


# ------------------------------------------------------------------------ notebooks and their marks
def read_notebook(path):
    """An .ipynb file -> notebook (format 4). Raises ValueError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({error}); save the notebook again as .ipynb"
        raise ValueError(f"{path}: {reason}") from None
    try:
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook, relax_add_props=True)
    except Exception as error:  # nbformat has many ways to reject a file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "save it again as .ipynb"
        raise ValueError(f"{path}: is not a Jupyter notebook ({reason:.100}); {remedy}") from None
    return notebook


def read_source(number):
    return read_notebook(HERE / f"assignment{number}.ipynb")


def mark(cell):
    """The cell's nbgrader metadata, {} if it has none."""
    found = cell.metadata.get("nbgrader", {})
    return found if isinstance(found, dict) else {}


def is_test(cell):
    return bool(mark(cell).get("grade")) and not mark(cell).get("solution")


def is_answer(cell):
    """A cell in which students write code."""
    return cell.cell_type == "code" and bool(mark(cell).get("solution"))


def is_read_by_teacher(cell):
    """An answer in prose: graded, but not by a test."""
    return bool(mark(cell).get("grade")) and bool(mark(cell).get("solution"))


def stub(cell):
    """The source of a cell without its solution or hidden tests."""

    def replace(region):
        if cell.cell_type == "markdown":
            return TO_BE_WRITTEN
        names = FUNCTION.findall(cell.source[: region.start()])
        name = names[-1] if names else mark(cell)["grade_id"]
        return f'{region[1]}raise NotImplementedError("{name}")'

    text = SOLUTION.sub(replace, cell.source) if mark(cell).get("solution") else cell.source
    return HIDDEN.sub("", text).rstrip("\n")


# ---------------------------------------------------------------------- what runs, in which order
@dataclass
class Step:
    """One code cell to run; kind: "setup" or "test" (from the source), "student" (submitted)."""

    kind: str
    name: str
    source: str
    points: float = 0


def with_marks(source, submission):
    """The submission's cells as pairs (cell, grade_id of the source's cell or None).

    A cell that has lost its mark is known by the functions that it defines; an unmarked copy of a
    cell of the source that is not an answer is left out.
    """
    known = {mark(cell).get("grade_id") for cell in source.cells} - {None}
    marked = {mark(cell).get("grade_id") for cell in submission.cells} & known
    owner = {name: mark(cell)["grade_id"] for cell in source.cells if is_answer(cell)
             for name in FUNCTION.findall(stub(cell))}
    given = {text.strip() for cell in source.cells if not mark(cell).get("solution")
             for text in (cell.source, stub(cell))}
    pairs = []
    for cell in submission.cells:
        name = mark(cell).get("grade_id")
        if name not in known:
            if cell.source.strip() in given:
                continue
            defined = FUNCTION.findall(cell.source) if cell.cell_type == "code" else ()
            names = [owner[f] for f in defined if f in owner and owner[f] not in marked]
            name = names[0] if names else None
        pairs.append((cell, name))
    return pairs


def assemble(source, submission):
    """The steps that grade a submission, and remarks on it.

    The source gives order, set-up and tests. A student's cell runs in the place of the source's
    cell with the same grade_id, as often as it occurs (Jupyter copies the mark when a cell is
    split). A cell that the student added runs before the next known one.
    """
    known = {mark(cell)["grade_id"]: cell for cell in source.cells if mark(cell)}
    written, added, waiting, remarks = {}, {}, [], []
    for cell, name in with_marks(source, submission):
        if name:
            added.setdefault(name, []).extend(waiting)
            written.setdefault(name, []).append(cell.source)
            waiting = []
        elif cell.cell_type == "code":
            waiting.append(cell.source)
    steps = []
    for name, cell in known.items():
        steps += [Step("student", f"a cell before {name}", text) for text in added.get(name, ())]
        if cell.cell_type != "code" or "demo" in cell.metadata.get("tags", ()):
            continue
        if is_test(cell):
            steps.append(Step("test", name, cell.source, mark(cell)["points"]))
        elif not mark(cell).get("solution"):
            steps.append(Step("setup", name, cell.source))
        elif name in written:
            steps += [Step("student", name, text) for text in written[name]]
        else:
            remarks.append(f"the cell {name} is missing")
    if remarks and waiting:  # these may be the missing cells, without their marks
        first = next(i for i, step in enumerate(steps) if step.kind == "test")
        steps[first:first] = [Step("student", "a cell at the end", text) for text in waiting]
    return steps, remarks


def other_assignment(source, submission):
    """The number of another assignment, if the submission answers that one and not this one."""

    def answered(source):
        wanted = {mark(cell)["grade_id"] for cell in source.cells if is_answer(cell)}
        return len(wanted & {name for _, name in with_marks(source, submission)})

    if answered(source):
        return None
    return next((n for n in NUMBERS if answered(read_source(n))), None)


def prose(source, submission, cell):
    """A student's answer to a question in prose: the marked cell, and new ones around it.

    What stands between the question and the next cell of the source counts, so an answer that was
    written into a new cell is not lost.
    """
    name, place = mark(cell)["grade_id"], source.cells.index(cell)
    question, empty = source.cells[place - 1].source.strip(), stub(cell).strip()
    given = {other.source.strip() for other in source.cells if other is not cell}
    parts, near = [], False
    for other in submission.cells:
        text, mine = other.source.strip(), mark(other).get("grade_id") == name
        if mine or text == question:
            near = True
        elif text in given or mark(other) or other.cell_type == "code":
            near = False
        if near and text not in (question, empty, ""):
            parts.append(text)
    return "\n\n".join(parts)


def without_marks(text):
    """A text without the lines ### BEGIN ... and ### END ..."""
    return re.sub(r"^###.*$", "", text, flags=re.MULTILINE).strip()


# --------------------------------------------------------------------------------------- running
BEGIN = """\
import sys as _sys, types as _types
_sys.modules["_grader"] = _types.ModuleType("_grader")
exec(compile({text!r}, "inside.py", "exec"), _sys.modules["_grader"].__dict__)
_sys.modules["_grader"].begin(globals())
"""
ASK = "import sys as _sys; _sys.modules['_grader'].{call}"


class Client(NotebookClient):
    """A kernel that keeps only the end of a cell's output, however much it prints."""

    def output(self, outs, msg, display_id, cell_index):
        out = super().output(outs, msg, display_id, cell_index)
        texts = [o for o in outs if o.output_type == "stream"]
        if len(texts) > 1:  # one text per cell, without its beginning
            texts[0].text = "".join(o.text for o in texts)[-LONGEST_OUTPUT:]
            outs[:] = [o for o in outs if o.output_type != "stream"] + texts[:1]
        return out


class Runner:
    """Runs steps in order; after one that hangs or ends the process, in a new kernel that first
    repeats the earlier ones."""

    def __init__(self, timeout, seed, memory):
        self.timeout, self.memory, self.done, self.kernel = timeout, memory, [], None
        os.environ["ASSIGNMENT_SEED"] = str(seed)  # the kernel inherits it; checks.py reads it
        paths = ROOT / "isa.py", HERE / "checks.py"  # read before any student code runs
        self.modules = [(path.stem, path.read_text(encoding="utf-8")) for path in paths]
        self.inside = (HERE / "inside.py").read_text(encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        where = {"metadata": {"path": str(HERE)}}
        self.client = Client(nbformat.v4.new_notebook(), kernel_name="python3", resources=where)
        self.client.log = logging.getLogger("quiet")
        self.client.log.setLevel(logging.CRITICAL)
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.kernel = self.client.setup_kernel(**silent)
        self.kernel.__enter__()
        self.limited = False
        self.execute(BEGIN.format(text=self.inside), SETUP_SECONDS)
        for step in self.done:
            try:
                self.attempt(step)
            except CellExecutionError:  # it worked before; a later test says what is missing
                pass

    def stop(self):
        if self.kernel is not None:
            self.kernel.__exit__(None, None, None)
            self.kernel = None

    def execute(self, text, timeout):
        """Run code in the kernel -> what it prints. Raises nbclient's errors."""
        cell = nbformat.v4.new_code_cell(text)
        self.client.timeout, self.client.nb.cells = timeout, [cell]
        self.client.execute_cell(cell, 0)
        return "".join(o.text for o in cell.outputs if o.output_type == "stream")

    def ask(self, call, *arguments):
        """Call a function of inside.py, which prints JSON behind a secret word -> that, or None."""
        end = secrets.token_hex(16)
        call = f"{call}({', '.join(map(repr, (*arguments, end)))})"
        said = self.execute(ASK.format(call=call), self.timeout)
        return json.loads(said.rsplit(end, 1)[1].splitlines()[0]) if end in said else None

    def attempt(self, step):
        """Run a step -> what inside.py says after it. Raises nbclient's errors."""
        if step.kind == "setup":
            return self.execute(ASK.format(call=f"run_setup({step.source!r})"), SETUP_SECONDS)
        if not self.limited:  # the set-up's own memory is not the student's
            self.execute(ASK.format(call=f"limit_memory({self.memory})"), self.timeout)
            self.limited = True
        if step.kind == "test":
            return self.ask("run_test", step.source, self.modules)
        try:
            self.execute(step.source, self.timeout)
        except CellExecutionError as error:
            if not self.too_large(error):
                after = self.ask("after_cell")
                raise Failed(sentence(error.ename, error.evalue), after) from None
            raise
        return self.ask("after_cell")

    def too_large(self, error):
        return bool(NO_MEMORY.search(f"{error.ename} {error.evalue}"))

    def run(self, step):
        """-> a sentence that says why the step failed, or None; what inside.py says after it."""
        why, after = None, None
        try:
            if self.kernel is None:
                self.start()
            after = self.attempt(step)
        except Failed as error:
            why, after = error.args
            if after and after["hoards"]:
                self.stop()
            return why, after
        except CellExecutionError as error:
            why = sentence(error.ename, error.evalue)
            if self.too_large(error):
                self.stop()
                why = f"needed more than {self.memory} MB of memory: an endless list?"
            return why, None
        except (CellTimeoutError, DeadKernelError) as error:
            self.stop()
            if isinstance(error, CellTimeoutError):
                return f"ran longer than {self.timeout} s and was stopped: an endless loop?", None
            return "ended the Python process: exit, or out of memory?", None
        if step.kind == "test" and after is None:
            return "the test's last line was not reached, or its output was redirected", None
        if step.kind == "student" and after and after["hoards"]:
            self.stop()
            why = f"keeps more than half of the {self.memory} MB of memory"
        elif step.kind != "test":
            self.done.append(step)
        return why, after if step.kind != "setup" else None


class Failed(Exception):
    """A student's cell ended in an error: (why, what inside.py says after it)."""


def sentence(kind, text):
    """An error in a student's cell or in its test, as one line."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", text or "").strip().splitlines() or [""]
    if kind == "NotImplementedError":
        return f"{line[0] or 'a function'} is not written yet"
    if kind == "AssertionError":
        return line[0][:300] or "a check failed without a message"
    return f"{kind}: {line[0]:.200}".rstrip(": ")


def run_steps(steps, timeout, seed, memory):
    """-> the tests' results, and remarks."""
    tests, remarks = [], []
    with Runner(timeout, seed, memory) as runner:
        for step in steps:
            began = time.time()
            why, after = runner.run(step)
            changed, notes = ((after or {}).get(key, ()) for key in ("changed", "notes"))
            if changed:
                remarks.append(f"{step.name}: changes {', '.join(changed)}, which was put back")
            remarks += [f"{step.name}: {note}" for note in notes]
            if step.kind == "setup" and why:
                if not any(earlier.kind == "student" for earlier in runner.done):
                    reason = f"the assignment's own set-up cell {step.name} fails here"
                    raise ValueError(f"{reason}: {why}")
                remarks.append(f"the set-up cell {step.name} fails after the student's: {why}")
            if step.kind == "student" and why:
                remarks.append(f"{step.name}: {why}")
            if step.kind == "test":
                lost = list((after or {}).get("lost", {}).values())
                cost = step.points if why else sum(points for points, _ in lost)
                reasons = [why] if why else list(dict.fromkeys(reason for _, reason in lost))
                tests.append({
                    "name": step.name, "points": round(max(0, step.points - cost), 2),
                    "possible": step.points, "message": "; ".join(reasons)[:600],
                    "seconds": round(time.time() - began, 1),
                })
    return tests, remarks


def grade(source, submission, timeout=120, seed=0, memory=2000):
    """Run a submission -> {points, possible, tests, to_read (answers in prose), remarks, look_at,
    shapes (for comparing submissions)}. timeout: seconds a cell, memory: MB for all of them."""
    source, submission = copy.deepcopy(source), copy.deepcopy(submission)
    possible = sum(mark(cell)["points"] for cell in source.cells if is_test(cell))
    other = other_assignment(source, submission)
    if other:
        tests = [{"name": mark(cell)["grade_id"], "points": 0, "possible": mark(cell)["points"],
                  "message": "", "seconds": 0} for cell in source.cells if is_test(cell)]
        remark = f"this is assignment {other}: grade it by `assignment.py grade {other}`"
        return {"points": 0, "possible": possible, "tests": tests, "to_read": [],
                "remarks": [remark], "look_at": [], "shapes": {}}
    steps, remarks = assemble(source, submission)
    tests, more = run_steps(steps, timeout, seed, memory)
    to_read = [{"name": mark(cell)["grade_id"], "possible": mark(cell)["points"],
                "answer": prose(source, submission, cell)}
               for cell in filter(is_read_by_teacher, source.cells)]
    scheme = {mark(cell)["grade_id"]: without_marks(cell.source) for cell in source.cells
              if is_read_by_teacher(cell)}
    copied = [f"{answer['name']} is the public solution" for answer in to_read
              if without_marks(answer["answer"]) == scheme[answer["name"]]]
    answers = {mark(cell)["grade_id"]: cell for cell in source.cells if is_answer(cell)}
    written = [(step.name, step.source) for step in steps if step.kind == "student"]
    return {
        "points": round(sum(test["points"] for test in tests), 2), "possible": possible,
        "tests": tests, "to_read": to_read, "remarks": remarks + more,
        "look_at": copied + suspicions.look(written, {n: c.source for n, c in answers.items()}),
        "shapes": suspicions.shapes(written, {n: stub(cell) for n, cell in answers.items()}),
    }


def grade_file(number, path, timeout, seed, memory):
    """grade() of two files, for a process of its own; an error becomes {"error": sentence}."""
    try:
        return grade(read_source(number), read_notebook(path), timeout, seed, memory)
    except ValueError as error:
        return {"error": str(error)}
    except Exception as error:  # one strange submission does not stop a class
        return {"error": f"{path}: the grader failed, {type(error).__name__}: {error}"}
