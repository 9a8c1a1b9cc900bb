"""The notebooks as committed; and that they run (`python -m pytest tests/notebooks`)."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from notebooks import make, ranges
from pocket import world

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CODE_BASE = [*ROOT.glob("*.py"), *ROOT.glob("[!t]*/*.py")]  # all but tests
PICTURES = "image/png", "image/gif", "text/html"
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


def count_statements(code):
    """Statements of a cell, those inside others too, without imports."""
    return sum(isinstance(node, ast.stmt) and not isinstance(node, ast.Import | ast.ImportFrom)
               for node in ast.walk(ast.parse(code)))


def solutions(stem):
    """SOLUTIONS.md -> [(hint, code)] of one notebook, in order."""
    text = (ROOT / "notebooks/SOLUTIONS.md").read_text(encoding="utf-8")
    part = re.search(rf"^## \[{stem}\].*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[0]
    folded = re.findall(r"<summary>Hint</summary>\n\n(.+?)\n\n</details>\n<details><summary>"
                        r"Solution</summary>\n\n```python\n(.+?)\n```", part, re.DOTALL)
    assert len(folded) == part.count("<summary>Solution") == part.count("<summary>Hint")
    return folded


def texts(value):
    """Every string in a JSON document, except pictures."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [part for key, part in value.items() if key not in PICTURES]
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
        count = count_statements(cell)
        assert count <= 20, f"{count} statements besides imports:\n{cell}"
        taken = definitions(cell) & names
        assert not taken, f"the code base has {taken}: import it, or choose another name\n{cell}"
        assert not fours(cell) & runs, f"four lines of the code base: import them\n{cell}"


@each
def test_it_is_committed_with_the_outputs_of_one_run_and_small(path):
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < 600_000
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


@each
def test_no_line_of_it_is_longer_than_the_screen(path):
    """100 characters; rows of tables cannot be broken."""
    for text in (*sources(path, "code"), *sources(path, "markdown")):
        long = [x for x in text.splitlines() if len(x) > 100 and not x.startswith("|")]
        assert not long, long[0]


@each
def test_each_thing_to_try_has_a_hint_and_a_solution(path):
    (text,) = [text for text in sources(path, "markdown") if re.search(r"## Try it", text)]
    items = re.findall(r"^\d\. ", text.split("## Try it")[1], re.MULTILINE)
    assert len(items) == len(solutions(path.stem)) and "(SOLUTIONS.md)" in text


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


def accepted_ranges(path):
    return json.loads(ranges.RANGES.read_text(encoding="utf-8"))[path.stem]


@each
def test_its_committed_numbers_are_in_the_accepted_ranges(path):
    """And the ranges are ranges: a number beside them is refused."""
    accepted, said = accepted_ranges(path), ranges.outputs_of(read(path)["cells"])
    assert accepted and not ranges.out_of_range(said, accepted)
    for words, line in ranges.by_words(said).items():
        if words.endswith("]") or words not in accepted:  # spoilt alone, it would be the first
            continue
        number, (low, high) = ranges.NUMBER.search(line), accepted[words][0]
        spoilt = f"{line[: number.start()]}{high + 1000}{line[number.end() :]}"
        assert low <= high and ranges.out_of_range([spoilt], {words: accepted[words]}), line


