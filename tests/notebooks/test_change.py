"""notebooks/CHANGE.md: its five changes apply to today's tree, are short, and are guarded."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "notebooks/CHANGE.md").read_text()
FOUND = re.findall(r"^## ([^\n]+)$.*?^```diff\n(.*?)^```\n\n    python -m pytest ([^\n]+)$.*?"
                   r"replace `([^`]+)` by `([^`]+)`\.\nThe test says `([^`]+)`\.$",
                   PAGE, re.MULTILINE | re.DOTALL)
each = pytest.mark.parametrize("title, diff, guard, right, wrong, says", FOUND,
                               ids=[title for title, *_ in FOUND])


def apply(diff, tree, *options):
    command = ["git", "apply", *options, "-"]
    done = subprocess.run(command, cwd=tree, input=diff, capture_output=True, text=True)
    assert done.returncode == 0, f"CHANGE.md's example no longer applies: {done.stderr}"


@each
def test_each_example_applies_and_is_short(title, diff, guard, right, wrong, says):
    apply(diff, ROOT, "--check")
    added, gone = (len(re.findall(rf"^\{sign}(?!\{sign}\{sign})", diff, re.M)) for sign in "+-")
    assert added < 25 and f"| +{added} -{gone} |" in PAGE, (title, added, gone)
    for path in re.findall(r"^diff --git a/(\S+)", diff, re.MULTILINE):
        assert f"`{path}`" in PAGE.split("\n## ")[0], f"the table does not name {path}"


def test_there_are_five():
    assert len(FOUND) == PAGE.count("```diff") == 5


@pytest.mark.slow
@each
def test_each_example_passes_its_test_and_broken_does_not(
        title, diff, guard, right, wrong, says, tmp_path):
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns(".git", "data", "cache", "runs", "__pycache__", ".venv")
    shutil.copytree(ROOT, tree, ignore=skipped)

    def run():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += shlex.split(guard)
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        return done.returncode, done.stdout

    apply(diff, tree)
    status, said = run()
    assert status == 0 and " passed" in said, said[-2000:]
    assert diff.count(right) == 1
    apply(diff, tree, "--reverse")
    apply(diff.replace(right, wrong), tree)
    status, said = run()
    assert status == 1 and re.search(f"^(E .*|FAILED .*){re.escape(says)}", said, re.M), said
