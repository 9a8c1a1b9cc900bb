"""The graded assignments: make the student's version of one, and grade submissions.

    python notebooks/assignments/assignment.py release 1 --out handout/  # handout/assignment1.ipynb
    python notebooks/assignments/assignment.py grade 1 anna.ipynb        # points and reasons
    python notebooks/assignments/assignment.py grade 1 submissions/*.ipynb --out grades --jobs 2

assignmentN.ipynb beside this file is the source, with solutions and hidden tests in nbgrader's
marks. The release replaces each solution by an error that names the function to write, and drops
hidden tests and outputs. How a submission is run: grading.py; what to look at: suspicions.py.

A class's results are kept in the folder --out as they come: results.jsonl, grades.csv, and
feedback/ with one file per student. An interrupted command resumes when it is given again.
"""

import argparse
import csv
import hashlib
import importlib.util
import io
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
NEEDED = ("torch", "numpy", "PIL", "torchvision", "matplotlib", "ipykernel", "nbclient", "nbformat")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"assignment.py: {', '.join(missing)} missing; "
             "pip install -r requirements.txt -r notebooks/requirements.txt")

import nbformat  # noqa: E402

from notebooks.assignments import suspicions  # noqa: E402
from notebooks.assignments.grading import (  # noqa: E402
    NUMBERS,
    grade_file,
    is_answer,
    is_read_by_teacher,
    is_test,
    mark,
    read_notebook,
    read_source,
    stub,
)
from plumbing.command import ignore_signals, run_command  # noqa: E402
from plumbing.files import check_folder, explained, replacing  # noqa: E402


# ------------------------------------------------------------------------------------------ release
def release(source):
    """The source notebook -> the student's, without solutions, hidden tests and outputs."""
    student = nbformat.reads(nbformat.writes(source), as_version=4)  # a copy
    for cell in student.cells:
        cell.source = stub(cell)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return student


def run_release(args):
    out = Path(args.out) / f"assignment{args.number}.ipynb"
    if out.resolve().parent == HERE:
        reason = "is the source with the solutions, which would be lost; give another --out"
        raise ValueError(f"{out} {reason}")
    write(out, nbformat.writes(release(read_source(args.number))) + "\n")
    print(f"wrote {out}")


def write(path, text):
    with replacing(path) as file:
        file.write(text.encode())


# ------------------------------------------------------------------------------------------ reports
def report(result):
    """A grade as text."""
    lines = [f"  {t['name']:24s} {t['points']:g}/{t['possible']:g}  {t['message']}".rstrip()
             for t in result["tests"]]
    lines += [f"  remark: {remark}" for remark in result["remarks"]]
    lines += [f"  look at: {what}" for what in result["look_at"]]
    for answer in result["to_read"]:
        status = "for you to read" if answer["answer"] else "no answer"
        lines.append(f"  {answer['name']:24s} ?/{answer['possible']:g}  {status}")
    total = f"  total {result['points']:g}/{result['possible']:g}, without answers in prose"
    return "\n".join([*lines, total])


def feedback(number, name, result):
    """What one student gets back, as Markdown. What the teacher should look at is not in it."""
    lines = [f"# Assignment {number}: {name}", ""]
    if "error" in result:
        return "\n".join([*lines, f"Not graded: {result['error']}", ""])
    lines += [f"**{result['points']:g} of {result['possible']:g} points** from tests.", "",
              "| test | points | why |", "|---|---|---|"]
    for t in result["tests"]:
        why = t["message"].replace("|", "\\|")
        lines.append(f"| {t['name']} | {t['points']:g} of {t['possible']:g} | {why} |")
    for answer in result["to_read"]:
        status = "read by your teacher" if answer["answer"] else "no answer was found"
        lines += ["", f"{answer['name']} ({answer['possible']:g} points): {status}"]
    lines += ["", "Remarks:", ""] * bool(result["remarks"])
    lines += [f"- {remark}" for remark in result["remarks"]]
    return "\n".join([*lines, ""])


def titles(paths):
    """{path: short name}, unique: submissions of a course may all be named assignment1.ipynb."""
    full = {path: Path(path).resolve() for path in paths}
    common = Path(os.path.commonpath([path.parent for path in full.values()]))
    return {path: "_".join(whole.relative_to(common).with_suffix("").parts)
            for path, whole in full.items()}


def table(source, results, old):
    """grades.csv. old: its earlier rows, whose points for prose the teacher may have typed in."""
    tests = [mark(cell)["grade_id"] for cell in source.cells if is_test(cell)]
    read = [f"{mark(cell)['grade_id']} (of {mark(cell)['points']:g})"
            for cell in source.cells if is_read_by_teacher(cell)]
    answers = {mark(cell)["grade_id"]: cell.source for cell in source.cells if is_answer(cell)}
    equal = suspicions.equal_submissions(results, suspicions.shapes(answers.items(), {}))
    rows = [["submission", *tests, "points", "possible", *read, "look at", "remarks"]]
    for path, result in results.items():
        points = {t["name"]: t["points"] for t in result.get("tests", ())}
        typed = [old.get(path, {}).get(column, "") for column in read]
        rows.append([
            path, *(points.get(name, 0) for name in tests), result.get("points", 0),
            result.get("possible", ""), *typed, "; ".join(result.get("look_at", []) + equal[path]),
            result.get("error") or "; ".join(result["remarks"])])
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------------------------- grading a class
def key_of(args, path):
    """A digest of all that a result depends on: same key, same result."""
    files = [HERE / f"assignment{args.number}.ipynb", ROOT / "isa.py", Path(path),
             *(HERE / f"{name}.py" for name in ("grading", "inside", "checks", "suspicions"))]
    what = str(Path(path).resolve()), args.seed, args.timeout, args.memory
    digest = hashlib.sha256(repr(what).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:24]


