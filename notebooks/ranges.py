"""The numbers that the notebooks print, and in which ranges they are accepted (ranges.json).

`python notebooks/make.py ranges` runs each notebook with other seeds and in bfloat16, in a copy of
the tree, and takes for each number the least and the greatest.
"""

import hashlib
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RANGES = ROOT / "notebooks/ranges.json"
KEPT = ROOT / "cache/ranges"  # what each run printed: an interrupted command resumes
PRECISIONS = "fp32", "bf16"
SHIFT = 1000  # between two seeds: notebook 1 counts its own from 0 to 99

NUMBER = re.compile(r"(?<![\w@/.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?!\w)")  # not R@1's
# Not compared: times, sizes of files, paths with their numbers; records ({...}, Query(...)).
UNSTABLE = re.compile(r"\d (?:ms|s|h)\b|\bbytes\b|\bweights \d|MB in float32|runs/notebook|cache/"
                      r"|^\s*(?:\{|\w+\()")
SEEDS = re.compile(r"\b(manual_seed|default_rng|Rng)\((\w+)\)")

BF16 = """
import torch, blip_lite
_bf16, _call = True, torch.nn.Module.__call__
def _float(x):
    if isinstance(x, (tuple, list)):
        return type(x)(map(_float, x))
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
def _cast(run):
    def cast(*args, **options):
        if not _bf16 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return run(*args, **options)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(*args, **options)
        return _float(found)
    return cast
torch.nn.Module.__call__ = _cast(_call)
for _name in ("encode_image", "encode_text", "match"):
    setattr(blip_lite.Blip, _name, _cast(getattr(blip_lite.Blip, _name)))
"""  # as train.py and evaluate.py do: networks in bfloat16, losses and similarities in float32


def numbers(line):
    """The numbers of a printed line, as floats."""
    return [float(x.replace(",", "")) for x in NUMBER.findall(line)]


def outputs_of(cells):
    """What cells printed, one text for each line; a kernel may send a line in two pieces."""
    printed = ["".join("".join(output["text"]) for output in cell.get("outputs", [])
                       if output.get("name") == "stdout") for cell in cells]
    return [line for text in printed for line in text.splitlines()]


def by_words(lines):
    """Lines with numbers to compare -> {words: line}.

    The words are the line with # in place of each number, and [2], [3], ... behind those of the
    second line, the third, ... with the same words.
    """
    found, times = {}, {}
    for line in lines:
        words = " ".join(NUMBER.sub("#", line).split())
        if "#" in words and not UNSTABLE.search(line):
            times[words] = times.get(words, 0) + 1
            found[f"{words} [{times[words]}]" if times[words] > 1 else words] = line
    return found


def last_digit(text):
    """The value of one in the last digit of a number: 0.01 of "3.14"."""
    return 10.0 ** -len(text.partition(".")[2])


def accepted(texts):
    """One number as several runs printed it -> its range [low, high].

    From the least to the greatest, and a tenth of that further on both sides, at least a hundredth
    of the number and one last digit, and not below 0 if no run was. An integer that is the same in
    all runs has to stay the same. A rounding error (4e-06) may be ten times as large, or 0.
    """
    values = [float(x.replace(",", "")) for x in texts]
    low, high = min(values), max(values)
    if low == high and all(re.fullmatch(r"[-+]?[\d,]+", x) for x in texts):
        return [int(low), int(high)]
    if any("e-" in x for x in texts):
        return [0, float(f"{10 * high:.6g}")]
    margin = max((high - low) / 10, max(abs(low), abs(high)) / 100, *map(last_digit, texts))
    bounds = max(low - margin, 0) if low >= 0 else low - margin, high + margin
    return [float(f"{x:.6g}") for x in bounds]


def ranges_of(runs):
    """Several runs' lines -> {words: a range for each number}, of the lines that all runs print.

    runs: one list of lines each. Lines whose words differ from run to run are left out.
    """
    found = [by_words(lines) for lines in runs]
    common = [words for words in found[0] if all(words in each for each in found)]
    return {words: [accepted(x) for x in zip(*(NUMBER.findall(each[words]) for each in found),
                                             strict=True)] for words in common}


