"""The graded assignments: make the student's version of one, and grade submissions.

    python notebooks/assignments/assignment.py release 1 --out handout/  # handout/assignment1.ipynb
    python notebooks/assignments/assignment.py grade 1 submission.ipynb   # points and reasons
    python notebooks/assignments/assignment.py grade 1 submissions/*.ipynb --csv grades.csv --seed 7

assignmentN.ipynb beside this file is the source, with solutions and hidden tests in nbgrader's
marks. The release replaces each solution by an error that names the function to write, and drops
hidden tests and outputs.

Grading runs a submission's own cells in a fresh kernel, but takes every locked cell (set-up, tests
with their hidden part) from the source: what a student changes or deletes there does not count.
Each test starts from fresh copies of isa.py and checks.py. Student code still runs with your
rights: grade strangers in a container.
"""

import argparse
import csv
import io
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
sys.path.insert(0, str(ROOT))

from plumbing.command import run_command  # noqa: E402
from plumbing.files import replacing, write_json  # noqa: E402

NUMBERS = (1, 2)
SETUP_SECONDS = 600  # the set-up may have to draw the pocket world
LONGEST_OUTPUT = 20_000  # characters of a cell's output that are kept
REGION = r"^([ \t]*)### BEGIN {0}\n.*?^[ \t]*### END {0}[ \t]*"
SOLUTION = re.compile(REGION.format("SOLUTION") + "$", re.DOTALL | re.MULTILINE)
HIDDEN = re.compile(REGION.format("HIDDEN TESTS") + r"\n?", re.DOTALL | re.MULTILINE)
TO_BE_WRITTEN = "YOUR ANSWER HERE"


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


def is_read_by_teacher(cell):
    """An answer in prose: graded, but not by a test."""
    return bool(mark(cell).get("grade")) and bool(mark(cell).get("solution"))


# ------------------------------------------------------------------------------------------ release
def stub(cell):
    """The source of a cell without its solution or hidden tests."""

    def replace(region):
        if cell.cell_type == "markdown":
            return TO_BE_WRITTEN
        names = re.findall(r"^def (\w+)", cell.source[: region.start()], re.MULTILINE)
        name = names[-1] if names else mark(cell)["grade_id"]
        return f'{region[1]}raise NotImplementedError("{name}")'

    text = SOLUTION.sub(replace, cell.source) if mark(cell).get("solution") else cell.source
    return HIDDEN.sub("", text).rstrip("\n")


def release(source):
    """The source notebook -> the student's, without solutions, hidden tests and outputs."""
    student = nbformat.reads(nbformat.writes(source), as_version=4)  # a copy
    for cell in student.cells:
        cell.source = stub(cell)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return student


# ---------------------------------------------------------------------- what runs, in which order
@dataclass
class Step:
    """One code cell to run; kind: "setup" or "test" (from the source), "student" (submitted)."""

    kind: str
    name: str
    source: str
    points: float = 0


def assemble(source, submission):
    """The steps that grade a submission, and remarks on it.

    The source gives order, set-up and tests. A student's cell runs in the place of the source's
    cell with the same grade_id, as often as it occurs (Jupyter copies the mark when a cell is
    split). A cell that the student added runs before the next known one.
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
    if remarks and waiting:  # these may be the missing cells, without their marks
        first = next(i for i, step in enumerate(steps) if step.kind == "test")
        steps[first:first] = [Step("student", "a cell at the end", text) for text in waiting]
    for step in steps:
        if step.kind == "student" and mentions_isa(step) and not mentions_isa(known.get(step.name)):
            remarks.append(f"{step.name} mentions isa, which contains a solution: read it")
    return steps, remarks


def mentions_isa(cell):
    return cell is not None and re.search(r"\bisa\b", cell.source)


# --------------------------------------------------------------------------------------- running
FRESH = """\
import builtins as _builtins, sys as _sys, types as _types
for _name, _text in {modules!r}:
    _sys.modules[_name] = _module = _types.ModuleType(_name)
    _builtins.exec(_builtins.compile(_text, _name, "exec"), _module.__dict__)
isa, checks = _sys.modules["isa"], _sys.modules["checks"]
"""


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

    def __init__(self, timeout, seed):
        self.timeout, self.done, self.kernel = timeout, [], None
        os.environ["ASSIGNMENT_SEED"] = str(seed)  # the kernel inherits it; checks.py reads it
        paths = ROOT / "isa.py", HERE / "checks.py"  # read before any student code runs
        modules = [(path.stem, path.read_text(encoding="utf-8")) for path in paths]
        self.fresh = FRESH.format(modules=modules)

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
        self.execute("import sys; exit = quit = sys.exit", 60)  # IPython's end the whole kernel
        for step in self.done:
            self.execute(step.source, self.seconds(step))

    def stop(self):
        if self.kernel is not None:
            self.kernel.__exit__(None, None, None)
            self.kernel = None

    def seconds(self, step):
        return SETUP_SECONDS if step.kind == "setup" else self.timeout

    def execute(self, text, timeout):
        """Run code in the kernel -> what it prints. Raises nbclient's errors."""
        cell = nbformat.v4.new_code_cell(text)
        self.client.timeout, self.client.nb.cells = timeout, [cell]
        self.client.execute_cell(cell, 0)
        return "".join(o.text for o in cell.outputs if o.output_type == "stream")

    def run(self, step):
        """-> None, or a sentence that says why the step failed."""
        end, text = secrets.token_hex(16), step.source
        if step.kind == "test":  # a test passes if its last line is reached
            text = f"{self.fresh}{text}\n_builtins.print({end!r})"
        try:
            if self.kernel is None:
                self.start()
            said = self.execute(text, self.seconds(step))
        except CellExecutionError as error:
            return sentence(error.ename, error.evalue)
        except (CellTimeoutError, DeadKernelError) as error:
            self.stop()
            if isinstance(error, CellTimeoutError):
                return f"ran longer than {self.timeout} s and was stopped: an endless loop?"
            return "ended the Python process: exit, or out of memory?"
        if step.kind != "test":
            self.done.append(step)
        elif end not in said:
            return "the test's last line was not reached, or its output was redirected"
        return None


