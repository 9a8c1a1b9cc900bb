"""The paper's tables as markdown, a column of ours beside each of the paper's."""

import statistics
from types import SimpleNamespace

from paper.numbers import CONTENTS, NUMBERS, ROWS, RUNS
from paper.results import measured
from paper.runs import FOLDERS, seeds_of

ROWS["comparison on validation"] = {
    label: row for label, row in ROWS["comparison"].items() if row["ours"] != "searle-oti"
}
COLUMNS = {  # heading of a table -> {column: (benchmark, metric)}; results.json has the others
    "CIRR": {m: ("cirr", m) for m in ("R@1", "Avg")},
    "CIRCO": {m: ("circo", m) for m in ("mAP@5", "Avg")},
    "FashionIQ": {m: ("fashioniq", m) for m in ("R@10", "R@50")},  # means over the categories
    "averages over the metrics": {
        f"{b} {m}": (b, m) for b, m in (("cirr", "Avg"), ("fashioniq", "mean"), ("circo", "Avg"))},
}


TABLES = {name: SimpleNamespace(**{**row, "headings": row["headings"].split(", ")})
          for name, row in CONTENTS.items()}  # columns as in rows.md


def title_of(name):
    """"5" -> "Table 5", "fig3" -> "Figure 3"; also the heading of its note."""
    return f"Figure {name[3:]}" if name.startswith("fig") else f"Table {name}"


def value(result, benchmark, metric):
    """One number of a result, or None. metric: "R@10", "dress R@10" or "one R@10" of a part, or
    "mean" of FashionIQ's two averages."""
    row = result.get(benchmark, {})
    if metric == "mean":
        return statistics.mean(row["all"][m] for m in ("R@10", "R@50")) if row else None
    *part, metric = metric.split()
    return row.get(part[0] if part else "all", {}).get(metric)


def cell(values):
    """Values over seeds -> "57.55 ± 1.00", "57.55" for a single one, "–" for none."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def markdown(head, rows):
    """A head and rows of strings -> lines of a markdown table."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells):
        return f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |"

    return [line(head), line(["-" * w for w in widths]), *map(line, rows)]


def table(name, seeds):
    """One table of the paper -> lines of markdown."""
    entry = TABLES[name]
    sets = "validation" if entry.split == "val" else "test"
    lines = [f"**{title_of(name)}: {entry.title}.** Ours: pocket {sets} sets, "
             "mean ± standard deviation over seeds."]
    for heading in entry.headings:
        columns, rows = COLUMNS[heading], []
        printed = {"": {}, **NUMBERS.get(f"{heading} {entry.printed}", {})}
        for label, row in ROWS[entry.rows].items():
            ours, papers = row["ours"], {k: printed[v] for k, v in row.items() if k != "ours"}
            results = measured(ours, seeds_of(ours, seeds), entry.split)
            why = "not run" if ours in RUNS or ours in FOLDERS else ours
            few = f" ({len(results)} seed{'s' * (len(results) > 1)})"  # where others have more
            cells = [label + few * (ours in RUNS and 0 < len(results) < len(seeds))]
            for column, (benchmark, metric) in columns.items():
                mine = cell([value(result, benchmark, metric) for result in results])
                cells += [mine if results else why, *(p.get(column, "") for p in papers.values())]
                why = ""  # only in the first column
            rows.append(cells)
        head = [heading, *(x for column in columns for x in (column, *papers))]
        lines += ["", *markdown(head, rows)]
    return lines
