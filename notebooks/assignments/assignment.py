"""The graded assignments: make the student's version of one, grade what comes back.

    python notebooks/assignments/assignment.py release 1 --out handout/              # handout/assignment1.ipynb
    python notebooks/assignments/assignment.py grade 1 submission.ipynb              # points, and a sentence for each that is lost
    python notebooks/assignments/assignment.py grade 1 submissions/*.ipynb --csv grades.csv --seed 7

assignmentN.ipynb beside this file is the source, with solutions and hidden tests, marked in nbgrader's way. The release replaces
each solution by an error that names the function to write, and drops hidden tests and outputs.

Grading runs a submission's own cells, in a kernel of their own, but takes every locked cell (set-up, tests with their hidden part)
from the source: what a student changed or deleted there does not count. Each test starts from fresh copies of isa.py and checks.py.
Student code runs with your rights all the same: grade strangers in a container.
"""

import argparse
import csv
import io
import json
import logging
import os
import re
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NUMBERS = (1, 2)
SETUP_SECONDS = 600  # the set-up may have to draw the pocket world
LONGEST_OUTPUT = 20_000  # characters of a cell's output that are kept
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION[ \t]*$", re.DOTALL | re.MULTILINE)
HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS\n.*?^[ \t]*### END HIDDEN TESTS[ \t]*\n?", re.DOTALL | re.MULTILINE)
TO_BE_WRITTEN = "YOUR ANSWER HERE"


# ---------------------------------------------------------------------------------------------- notebooks and their marks
def read_notebook(path):
    """An .ipynb file -> notebook (format 4). Raises ValueError, one sentence."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); save the notebook again as .ipynb") from None
    try:
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook, relax_add_props=True)
    except Exception as error:  # nbformat reports what is no notebook in many ways
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: is not a Jupyter notebook ({reason[0]:.100}); save it again as .ipynb") from None
    return notebook


def read_source(number):
    return read_notebook(HERE / f"assignment{number}.ipynb")


def mark(cell):
    """The cell's nbgrader metadata; {} for a cell without."""
    found = cell.metadata.get("nbgrader", {})
    return found if isinstance(found, dict) else {}


def is_test(cell):
    return bool(mark(cell).get("grade")) and not mark(cell).get("solution")


def is_read_by_teacher(cell):
    """An answer in prose: graded, but by nobody's test."""
    return bool(mark(cell).get("grade")) and bool(mark(cell).get("solution"))


# ---------------------------------------------------------------------------------------------- release
def stub(cell):
    """The source of a cell without its solution or hidden tests."""

    def replace(region):
        if cell.cell_type == "markdown":
            return TO_BE_WRITTEN
        names = re.findall(r"^def (\w+)", cell.source[: region.start()], re.MULTILINE)
        return f'{region[1]}raise NotImplementedError("{names[-1] if names else mark(cell)["grade_id"]}")'

    text = SOLUTION.sub(replace, cell.source) if mark(cell).get("solution") else cell.source
    return HIDDEN.sub("", text).rstrip("\n")


def release(source):
    """The source notebook -> the student's: no solutions, hidden tests and outputs; the same for the same source."""
    student = nbformat.reads(nbformat.writes(source), as_version=4)  # a copy
    for cell in student.cells:
        cell.source = stub(cell)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return student


# ---------------------------------------------------------------------------------------------- what is run, in which order
@dataclass
class Step:
    """One code cell to run: "setup" and "test" cells come from the source, "student" cells from the submission."""

    kind: str
    name: str
    source: str
    points: float = 0


def assemble(source, submission):
    """The steps that grade a submission, and remarks on it.

    The source gives order, set-up and tests. A student's cell runs at the place of the source's cell of that grade_id, however
    often it is there (Jupyter copies the mark when a cell is split); one that the student added runs before the next that is known.
    """
    known = {mark(cell)["grade_id"]: cell for cell in source.cells if mark(cell)}
    written, added, waiting, remarks = {}, {}, [], []
    for cell in submission.cells:
        name = mark(cell).get("grade_id")
        if name in known:
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
    if remarks and waiting:  # perhaps they are the missing ones, without their marks
        first = next(i for i, step in enumerate(steps) if step.kind == "test")
        steps[first:first] = [Step("student", "a cell at the end", text) for text in waiting]
    for step in steps:
        if step.kind == "student" and re.search(r"\bisa\b", step.source) and not uses_isa(known.get(step.name)):
            remarks.append(f"{step.name} mentions isa, which holds a solution: read it")
    return steps, remarks