def test_a_range_holds_what_every_seed_and_precision_printed():
    runs = [["R@1 61.2 of 1,536", "L = 1: -1.5", "L = 2: +3.0", "found 2 %", "error 4e-06",
             "isa 61.2 %, in 12 ms", "wrote 12 bytes", "a house 3"],
            ["R@1 64.2 of 1,536", "L = 1: +0.5", "L = 2: +3.1", "found 0 %", "error 1e-06",
             "isa 61.2 %, in 99 ms", "wrote 99 bytes", "a cat 3"]]
    found = ranges.ranges_of(runs)
    assert found == {  # by hand; times, sizes and what one run alone says have none
        "R@1 # of #": [[60.558, 64.842], [1536, 1536]],  # a hundredth of 64.2; an exact count
        "L = #: #": [[1, 1], [-1.7, 0.7]],  # a tenth of 2
        "L = #: # [2]": [[2, 2], [2.9, 3.2]],  # a last digit; the second line of these words
        "found # %": [[0, 3]],  # a last digit, not below 0
        "error #": [[0, 4e-05]],  # ten times as much
    }
    good = ["R@1 64.8 of 1,536", "L = 1: 0.7", "L = 2: 2.9", "found 3 %", "error 4e-05"]
    assert not any(ranges.out_of_range(lines, found) for lines in (*runs, good))
    for i, bad in enumerate(("R@1 64.8 of 1,535", "L = 1: 0.8", "L = 2: 2.8", "found 4 %", "")):
        (wrong,) = ranges.out_of_range([*good[:i], bad, *good[i + 1 :]], found)
        assert bad in wrong and bool(bad) != wrong.startswith("was not printed: error")


def test_another_run_has_other_seeds_and_another_precision():
    """Only those: not a number that is no seed, nor what a kernel of fp32 would not notice."""
    for path in PATHS:
        code = ranges.code_of(read(path), 0, "fp32")
        assert code == sources(path, "code")
        other, bf16 = "".join(ranges.code_of(read(path), 2, "fp32")), "".join(
            ranges.code_of(read(path), 0, "bf16"))
        seeds = re.findall(r"(?:manual_seed|default_rng|\bRng)\((.+?)\)", other)
        assert all(x.endswith(" + 2000") for x in seeds) and "fp32" not in bf16
        assert other.replace(" + 2000", "") == "".join(code)
    assert "--seed {seed + 1000} " in "".join(ranges.code_of(read(PATHS[3]), 1, "fp32"))


def test_a_line_that_the_kernel_sends_in_two_pieces_is_one_line():
    pieces = [{"name": "stdout", "text": x} for x in (["1\n", "40"], "0 files\n", "2\n")]
    assert ranges.outputs_of([{"outputs": pieces}, {}]) == ["1", "400 files", "2"]


def test_a_run_is_kept_until_its_cells_change(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "KEPT", tmp_path / "cache/ranges")
    monkeypatch.setattr(ranges, "execute", lambda cells, clone: (said.pop(), []))
    said, document = [["3"], ["2"], ["1"]], read(PATHS[1])
    begin = [ranges.kept_run(PATHS[1], document, tmp_path, 0, "fp32") for _ in range(2)]
    document["cells"][1]["source"] += ["\n1"]
    assert begin == [["1"], ["1"]]
    assert ranges.kept_run(PATHS[1], document, tmp_path, 0, "bf16") == ["2"]
    assert ranges.kept_run(PATHS[1], document, tmp_path, 0, "fp32") == ["3"]


def first_cell(folder, changed=lambda code: code):
    """Run the first code cell as a program in `folder` -> finished process."""
    pytest.importorskip("matplotlib", reason="notebooks/requirements.txt is not installed")
    code = changed(sources(PATHS[0], "code")[0]) + "\nprint('ROOT', ROOT)"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("folder", [".", "notebooks", "notebooks/assignments", "tests/plumbing"])
def test_the_first_cell_finds_the_clone_from_any_folder_in_it(folder):
    done = first_cell(ROOT / folder)
    assert done.returncode == 0 and f"ROOT {ROOT}\n" in done.stdout, done.stderr


