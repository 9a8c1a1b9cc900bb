"""Exact ranking by inner product, in memory that does not grow with the gallery.

A float32 matrix product is fast, but rounds differently at different places, so equal images would
not tie. It therefore only selects candidates, which are then compared by sums in float64.
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F


@torch.no_grad()
def top_k(query_features, gallery_features, k, exclude=None, chunk=4096):
    """The k most similar images: query [Q, E], gallery [N, E] -> indices [Q, k], best first.

    Similarity is the inner product, summed in float64 and rounded to float32; ties keep the order
    of the gallery: a tensor, or the path of an .npy file, held `chunk` rows at a time. exclude: for
    each query a row to leave out, or -1. k is clipped to N, or N - 1 if any row is excluded.
    Raises FileNotFoundError, and ValueError for an unusable file or shape, k < 1, NaN and infinity.
    """
    shape, read = _open_gallery(gallery_features)
    q, n = len(query_features), shape[0]
    exclude = torch.as_tensor([-1] * q if exclude is None else exclude)
    if query_features.dim() != 2 or query_features.shape[1:] != shape[1:] or len(exclude) != q:
        raise ValueError(f"top_k needs [Q, E], [N, E] and Q exclusions, got "
                         f"{list(query_features.shape)}, {list(shape)} and {len(exclude)}")
    k = min(k, n - bool((exclude >= 0).any()))
    if k < 1:
        raise ValueError(f"top_k has nothing to return: k clipped to {k} for a gallery of {n}")
    query_features = query_features.cpu()
    _largest(query_features)
    best, place = torch.full((q, k), -torch.inf), torch.full((q, k), n)  # so far, best first
    for start in range(0, n, chunk):
        rows = read(start, min(start + chunk, n))  # [R, E]
        size = min(16, -(-len(rows) // (8 * k)))  # of a group of rows, the last one padded
        padding = rows[-1:].expand(-len(rows) % size, -1)
        whole = (torch.cat([rows, padding]) if len(padding) else rows).float()
        largest = _largest(whole)
        for i in range(0, q, 256):  # bounds memory for any Q
            block = slice(i, i + 256)
            query, old = query_features[block], best[block]
            owner, row = _candidates(query, whole, size, largest, k, old[:, -1])  # [C]
            keep = (row < len(rows)) & (row + start != exclude[block][owner])
            owner, row = owner[keep], row[keep]
            count = owner.bincount(minlength=len(query))
            slot = k + torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]  # after the old
            values = torch.full((len(query), k + int(count.max())), -torch.inf)
            places = torch.full(values.shape, n)
            values[:, :k], values[owner, slot] = old, _similarity(query, rows, owner, row)
            places[:, :k], places[owner, slot] = place[block], row + start
            values, order = values.sort(descending=True, stable=True)
            best[block], place[block] = values[:, :k], places.gather(1, order[:, :k])
    return place


def _candidates(query, rows, size, largest, k, least):
    """All (query, row), [C] each, that may be among the k best; least [Q]: the k-th so far."""
    rough, e = query.float() @ rows.T, query.shape[1]  # [Q, R]
    tops = F.max_pool1d(rough, size)  # [Q, R / size], the highest of each group
    # |rough - similarity| <= error, whatever the order of the sum: E products, sums and a few other
    # roundings, each by 2^-24 of at most |q|_1 max|g|, and underflow. Where float32 may overflow,
    # error is infinite and every row stays a candidate, as NaN is not less than anything.
    bound = (1.01 * query.double().abs().sum(1) * largest).float()  # [Q]
    error = bound * ((e + 8) * 2**-24) + 2 * e * 2**-126
    chosen = ~(tops < (least - error)[:, None])  # [Q, R / size]
    other = tops.shape[1] - k  # all tops but k
    if chosen.count_nonzero() > 2 * k * len(query) and other > 0:  # these rows raise the bar
        least = torch.maximum(least, tops.kthvalue(other).values - error)  # one may be excluded
        chosen = ~(tops < (least - error)[:, None])
    owner, group = chosen.nonzero().T
    rough = rough.view(-1, size).index_select(0, owner * tops.shape[1] + group)
    member, offset = (~(rough < (least - error)[owner, None])).nonzero().T
    return owner[member], group[member] * size + offset


def _similarity(query, rows, i, j):
    """query[i] * rows[j] [C], summed in float64, as finite float32."""
    query, pairs = query.double(), zip(i.split(256), j.split(256), strict=True)  # fits the cache
    return torch.cat([query.index_select(0, i).mul_(rows.index_select(0, j)).sum(1)
                      for i, j in pairs]).float().nan_to_num()


def score_pairs(query_features, gallery, i, j):
    """Similarity of query i to image j, int64 [P] each; of two features a query their product."""
    if query_features.dim() == 2:
        return _similarity(query_features, gallery, i, j)
    first, second = (1 + _similarity(q, gallery, i, j).double() for q in query_features.unbind(1))
    return (first * second).float()


def _largest(features):
    """max |value| as a float; raises ValueError for NaN and infinity."""
    low, high = features.float().aminmax() if features.numel() else torch.zeros(2)
    largest = max(-low.item(), high.item())  # both are NaN if any value is
    if not math.isfinite(largest):
        raise ValueError("features hold NaN or infinity, which cannot be ranked: "
                         "check the model that made them")
    return largest


def _open_gallery(gallery):
    """A tensor or an .npy file -> its shape [N, E], a function (start, stop) -> rows."""
    if isinstance(gallery, torch.Tensor):
        return gallery.shape, lambda start, stop: gallery[start:stop].cpu()
    open_map = partial(np.load, gallery, mmap_mode="c")  # "c": torch wants to be allowed to write
    try:
        head = open_map()
        if head.dtype not in (np.float16, np.float32) or head.ndim != 2:
            raise ValueError
    except (AttributeError, OSError, ValueError, EOFError) as error:  # AttributeError: an .npz
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{gallery} is missing or not a whole .npy file of one float16 or float32 array "
                   "[N, E]: write it again with numpy.save") from None
    # A new map for each read: what was read stays in memory as long as its map.
    return head.shape, lambda start, stop: torch.from_numpy(open_map()[start:stop])


@torch.no_grad()
def top_k_of_product(query_features, gallery, k, exclude, chunk=4096):
    """top_k where the score is (1 + q1 g)(1 + q2 g): query features [Q, 2, E], gallery a tensor.

    Everything is scored in float64 and rounded to float32; equal images tie, but for a few in 10^8.
    """
    exclude, places = torch.tensor(exclude), []
    _largest(query_features), _largest(gallery)
    k = min(k, len(gallery) - bool((exclude >= 0).any()))
    for i in range(0, len(query_features), 256):
        first, second = query_features[i : i + 256].cpu().double().unbind(1)  # [256, E] each
        best, place = torch.empty(len(first), 0), torch.empty(len(first), 0, dtype=torch.int64)
        for start in range(0, len(gallery), chunk):
            rows = gallery[start : start + chunk].cpu().double()
            scores = ((1 + first @ rows.T) * (1 + second @ rows.T)).float()  # [256, R]
            numbers = torch.arange(start, start + len(rows)).expand(len(first), -1)
            scores[numbers == exclude[i : i + 256, None]] = -torch.inf
            best, place = torch.cat([best, scores], 1), torch.cat([place, numbers], 1)
            best, order = best.sort(descending=True, stable=True)
            best, place = best[:, :k], place.gather(1, order[:, :k])
        places.append(place)
    return torch.cat(places)


def rank(benchmark, query_features, gallery_features, k=50, chunk=4096):
    """Features [Q, E], [N, E] -> rankings of k names; CIRR's leave out the reference image.

    With two features a query, [Q, 2, E], their product ranks, as in `top_k_of_product`.
    """
    place = _places(benchmark, query_features, gallery_features)
    exclude = [place[q.reference] if benchmark.name == "cirr" else -1 for q in benchmark.queries]
    find = top_k if query_features.dim() == 2 else top_k_of_product
    best = find(query_features, gallery_features, k, exclude, chunk).tolist()
    return {query.id: [benchmark.gallery[i] for i in row]
            for query, row in zip(benchmark.queries, best, strict=True)}


@torch.no_grad()
def rank_subsets(benchmark, query_features, gallery_features):
    """CIRR: the other members of each query's group, best first."""
    place = _places(benchmark, query_features, gallery_features)
    pairs = [(i, row) for i, query in enumerate(benchmark.queries)
             for row in sorted(place[name] for name in query.subset)]
    _largest(query_features), _largest(gallery_features)
    values = score_pairs(query_features.cpu(), gallery_features.cpu(), *torch.tensor(pairs).T)
    rankings = [[] for _ in benchmark.queries]
    for p in values.sort(descending=True, stable=True).indices.tolist():
        i, row = pairs[p]
        rankings[i].append(benchmark.gallery[row])
    return {query.id: names for query, names in zip(benchmark.queries, rankings, strict=True)}


def _places(benchmark, query_features, gallery_features):
    """dict name -> row of the gallery, once the features are known to fit the benchmark."""
    (q, *e), (n, *d) = query_features.shape, gallery_features.shape
    if (q, n) != (len(benchmark.queries), len(benchmark.gallery)) or e not in (d, [2, *d]):
        raise ValueError(f"features of {q} queries and {n} images, of sizes {e} and {d}, do not "
                         f"fit {benchmark.name} {benchmark.split}")
    return {name: i for i, name in enumerate(benchmark.gallery)}
