"""Ours beside the paper's, as markdown."""

import statistics
from collections import Counter
from json import loads
from pathlib import Path

import torch
from PIL import Image

import benchmarks
import blip_lite
import evaluate
import isa
import query_side
from paper.numbers import NO_WEIGHTS, TABLES
from paper.runs import LAR_RUNS, ONE_SEED, RUNS, WEIGHTS, evaluation, folder, folder_of, read_results
from plumbing.pictures import nearest_words, word_rows
from pocket import specs


def measured(ours, seeds, split):
    """A run's or a method's results -> [{benchmark: {"all" and parts: {metric: value}}}], one for each seed that is there."""
    untrained = folder_of(ours)
    if ours not in RUNS and untrained is None:
        return []
    found = []
    for seed in [None] if untrained else seeds:
        _, path = evaluation(untrained or ours, seed, split)
        if path.exists():
            results = read_results(path)["results"]
            rows = {benchmark: methods.get(ours if untrained else "isa", {}) for benchmark, methods in results.items()}
            means = {b: {part: {m: mean for m, (mean, _) in ms.items()} for part, ms in row.items()} for b, row in rows.items()}
            found.append({benchmark: row for benchmark, row in means.items() if row})
    return [result for result in found if result]


def value(result, benchmark, metric):
    """One number: a metric, FashionIQ's "dress R@10" where the file has it, or its "mean" over the two averages; else None."""
    row = result.get(benchmark, {})
    if metric == "mean":
        return statistics.mean((row["all"]["R@10"], row["all"]["R@50"])) if row else None
    *category, metric = metric.split()
    return row.get(category[0] if category else "all", {}).get(metric)


def cell(values):
    """Values over seeds -> "57.55 ± 1.00", "57.55" for one, "–" where there is none."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(name, seeds):
    """One table of the paper as markdown: a column for each metric of ours, and beside it the paper's."""
    entry, lines, start = TABLES[name], [], 0
    title = f"Table {name}" if name.isdigit() else f"Figure {name[3:]}"
    ours = [f"pocket {'validation' if entry.split == 'val' else 'test'} sets", "mean ± standard deviation over seeds"]
    lines += [f"**{title}: {entry.title}.** Ours: {', '.join(ours)}.", ""]
    for heading, columns in entry.parts:
        rows = []
        for label, run, *papers in entry.rows:
            results = measured(run, seeds[:1] if run in ONE_SEED else seeds, entry.split)
            why = NO_WEIGHTS if run in WEIGHTS else "not run" if run in RUNS or folder_of(run) else run
            cells = [label + (" (1 seed)" if run in RUNS and len(results) == 1 else "")]
            printed = [paper.split()[start : start + len(columns)] or [""] * len(columns) for paper in papers]
            for i, (benchmark, metric) in enumerate(columns):
                cells += [cell([value(r, benchmark, metric) for r in results]) if results else why if i == 0 else ""]
                cells += [numbers[i] for numbers in printed]
            rows.append(cells)
        head = [heading]
        for benchmark, metric in columns:
            head += [f"{benchmark} {metric}" if len({b for b, _ in columns}) > 1 else metric, *entry.papers]
        lines += [*markdown(head, rows), ""]
        start += len(columns)
    return lines


def markdown(head, rows):
    """A head and rows of strings -> lines of a markdown table, padded so that it can be read as text as well."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"  # noqa: E731
    return [line(head), line(["-" * w for w in widths]), *map(line, rows)]


def lar_table(seeds, images=500):
    """Losses compared beyond Table 8: headline metrics by type of modifier, and what the learnt sentences look like."""
    blip = blip_lite.load("pocket")
    benchmark = benchmarks.load("cirr", Path(evaluate.POCKET_DATA) / "cirr", "test1")
    paths = [benchmark.paths[name] for name in benchmark.gallery[:images]]
    v = features_of(blip, paths)
    kinds = [kind for kind in specs.EDIT_KINDS if kind != "replace"]  # that one is in pre-training alone
    columns = [(b, metric, kind) for b, metric in benchmarks.HEADLINE.items() for kind in kinds]
    scores, words = [], []
    for run, label in LAR_RUNS.items():
        there = [seed for seed in (seeds[:1] if run in ONE_SEED else seeds) if (folder(run, seed) / "isa.pt").exists()]
        results = measured(run, there, "test")
        scores.append([label, *(cell([value(r, b, f"{kind} {metric}") for r in results]) for b, metric, kind in columns)])
        looks = [look_at_words(folder(run, seed) / "isa.pt", blip, paths, v) for seed in there]
        words.append([label, *(cell([x[i] for x in looks]) for i in range(4)), looks[0][4] if looks else "–"])
    return [
        "**What LAR changes: results by type of modifier.** One change, two or three, a description of the target.",
        "",
        *markdown(["loss", *(f"{b} {metric}, {kind}" for b, metric, kind in columns)], scores),
        "",
        f"**What LAR changes: the learnt words** of {images} images of CIRR's test gallery. Rows of the word embedding have a mean",
        f"norm of {word_rows(blip)[1].norm(dim=1).mean():.2f}. True: the nearest word stands in its full caption. Own image:",
        "R@1 of the sentence alone, among these images.",
        "",
        *markdown(
            ["loss", "norm of a token", "cosine to the nearest word", "true, %", "own image, R@1", "nearest words, most often"],
            words,
        ),
    ]


@torch.no_grad()
def features_of(blip, paths):
    """BLIP's v [M, E] of some images: the same for every run, so computed once."""
    return torch.cat([blip.encode_image(blip.preprocess(Image.open(path))[None], cls_only=True)[0] for path in paths])


@torch.no_grad()
def look_at_words(checkpoint, blip, paths, v):
    """The tokens U [M, L, d_w] of some images with features v [M, E] -> their mean norm, mean cosine to the nearest word, percent
    of nearest words that the image's full caption holds, R@1 of the sentence among the images, the words nearest most often."""
    model, settings = query_side.load_query_model(checkpoint, blip)
    U, _ = evaluate.through_query_model(model, paths, "fp32", "cpu", 1)
    said, cosine = nearest_words(blip, U)  # [M, L] each
    captions = loads((paths[0].absolute().parents[2] / "captions.json").read_text())
    true = [word in captions[path.stem].split() for path, words in zip(paths, said, strict=True) for word in words]
    t = blip.encode_text(*isa.compose_query(blip, U, prompt=settings["prompt"]))
    found = (t @ v.T).argmax(dim=1) == torch.arange(len(paths))
    often = Counter(word for words in said for word in words).most_common(6)
    numbers = U.norm(dim=-1).mean().item(), cosine.mean().item(), 100 * statistics.mean(true), 100 * found.float().mean().item()
    return *numbers, " ".join(word for word, _ in often)
