"""Evaluate composed image retrieval on CIRR, FashionIQ and CIRCO, the real ones or the pocket world's.

    python evaluate.py table                              # the pocket world: ISA beside the simple baselines
    python evaluate.py table --benchmark cirr --data data/cirr --split val --checkpoint runs/x/isa.pt --blip model_base.pth
    python evaluate.py score --benchmark circo --data data/circo --split val predictions.json       # annotations are enough
    python evaluate.py submit --benchmark cirr --data data/cirr --split test1 --checkpoint runs/x/isa.pt --out cirr_test1.json
    python evaluate.py check --benchmark cirr --data data/cirr                                      # is everything there?
    python evaluate.py check --images cc3m/                                                         # the same of a training folder
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import baselines
import benchmarks
import isa
import query_side
from baselines.searle import invert
from benchmarks.layout import require_images
from benchmarks.report import print_table, summarize
from plumbing.command import run_command
from plumbing.features import image_features
from plumbing.files import check_output, replacing, write_json
from plumbing.images import check_images, list_images, load_images
from plumbing.options import add_shared_options, check_lengths, check_options
from plumbing.pictures import draw_picture
from plumbing.precision import autocast, open_blip
from pocket import world
from pocket.specs import EDIT_KINDS
from query_side.query_model import load_query_model, read_checkpoint

POCKET_DATA = "data/pocket"


SIMPLE = {  # method -> query features from (blip, v of the reference, modifiers)
    "image": baselines.image_only,
    "text": baselines.text_only,
    "image+text": baselines.image_plus_text,
    "0.5image+text": partial(baselines.image_plus_text, image_weight=0.5),
}


CEILINGS = {  # the same through captions of what the pocket world really drew: how far its BLIP could get at all
    "reference caption": "what the light encoder would have to say",
    "target caption": "what the modifier is about",
}


CHECKPOINTS = {"isa": "checkpoint", "pic2word": "pic2word", "searle": "searle"}  # query models -> the options that name their files


METHODS = (*SIMPLE, *CHECKPOINTS, "searle-oti", *CEILINGS)


DEFAULT_METHODS = (*SIMPLE, "isa", *CEILINGS)


def modifiers(query):
    """The texts of one query whose features are averaged: FashionIQ's two captions are joined in both orders."""
    if len(query.captions) == 2:
        first, second = query.captions
        return [f"{first} and {second}", f"{second} and {first}"]
    return query.captions


@torch.no_grad()
def encode_queries(encode, queries, precision, device, batch_size=256):
    """encode(rows, modifiers) -> [B, E] for every text of every query; the texts of a query are averaged. -> [Q, E]."""
    texts = [(row, text) for row, query in enumerate(queries) for text in modifiers(query)]
    texts.sort(key=lambda pair: len(pair[1]))  # like lengths together: less padding
    features = []
    for start in range(0, len(texts), batch_size):
        rows, words = zip(*texts[start : start + batch_size], strict=True)
        with autocast(device, precision):
            features.append(F.normalize(encode(torch.tensor(rows), list(words)).float(), dim=-1))
    features = torch.cat(features).cpu()
    q = torch.zeros(len(queries), features.shape[1]).index_add_(0, torch.tensor([row for row, _ in texts]), features)
    return F.normalize(q, dim=-1)


@torch.no_grad()
def through_query_model(query_model, paths, precision, device, workers):
    """Image files -> U [M, L, d_w], what a phone would send for each, and v [M, E] where the model serves the gallery too."""
    preprocess = partial(query_side.preprocess, query_model.encoder)
    two_sided = isinstance(query_model, query_side.TwoSidedModel)
    sentences, features = [], []
    batches = load_images(list_images(paths), preprocess, 128, workers)
    for _, pixels, bad in tqdm(batches, desc="sentences", unit="batch", leave=False, disable=None):
        if bad:
            raise ValueError(next(iter(bad.values())))
        with autocast(device, precision):
            U, v = query_model(pixels.to(device))[:2] if two_sided else (query_model(pixels.to(device)), None)
        sentences.append(U.float())
        features.append(v)
    return torch.cat(sentences), torch.cat(features).cpu() if two_sided else None


