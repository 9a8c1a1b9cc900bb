"""Exact ranking by inner product."""

import math

import numpy as np
import torch


@torch.no_grad()
def top_k(query_features, gallery_features, k, exclude=None, chunk=4096):
    """The k most similar gallery items: query [Q, E], gallery [N, E] -> indices [Q, k] int64, best first, on the CPU.

    Similarity is the inner product, summed in float64 and rounded to float32; equal values keep gallery order. Float32
    matmuls round by position, so equal images would not tie: here one only discards what cannot be among the k best.
    gallery_features: a tensor, or the path of an .npy file [N, E] (float16 or float32) that need not fit in memory.
    exclude: per query a gallery index to leave out, or -1. k is clipped to N, or to N - 1 if anything is excluded.
    Memory grows with `chunk`, the gallery rows held at a time, not with N. Raises FileNotFoundError, and ValueError for
    an unusable file, shapes that do not fit, features that are not finite (as float32) and k < 1.
    """
    shape, read = _open_gallery(gallery_features)
    q, n, exclude = len(query_features), shape[0], [-1] * len(query_features) if exclude is None else list(exclude)
    if query_features.dim() != 2 or query_features.shape[1:] != shape[1:] or len(exclude) != q:
        raise ValueError(f"top_k needs [Q, E], [N, E] and Q exclusions, got {list(query_features.shape)}, "
                         f"{list(shape)} and {len(exclude)}")
    exclude = torch.tensor([int(place) for place in exclude], dtype=torch.int64)
    k = min(k, n - bool((exclude >= 0).any()))
    if k < 1:
        raise ValueError(f"top_k has nothing to return: k clipped to {k} for a gallery of {n}")
    _largest(query_features)
    if q == 0:
        return torch.empty(0, k, dtype=torch.int64)
    blocks = zip(query_features.cpu().split(1024), exclude.split(1024), strict=True)  # bounds [Q, chunk] for any Q
    return torch.cat([_top_k(query, read, n, k, left_out, chunk) for query, left_out in blocks])


def _top_k(query, read, n, k, exclude, chunk, width=16):
    """`top_k` after its checks, for one block of queries: query [Q, E], exclude [Q], read(start, stop) -> rows."""
    q, e = query.shape
    chunk = min(chunk, n)
    query32, length = query.float().T, query.double().abs().sum(1)  # [E, Q], [Q]
    gallery32, rough = torch.empty(chunk, e), torch.empty(chunk + -chunk % width, q)  # reused: new memory is slow
    best, place = torch.full((q, k), -torch.inf), torch.full((q, k), n)  # [Q, k], best first; n: nothing yet
    for start in range(0, n, chunk):
        gallery = read(start, min(start + chunk, n))  # [R, E]
        r = len(gallery)
        gallery32[:r] = gallery
        # |float32 matmul - similarity| <= (E + 4) u |q|_1 max|g|, u = 2^-24: E roundings whatever the order of the sum
        # (Higham 2002, section 3.1), 4 of inputs, similarity, `least`; 1.01 for u^2 terms, 2 E tiny for underflow.
        margin = (1.01 * length * _largest(gallery32[:r])).float() * ((e + 4) * 2**-24) + 2 * e * 2**-126  # [Q]
        torch.mm(gallery32[:r], query32, out=rough[:r])
        rough[r:] = -torch.inf
        # Each peak is one item, so the (k + 1)-th peak bounds the k-th best from below, even if one is left out.
        peaks = rough.view(-1, width, q).amax(1)  # [R / width, Q]
        least = best[:, -1]
        if len(peaks) > k:
            least = torch.maximum(least, peaks.topk(k + 1, dim=0).values[-1] - margin)
        least = least - margin  # [Q]
        # "Not below" instead of "at least": where float32 overflows to NaN every item stays a candidate.
        block, owner = (~(peaks < least)).nonzero().T  # [P]
        hit, column = (~(rough.view(-1, width, q)[block, :, owner] < least[owner, None])).nonzero().T  # [C]
        owner, column = owner[hit], block[hit] * width + column  # for each query in gallery order
        keep = (column < r) & (column + start != exclude[owner])
        owner, column = owner[keep], column[keep]
        if len(owner):
            values = torch.cat([best.flatten(), _similarity(query, gallery, owner, column)])  # [Q*k + C]
            places = torch.cat([place.flatten(), column + start])
            owner = torch.cat([torch.arange(q).repeat_interleave(k), owner])
            order, count = _best_first(owner, values), owner.bincount()  # [Q*k + C], [Q]
            order = order[torch.arange(len(order)) - (count.cumsum(0) - count)[owner[order]] < k]  # each query's first k
            best, place = values[order].view(q, k), places[order].view(q, k)
    return place