def uses_isa(cell):
    return cell is not None and re.search(r"\bisa\b", cell.source)


# ---------------------------------------------------------------------------------------------- running it
FRESH = """\
import builtins as _builtins, sys as _sys, types as _types
for _name, _text in {modules!r}:
    _sys.modules[_name] = _module = _types.ModuleType(_name)
    _builtins.exec(_builtins.compile(_text, _name, "exec"), _module.__dict__)
isa, checks = _sys.modules["isa"], _sys.modules["checks"]
"""


class Client(NotebookClient):
    """A kernel that keeps the end of a cell's output only, however much is printed."""

    def output(self, outs, msg, display_id, cell_index):
        out = super().output(outs, msg, display_id, cell_index)
        texts = [o for o in outs if o.output_type == "stream"]
        if len(texts) > 1:  # one text a cell, cut at its beginning
            texts[0].text = "".join(o.text for o in texts)[-LONGEST_OUTPUT:]
            outs[:] = [o for o in outs if o.output_type != "stream"] + texts[:1]
        return out


class Runner:
    """Runs steps one after the other; where one hangs or ends the process, in a new kernel that gets the earlier ones again."""

    def __init__(self, timeout, seed):
        self.timeout, self.done, self.kernel = timeout, [], None
        os.environ["ASSIGNMENT_SEED"] = str(seed)  # the kernel inherits it; checks.py reads it
        modules = [("isa", ROOT / "isa.py"), ("checks", HERE / "checks.py")]  # read before any student's code runs
        self.fresh = FRESH.format(modules=[(name, path.read_text(encoding="utf-8")) for name, path in modules])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        self.client = Client(nbformat.v4.new_notebook(), kernel_name="python3", resources={"metadata": {"path": str(HERE)}})
        self.client.log = logging.getLogger("quiet")
        self.client.log.setLevel(logging.CRITICAL)
        self.kernel = self.client.setup_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.kernel.__enter__()
        self.execute("import sys; exit = quit = sys.exit", 60)  # IPython's own end the kernel after the cell
        for step in self.done:
            self.execute(step.source, self.seconds(step))

    def stop(self):
        if self.kernel is not None:
            self.kernel.__exit__(None, None, None)
            self.kernel = None

    def seconds(self, step):
        return SETUP_SECONDS if step.kind == "setup" else self.timeout

    def execute(self, text, timeout):
        """Run text in the kernel -> what it printed. Raises nbclient's errors."""
        cell = nbformat.v4.new_code_cell(text)
        self.client.timeout, self.client.nb.cells = timeout, [cell]
        self.client.execute_cell(cell, 0)
        return "".join(o.text for o in cell.outputs if o.output_type == "stream")

    def run(self, step):
        """-> None, or one sentence: why the step failed."""
        end, text = secrets.token_hex(16), step.source
        if step.kind == "test":  # only what reaches the test's last line has passed
            text = f"{self.fresh}{text}\n_builtins.print({end!r})"
        try:
            if self.kernel is None:
                self.start()
            said = self.execute(text, self.seconds(step))
        except CellExecutionError as error:
            return sentence(error.ename, error.evalue)
        except (CellTimeoutError, DeadKernelError) as error:
            self.stop()
            took = f"ran longer than {self.timeout} s and was stopped: an endless loop?"
            return took if isinstance(error, CellTimeoutError) else "ended the Python process: exit, or no memory left?"
        if step.kind != "test":
            self.done.append(step)
        elif end not in said:
            return "the test's last line was not reached, or its output was redirected"
        return None