class Setting:
    """One benchmark ready to be queried: gallery and reference features from the frozen BLIP, computed once."""

    def __init__(self, blip, benchmark, args, precision):
        self.blip, self.benchmark, self.precision, self.workers = blip, benchmark, precision, args.workers
        self.sentences = getattr(args, "sentences", None)
        extra = {query.reference for query in benchmark.queries} - set(benchmark.gallery)
        self.names = [*benchmark.gallery, *sorted(extra)]
        self.place = {name: i for i, name in enumerate(self.names)}
        label = " ".join(filter(None, (benchmark.name, benchmark.category, benchmark.split)))
        images = list_images([benchmark.paths[name] for name in self.names])
        features = image_features(blip, images, args.cache_dir, precision=precision, workers=args.workers,
                                  what=f"images of {label}", dtype=np.float32)  # fmt: skip
        self.v = torch.from_numpy(np.asarray(features.v))  # [M, E], the gallery first
        self.references = torch.tensor([self.place[query.reference] for query in benchmark.queries])  # [Q]

    @property
    def gallery(self):
        return self.v[: len(self.benchmark.gallery)]

    def captions(self):
        """{name: a full caption} where the data set has captions.json beside its annotations (the pocket world), else None."""
        image = self.benchmark.paths[self.names[0]].absolute()
        path = image.parents[1 if self.benchmark.name == "fashioniq" else 2] / "captions.json"
        return json.loads(path.read_text()) if path.exists() else None

    def query_features(self, method, query_model=None, prompt="a photo of"):
        """Features [Q, E] of every query by a method of METHODS; None where the method does not apply to this data."""
        blip, device = self.blip, self.blip.temp.device
        if method in CHECKPOINTS or method == "searle-oti":
            used, own = self.references.unique(return_inverse=True)  # [R], [Q]
            if method == "searle-oti":
                U = self.invert(self.v[used].to(device))  # [R, 1, d_w]
            else:
                paths = [self.benchmark.paths[self.names[i]] for i in used.tolist()]
                U, _ = through_query_model(query_model, paths, self.precision, device, self.workers)  # [R, L, d_w]

            def encode(rows, words):
                return blip.encode_text(*isa.compose_query(blip, U[own[rows].to(device)], words, prompt))
        elif method in CEILINGS:
            captions = self.captions()
            if captions is None:
                return None

            def encode(rows, words):
                queries = [self.benchmark.queries[i] for i in rows.tolist()]
                if method == "target caption":
                    words = [f"{prompt} {captions[query.targets[0]]}" for query in queries]
                else:
                    words = [f"{prompt} {captions[q.reference]} {isa.continuation(w)}" for q, w in zip(queries, words, strict=True)]
                return baselines.text_only(blip, None, words)
        else:

            def encode(rows, words):
                return SIMPLE[method](blip, self.v[self.references[rows]].to(device), words)

        return encode_queries(encode, self.benchmark.queries, self.precision, device)

    def invert(self, v):
        """SEARLE's optimization-based inversion of images, given by v [R, E] -> words [R, 1, d_w]; minutes."""
        regularize = baselines.TextRegularization(self.blip, baselines.read_sentences(self.sentences), precision=self.precision)
        return invert(self.blip, v, regularize, precision=self.precision)

    def rank(self, q, query_model=None, k=50):
        """Query features -> rankings, and CIRR's subset rankings (else None). The gallery's features are the frozen BLIP's, unless
        the query model was trained for both sides."""
        gallery = self.gallery
        if isinstance(query_model, query_side.TwoSidedModel):
            paths = [self.benchmark.paths[name] for name in self.benchmark.gallery]
            _, gallery = through_query_model(query_model, paths, self.precision, self.blip.temp.device, self.workers)
        subsets = benchmarks.rank_subsets(self.benchmark, q, gallery) if self.benchmark.name == "cirr" else None
        return benchmarks.rank(self.benchmark, q, gallery, k), subsets


def open_benchmarks(args):
    """The benchmarks that the options ask for, complete; the pocket world is drawn first where it is missing."""
    if args.data is None:
        world.ensure(POCKET_DATA)
    names = ("cirr", "fashioniq", "circo") if args.benchmark == "all" else (args.benchmark,)
    split = args.split or "test"
    loaded = []
    for name in names:
        root = Path(args.data or POCKET_DATA) / name if args.benchmark == "all" or args.data is None else args.data
        official = "test1" if name == "cirr" and split == "test" else split
        categories = benchmarks.CATEGORIES if name == "fashioniq" else (None,)
        loaded += [benchmarks.load(name, root, official, category) for category in categories]
    for benchmark in loaded:
        require_images(benchmark)
        if not benchmark.queries[0].targets:
            raise ValueError(
                f"{benchmark.name} {benchmark.split} has no ground truth; `python evaluate.py submit` writes what its server scores"
            )
    return loaded


def check_modifiers(blip, benchmark, trained):
    """ValueError for a modifier that is too long for BLIP, after the sentence of any of the models with the settings `trained`."""
    label = " ".join(filter(None, (benchmark.name, benchmark.category, benchmark.split)))
    texts = [(f"the modifier of query {q.id} of {label} ({text[:40]!r})", isa.continuation(text))
             for q in benchmark.queries for text in modifiers(q)]  # fmt: skip
    for prompt, tokens in {(settings["prompt"], settings["tokens"]) for settings in trained}:
        check_lengths(blip, prompt, tokens, texts)