def read_results(path):
    """{key: row} of an earlier command; its last line may be cut."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            row = json.loads(line)
            rows[row["key"]] = row
    return rows


def grade_class(args):
    """Grade what --out has no result of yet; each result is written at once."""
    out, source = Path(args.out), read_source(args.number)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    log, names, results, keys = out / "results.jsonl", titles(args.submissions), {}, {}
    for path in args.submissions:
        try:
            read_notebook(path)
            keys[path] = key_of(args, path)
        except ValueError as error:
            results[path] = {"error": str(error)}
            print(error, flush=True)
    known = read_results(log)
    write(log, "".join(json.dumps(row) + "\n" for row in known.values()))
    results |= {path: known[key]["result"] for path, key in keys.items() if key in known}
    waiting = [path for path in keys if keys[path] not in known]
    if len(waiting) < len(keys):
        print(f"{len(keys) - len(waiting)} of {len(keys)} are graded already", flush=True)
    save(args, source, names, results)
    began, options = time.time(), (args.timeout, args.seed, args.memory)
    pool = ProcessPoolExecutor(args.jobs, initializer=ignore_signals)
    try:
        jobs = {pool.submit(grade_file, args.number, path, *options): path for path in waiting}
        for count, job in enumerate(as_completed(jobs), 1):
            path = jobs[job]
            results[path] = job.result()
            if "error" not in results[path]:
                row = {"key": keys[path], "submission": path, "result": results[path]}
                with explained(log), open(log, "a") as file:
                    file.write(json.dumps(row) + "\n")
            save(args, source, names, results, path)
            left = (time.time() - began) / count * (len(waiting) - count)
            print(f"[{count}/{len(waiting)}, {left / 60:.0f} min left] {summary(path, results)}",
                  flush=True)
    except BrokenProcessPool:
        raise ValueError("a grading process was killed, perhaps out of memory; give fewer --jobs; "
                         f"{out} keeps what is graded") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    print(f"wrote {out / 'grades.csv'} and {out / 'feedback'}/")
    return results


def summary(path, results):
    result = results[path]
    if "error" in result:
        return result["error"]
    lost = ", ".join(t["name"] for t in result["tests"] if t["points"] < t["possible"])
    return f"{path}: {result['points']:g}/{result['possible']:g}{lost and f', lost in {lost}'}"


def save(args, source, names, results, *new):
    """Write grades.csv, and feedback for the new results (without any: for all)."""
    grades, old = Path(args.out) / "grades.csv", {}
    if grades.exists():
        with open(grades, newline="") as file:
            old = {row.get("submission"): row for row in csv.DictReader(file)}
    ordered = {path: results[path] for path in args.submissions if path in results}
    write(grades, table(source, ordered, old))
    for path in new or ordered:
        text = feedback(args.number, names[path], results[path])
        write(Path(args.out) / "feedback" / f"{names[path]}.md", text)


def run_grade(args):
    if args.out:
        failed = ["error" in result for result in grade_class(args).values()]
        if any(failed):
            raise ValueError(f"{sum(failed)} of {len(failed)} submissions could not be graded; "
                             "see above")
        return
    (path,) = args.submissions
    result = grade_file(args.number, path, args.timeout, args.seed, args.memory)
    if "error" in result:
        raise ValueError(result["error"])
    print(f"{path}\n{report(result)}")


# ------------------------------------------------------------------------------------- command line
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
    p.add_argument("--out", help="folder for grades.csv, feedback/ and results.jsonl; needed for "
                   "more than one submission. What it has graded already is not run again")
    p.add_argument("--jobs", type=int, default=1, help="submissions side by side")
    p.add_argument("--seed", type=int, default=0,
                   help="changes the tests' inputs: keep it secret, use one for the whole class")
    p.add_argument("--timeout", type=int, default=120,
                   help="seconds for a student's cell and for a test (default: %(default)s)")
    p.add_argument("--memory", type=int, default=2000, help="MB that a submission may use beyond "
                   "the set-up's (default: %(default)s; only Linux can limit it)")
    args = parser.parse_args(argv)
    for name, least in (("timeout", 1), ("jobs", 1), ("memory", 100), ("seed", 0)):
        if getattr(args, name, least) < least:
            parser.error(f"--{name} has to be at least {least}, not {getattr(args, name)}")
    if args.command == "grade":
        args.submissions = list(dict.fromkeys(args.submissions))
        if len(args.submissions) > 1 and not args.out:
            parser.error("more than one submission: give --out, a folder for the results")
    return args


def interrupted(args):
    kept = f"{args.out} keeps what is graded; the same command resumes"
    return f"interrupted; {kept}" if getattr(args, "out", None) else "interrupted"


if __name__ == "__main__":
    arguments = parse_args()
    run_command("assignment.py", arguments.run, arguments, interrupted)
