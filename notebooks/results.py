"""The numbers of one_epoch.md (or paper/RESULTS.md): by table, benchmark, row and column.

    results.read()["Table 18"]["CIRR"]["ATL"]["R@1"]    # (mean, standard deviation over seeds)

A column "paper R@1" holds the paper's own number. A single number has a deviation of 0, and cells
without a number are left out.
"""

import re
from pathlib import Path

FILE = Path(__file__).with_name("one_epoch.md")


def number(cell):
    """"48.85 ± 0.87" -> (48.85, 0.87), "31.48" -> (31.48, 0.0), words -> None."""
    found = re.fullmatch(r"([\d.]+)(?: ± ([\d.]+))?", cell)
    return found and (float(found[1]), float(found[2] or 0))


def read(path=FILE):
    """{title: {benchmark: {row: {column: (mean, deviation)}}}}."""
    found, last = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("**"):
            title = re.split("[.:]", line.strip("*"))[0]  # "Table 18"
        elif line.startswith("| ") and not last.startswith("|"):
            part = found.setdefault(title, {}).setdefault(cells[0], {})
            columns = head(cells[1:])
        elif line.startswith("| ") and set(line) - set("|- "):
            part[cells[0]] = {c: number(x) for c, x in zip(columns, cells[1:], strict=True)
                              if c and number(x)}
        last = line
    return found


def head(titles):
    """Titles of columns; "paper" belongs to the metric before it, a second one is dropped: None."""
    ours = [title for title in titles if not title.startswith("paper")]
    names = [title if title in ours else f"paper {titles[i - 1]}" for i, title in enumerate(titles)]
    return [name if name in ours or name[6:] in ours else None for name in names]