def table(args):
    checkpoints = {m: getattr(args, CHECKPOINTS[m]) for m in CHECKPOINTS if m in args.methods}
    for path in sum(checkpoints.values(), []):  # what could fail at the end is asked at the start
        read_checkpoint(path)
    if "searle-oti" in args.methods:
        baselines.read_sentences(args.sentences)
    for path in filter(None, (args.json, args.picture)):
        check_output(path)
    if args.picture and Image.registered_extensions().get(Path(args.picture).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{args.picture}: PIL writes no such format; give a name that ends in .png")
    opened = open_benchmarks(args)
    blip, precision = open_blip(vars(args))
    models = {m: [load_query_model(path, blip) for path in paths] for m, paths in checkpoints.items()}
    trained = [{"prompt": "", "tokens": 0}, *(settings for runs in models.values() for _, settings in runs)]
    for benchmark in opened:
        check_modifiers(blip, benchmark, trained)
    settings = {k: v for k, v in vars(args).items() if isinstance(v, str | int | float | list | None)}
    report = {"settings": {**settings, "precision": precision, "blip_fingerprint": blip.fingerprint}, "results": {}}
    picture = None
    scores = {}  # benchmark -> method -> [seed][category] -> (metrics, metrics by kind)
    for benchmark in opened:
        setting = Setting(blip, benchmark, args, precision)
        for method in tqdm(args.methods, desc=f"{benchmark.name} {benchmark.category or ''}", leave=False, disable=None):
            runs = models.get(method, [(None, {"prompt": "a photo of"})])
            for seed, (model, trained) in enumerate(runs):
                q = setting.query_features(method, model, trained["prompt"])
                if q is None:
                    continue
                rankings, subsets = setting.rank(q, model)
                result = [f(benchmark, rankings, subsets) for f in (benchmarks.score, benchmarks.score_by_kind)]
                scores.setdefault(benchmark.name, {}).setdefault(method, {}).setdefault(seed, []).append(result)
                if method == "isa" and picture is None and args.picture:
                    picture = draw_picture(setting, rankings)
    several = [m for m, option in CHECKPOINTS.items() if len(getattr(args, option)) > 1]
    for name, methods in scores.items():
        rows = {}
        for method, seeds in methods.items():
            rows[method] = {"all": summarize([benchmarks.average([r for r, _ in parts]) for parts in seeds.values()])}
            for kind in (k for k in EDIT_KINDS if all(k in by_kind for _, by_kind in seeds[0])):
                rows[method][kind] = summarize([benchmarks.average([k[kind] for _, k in parts]) for parts in seeds.values()])
            for i, category in enumerate(benchmarks.CATEGORIES if name == "fashioniq" else ()):
                rows[method][category] = summarize([parts[i][0] for parts in seeds.values()])
        report["results"][name] = rows
        print_table(name, rows, args.split or "test", several)
    write_json(args.json, report)
    print(f"\nwrote {args.json}")
    if picture is not None:
        path = Path(args.picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            picture.save(file)
        print(f"wrote {args.picture}: query, modifier, the five best; framed = the target")


def annotated(args):
    """The benchmark's parts of one split: one, or FashionIQ's three categories."""
    categories = benchmarks.CATEGORIES if args.benchmark == "fashioniq" else (None,)
    return [benchmarks.load(args.benchmark, args.data, args.split, category) for category in categories]


def score(args):
    parts = annotated(args)
    results = []
    for benchmark in parts:
        rankings = benchmarks.read_predictions(args.predictions, benchmark)
        subsets = benchmarks.read_predictions(args.subset, benchmark, "recall_subset") if args.subset else None
        result = benchmarks.score(benchmark, rankings, subsets)
        if benchmark.name == "cirr" and subsets is None:
            result = {k: v for k, v in result.items() if k[:2] != "Rs"}  # a top-50 list does not rank the whole subset
        results.append(result)
        short = sum(len(names) < min(50, len(benchmark.gallery) - 1) for names in rankings.values())
        if short:
            print(f"{short} of {len(rankings)} lists hold fewer than 50 names; what they leave out counts as not found")
        print(f"{benchmark.name} {benchmark.category or ''} {benchmark.split}: "
              + "  ".join(f"{k} {v:.2f}" for k, v in result.items()))  # fmt: skip
        for aspect, value in benchmarks.aspect_scores(benchmark, rankings).items():
            print(f"  mAP@10 {aspect}: {value:.2f}")
    if len(results) > 1:
        print("average: " + "  ".join(f"{k} {v:.2f}" for k, v in benchmarks.average(results).items()))


def submit(args):
    read_checkpoint(args.checkpoint)  # now: a gallery may take hours to encode
    check_output(args.out)
    parts, out = annotated(args), Path(args.out)
    for benchmark in parts:
        require_images(benchmark)
    blip, precision = open_blip(vars(args))
    model, trained = load_query_model(args.checkpoint, blip)
    for benchmark in parts:
        check_modifiers(blip, benchmark, [trained])
    out.parent.mkdir(parents=True, exist_ok=True)
    document, subset_document = {}, {}
    for benchmark in parts:
        setting = Setting(blip, benchmark, args, precision)
        rankings, subsets = setting.rank(setting.query_features("isa", model, trained["prompt"]), model)
        document |= benchmarks.predictions(benchmark, rankings)
        if subsets is not None:
            subset_document = benchmarks.predictions(benchmark, subsets, "recall_subset")
    benchmarks.write_predictions(out, document)
    print(f"wrote {out}")
    if subset_document:
        subset_out = out.with_name(f"{out.stem}_subset{out.suffix}")
        benchmarks.write_predictions(subset_out, subset_document)
        print(f"wrote {subset_out}")


def check(args):
    if args.images:
        return check_images(args)
    print(f"expected below {args.data}:\n\n{benchmarks.expected_tree(args.benchmark)}\n")
    complete = True
    for row in benchmarks.check_layout(args.benchmark, args.data, args.splits):
        print(f"{args.benchmark} {row['category'] or ''} {row['split']}: ", end="")
        if row["problem"]:
            complete = False
            print(row["problem"] if not row["missing"] else "annotations are missing")
            for file in row["missing"]:
                print(f"  missing: {file}")
            continue
        found = row["images"] - row["images_missing"]
        print(f"{row['queries']} queries, gallery of {row['gallery']}, {found} of {row['images']} images found")
        for name in row["first_missing"]:
            print(f"  missing: {name}")
        complete &= not row["images_missing"]
    if not complete:
        root = benchmarks.find_root(args.benchmark, args.data)
        hint = "" if root in (None, Path(args.data)) else f", and --data {root} has its annotations"
        raise ValueError(f"{args.data} is not complete; see the list above{hint}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, help, benchmark):
        p = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        p.set_defaults(run=run)
        if benchmark:
            p.add_argument("--benchmark", choices=("cirr", "fashioniq", "circo"), required=benchmark == "required")
            p.add_argument("--data", required=benchmark == "required", help="root of the benchmark, in its official layout")
        return p

    p = command("table", table, "a table of methods: ISA, the simple baselines, the ceilings of the pocket world", None)
    p.add_argument("--benchmark", choices=("all", "cirr", "fashioniq", "circo"), default="all")
    p.add_argument("--data", help="root of the benchmark (of all three: their common parent); default: the pocket world")
    p.add_argument("--split", help="val, test, test1, ...; default: test, with targets only in the pocket world")
    p.add_argument("--checkpoint", nargs="+", default=["runs/pocket/isa.pt"], help="isa.pt; several = seeds of one setting")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT_METHODS), help="isa: any checkpoint of train.py; "
                   "searle-oti inverts each reference image, which takes minutes")
    p.add_argument("--pic2word", nargs="+", default=["runs/pic2word/isa.pt"], help="its checkpoint or checkpoints")
    p.add_argument("--searle", nargs="+", default=["runs/searle/isa.pt"], help="its checkpoint or checkpoints")
    p.add_argument("--sentences", default="pocket/sentences.json", help="for searle-oti: JSON, concept -> list of sentences")
    p.add_argument("--json", default="runs/table.json", help="the table with its settings")
    p.add_argument("--picture", default="runs/retrieved.png", help='some queries and what ISA found; "" = none')
    add_shared_options(p)

    p = command("score", score, "score a prediction file; needs annotations only", "required")
    p.add_argument("--split", default="val")
    p.add_argument("predictions", help="JSON in the test server's format; FashionIQ: {category: {index: [names]}}")
    p.add_argument("--subset", help="CIRR: the recall_subset file, for Rs@K")

    p = command("submit", submit, "write the file that the test server of CIRR or CIRCO takes", "required")
    p.add_argument("--split", required=True)
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--out", required=True, help="CIRR: a second file NAME_subset.json is written beside it")
    add_shared_options(p)

    p = command("check", check, "compare a folder with the layout that is expected", "or --images")
    p.add_argument("--splits", nargs="+", help="default: those that evaluation asks for and whose annotations are there, or val")
    p.add_argument("--images", help="a folder of images to train on, in place of --benchmark and --data")
    p.add_argument("--cache-dir", default="cache", help="with --images: folder for the list of them, which train.py then finds")
    args = parser.parse_args(argv)
    if args.command == "check" and bool(args.images) == bool(args.benchmark and args.data):
        parser.error("check needs --benchmark and --data, or --images alone")
    check_options(parser, args, workers=0, threads=0)
    return args


if __name__ == "__main__":
    arguments = parse_args()
    run_command("evaluate.py", arguments.run, arguments, "interrupted; stored features are kept")
