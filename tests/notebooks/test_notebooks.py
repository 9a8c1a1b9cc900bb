"""The notebooks as committed; and that they run (`python -m pytest tests/notebooks`)."""

import ast
import importlib.util
import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from pocket import world

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CODE_BASE = [*ROOT.glob("*.py"), *ROOT.glob("[!t]*/*.py")]  # all but tests
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path, kind):
    cells = read(path)["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def python(code):
    """A cell without IPython's own lines (%pip, !ls)."""
    lines = code.splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def texts(value):
    """Every string in a JSON document, except pictures."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [part for key, part in value.items() if key != "image/png"]
    return [text for part in value for text in texts(part)] if isinstance(value, list) else []


def statements(code):
    """Lines of code without blanks, comments and imports."""
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in code.splitlines())
    skipped = "#", "import ", "from ", "@", '"""'
    return [line for line in lines if line and not line.startswith(skipped)]


def definitions(code):
    nodes = ast.parse(code).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_they_begin_alike():
    firsts = {path.stem: sources(path, "code")[0] for path in PATHS}
    assert len(firsts) == 6 and 'if (p / "isa.py").exists()' in next(iter(firsts.values()))
    assert len(set(firsts.values())) == 1, f"the first code cells differ: {sorted(firsts)}"


@each
def test_it_opens_with_prose_and_asks_to_predict(path):
    first, second, *_ = read(path)["cells"]
    assert (first["cell_type"], second["cell_type"]) == ("markdown", "code")
    assert "".join(first["source"]).startswith("# ")
    assert any("**Predict" in text for text in sources(path, "markdown"))
    assert read(path)["metadata"]["kernelspec"]["name"] == "python3"


@each
def test_its_cells_are_short_and_copy_nothing_of_the_code_base(path):
    def fours(code):
        lines = statements(code)
        return {tuple(lines[i : i + 4]) for i in range(len(lines) - 3)}

    code = [file.read_text(encoding="utf-8") for file in CODE_BASE]
    names, runs = (set().union(*map(of, code)) for of in (definitions, fours))
    for cell in map(python, sources(path, "code")):
        assert len(statements(cell)) <= 20, f"more than 20 lines besides imports:\n{cell}"
        taken = definitions(cell) & names
        assert not taken, f"the code base has {taken}: import it, or choose another name\n{cell}"
        assert not fours(cell) & runs, f"four lines of the code base: import them\n{cell}"


@each
def test_it_is_committed_with_the_outputs_of_one_run_and_small(path):
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < 500_000
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


@each
def test_it_contains_no_path_of_a_machine_and_no_progress_bar(path):
    place = r"(?<![\w.])/(tmp|home|root|Users|usr|var|mnt|opt|work)/|\b[A-Z]:\\"
    for text in texts(read(path)):
        assert not re.search(place, text) and str(ROOT) not in text, text[:500]
        assert "\r" not in text and not re.search(r"\d(it|img)/s\]", text), text[:500]


@each
def test_the_files_that_it_links_to_exist(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", "\n".join(sources(path, "markdown"))):
        assert (path.parent / target).exists(), target


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The whole pocket world, drawn once for all notebooks."""
    needed = (ROOT / "notebooks/requirements.txt").read_text()
    needed = re.findall(r"^[\w-]+", needed, re.MULTILINE)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing; pip install -r notebooks/requirements.txt")
    out = tmp_path_factory.mktemp("data")
    world.write(out / "pocket")
    return out


@pytest.fixture
def clone(drawn, tmp_path):
    """The source tree as in a fresh clone, including uncommitted changes, plus only data/."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT,
                            capture_output=True)
    if listed.returncode:
        pytest.skip("not a git repository, so what belongs to the source is unknown")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():  # it may be deleted, and that not committed
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "data").symlink_to(drawn, target_is_directory=True)
    return tmp_path


@pytest.mark.slow
@each
def test_it_runs_from_top_to_bottom(path, clone, capsys):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(clone / "notebooks" / path.name, as_version=4)
    where, began = {"metadata": {"path": str(clone / "notebooks")}}, time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    with capsys.disabled():
        print(f" {path.name}: {time.perf_counter() - began:.0f} s ", end="")
