"""A benchmark and all methods: queries, features, rankings."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import baselines
import benchmarks
import isa
import query_side
from baselines.searle import invert
from plumbing.features import image_features
from plumbing.images import list_images, load_images
from plumbing.precision import autocast
from pocket import ceilings

SIMPLE = {  # method -> function (blip, v of the references [B, E], B modifiers) -> [B, E]
    "image": baselines.image_only,
    "text": baselines.text_only,
    "image+text": baselines.image_plus_text,
    "0.5image+text": partial(baselines.image_plus_text, image_weight=0.5),
}
MODEL_OPTIONS = {"isa": "checkpoint", "pic2word": "pic2word", "searle": "searle"}  # of evaluate.py
METHODS = (*SIMPLE, *MODEL_OPTIONS, "searle-oti", *ceilings.METHODS)


def modifiers(query):
    """Texts to average: FashionIQ joins its captions in both orders."""
    if len(query.captions) == 2:
        first, second = query.captions
        return [f"{first} and {second}", f"{second} and {first}"]
    return query.captions


@torch.no_grad()
def encode_queries(encode, queries, precision, device, batch_size=256):
    """encode(rows of queries, int64 [B]; B modifiers) -> [Q, E], unit norm, float32, on the CPU."""
    texts = [(row, text) for row, query in enumerate(queries) for text in modifiers(query)]
    texts.sort(key=lambda pair: len(pair[1]))  # like lengths together: less padding
    features, owner = [], torch.tensor([row for row, _ in texts])
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        with autocast(device, precision):
            batch = encode(owner[part], [text for _, text in texts[part]])
        features.append(F.normalize(batch.float(), dim=-1))
    features = torch.cat(features).cpu()
    q = torch.zeros(len(queries), features.shape[1]).index_add_(0, owner, features)
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


class Setting:
    """A benchmark with the frozen BLIP's v [M, E], gallery first."""

    def __init__(self, blip, benchmark, precision="fp32", cache_dir="cache", workers=1,
                 sentences="pocket/sentences.json"):
        self.blip, self.benchmark, self.sentences = blip, benchmark, sentences
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

    def query_features(self, method, query_model=None, prompt="a photo of"):
        """[Q, E], unit norm."""
        blip, used = self.blip, self.references.unique()  # [R], ascending
        if method in SIMPLE:
            def encode(rows, texts):
                return SIMPLE[method](blip, self.v[self.references[rows]].to(self.device), texts)
        elif method in ceilings.METHODS:
            encode = ceilings.encoder(blip, self.benchmark, method, prompt)
        else:
            if method == "searle-oti":
                regularize = baselines.TextRegularization(
                    blip, baselines.read_sentences(self.sentences), precision=self.precision)
                v = self.v[used].to(self.device)
                U = invert(blip, v, regularize, precision=self.precision)
            else:
                U, _ = self.encode_images(query_model, [self.names[i] for i in used.tolist()])
            own = torch.searchsorted(used, self.references)  # [Q]: rows of U [R, L, d_w]

            def encode(rows, texts):
                return blip.encode_text(*isa.compose_query(blip, U[own[rows]], texts, prompt))
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

    def encode_images(self, query_model, names):
        paths = [self.benchmark.paths[name] for name in names]
        return through_query_model(query_model, paths, self.precision, self.device, self.workers)
