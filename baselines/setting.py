"""A benchmark and all methods: queries, sentences, features, rankings."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import baselines
import benchmarks
import isa
import query_side
from baselines.searle import INVERTED_TOGETHER, invert
from plumbing.features import image_features
from plumbing.images import list_images, load_images
from plumbing.precision import autocast
from pocket import ceilings, world

POCKET_DATA = "data/pocket"
WEIGHTS = str(Path(__file__).with_name("weights.json"))  # chosen on validation: weights.py

SIMPLE = {  # method -> function (blip, v of the references [B, E], B modifiers) -> [B, E]
    "image": baselines.image_only,
    "text": baselines.text_only,
    "image+text": baselines.image_plus_text,
    "0.5image+text": partial(baselines.image_plus_text, image_weight=0.5),
}
STRONGER = {  # the same with a weight
    "weighted": lambda *inputs, weight: baselines.image_plus_text(*inputs, image_weight=weight),
    "slerp": lambda *inputs, weight: baselines.slerp(*inputs, image_share=weight),
    "product": lambda *inputs, weight: baselines.product(*inputs),  # has none
}
MODEL_OPTIONS = {  # of evaluate.py
    "isa": "checkpoint", "isa+text": "checkpoint", "pic2word": "pic2word", "searle": "searle"}
METHODS = (*SIMPLE, *STRONGER, *MODEL_OPTIONS, "searle-oti", *ceilings.METHODS)
NOT_IN_THE_PAPER = ("0.5image+text", *STRONGER, "isa+text")


def open_benchmarks(benchmark="all", data=None, split=None, images=True, targets=True):
    """One benchmark or "all" three -> list of Benchmark, FashionIQ one for each category.

    data: the root of the one, the parent of all; by default the pocket world, drawn if need be.
    Raises ValueError where `images` or `targets`, if needed, are missing.
    """
    if data is None:
        world.ensure(POCKET_DATA)
    opened, split = [], split or "test"
    for name in benchmarks.PAPERS if benchmark == "all" else (benchmark,):
        root = data if data and benchmark != "all" else Path(data or POCKET_DATA) / name
        official = "test1" if (name, split) == ("cirr", "test") else split
        for category in benchmarks.CATEGORIES if name == "fashioniq" else (None,):
            opened.append(benchmarks.load(name, root, official, category))
    for part in opened:
        if images:
            benchmarks.require_images(part)
        if targets and not part.queries[0].targets:
            raise ValueError(f"{part.name} {part.split} has no ground truth; "
                             "`evaluate.py submit` writes what its server scores")
    return opened


def read_weights(path=WEIGHTS):
    """What `python -m baselines.weights` wrote -> {method: weight}. Raises ValueError."""
    try:
        chosen = json.loads(Path(path).read_text())["chosen"]
        return {method: float(chosen[method]) for method in ("weighted", "slerp", "isa+text")}
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; `python -m baselines.weights --out` "
                         "writes it") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: holds no weights; write it again by `python -m "
                         "baselines.weights --out`") from None


def modifiers(query):
    """Texts to average: FashionIQ joins its captions in both orders."""
    if len(query.captions) == 2:
        first, second = query.captions
        return [f"{first} and {second}", f"{second} and {first}"]
    return query.captions


@torch.no_grad()
def encode_queries(encode, queries, precision, device, batch_size=256):
    """encode(rows of queries, int64 [B]; B modifiers) -> [Q, E], unit norm, float32, on the CPU.

    Two features a query, [B, 2, E], give [Q, 2, E].
    """
    texts = [(row, text) for row, query in enumerate(queries) for text in modifiers(query)]
    texts.sort(key=lambda pair: len(pair[1]))  # like lengths together: less padding
    features, owner = [], torch.tensor([row for row, _ in texts])
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        with autocast(device, precision):
            batch = encode(owner[part], [text for _, text in texts[part]])
        features.append(F.normalize(batch.float(), dim=-1))
    features = torch.cat(features).cpu()
    q = torch.zeros(len(queries), *features.shape[1:]).index_add_(0, owner, features)
    return F.normalize(q, dim=-1)


@torch.no_grad()
def through_query_model(query_model, paths, precision, device, workers):
    """M image files -> U [M, L, d_w], and v [M, E] of a two-sided model, None of others."""
    images, preprocess = list_images(paths), partial(query_side.preprocess, query_model.encoder)
    batches, outputs = load_images(images, preprocess, 128, workers), []
    for _, pixels, bad in tqdm(batches, "sentences", unit="batch", leave=False, disable=None):
        if bad:
            raise ValueError(next(iter(bad.values())))
        with autocast(device, precision):
            output = query_model(pixels.to(device))
        outputs.append(output[:2] if isinstance(output, tuple) else (output, None))
    U, v = zip(*outputs, strict=True)
    return torch.cat(U).float(), None if v[0] is None else torch.cat(v).cpu()


def check_methods(blip, k, parts, methods, files, models):
    """ValueError where --rerank k cannot be done: by these methods, models and galleries.

    files, models: {method: [path]}, {method: [(model, settings)]}.
    """
    if not {*methods} - ({*SIMPLE, *STRONGER} - {"text"}):
        raise ValueError(f"--rerank: {', '.join(methods)} have no sentence to read; add isa, text "
                         "or another method that has one")
    for method, runs in models.items():
        for path, (_, trained) in zip(files[method], runs, strict=True):
            if trained["gallery"] == "query":
                raise ValueError(f"--rerank: {path} was trained for its own gallery, which BLIP's "
                                 "matching head cannot read; give another model")
    sizes = {p.category or p.name: len(p.gallery) - (p.name == "cirr") for p in parts}
    benchmarks.check_reranking(blip, k, sizes)


class Setting:
    """A benchmark with the frozen BLIP's v [M, E], gallery first."""

    def __init__(self, blip, benchmark, precision="fp32", cache_dir="cache", workers=1,
                 sentences="pocket/sentences.json", weights=WEIGHTS):
        self.blip, self.benchmark, self.sentences = blip, benchmark, sentences
        self.weights = read_weights(weights) if weights else {}
        self.precision, self.device, self.workers = precision, blip.temp.device, workers
        gallery, references = benchmark.gallery, [query.reference for query in benchmark.queries]
        self.names = [*gallery, *sorted(set(references) - set(gallery))]
        self.place = {name: i for i, name in enumerate(self.names)}  # rows of v
        self.references = torch.tensor([self.place[name] for name in references])  # [Q]
        what = " ".join(filter(None, (benchmark.name, benchmark.category, benchmark.split)))
        images = list_images([benchmark.paths[name] for name in self.names])
        features = image_features(blip, images, cache_dir, precision=precision, workers=workers,
                                  what=f"images of {what}", dtype=np.float32)
        self.v = torch.from_numpy(np.asarray(features.v))
        self.gallery = self.v[: len(gallery)]  # [N, E]

    def speaker(self, method, query_model=None, prompt="a photo of"):
        """A function (rows of queries, int64 [B]; B modifiers) -> words [B, T, d_w], mask [B, T].

        They are the method's sentences as BLIP reads them. None for methods that use an image's v.
        """
        blip, used = self.blip, self.references.unique()  # [R], ascending
        if method == "text":
            return lambda rows, texts: baselines.text_words(blip, texts)
        if method in (*SIMPLE, *STRONGER):
            return None
        if method in ceilings.METHODS:
            return ceilings.speaker(blip, self.benchmark, method, prompt)
        if method == "searle-oti":
            regularize = baselines.TextRegularization(
                blip, baselines.read_sentences(self.sentences), precision=self.precision)
            v = self.v[used].to(self.device)
            U = torch.cat([invert(blip, v[i], regularize, precision=self.precision, numbers=i)
                           for i in torch.arange(len(v)).split(INVERTED_TOGETHER)])
        else:
            U, _ = self.encode_images(query_model, [self.names[i] for i in used.tolist()])
        own = torch.searchsorted(used, self.references)  # [Q]: rows of U [R, L, d_w]
        return lambda rows, texts: isa.compose_query(blip, U[own[rows]], texts, prompt)

    def query_features(self, method, query_model=None, prompt="a photo of", speak=None):
        """[Q, E], unit norm; of "product" [Q, 2, E]. speak: the method's `speaker`, if at hand."""
        blip, weight = self.blip, self.weights.get(method)
        speak = speak or self.speaker(method, query_model, prompt)

        def encode(rows, texts):
            if speak is None:
                combine = SIMPLE.get(method) or partial(STRONGER[method], weight=weight)
                return combine(blip, self.v[self.references[rows]].to(self.device), texts)
            q = blip.encode_text(*speak(rows, texts))
            if method == "isa+text":
                q = F.normalize(q + weight * baselines.text_only(blip, None, texts), dim=-1)
            return q

        return encode_queries(encode, self.benchmark.queries, self.precision, self.device)

    def rank(self, q, query_model=None, k=50):
        """q [Q, E] -> {query id: k names, best first}; the same of CIRR's subsets, or None.

        Similarity is to the frozen BLIP's v, or to a two-sided query model's own.
        """
        gallery, subsets = self.gallery, None
        if isinstance(query_model, query_side.TwoSidedModel):
            _, gallery = self.encode_images(query_model, self.benchmark.gallery)
        if self.benchmark.name == "cirr":
            subsets = benchmarks.rank_subsets(self.benchmark, q, gallery)
        return benchmarks.rank(self.benchmark, q, gallery, k), subsets

    def rerank(self, q, best, subsets, speak, k, weight):
        """What `rank` gave -> the same, re-ranked by sentences of `speaker`."""
        rankings = [best] if subsets is None else [best, subsets]
        chances = self.matching(rankings, speak, k)
        new = [benchmarks.rerank(self.benchmark, names, q, self.gallery, chances, k, weight)
               for names in rankings]
        return (*new, None)[:2]

    def matching(self, rankings, speak, k):
        """Matching probabilities of the first k names of each ranking: {(query id, name): p}.

        With two orders of captions a query has two sentences, whose mean counts.
        """
        queries, names = self.benchmark.queries, self.benchmark.gallery
        texts = [(row, text) for row, query in enumerate(queries) for text in modifiers(query)]
        owner, numbers = torch.tensor([row for row, _ in texts]), {}
        for number, (row, _) in enumerate(texts):
            numbers.setdefault(queries[row].id, []).append(number)
        pairs = sorted({(query, name) for ranking in rankings
                        for query, best in ranking.items() for name in best[:k]})
        read = [(number, self.place[name], i)
                for i, (query, name) in enumerate(pairs) for number in numbers[query]]
        sentence, image, pair = torch.tensor(read).T
        found = benchmarks.matching_probabilities(
            self.blip, list_images([self.benchmark.paths[name] for name in names]),
            lambda rows: speak(owner[rows], [texts[i][1] for i in rows.tolist()]),
            sentence, image, self.precision, self.workers)
        total = torch.zeros(len(pairs)).index_add_(0, pair, found)
        return dict(zip(pairs, (total / pair.bincount()).tolist(), strict=True))

    def encode_images(self, query_model, names):
        paths = [self.benchmark.paths[name] for name in names]
        return through_query_model(query_model, paths, self.precision, self.device, self.workers)
