"""Tables of results as text."""

import statistics

from benchmarks.metrics import HEADLINE
from benchmarks.readers import CATEGORIES


def summarize(results):
    """A list of {metric: value} over seeds -> {metric: [mean, standard deviation]}."""
    columns = {metric: [result[metric] for result in results] for metric in results[0]}
    return {metric: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
            for metric, values in columns.items()}


def print_table(name, rows, split, several):
    """Print {method: {part: {metric: [mean, deviation]}}}; part: "all", kinds of modifier, categories.

    several: the methods that have more than one seed.
    """
    first = next(iter(rows.values()))
    columns = [("all", metric, metric) for metric in first["all"]
               if metric[:2] != "Rs" and not (name == "circo" and metric[0] == "R")]
    columns += [(kind, HEADLINE[name], f"{HEADLINE[name]} {kind}")
                for kind in first if kind not in ("all", *CATEGORIES)]
    spread = any(method in rows for method in several)
    widths = [max(8, len(title) + 2) + 6 * spread for _, _, title in columns]

    def line(label, cells):
        print(f"{label:18s}" + "".join(f"{c:>{w}s}" for c, w in zip(cells, widths, strict=True)))

    seeds = ", mean ± standard deviation over seeds where there are several" if spread else ""
    print(f"\n{name} ({split}), percent{seeds}")
    line("method", [title for _, _, title in columns])
    for method, parts in rows.items():
        values = [parts[part][metric] for part, metric, _ in columns]
        line(method, [f"{mean:.2f} ± {sd:.2f}" if method in several else f"{mean:.2f}"
                      for mean, sd in values])
