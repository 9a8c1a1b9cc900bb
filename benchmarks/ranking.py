"""Exact ranking by inner product, in memory that does not grow with the gallery.

A float32 matrix product is fast but rounds differently at different positions, so equal images would not
tie. It therefore only selects candidates, which are then compared by sums in float64.
"""

import math

import numpy as np
import torch


@torch.no_grad()
def top_k(query_features, gallery_features, k, exclude=None, chunk=4096):
    """The k most similar images: query [Q, E], gallery [N, E] -> indices [Q, k] int64, best first, on CPU.

    Similarity is the inner product, summed in float64 and rounded to float32; ties keep gallery order.
    gallery_features: a tensor, or the path of an .npy file (float16 or float32); `chunk` rows are read at
    a time. exclude: per query a gallery index to leave out, or -1. k is clipped to N, or to N - 1 if
    anything is excluded. Raises FileNotFoundError, and ValueError for an unusable file, shapes that do not
    match, features that are not finite (as float32) and k < 1.
    """
    shape, read = _open_gallery(gallery_features)
    q, n = len(query_features), shape[0]
    exclude = torch.tensor([-1] * q if exclude is None else [int(i) for i in exclude], dtype=torch.int64)
    if query_features.dim() != 2 or query_features.shape[1:] != shape[1:] or len(exclude) != q:
        raise ValueError(f"top_k needs [Q, E], [N, E] and Q exclusions, got {list(query_features.shape)}, "
                         f"{list(shape)} and {len(exclude)}")
    k = min(k, n - bool((exclude >= 0).any()))
    if k < 1:
        raise ValueError(f"top_k has nothing to return: k clipped to {k} for a gallery of {n}")
    _largest(query_features)
    best, place = torch.full((q, k), -torch.inf), torch.full((q, k), n)  # so far, best first
    for start in range(0, n, chunk):
        rows = read(start, min(start + chunk, n))  # [R, E]
        for i in range(0, q, 1024):  # bounds memory for any Q
            block = slice(i, i + 1024)
            query = query_features[block].cpu()
            owner, row = _candidates(query, rows.float(), k, best[block, -1])  # [C], in gallery order
            keep = row + start != exclude[block][owner]
            owner, row = owner[keep], row[keep]
            count = owner.bincount(minlength=len(query))
            slot = k + torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]  # behind the best so far
            values = torch.full((len(query), k + int(count.max())), -torch.inf)
            places = torch.full(values.shape, n)
            values[:, :k], places[:, :k] = best[block], place[block]
            values[owner, slot], places[owner, slot] = _similarity(query, rows, owner, row), row + start
            values, order = values.sort(dim=1, descending=True, stable=True)
            best[block], place[block] = values[:, :k], places.gather(1, order[:, :k])
    return place


def _candidates(query, rows, k, least):
    """All that may be among the k best: query [Q, E], rows [R, E], least [Q] -> query and row of each [C].

    rows: float32; least: each query's k-th best similarity so far.
    """
    e = query.shape[1]
    rough = query.float() @ rows.T  # [Q, R]
    # |rough - similarity| <= error, whatever the order of the sum: E products, sums and some other
    # roundings, each by 2^-24 of at most |q|_1 max|g|, and underflow. Where float32 may overflow, error
    # is infinite and every row stays a candidate; so does NaN, as it is not less than anything.
    bound = (1.01 * query.double().abs().sum(1) * _largest(rows)).float()  # [Q]
    error = bound * ((e + 8) * 2**-24) + 2 * e * 2**-126
    chosen = ~(rough < (least - error)[:, None])  # [Q, R]
    if chosen.count_nonzero() > 2 * k * len(query) and len(rows) > k:  # let these rows raise the bar
        least = torch.maximum(least, rough.topk(k + 1).values[:, -1] - error)  # + 1: one may be excluded
        chosen = ~(rough < (least - error)[:, None])
    return chosen.nonzero().T