def test_outside_a_clone_the_first_cell_says_what_to_do(tmp_path):
    done = first_cell(tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "CLONE = True" in done.stderr
    given = first_cell(tmp_path, lambda code: make.ADDRESS.sub('ADDRESS = "https://x.org/y"', code))
    assert given.stderr.strip().endswith("fetch one from https://x.org/y.")


def test_outside_a_clone_the_first_cell_clones_from_the_address(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository: nothing to clone")

    def changed(code):
        code = make.ADDRESS.sub(f'ADDRESS = "file://{ROOT}"', code)
        return code.replace("CLONE = False", "CLONE = True")

    for _ in range(2):  # the second time it is there
        done = first_cell(tmp_path, changed)
        assert f"ROOT {tmp_path / 'isa-clone'}\n" in done.stdout, done.stderr


def test_the_address_is_written_once_for_all(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    command = [sys.executable, str(tmp_path / "notebooks/make.py"), "address", "https://x.org/y"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    for path in PATHS:
        new = sources(tmp_path / "notebooks" / path.name, "code")[0]
        assert 'ADDRESS = "https://x.org/y"  #' in new
        assert make.ADDRESS.sub('ADDRESS = ""', new) == sources(path, "code")[0]


def run_make(*arguments):
    command = [sys.executable, str(ROOT / "notebooks/make.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_hand_out_has_no_outputs_and_folds_the_answers(tmp_path):
    done = run_make("hand-out", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for path in PATHS:
        out = tmp_path / "out" / path.name
        assert sources(out, "code") == sources(path, "code")
        for cell in read(out)["cells"]:
            assert not cell.get("outputs") and not cell.get("execution_count")
        old, new = ("\n".join(sources(p, "markdown")) for p in (path, out))
        unfolded = new.replace("<details><summary>Answer</summary>\n\n", "")
        assert unfolded.replace("\n\n</details>", "") == old
        folded = re.findall(r"<details>.*?</details>", new, re.DOTALL)
        assert len(folded) >= 2 and not any("**Predict" in text for text in folded)
    for path, begins in {PATHS[0]: ['"describe" gives away'],
                         PATHS[4]: ["What to read here", "Nine in ten of the nearest"]}.items():
        new = "\n".join(sources(tmp_path / "out" / path.name, "markdown"))
        for answer in begins:  # not an introduction to the next cell
            assert f"<details><summary>Answer</summary>\n\n{answer}" in new


def test_the_hand_out_is_not_written_over_the_notebooks():
    done = run_make("hand-out", "--out", ROOT / "notebooks")
    assert done.returncode == 1 and "another folder" in done.stderr


def test_html_is_static_and_complete(tmp_path):
    pytest.importorskip("nbconvert")
    done = run_make("html", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for path in PATHS:
        page = (tmp_path / f"{path.stem}.html").read_text(encoding="utf-8")
        outputs = [o for cell in read(path)["cells"] for o in cell.get("outputs", [])]
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        assert page.count("data:image/") >= pictures and ".ipynb\"" not in page


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The whole pocket world, drawn once for all notebooks."""
    needed = (ROOT / "notebooks/requirements.txt").read_text()
    needed = re.findall(r"^[\w-]+", needed, re.MULTILINE)
    needed.remove("nbconvert")  # for make.py alone
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing; pip install -r notebooks/requirements.txt")
    out = tmp_path_factory.mktemp("data")
    world.write(out / "pocket")
    return out


@pytest.fixture
def clone(drawn, tmp_path):
    """The source tree as in a fresh clone, including uncommitted changes, plus only data/."""
    try:
        ranges.copy_tree(tmp_path)
    except ValueError as error:
        pytest.skip(str(error))
    (tmp_path / "data").symlink_to(drawn, target_is_directory=True)
    return tmp_path


@pytest.mark.slow
@each
def test_it_runs_from_top_to_bottom(path, clone, capsys):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(clone / "notebooks" / path.name, as_version=4)
    folder = "tests/plumbing" if path == PATHS[0] else "notebooks"  # any folder will do
    where, began = {"metadata": {"path": str(clone / folder)}}, time.perf_counter()
    cells = len(notebook.cells)
    notebook.cells += [nbformat.v4.new_code_cell(code) for _, code in solutions(path.stem)]
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    wrong = ranges.out_of_range(ranges.outputs_of(notebook.cells[:cells]), accepted_ranges(path))
    assert not wrong, "\n".join(wrong)
    with capsys.disabled():
        print(f" {path.name}: {time.perf_counter() - began:.0f} s ", end="")
