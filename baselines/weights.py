"""Choose the weights of the simple baselines that have one, on validation sets.

    python -m baselines.weights                   # the pocket world's: baselines/weights.json
    python -m baselines.weights --benchmark cirr --data data/cirr --blip ... --checkpoint ... \\
        --out weights.json                        # then: python evaluate.py table --weights ...

One weight serves all benchmarks: the best by the mean of their headline metrics.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from tqdm import tqdm

import benchmarks
import pocket
import query_side
from baselines.setting import WEIGHTS, Setting, open_benchmarks
from plumbing.command import run_command
from plumbing.files import check_output, write_json
from plumbing.options import add_shared_options, check_options
from plumbing.precision import open_blip

POCKET = str(Path(pocket.__file__).with_name("isa.pt"))
GRID = {  # method -> weights to try; slerp's is a share of the angle
    "weighted": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1),  # of the image, beside 1 of the text
    "slerp": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5),
    "isa+text": (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5),  # of the text, beside 1 of ISA
}


def headline(settings, method, weight, speakers, model):
    """The headline metric of each benchmark, FashionIQ's the mean of its three -> {name: %}."""
    found = {}
    for setting, speak in zip(settings, speakers, strict=True):
        setting.weights[method] = weight
        best, subsets = setting.rank(setting.query_features(method, speak=speak), model)
        part = setting.benchmark
        score = benchmarks.score(part, best, subsets)[benchmarks.HEADLINE[part.name]]
        found.setdefault(part.name, []).append(score)
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


def main(args):
    check_output(args.out)
    query_side.read_checkpoint(args.checkpoint)
    parts = open_benchmarks(args.benchmark, args.data, args.split)
    blip, precision = open_blip(vars(args))
    model, trained = query_side.load_query_model(args.checkpoint, blip)
    settings = [Setting(blip, part, precision, args.cache_dir, args.workers, weights=None)
                for part in parts]
    chosen, tried = {}, {}
    for method, grid in GRID.items():
        own = model if method == "isa+text" else None  # of two sides: its own gallery
        speakers = [s.speaker(method, model, trained["prompt"]) for s in settings]
        rows = {weight: headline(settings, method, weight, speakers, own)
                for weight in tqdm(grid, method, leave=False, disable=None)}
        mean = {weight: sum(row.values()) / len(row) for weight, row in rows.items()}
        chosen[method] = max(mean, key=mean.get)  # of equals the first
        for weight, row in rows.items():
            values = "  ".join(f"{name} {value:.2f}" for name, value in row.items())
            print(f"{method} {weight}: {values}  mean {mean[weight]:.2f}"
                  + "  <- chosen" * (weight == chosen[method]), flush=True)
        tried[method] = {str(weight): row for weight, row in rows.items()}
    write_json(args.out, {"made by": "python -m baselines.weights", "split": args.split,
                          "chosen": chosen, "tried": tried})
    print(f"wrote {args.out}")


def parse_args(argv=None):
    p = ArgumentParser("python -m baselines.weights", description=__doc__, allow_abbrev=False,
                       formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--benchmark", choices=("all", *benchmarks.HEADLINE), default="all")
    p.add_argument("--data", help="its root; of all three: their parent")
    p.add_argument("--split", default="val")
    p.add_argument("--checkpoint", default=POCKET)
    p.add_argument("--out", default=WEIGHTS, help="the file to write")
    add_shared_options(p)
    args = p.parse_args(argv)
    check_options(p, args)
    return args


if __name__ == "__main__":
    run_command("baselines.weights", main, parse_args())