def sentence(kind, text):
    """An error in a student's cell, or in a test of it, as one line."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", text or "").strip().splitlines() or [""]
    if kind == "NotImplementedError":
        return f"{line[0] or 'a function'} is not written yet"
    if kind == "AssertionError":
        return f"{line[0][:300] or 'a check failed that says no more'}"
    return f"{kind}: {line[0]:.200}".rstrip(": ")


def grade(source, submission, timeout=120, seed=0):
    """Run a submission -> dict: points, possible, tests (name, points, possible, message), to_read, remarks."""
    steps, remarks = assemble(source, submission)
    tests, broken = [], set()
    with Runner(timeout, seed) as runner:
        for step in steps:
            began, why = time.time(), runner.run(step)
            if step.kind == "setup" and why and not tests:
                raise ValueError(f"the set-up cell {step.name} of the assignment itself fails here: {why}")
            if step.kind == "student" and why:
                remarks.append(f"{step.name}: {why}")
                broken.add(step.name)
            if step.kind == "test":
                tests.append({"name": step.name, "points": 0 if why else step.points, "possible": step.points,
                              "message": why or "", "seconds": round(time.time() - began, 1)})  # fmt: skip
    written = {mark(cell).get("grade_id"): cell.source for cell in submission.cells}
    to_read = []
    for cell in filter(is_read_by_teacher, source.cells):
        text = written.get(mark(cell)["grade_id"], "").strip()
        answered = bool(text) and text != stub(cell).strip()
        to_read.append({"name": mark(cell)["grade_id"], "possible": mark(cell)["points"], "answer": text if answered else ""})
    return {"points": sum(t["points"] for t in tests), "possible": sum(t["possible"] for t in tests), "tests": tests,
            "to_read": to_read, "remarks": remarks}  # fmt: skip


# ---------------------------------------------------------------------------------------------- command line
def report(result):
    """A grade as text."""
    lines = [f"  {t['name']:24s} {t['points']:g}/{t['possible']:g}  {t['message']}".rstrip() for t in result["tests"]]
    lines += [f"  remark: {remark}" for remark in result["remarks"]]
    for answer in result["to_read"]:
        lines.append(f"  {answer['name']:24s} ?/{answer['possible']:g}  {'to be read by you' if answer['answer'] else 'no answer'}")
    return "\n".join([*lines, f"  total {result['points']:g}/{result['possible']:g}, without what is to be read"])


def write(path, text):
    """At once: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text.encode())  # as it is: CSV has line ends of its own
    os.replace(temporary, path)


def run_release(args):
    out = Path(args.out) / f"assignment{args.number}.ipynb"
    if out.resolve().parent == HERE:
        raise ValueError(f"{out} is the source with the solutions, which would be lost; give another --out")
    write(out, nbformat.writes(release(read_source(args.number))) + "\n")
    print(f"wrote {out}")


def run_grade(args):
    source, results = read_source(args.number), {}
    for path in args.submissions:
        try:
            results[path] = result = grade(source, read_notebook(path), args.timeout, args.seed)
        except ValueError as error:
            if len(args.submissions) == 1:
                raise
            results[path] = result = {"error": str(error)}
        if len(args.submissions) == 1:
            print(f"{path}\n{report(result)}")
        elif "error" in result:
            print(result["error"], flush=True)
        else:
            lost = ", ".join(t["name"] for t in result["tests"] if not t["points"])
            print(f"{path}: {result['points']:g}/{result['possible']:g}{lost and f', lost {lost}'}", flush=True)
    if args.json:
        write(args.json, json.dumps({"assignment": args.number, "seed": args.seed, "submissions": results}, indent=1) + "\n")
    if args.csv:
        names = [mark(cell)["grade_id"] for cell in source.cells if is_test(cell)]
        table = [["submission", *names, "points", "possible", "remarks"]]
        for path, result in results.items():
            points = {t["name"]: t["points"] for t in result.get("tests", ())}
            table.append([path, *(points.get(name, 0) for name in names), sum(points.values()), result.get("possible", ""),
                          result.get("error") or "; ".join(result["remarks"])])  # fmt: skip
        text = io.StringIO(newline="")
        csv.writer(text).writerows(table)
        write(args.csv, text.getvalue())
    if any("error" in result for result in results.values()):
        raise ValueError("some submissions could not be graded; see above")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("release", help="write the student's version of an assignment", allow_abbrev=False)
    p.set_defaults(run=run_release)
    p.add_argument("number", type=int, choices=NUMBERS)
    p.add_argument("--out", required=True, help="folder to write it to")
    p = commands.add_parser("grade", help="run submissions and print their points", allow_abbrev=False)
    p.set_defaults(run=run_grade)
    p.add_argument("number", type=int, choices=NUMBERS)
    p.add_argument("submissions", nargs="+", help="notebooks that students handed in")
    p.add_argument("--json", help="write points, messages and the answers that are to be read")
    p.add_argument("--csv", help="write one line a submission")
    p.add_argument("--seed", type=int, default=0, help="other inputs for the tests: your secret, the same for a whole class")
    p.add_argument("--timeout", type=int, default=120, help="seconds for a cell of a student and for a test")
    args = parser.parse_args(argv)
    if getattr(args, "timeout", 1) < 1:
        parser.error(f"--timeout has to be at least 1, not {args.timeout}")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as stop:
        sys.exit(f"assignment.py: {stop}")
    except KeyboardInterrupt:
        sys.exit("assignment.py: interrupted")
