"""Tables of results as text."""

import statistics

import benchmarks
from pocket.specs import EDIT_KINDS


def summarize(results):
    """A list of {metric: value} over seeds -> {metric: [mean, standard deviation]}."""
    return {m: [statistics.mean(r[m] for r in results), statistics.stdev([r[m] for r in results]) if len(results) > 1 else 0.0]
            for m in results[0]}  # fmt: skip


def print_table(name, rows, split, several):
    """Rows {method: {"all" or a kind: {metric: [mean, spread]}}} as text."""
    metrics = [m for m in next(iter(rows.values()))["all"] if m[:2] != "Rs" and not (name == "circo" and m[0] == "R")]
    kinds = [k for k in EDIT_KINDS if k in next(iter(rows.values()))]
    titles = [*metrics, *(f"{benchmarks.HEADLINE[name]} {kind}" for kind in kinds)]
    spread = any(method in rows for method in several)
    seeds = ", mean ± standard deviation over seeds where there are several" if spread else ""
    print(f"\n{name} ({split}), percent{seeds}")
    print(f"{'method':18s}" + "".join(f"{t:>{max(8, len(t) + 2) + 6 * spread}s}" for t in titles))
    for method, parts in rows.items():
        values = [parts["all"][m] for m in metrics] + [parts[k][benchmarks.HEADLINE[name]] for k in kinds]
        cells = [f"{mean:.2f} ± {sd:.2f}" if spread and method in several else f"{mean:.2f}" for mean, sd in values]
        print(f"{method:18s}" + "".join(f"{c:>{max(8, len(t) + 2) + 6 * spread}s}" for c, t in zip(cells, titles, strict=True)))
