"""The notebooks: cheap checks of every file, and, where this file is named (`pytest tests/test_notebooks.py`), each one executed.

Execution takes place in a copy of the source tree, so nobody's data/, runs/ or cache/ is touched; the pocket world is drawn once.
"""

import ast
import importlib.util
import json
import re
import subprocess
import time

import pytest
from conftest import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LONGEST = 15  # lines of a code cell
NEEDED = [re.split("[<>=]", line)[0] for line in (FOLDER / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
MISSING = [package for package in NEEDED if importlib.util.find_spec(package) is None]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path, kind=None):
    """A notebook's cells, or those of one kind, each with its source as one string."""
    cells = json.loads(path.read_text())["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells if kind in (None, cell["cell_type"])]


def python(source):
    """A cell's code without IPython's own lines."""
    return ast.parse("\n".join(line for line in source.splitlines() if line.strip()[:1] not in ("%", "!")))


def definitions(nodes):
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def code_base():
    """Names of all functions, classes and methods of the code base."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("blip_lite/*.py"), *ROOT.glob("pocket/*.py"), *FOLDER.glob("*.py")]
    return set().union(*(definitions(ast.walk(ast.parse(path.read_text()))) for path in files))


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_the_first_code_cell_is_the_same_everywhere():
    firsts = {path.name: read(path, "code")[0]["source"] for path in NOTEBOOKS}
    assert len(set(firsts.values())) == 1, firsts


@each_notebook
def test_is_short_and_asks_before_it_shows(path):
    cells = read(path, "code")
    long = [f"{len(cell['source'].splitlines())} lines: {cell['source'][:60]}" for cell in cells
            if len(cell["source"].splitlines()) > LONGEST]  # fmt: skip
    assert not long
    assert path.stat().st_size < 500_000
    assert any("Predict" in cell["source"] for cell in read(path, "markdown"))


@each_notebook
def test_was_committed_as_executed_and_shows_no_error(path):
    cells = [cell for cell in read(path, "code") if cell["source"].strip()]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "execute it from top to bottom"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@each_notebook
def test_names_the_usual_kernel_and_no_folder_of_one_machine(path):
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"
    absolute = r"(?<![\w.:/*)<])/(?:home|root|tmp|Users|work|mnt|opt|usr|var|private)/|[A-Z]:\\\\\w"
    for cell in read(path):
        outputs = [{k: v for k, v in output.get("data", output).items() if k != "image/png"} for output in cell.get("outputs", [])]
        assert not re.search(absolute, cell["source"] + json.dumps(outputs))


@each_notebook
def test_imports_the_code_base_and_copies_none_of_it(path):
    cells = [python(cell["source"]).body for cell in read(path, "code")]  # top level only: a class may well have a `forward`
    own = set().union(*map(definitions, cells))
    copied = code_base() & own
    assert not copied, f"{sorted(copied)} are functions of the code base: import them"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources (tracked files, and new ones that git does not ignore), with the pocket world drawn in it."""
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}: pip install -r notebooks/requirements.txt")
    copy = tmp_path_factory.mktemp("notebooks") / "tree"
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout.split("\0")  # fmt: skip
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    from pocket import world

    world.write(copy / "data" / "pocket")
    return copy


def execute(path, folder):
    """Run a notebook from top to bottom in a kernel of its own, as a reader who opened it in `folder`. Raises where a cell does."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.slow
@each_notebook
def test_runs_from_top_to_bottom(path, tree, capsys):
    began = time.perf_counter()
    execute(tree / "notebooks" / path.name, tree / "notebooks")
    with capsys.disabled():
        print(f"\n{path.name}: {time.perf_counter() - began:.0f} s")