def _similarity(query, rows, i, j):
    """query[i] * rows[j], summed in float64, rounded to finite float32: [Q, E], [R, E], [C], [C] -> [C]."""
    limit = torch.finfo(torch.float32).max
    pairs = zip(i.split(128), j.split(128), strict=True)  # 128 rows fit the cache
    values = torch.cat([(query[i].double() * rows[j]).sum(1) for i, j in pairs])
    return values.float().clamp(-limit, limit)


def _largest(features):
    """max |value| as a float; raises ValueError for NaN and infinity."""
    low, high = features.float().aminmax() if features.numel() else torch.zeros(2)
    largest = max(-low.item(), high.item())  # both are NaN if any value is
    if not math.isfinite(largest):
        raise ValueError("features hold NaN or infinity, which cannot be ranked: "
                         "check the model that made them")
    return largest


def _open_gallery(gallery):
    """A tensor [N, E] or the path of an .npy file -> its shape, a function (start, stop) -> rows on CPU."""
    if isinstance(gallery, torch.Tensor):
        return gallery.shape, lambda start, stop: gallery[start:stop].cpu()
    try:
        head = np.load(gallery, mmap_mode="r")  # for its header: mapped pages would stay in memory
    except FileNotFoundError:
        raise FileNotFoundError(f"{gallery} is missing: save the gallery's features there with "
                                "numpy.save") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{gallery} is not a whole .npy file ({error}): "
                         "write it again with numpy.save") from None
    if not (isinstance(head, np.memmap) and head.dtype.str in ("<f2", "<f4") and head.ndim == 2
            and head.flags.c_contiguous):
        raise ValueError(f"{gallery} should hold one float16 or float32 array [N, E] in C order: "
                         "write it again")
    shape, dtype, offset = head.shape, head.dtype, head.offset

    def read(start, stop):
        count, skipped = (stop - start) * shape[1], start * shape[1] * dtype.itemsize
        rows = np.fromfile(gallery, dtype, count, offset=offset + skipped)
        return torch.from_numpy(rows.reshape(stop - start, shape[1]))

    return shape, read


def rank(benchmark, query_features, gallery_features, k=50, chunk=4096):
    """Features [Q, E] in query order, [N, E] in gallery order -> rankings of k names.

    CIRR's leave out the reference image. Raises ValueError as `top_k` does.
    """
    place = _places(benchmark, query_features, gallery_features)
    cirr = benchmark.name == "cirr"
    exclude = [place[query.reference] for query in benchmark.queries] if cirr else None
    best = top_k(query_features, gallery_features, k, exclude, chunk).tolist()
    return {query.id: [benchmark.gallery[i] for i in row]
            for query, row in zip(benchmark.queries, best, strict=True)}


@torch.no_grad()
def rank_subsets(benchmark, query_features, gallery_features):
    """CIRR: the five other members of each query's group, best first; arguments and ties as in `rank`."""
    place = _places(benchmark, query_features, gallery_features)
    pairs = [(i, row) for i, query in enumerate(benchmark.queries)
             for row in sorted(place[name] for name in query.subset)]
    owner, row = torch.tensor(pairs).T  # [5 Q]
    _largest(query_features), _largest(gallery_features)
    values = _similarity(query_features.cpu(), gallery_features.cpu(), owner, row).tolist()
    rankings = {query.id: [] for query in benchmark.queries}
    for _, (i, row) in sorted(zip(values, pairs, strict=True), key=lambda scored: -scored[0]):  # stable
        rankings[benchmark.queries[i].id].append(benchmark.gallery[row])
    return rankings


def _places(benchmark, query_features, gallery_features):
    """dict name -> row of the gallery, once the features are known to fit the benchmark."""
    q, g = list(query_features.shape), list(gallery_features.shape)
    queries, images = len(benchmark.queries), len(benchmark.gallery)
    if (q[0], g[0]) != (queries, images) or q[1:] != g[1:]:
        raise ValueError(f"features of queries {q} and images {g} do not match each other or "
                         f"{benchmark.name} {benchmark.split}: {queries} queries, {images} images")
    return {name: i for i, name in enumerate(benchmark.gallery)}
