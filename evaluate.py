"""Evaluate retrieval on CIRR, FashionIQ and CIRCO, real or the pocket world's.

    python evaluate.py table                        # the pocket world: ISA beside simple baselines
    python evaluate.py table --benchmark cirr --data data/cirr --split val --checkpoint x/isa.pt ...
    python evaluate.py score --benchmark circo --data data/circo --split val predictions.json
    python evaluate.py submit --benchmark cirr --data data/cirr --split test1 --out cirr.json ...
    python evaluate.py check --benchmark cirr --data data/cirr        # is everything there?
    python evaluate.py check --images cc3m/                           # the same for training images
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

import baselines
import benchmarks
import isa
import query_side
from baselines.setting import (  # noqa: F401, some only for importers
    METHODS,
    MODEL_OPTIONS,
    NOT_IN_THE_PAPER,
    SIMPLE,
    WEIGHTS,
    Setting,
    check_methods,
    encode_queries,
    modifiers,
    open_benchmarks,
    read_weights,
    through_query_model,
)
from benchmarks.metrics import SUBSET
from benchmarks.report import print_table, summarize
from plumbing.command import run_command
from plumbing.files import check_output, write_json
from plumbing.images import check_images
from plumbing.options import RERANK, SHARED, add_shared_options, check_lengths, check_options
from plumbing.pictures import check_picture, draw_picture, save_picture
from plumbing.precision import open_blip
from pocket import ceilings
from pocket.specs import EDIT_KINDS

POCKET_RUN = "runs/pocket/isa.pt"


def all_rankings(settings, methods, targets=True):
    """Yields (Setting, method, number of its checkpoint, rankings, rankings of CIRR's subsets).

    With --rerank, "METHOD re-ranked" follows a method that has sentences. Raises ValueError, before
    anything slow, for what could fail later.
    """
    files = {m: settings[option] for m, option in MODEL_OPTIONS.items() if m in methods}
    for path in sum(files.values(), []):
        query_side.read_checkpoint(path)
    k, weights = settings["rerank"] or 0, settings.get("weights", WEIGHTS)
    read_weights(weights)
    where = settings["benchmark"], settings["data"], settings["split"]
    opened = open_benchmarks(*where, targets=targets)
    blip, precision = open_blip(settings)
    models = {m: [query_side.load_query_model(path, blip) for path in files[m]] for m in files}
    if k:
        check_methods(blip, k, opened, methods, files, models)
    texts = [(f"the modifier of query {query.id} of {part.category or part.name} ({text[:40]!r})",
              isa.continuation(text))
             for part in opened for query in part.queries for text in modifiers(query)]
    trained = [trained for runs in models.values() for _, trained in runs]
    for prompt, tokens in {(t["prompt"], t["tokens"]) for t in trained} or {("", 0)}:
        check_lengths(blip, prompt, tokens, texts)

    for part in opened:
        setting = Setting(blip, part, precision, settings["cache_dir"], settings["workers"],
                          settings.get("sentences"), weights)
        for method in tqdm(methods, part.category or part.name, leave=False, disable=None):
            if method in ceilings.METHODS and not ceilings.read_captions(part):
                continue
            runs = models.get(method, [(None, {"prompt": "a photo of"})])
            for number, (model, trained) in enumerate(runs):
                speak = setting.speaker(method, model, trained["prompt"])
                q = setting.query_features(method, speak=speak)
                best, subsets = setting.rank(q, model, max(50, k))
                yield setting, method, number, best, subsets
                if k and speak:
                    best, subsets = setting.rerank(q, best, subsets, speak, k,
                                                   settings["rerank_weight"])
                    yield setting, f"{method} re-ranked", number, best, subsets


def table(args):
    """Print a table of methods on benchmarks and write it to a file."""
    check_output(args.json)  # what could fail at the end fails now
    if args.picture:
        check_picture(args.picture)
    if "searle-oti" in args.methods:
        baselines.read_sentences(args.sentences)
    scores, picture = {}, None  # {benchmark: {method: {seed: [category]{kind: metrics}}}}
    for setting, method, seed, best, subsets in all_rankings(vars(args), args.methods):
        part = setting.benchmark
        metrics = {"all": benchmarks.score(part, best, subsets)}
        metrics |= benchmarks.score_by_kind(part, best, subsets)
        seeds = scores.setdefault(part.name, {}).setdefault(method, {})
        seeds.setdefault(seed, []).append(metrics)
        if args.picture and method == "isa" and picture is None:
            picture = draw_picture(part, best)
    if not scores:
        raise ValueError("--methods: all of these need captions.json, as only the pocket world has")
    results = {name: {method: over_seeds(list(seeds.values())) for method, seeds in methods.items()}
               for name, methods in scores.items()}
    for name, rows in results.items():
        several = [method for method in rows if len(scores[name][method]) > 1]
        print_table(name, rows, args.split or "test", several, NOT_IN_THE_PAPER)
    found = {"precision": setting.precision, "blip_fingerprint": setting.blip.fingerprint}
    write_json(args.json, {"settings": vars(args) | found, "results": results})
    print(f"\nwrote {args.json}")
    if picture is not None:
        save_picture(picture, args.picture)
        print(f"wrote {args.picture}: query, modifier, the five best; framed = the target")


def over_seeds(seeds):
    """[seed][category]{"all" or a kind: metrics} -> {"all", a kind or a category: summary}."""
    rows = {kind: summarize([benchmarks.average([part[kind] for part in parts]) for parts in seeds])
            for kind in ("all", *EDIT_KINDS) if all(kind in part for part in seeds[0])}
    for i, category in enumerate(benchmarks.CATEGORIES if len(seeds[0]) > 1 else ()):
        rows[category] = summarize([parts[i]["all"] for parts in seeds])
    return rows


def score(args):
    """Score a prediction file; needs only annotations."""
    results = []
    for part in open_benchmarks(args.benchmark, args.data, args.split, images=False):
        best = benchmarks.read_predictions(args.predictions, part)
        subsets = args.subset and benchmarks.read_predictions(args.subset, part, "recall_subset")
        metrics = benchmarks.score(part, best, subsets)
        if not subsets:  # a top-50 list does not rank the whole subset
            metrics = {name: value for name, value in metrics.items() if name not in SUBSET}
        results.append(metrics)
        whole = min(50, len(part.gallery) - 1) if part.gallery else 50  # without images: unknown
        short = sum(len(names) < whole for names in best.values())
        if short:
            print(f"{short} of {len(best)} lists hold fewer than 50 names; "
                  "names left out count as not found")
        print(f"{part.name} {part.category or ''} {part.split}: {one_line(metrics)}")
        for aspect, value in benchmarks.aspect_scores(part, best).items():
            print(f"  mAP@10 {aspect}: {value:.2f}")
    if len(results) > 1:
        print(f"average: {one_line(benchmarks.average(results))}")


def one_line(metrics):
    return "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def submit(args):
    """Write the file that the test server of CIRR or CIRCO scores."""
    check_output(args.out)
    out, files = Path(args.out), {}
    settings = vars(args) | {"checkpoint": [args.checkpoint]}
    # with --rerank each part comes twice, and what is re-ranked takes the place of the other
    for setting, _, _, best, subsets in all_rankings(settings, ["isa"], targets=False):
        files[out] = files.get(out, {}) | benchmarks.predictions(setting.benchmark, best)
        if subsets:
            document = benchmarks.predictions(setting.benchmark, subsets, "recall_subset")
            files[out.with_name(f"{out.stem}_subset{out.suffix}")] = document
    for path, document in files.items():
        benchmarks.write_predictions(path, document)
        print(f"wrote {path}")


def check(args):
    """Compare a folder with the expected layout."""
    if args.images:
        check_images(args.images, args.cache_dir, args.decode, args.workers)
    else:
        benchmarks.check_benchmark(args.benchmark, args.data, args.splits, args.decode,
                                   args.workers)


COMMANDS = {"table": table, "score": score, "submit": submit, "check": check}


def number_or_all(text):
    return sys.maxsize if text == "all" else int(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, parsers = parser.add_subparsers(dest="command", required=True), {}
    for name, run in COMMANDS.items():
        p = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        required, names = name in ("score", "submit"), tuple(benchmarks.HEADLINE)
        p.add_argument("--benchmark", required=required, default="all" if name == "table" else None,
                       choices=("all", *names) if name == "table" else names)
        p.add_argument("--data", required=required, help="its root; of all three: their parent")
        parsers[name] = p

    p = parsers["table"]
    p.add_argument("--split", help="default: test, which has targets in the pocket world only")
    p.add_argument("--checkpoint", nargs="+", help="several = seeds of one setting (default: "
                   f"{POCKET_RUN}; with --clip none)")
    p.add_argument("--methods", nargs="+", choices=METHODS,
                   help="isa: any model of train.py; searle-oti takes minutes (default: the sums, "
                        "isa if there is a --checkpoint, upper bounds)")
    for name in ("pic2word", "searle"):
        p.add_argument(f"--{name}", nargs="+", default=[f"runs/{name}/isa.pt"])
    p.add_argument("--sentences", default="pocket/sentences.json", help="for searle-oti")
    p.add_argument("--weights", default=WEIGHTS, help="what `python -m baselines.weights` wrote, "
                   "for weighted, slerp and isa+text")
    p.add_argument("--json", default="runs/table.json", help="results and settings")
    p.add_argument("--picture", default="runs/retrieved.png", help='what ISA found; "" = none')
    add_shared_options(p, *SHARED, *RERANK)

    p = parsers["score"]
    p.add_argument("--split", default="val")
    p.add_argument("--subset", help="CIRR: the recall_subset file, for Rs@K")
    p.add_argument("predictions", help="JSON in the test server's format")

    p = parsers["submit"]
    p.add_argument("--split", required=True)
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--out", required=True, help="CIRR: NAME_subset.json is written beside it")
    add_shared_options(p, *SHARED, *RERANK)

    p = parsers["check"]
    p.add_argument("--splits", nargs="+", help="default: those with annotations, or val")
    p.add_argument("--images", help="a training folder, instead of a benchmark")
    p.add_argument("--decode", type=number_or_all, default=200, metavar="N",
                   help='how many images to decode, drawn at random: a number, or "all"')
    add_shared_options(p, "--cache-dir", "--workers")
    args = parser.parse_args(argv)
    if args.command == "table":
        isa_too = ["isa"] if args.checkpoint or not args.clip else []
        args.methods = [*dict.fromkeys(args.methods or [*SIMPLE, *isa_too, *ceilings.METHODS])]
        args.checkpoint = args.checkpoint or [POCKET_RUN]
    if args.command == "score" and args.subset and args.benchmark != "cirr":
        parser.error("--subset is for CIRR alone")
    if args.command == "check":
        given = bool(args.benchmark), bool(args.data), bool(args.images)
        if given not in ((True, True, False), (False, False, True)):
            parser.error("check needs --benchmark and --data, or --images alone")
    check_options(parser, args, decode=0, rerank=1, rerank_weight=0)
    return args


if __name__ == "__main__":
    arguments = parse_args()
    main = COMMANDS[arguments.command]
    run_command("evaluate.py", main, arguments, "interrupted; stored features are kept")
