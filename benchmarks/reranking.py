"""Re-ranking, which the paper does not have: BLIP's matching head reads each query's sentence
against its K best images.

    score = similarity + weight * probability that sentence and image match

The head sees all tokens of both, so it notices what two single vectors miss; but alone, without
the similarity, it orders images worse than the similarity does (paper/BEYOND.md). F^v is not
stored: a chunk of images is encoded, read by all sentences that ask for them, and dropped.
"""

import torch
from tqdm import tqdm

from benchmarks.ranking import score_pairs
from plumbing.images import load_images
from plumbing.precision import autocast

IMAGES, PAIRS = 64, 64  # encoded, and read, at once: at ViT-B's size 40 MB and 80 MB a layer


@torch.no_grad()
def matching_probabilities(blip, images, speak, sentence, image, precision="fp32", workers=1):
    """P pairs of a sentence and an image, int64 [P] each -> float32 [P].

    images: an ImageList; speak(numbers of sentences [B]) -> words [B, T, d_w], mask [B, T]. Each
    image is encoded once. Raises ValueError for an image that cannot be read.
    """
    device, found, done = blip.temp.device, torch.empty(len(image)), 0
    image, order = image.sort(stable=True)
    batches = load_images(images, blip.preprocess, IMAGES, workers, image.unique().tolist())
    for rows, pixels, bad in tqdm(batches, "re-ranking", leave=False, disable=None):
        if bad:
            raise ValueError(next(iter(bad.values())))
        stop = int((image <= rows[-1]).sum())  # pairs are in the order of their images
        place = torch.searchsorted(torch.tensor(rows), image[done:stop])  # rows of F^v
        with autocast(device, precision):
            _, F_v = blip.encode_image(pixels.to(device))  # [M, 1+N, D]
            for pairs, at in zip(order[done:stop].split(PAIRS), place.split(PAIRS), strict=True):
                seen = F_v[at[0] : at[-1] + 1]  # keys and values of no other images
                logits = blip.match(*speak(sentence[pairs]), seen, (at - at[0]).to(device))
                found[pairs] = logits.softmax(dim=1)[:, 1].cpu()
        done = stop
    return found


def rerank(benchmark, rankings, query_features, gallery, chances, k, weight=0.05):
    """Rankings -> the same with the first k names of each in a new order, the rest behind them.

    query_features [Q, E], gallery [N, E]; chances: {(query id, name): matching probability}. Ties
    keep the old order.
    """
    place, reranked = {name: i for i, name in enumerate(benchmark.gallery)}, {}
    for i, query in enumerate(benchmark.queries):
        names, rest = rankings[query.id][:k], rankings[query.id][k:]
        chance = torch.tensor([chances[query.id, name] for name in names])
        rows = torch.tensor([place[name] for name in names])
        scores = score_pairs(query_features, gallery, torch.full_like(rows, i), rows)
        order, _ = reorder(scores, chance, weight)
        reranked[query.id] = [names[j] for j in order.tolist()] + rest
    return reranked


def reorder(scores, chances, weight):
    """Of K images of a query, best first -> their new order [K] and scores [K] in it."""
    scores = scores + weight * chances
    order = scores.argsort(descending=True, stable=True)
    return order, scores[order]


def check_reranking(blip, k, sizes):
    """ValueError where this model or gallery cannot be re-ranked. sizes: {gallery: images}."""
    if not hasattr(blip, "itm_head"):
        raise ValueError(f"--rerank: {type(blip).__name__} has no matching head, which reads a "
                         "sentence against an image; give a BLIP, or leave --rerank out")
    for name, count in sizes.items():
        if k > count:
            raise ValueError(f"--rerank {k}: {name} has {count} images to rank; give at most "
                             f"--rerank {count}")