def out_of_range(lines, ranges):
    """Lines whose numbers leave the ranges of a line with the same words; and missing lines."""
    found, wrong = by_words(lines), []
    for words, bounds in ranges.items():
        if words not in found:
            wrong.append(f"was not printed: {words}")
            continue
        for x, (low, high) in zip(numbers(found[words]), bounds, strict=True):
            if not low <= x <= high:
                wrong.append(f"{x} is not in {low}..{high}: {found[words]}")
    return wrong


def copy_tree(to):
    """The source as in a fresh clone, including uncommitted changes; ValueError without git."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT,
                            capture_output=True)
    if listed.returncode:
        raise ValueError("not a git repository, so what belongs to the source is unknown")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():  # it may be deleted, and that not committed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes((ROOT / name).read_bytes())


def code_of(document, seed, precision):
    """A notebook's code cells with every seed shifted, in that precision -> their sources."""
    cells = ["".join(c["source"]) for c in document["cells"] if c["cell_type"] == "code"]
    if seed:
        cells = [SEEDS.sub(rf"\1(\2 + {SHIFT * seed})", cell) for cell in cells]
        cells = [x.replace("--seed {seed}", f"--seed {{seed + {SHIFT * seed}}}") for x in cells]
    if precision == "bf16":
        cells = [x.replace("fp32", "bf16").replace("atol=", "atol=1000 * ") for x in cells]
        cells.insert(1, BF16)
    return cells


def execute(cells, clone):
    """Run sources in `clone` -> lines printed below the first, cells that needed float32."""
    import nbclient
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(x) for x in cells])
    where, again = {"metadata": {"path": str(clone / "notebooks")}}, []
    client = nbclient.NotebookClient(notebook, timeout=None, resources=where)
    with client.setup_kernel(stderr=subprocess.DEVNULL):  # a cell's errors come in its outputs
        for i, cell in enumerate(notebook.cells):
            try:
                client.execute_cell(cell, i)
            except nbclient.exceptions.CellExecutionError:
                if BF16 not in cells:
                    raise
                again.append(cell.source)  # its assert, say, asks for float32's digits
                cell.source = f"_bf16 = False\n{cell.source}\n_bf16 = True"
                client.execute_cell(cell, i)
    return outputs_of(notebook.cells[1:]), again


def kept_run(path, document, clone, seed, precision):
    """The lines of `execute`, or what the same cells printed when they ran before."""
    cells = code_of(document, seed, precision)
    state = hashlib.sha256(json.dumps(cells).encode()).hexdigest()
    kept, began = KEPT / f"{path.stem}-{seed}-{precision}.json", time.time()
    if kept.exists() and (done := json.loads(kept.read_text()))["code"] == state:
        return done["lines"]
    lines, again = execute(cells, clone)
    KEPT.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"code": state, "lines": lines, "again": again}, indent=1))
    print(f"{path.stem}, seed {seed}, {precision}: {time.time() - began:.0f} s"
          + f", {len(again)} of its cells in fp32" * bool(again), flush=True)
    return lines


def write(notebooks, seeds):
    """Run notebooks [(path, document)] with each seed and precision; renew their ranges."""
    ranges = json.loads(RANGES.read_text(encoding="utf-8"))
    (ROOT / "data").mkdir(exist_ok=True)  # where the first notebook draws the pocket world
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:  # a tree for each, as stored features do not tell them apart
            copy_tree(Path(folder) / precision)
            (Path(folder) / precision / "data").symlink_to(ROOT / "data")
        for path, document in notebooks:
            runs = [outputs_of(document["cells"][2:])] + [
                kept_run(path, document, Path(folder) / precision, seed, precision)
                for seed in seeds for precision in PRECISIONS]
            ranges[path.stem] = ranges_of(runs)
            left_out = by_words(runs[0]).keys() - ranges[path.stem].keys()
            print(f"{path.stem}: {len(ranges[path.stem])} lines; no range, because not every run "
                  f"has these words: {sorted(left_out)}", flush=True)
            RANGES.write_text(as_text(ranges), encoding="utf-8")


def as_text(ranges):
    """JSON, one printed line a line."""
    parts = [f" {json.dumps(stem)}: {{\n" + ",\n".join(
        f"  {json.dumps(words, ensure_ascii=False)}: {json.dumps(bounds)}"
        for words, bounds in lines.items()) + "\n }" for stem, lines in sorted(ranges.items())]
    return "{\n" + ",\n".join(parts) + "\n}\n"
