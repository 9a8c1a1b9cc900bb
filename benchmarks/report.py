"""Tables of results as text."""

import statistics

from benchmarks.metrics import HEADLINE, LEFT_OUT
from benchmarks.readers import CATEGORIES


def summarize(results):
    """A list of {metric: value} over seeds -> {metric: [mean, standard deviation]}."""
    columns = {metric: [result[metric] for result in results] for metric in results[0]}
    return {metric: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
            for metric, values in columns.items()}


def print_table(name, rows, split, several, starred=()):
    """Print {method: {"all" or kind: {metric: [mean, sd]}}}; several: methods of several seeds.

    starred: methods that are not in the paper, nor is any that is re-ranked.
    """
    parts, head = next(iter(rows.values())), HEADLINE[name]
    columns = {m: ("all", m) for m in parts["all"]
               if m not in LEFT_OUT.get(name, ())}  # title -> part, metric
    columns |= {f"{head} {k}": (k, head) for k in parts if k not in ("all", *CATEGORIES)}
    spread = any(method in rows for method in several)
    note = ", mean ± standard deviation over seeds where there are several" if spread else ""
    print(f"\n{name} ({split}), percent{note}")
    widths = [max(8, len(title) + 2) + 6 * spread for title in columns]
    lines = {"method": columns} | {
        method: [f"{mean:.2f} ± {sd:.2f}" if method in several else f"{mean:.2f}"
                 for mean, sd in (parts[part][metric] for part, metric in columns.values())]
        for method, parts in rows.items()}
    stars = {m for m in rows if m in starred or m.endswith(" re-ranked")}
    width = max(18, *(len(label) + 3 for label in lines))
    for label, cells in lines.items():
        label = f"{label} *" if label in stars else label
        print(f"{label:{width}s}"
              + "".join(f"{c:>{w}s}" for c, w in zip(cells, widths, strict=True)))
    if stars:
        print("* not in the paper")
