"""The notebooks: what can be seen without running them (by default), and that they run (`pytest tests/test_notebooks.py`)."""

import ast
import importlib.util
import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from pocket import world

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CODE_BASE = [path for folder in ("", "blip_lite", "pocket", "notebooks") for path in (ROOT / folder).glob("*.py")]
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path, kind):
    return ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == kind]


def python(code):
    """A cell without IPython's own lines (%pip, !ls)."""
    return "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))


def outputs(path):
    return [output for cell in read(path)["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


def texts(value):
    """Every string in JSON but pictures, whose base64 might spell anything."""
    if isinstance(value, str):
        return [value]
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [text for key, part in parts if key != "image/png" for text in texts(part)]


def statements(code):
    """Lines of code without blanks, comments and imports."""
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in code.splitlines())
    return [line for line in lines if line and not line.startswith(("#", "import ", "from ", "@", '"""'))]


def definitions(nodes):
    return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


# ---------------------------------------------------------------------------------------------- without running
def test_there_are_notebooks_and_they_begin_alike():
    firsts = {path.stem: sources(path, "code")[0] for path in PATHS}
    assert len(firsts) >= 3 and 'if (p / "isa.py").exists()' in next(iter(firsts.values()))
    assert len(set(firsts.values())) == 1, f"the first code cells differ: {sorted(firsts)}"


@each
def test_it_opens_with_prose_and_asks_to_predict(path):
    first, second, *_ = read(path)["cells"]
    assert (first["cell_type"], second["cell_type"]) == ("markdown", "code") and "".join(first["source"]).startswith("# ")
    assert any("**Predict" in text for text in sources(path, "markdown"))
    assert read(path)["metadata"]["kernelspec"]["name"] == "python3"


@each
def test_its_cells_are_short_and_copy_nothing_of_the_code_base(path):
    written = {name for file in CODE_BASE for name in definitions(ast.parse(file.read_text(encoding="utf-8")).body)}
    lines = {file.name: statements(file.read_text(encoding="utf-8")) for file in CODE_BASE}
    runs = {tuple(code[i : i + 4]): name for name, code in lines.items() for i in range(len(code) - 3)}
    for code in map(python, sources(path, "code")):
        doing = [line for line in code.splitlines() if line.strip() and not line.startswith(("import ", "from ", "#"))]
        assert len(doing) <= 20, f"more than 20 lines besides imports:\n{code}"
        taken = definitions(ast.parse(code).body) & written  # a class may well have a `forward`
        assert not taken, f"the code base has {taken}: import it, or choose another name\n{code}"
        own = statements(code)
        copied = [runs[key] for i in range(len(own) - 3) if (key := tuple(own[i : i + 4])) in runs]
        assert not copied, f"four lines that follow each other in {copied[0]}: import them\n{code}"


@each
def test_it_is_committed_with_its_outputs_from_one_run_and_small(path):
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it top to bottom, then save"
    assert path.stat().st_size < 500_000
    assert any("image/png" in output.get("data", {}) for output in outputs(path)), "no picture"
    assert not [output for output in outputs(path) if output["output_type"] == "error" or output.get("name") == "stderr"]


@each
def test_it_names_no_place_of_the_machine_that_ran_it_and_holds_no_progress_bar(path):
    for text in texts(read(path)):
        assert not re.search(r"(?<![\w.])/(tmp|home|root|Users|usr|var|mnt|opt|work)/|\b[A-Z]:\\", text), text[:500]
        assert str(ROOT) not in text and "\r" not in text and not re.search(r"\d(it|img)/s\]", text), text[:500]


@each
def test_the_files_that_it_links_to_exist(path):
    if len(PATHS) < 6:
        pytest.skip("notebooks link to each other, and not all six are here")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", "\n".join(sources(path, "markdown"))):
        assert (path.parent / target).exists(), target


# ---------------------------------------------------------------------------------------------- running
@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The whole pocket world, drawn once for all notebooks."""
    missing = [name for name in re.findall(r"^[\w-]+", (ROOT / "notebooks/requirements.txt").read_text(), re.MULTILINE)
               if importlib.util.find_spec(name) is None]  # fmt: skip
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; pip install -r notebooks/requirements.txt")
    out = tmp_path_factory.mktemp("data")
    world.write(out / "pocket")
    return out


@pytest.fixture
def clone(drawn, tmp_path):
    """The source tree as a fresh clone has it, uncommitted changes included; the only thing that is there already is data/."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("this is no git repository, so what belongs to the source is not known")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():  # not what was deleted and is not committed yet
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "data").symlink_to(drawn, target_is_directory=True)
    return tmp_path


@pytest.mark.slow
@each
def test_it_runs_from_top_to_bottom(path, clone, capsys):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(clone / "notebooks" / path.name, as_version=4)
    where = {"metadata": {"path": str(clone / "notebooks")}}
    began = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()  # raises where a cell does
    with capsys.disabled():
        print(f" {path.name}: {time.perf_counter() - began:.0f} s ", end="")
    assert not [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "error"]
