"""Beyond the paper: stronger baselines and re-ranking, and what stress.py shares with them."""

import itertools
from functools import partial
from statistics import mean

import torch

import benchmarks
import evaluate
import isa
import query_side
from paper.costs import blip_base, machine, median_ms
from paper.numbers import NOTES
from paper.runs import folder
from paper.tables import cell, markdown
from plumbing.precision import autocast, open_blip, round_frozen_weights

RUN = "isa"  # of runs.md: `python train.py`, seed by seed
HEADS = {"cirr": "CIRR R@1", "fashioniq": "FashionIQ R@10", "circo": "CIRCO mAP@5"}
TEXT, SUMS = "reference caption", ("image+text", "weighted")


def models_of(seeds, blip):
    """The query models of RUN -> [(model, settings)]. Raises ValueError without a checkpoint."""
    return [query_side.load_query_model(folder(RUN, seed) / "isa.pt", blip) for seed in seeds]


def options(threads, *words):
    few = ["--threads", str(threads), "--workers", "0"]  # a worker starts slower than it decodes
    return vars(evaluate.parse_args(["table", *few, *words]))


def headline(benchmark, rankings):
    return benchmarks.score(benchmark, rankings)[benchmarks.HEADLINE[benchmark.name]]


def averaged(scores):
    """[(name of a benchmark, score)], FashionIQ's three times -> {name: mean}."""
    groups = itertools.groupby(scores, key=lambda pair: pair[0])
    return {name: mean([score for _, score in pairs]) for name, pairs in groups}


def stronger_table(seeds, threads, k=20):
    """ISA and the methods without training on the test sets, plain and re-ranked -> markdown."""
    sums, spoken = [*evaluate.SIMPLE, "weighted", "slerp", "product"], ["isa", "isa+text", TEXT]
    paths = [str(folder(RUN, seed) / "isa.pt") for seed in seeds]
    settings, scores = options(threads, "--checkpoint", *paths), {}
    for methods, rerank in ((sums, None), (spoken, k)):
        settings["rerank"] = rerank
        for setting, method, number, best, _ in evaluate.all_rankings(settings, methods):
            part = setting.benchmark
            runs = scores.setdefault(method, {}).setdefault(number, [])
            runs.append((part.name, headline(part, best)))
    rows = []
    for method in (*sums, *spoken):
        for label in (method, f"{method} re-ranked"):
            found = [averaged(run) for run in scores.get(label, {}).values()]
            if found:
                rows.append([label, *(cell([run[name] for run in found]) for name in HEADS)])
    weights = evaluate.read_weights()
    note = NOTES["stronger"].format(k=k, weight=settings["rerank_weight"], weights=", ".join(
        f"{method} {weight}" for method, weight in weights.items()))
    return [note, "", *markdown(["test", *HEADS.values()], rows)]


def rerank_table(seeds, threads, ks=(5, 10, 20, 50), weights=(0.02, 0.05, 0.1, 0.2)):
    """ISA of the first seed on validation, for several K and weights -> markdown."""
    blip, precision = open_blip(options(threads))
    ((model, trained),) = models_of(seeds[:1], blip)
    alone, found = 1e6, {}
    for part in evaluate.open_benchmarks(split="val"):
        setting = evaluate.Setting(blip, part, precision, workers=0)
        speak = setting.speaker("isa", model, trained["prompt"])
        q = setting.query_features("isa", speak=speak)
        best, _ = setting.rank(q, k=max(50, *ks))
        chances = setting.matching([best], speak, max(ks))
        for k, weight in [(1, 0.0), *itertools.product(ks, (*weights, alone))]:
            again = benchmarks.rerank(part, best, q, setting.gallery, chances, k, weight)
            found.setdefault((k, weight), []).append((part.name, headline(part, again)))
    texts = {key: " / ".join(f"{score:.1f}" for score in averaged(scores).values())
             for key, scores in found.items()}
    rows = [[str(k), *(texts[k, weight] for weight in (*weights, alone))] for k in ks]
    head = ["K", *(f"weight {weight}" for weight in weights), "matching alone"]
    note = NOTES["rerank"].format(without=texts[1, 0.0])
    return [note, "", *markdown(head, rows)]


@torch.inference_mode()
def rerank_cost(seeds, threads, k=20):
    """What re-ranking adds to a query, in ms, for pocket BLIP and at the paper's size -> a line."""
    blip, precision = open_blip(options(threads))
    times = []
    for model in (blip, blip_base()):
        side, pixels = model.image_size, torch.randn(k, 3, model.image_size, model.image_size)
        calls = 30 if side == blip.image_size else 3
        round_frozen_weights(model, precision)
        with autocast("cpu", precision):
            F_v = model.encode_image(pixels)[1]
            U = torch.randn(1, 6, model.word_dim)
            words, mask = isa.compose_query(model, U, ["shows a red car in the snow instead"])
            words, mask = words.expand(k, -1, -1), mask.expand(k, -1)
            times += [median_ms(partial(model.encode_image, pixels), calls),
                      median_ms(partial(model.match, words, mask, F_v), calls)]
    note = NOTES["cost"].format(*times, k=k, precision=precision, machine=machine(threads))
    return note.splitlines()
