"""Does the house keep its promises about sizes, imports and words?

    python tests/house.py       # prints promises beside counts; exit status 1 if one is broken

A line counts once for every 100 columns that it begins. The product is every .py file but those of
tests/ and notebooks/.
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 100
LINES = {  # file or folder -> the most lines
    "isa.py": 190, "train.py": 220, "evaluate.py": 260, "search.py": 211, "blip_lite": 950,
    "clip_lite": 482, "query_side": 830, "baselines": 796, "benchmarks": 788, "pocket": 1582,
    "paper": 1320, "plumbing": 1857, "README.md": 150,
}
LEVELS = [  # imports point from later levels to earlier ones, never within a level
    {"blip_lite", "isa"}, {"clip_lite"}, {"plumbing"}, {"query_side", "benchmarks"}, {"pocket"},
    {"baselines"}, {"train", "evaluate", "search"}, {"paper"},
]
TOP = {
    "isa.py", "train.py", "evaluate.py", "search.py", "blip_lite", "clip_lite", "query_side",
    "baselines", "benchmarks", "pocket", "paper", "plumbing", "notebooks", "tests",
    "requirements.txt", "README.md", "LICENSE", "pyproject.toml", ".ci", ".gitignore",
}


def tracked(*patterns):
    command = ["git", "-C", str(ROOT), "ls-files", "--", *patterns]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def height(path):
    lines = (ROOT / path).read_text().splitlines()
    return sum(max(1, -(-len(line) // COLUMNS)) for line in lines)


def functions(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.end_lineno - node.lineno + 1, f"{path}: {node.name}"


def imported(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def wrong_imports(product):
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    for path in product:
        here = path.split("/")[0].removesuffix(".py")
        for name in imported(path):
            if name != here and level.get(name, -1) >= level.get(here, len(LEVELS)):
                yield f"{path} imports {name}"
            if here == "isa" and name not in {"torch", *sys.stdlib_module_names}:
                yield f"{path} imports {name}"


def check():
    product = [path for path in tracked("*.py") if path.split("/")[0] not in ("tests", "notebooks")]
    broken = 0

    def promise(what, found, most, unit="", listed=()):
        nonlocal broken
        broken += found > most
        print(f"{'BROKEN' if found > most else 'kept  '}  {what}: {found:,} of {most:,}{unit}")
        for line in listed if found > most else ():
            print(f"          {line}")

    for name, most in LINES.items():
        parts = tracked(name if "." in name else f"{name}/*.py")
        promise(name, sum(map(height, parts)), most, " lines")
    promise("product", sum((ROOT / p).stat().st_size for p in product), 451_000, " bytes")
    promise("tests", sum((ROOT / p).stat().st_size for p in tracked("tests")), 640_000, " bytes")
    lines = [line for path in product for line in (ROOT / path).read_text().splitlines()]
    long = sum(len(line) > COLUMNS for line in lines)
    promise(f"lines over {COLUMNS} columns", long, int(0.03 * len(lines)))
    sizes = sorted((f for path in product for f in functions(path)), reverse=True)
    promise("longest function", sizes[0][0], 90, " lines", [sizes[0][1]])
    over = [f"{name}, {size} lines" for size, name in sizes if size > 60]
    promise("functions over 60 lines", len(over), 3, "", over)
    wrong = list(wrong_imports(product))
    promise("imports that point the wrong way", len(wrong), 0, "", wrong)
    strange = sorted({path.split("/")[0] for path in tracked()} ^ TOP)
    promise("top-level names too many or missing", len(strange), 0, "", strange)
    promise("README.md", len((ROOT / "README.md").read_text().split()), 1_200, " words")
    return broken


if __name__ == "__main__":
    sys.exit(1 if check() else 0)