def _similarity(query, gallery, i, j):
    """query[i] * gallery[j], summed in float64 and rounded to float32: [Q, E], [N, E], [P], [P] -> [P].

    Row by row, so that equal rows have equal values; finite, as -inf means "nothing yet" in `_top_k`.
    """
    limit = torch.finfo(torch.float32).max
    pairs = zip(i.split(512), j.split(512), strict=True)  # 512 rows fit the cache
    return torch.cat([(query[i].double() * gallery[j]).sum(1) for i, j in pairs]).float().clamp(-limit, limit)


def _best_first(owner, values):
    """Order [P] by owner, then best value first; equal ones keep their order (stable, so the last key sorts first)."""
    order = values.sort(descending=True, stable=True).indices
    return order[owner[order].sort(stable=True).indices]


def _largest(features):
    """max |value| as a float; raises ValueError for NaN and infinity."""
    low, high = features.float().aminmax() if features.numel() else torch.zeros(2)
    largest = max(-low.item(), high.item())  # both are NaN if any value is
    if not math.isfinite(largest):
        raise ValueError("features hold NaN or infinity, which cannot be ranked: check the model that made them")
    return largest


def _open_gallery(gallery):
    """A tensor [N, E] or the path of an .npy file -> (its shape, a function (start, stop) -> rows on the CPU)."""
    if isinstance(gallery, torch.Tensor):
        return gallery.shape, lambda start, stop: gallery[start:stop].cpu()
    try:
        head = np.load(gallery, mmap_mode="r")  # only the header: pages of a map that are read would stay in memory
    except FileNotFoundError:
        raise FileNotFoundError(f"{gallery} is missing: save the gallery's features there with numpy.save") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{gallery} is not a whole .npy file ({error}): write it again with numpy.save") from None
    if not (isinstance(head, np.memmap) and head.dtype.str in ("<f2", "<f4") and head.ndim == 2
            and head.flags.c_contiguous):
        raise ValueError(f"{gallery} should hold one float16 or float32 array [N, E] in C order: write it again")
    shape, dtype, offset = head.shape, head.dtype, head.offset

    def read(start, stop):
        rows = np.fromfile(gallery, dtype, (stop - start) * shape[1], offset=offset + start * shape[1] * dtype.itemsize)
        return torch.from_numpy(rows.reshape(stop - start, shape[1]))

    return shape, read


def rank(benchmark, query_features, gallery_features, k=50, chunk=4096):
    """Features [Q, E] in query order and [N, E] in gallery order -> rankings of k names, CIRR's without reference."""
    place = _places(benchmark, query_features, gallery_features)
    exclude = [place[query.reference] for query in benchmark.queries] if benchmark.name == "cirr" else None
    best = top_k(query_features, gallery_features, k, exclude, chunk).tolist()
    return {query.id: [benchmark.gallery[i] for i in row] for query, row in zip(benchmark.queries, best, strict=True)}


@torch.no_grad()
def rank_subsets(benchmark, query_features, gallery_features):
    """CIRR: the five other members of each query's group, best first; arguments and ties as in `rank`."""
    place, rankings = _places(benchmark, query_features, gallery_features), {}
    pairs = [(i, row) for i, query in enumerate(benchmark.queries) for row in sorted(place[name] for name in query.subset)]
    owner, row = torch.tensor(pairs).T  # [5 Q]
    query, gallery = query_features.cpu(), gallery_features.cpu()[row]  # [Q, E], [5 Q, E]
    _largest(query), _largest(gallery)
    for p in _best_first(owner, _similarity(query, gallery, owner, torch.arange(len(row)))).tolist():
        rankings.setdefault(benchmark.queries[pairs[p][0]].id, []).append(benchmark.gallery[pairs[p][1]])
    return rankings


def _places(benchmark, query_features, gallery_features):
    """dict name -> row of the gallery, once the features fit the benchmark."""
    rows, wanted = [len(query_features), len(gallery_features)], [len(benchmark.queries), len(benchmark.gallery)]
    if rows != wanted:
        raise ValueError(f"features are for {rows} queries and images, {benchmark.name} {benchmark.split} has {wanted}")
    if query_features.shape[1:] != gallery_features.shape[1:]:
        raise ValueError(f"features of queries and images differ in size: {list(query_features.shape)}, "
                         f"{list(gallery_features.shape)}")
    return {name: i for i, name in enumerate(benchmark.gallery)}