def sentence(kind, text):
    """An error in a student's cell or in its test, as one line."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", text or "").strip().splitlines() or [""]
    if kind == "NotImplementedError":
        return f"{line[0] or 'a function'} is not written yet"
    if kind == "AssertionError":
        return line[0][:300] or "a check failed without a message"
    return f"{kind}: {line[0]:.200}".rstrip(": ")


def grade(source, submission, timeout=120, seed=0):
    """Run a submission -> {points, possible, tests, to_read (answers in prose), remarks}."""
    steps, remarks = assemble(source, submission)
    tests, broken = [], set()
    with Runner(timeout, seed) as runner:
        for step in steps:
            began, why = time.time(), runner.run(step)
            if step.kind == "setup" and why and not tests:
                raise ValueError(f"the assignment's own set-up cell {step.name} fails here: {why}")
            if step.kind == "student" and why:
                remarks.append(f"{step.name}: {why}")
                broken.add(step.name)
            if step.kind == "test":
                tests.append({
                    "name": step.name, "points": 0 if why else step.points, "possible": step.points,
                    "message": why or "", "seconds": round(time.time() - began, 1),
                })
    written = {mark(cell).get("grade_id"): cell.source for cell in submission.cells}
    to_read = []
    for cell in filter(is_read_by_teacher, source.cells):
        name, possible = mark(cell)["grade_id"], mark(cell)["points"]
        text = written.get(name, "").strip()
        answer = "" if text == stub(cell).strip() else text
        to_read.append({"name": name, "possible": possible, "answer": answer})
    points, possible = (sum(test[key] for test in tests) for key in ("points", "possible"))
    return {"points": points, "possible": possible, "tests": tests, "to_read": to_read,
            "remarks": remarks}


# ------------------------------------------------------------------------------------- command line
def report(result):
    """A grade as text."""
    lines = [f"  {t['name']:24s} {t['points']:g}/{t['possible']:g}  {t['message']}".rstrip()
             for t in result["tests"]]
    lines += [f"  remark: {remark}" for remark in result["remarks"]]
    for answer in result["to_read"]:
        status = "for you to read" if answer["answer"] else "no answer"
        lines.append(f"  {answer['name']:24s} ?/{answer['possible']:g}  {status}")
    total = f"  total {result['points']:g}/{result['possible']:g}, without answers in prose"
    return "\n".join([*lines, total])


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


def run_release(args):
    out = Path(args.out) / f"assignment{args.number}.ipynb"
    if out.resolve().parent == HERE:
        reason = "is the source with the solutions, which would be lost; give another --out"
        raise ValueError(f"{out} {reason}")
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
            total = f"{result['points']:g}/{result['possible']:g}"
            print(f"{path}: {total}{lost and f', lost {lost}'}", flush=True)
    if args.json:
        about = {"assignment": args.number, "seed": args.seed, "submissions": results}
        write_json(args.json, about)
    if args.csv:
        names = [mark(cell)["grade_id"] for cell in source.cells if is_test(cell)]
        table = [["submission", *names, "points", "possible", "remarks"]]
        for path, result in results.items():
            points = {t["name"]: t["points"] for t in result.get("tests", ())}
            remarks = result.get("error") or "; ".join(result["remarks"])
            table.append([path, *(points.get(name, 0) for name in names), sum(points.values()),
                          result.get("possible", ""), remarks])
        text = io.StringIO(newline="")
        csv.writer(text).writerows(table)
        write(args.csv, text.getvalue())
    if any("error" in result for result in results.values()):
        raise ValueError("some submissions could not be graded; see above")


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("release", help="write the student's version of an assignment",
                            allow_abbrev=False)
    p.set_defaults(run=run_release)
    p.add_argument("number", type=int, choices=NUMBERS)
    p.add_argument("--out", required=True, help="folder to write it to")
    p = commands.add_parser("grade", help="run submissions and print their points",
                            allow_abbrev=False)
    p.set_defaults(run=run_grade)
    p.add_argument("number", type=int, choices=NUMBERS)
    p.add_argument("submissions", nargs="+", help="notebooks that students handed in")
    p.add_argument("--json", help="write points, messages and the answers in prose")
    p.add_argument("--csv", help="write one line per submission")
    p.add_argument("--seed", type=int, default=0,
                   help="changes the tests' inputs: keep it secret, use one for the whole class")
    p.add_argument("--timeout", type=int, default=120,
                   help="seconds for a student's cell and for a test (default: %(default)s)")
    args = parser.parse_args(argv)
    if getattr(args, "timeout", 1) < 1:
        parser.error(f"--timeout has to be at least 1, not {args.timeout}")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    run_command("assignment.py", arguments.run, arguments)
