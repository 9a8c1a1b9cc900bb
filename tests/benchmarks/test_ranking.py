"""Exact ranking against a sort of all pairs, on galleries that a float32 product gets wrong."""

import math

import numpy as np
import pytest
import torch
from trees import cirr_tree, fashioniq_tree, refused

import benchmarks
from benchmarks import ranking


def brute_top_k(query, gallery, k, exclude=None):
    """Every pair by itself, then numpy's lexsort: by similarity, then by gallery index."""
    result = []
    for i, q in enumerate(query.numpy().astype(np.float64)):
        products = q * gallery.numpy().astype(np.float64)
        similarity = np.array([math.fsum(row) for row in products]).astype(np.float32)
        order = np.lexsort((np.arange(len(gallery)), -similarity)).tolist()
        result.append([j for j in order if exclude is None or j != exclude[i]][:k])
    return result


def top_k_cases():
    """Name -> query [Q, E], gallery [N, E], each hard in its own way for a float32 product."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 33, generator=generator)
    gallery = torch.randn(90, 33, generator=generator)
    cases = {"random": (query, gallery), "all equal": (query, gallery[:1].repeat(90, 1))}
    cases["copies"] = query, gallery[torch.randint(0, 9, (90,), generator=generator)]
    cases["few values"] = query[:, :4].sign(), gallery[:, :4].round().clamp(-1, 1)
    cases["zeros"] = query * torch.eye(2, 1).repeat(3, 1), gallery * torch.eye(3, 1).repeat(30, 1)
    scales = torch.logspace(0, 18, 90)[torch.randperm(90, generator=generator), None]
    cases["huge"] = query * 1e18, gallery * scales
    cases["overflow"] = query * 1e25, gallery * torch.logspace(-25, 17, 90).flip(0)[:, None]
    cases["tiny"] = query * 1e-22, gallery * 1e-23  # products near float32's least positive number
    cases["worst first"] = query[:1].repeat(6, 1), gallery[(gallery @ query[0]).argsort()]
    # Neighbours in float32, whose sum passes through terms that are 2^20 times as large and cancel.
    steps = 1 + torch.randperm(90, generator=generator) * 2.0**-23
    large = torch.randn(90, 16, generator=generator) * 2**20
    cases["one ulp"] = torch.ones(6, 33), torch.cat([large, steps[:, None], -large], dim=1)
    return cases


@pytest.mark.parametrize("name", top_k_cases())
def test_top_k_is_exact(name):
    query, gallery = top_k_cases()[name]
    if name == "overflow":  # what leaves float32's range ties, and keeps gallery order
        assert (query.double() @ gallery.double().T > torch.finfo(torch.float32).max).any(1).all()
    exclude = [0, 89, 5, -1, 44, 44]
    with np.errstate(over="ignore"):
        whole, left = brute_top_k(query, gallery, 90), brute_top_k(query, gallery, 89, exclude)
    for chunk in (1, 7, 40, 90, 4096):
        for k in (1, 2, 13, 90, 1000):
            best = benchmarks.top_k(query, gallery, k, chunk=chunk)
            assert best.dtype == torch.int64
            assert best.tolist() == [row[:k] for row in whole], (chunk, k)
            best = benchmarks.top_k(query, gallery, k, exclude, chunk).tolist()
            assert best == [row[:min(k, 89)] for row in left], (chunk, k)


def test_copies_tie_at_any_place():
    """More than one block of queries; copies and near-copies lie far apart and at the cut."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1030, 64, generator=generator)
    gallery = torch.randn(600, 64, generator=generator)
    gallery = torch.cat([gallery, gallery * (1 + 2**-22), gallery, gallery * (1 - 2**-22)])
    pairs = [(query.numpy().astype(np.float64) * row).sum(1) for row in gallery.numpy()]
    order = np.argsort(-np.array(pairs).T.astype(np.float32), axis=1, kind="stable")
    for chunk in (130, 1000, 4096):
        for k in (1, 10, 50):
            best = benchmarks.top_k(query, gallery, k, chunk=chunk).numpy()
            assert (best == order[:, :k]).all(), (chunk, k)
    exclude = order[:, 3]  # one of the best is left out
    rest = order[order != exclude[:, None]].reshape(1030, -1)[:, :10]
    assert (benchmarks.top_k(query, gallery, 10, exclude, 500).numpy() == rest).all()


def test_top_k_compares_few_pairs_in_float64(monkeypatch):
    """Speed needs it, also where every chunk is better than all before."""
    count, similarity = [], ranking._similarity
    monkeypatch.setattr(ranking, "_similarity",
                        lambda q, rows, i, j: count.append(len(i)) or similarity(q, rows, i, j))
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(4000, 64, generator=generator)
    query = gallery[:1] + 0.01 * torch.randn(20, 64, generator=generator)
    for images in (gallery, gallery[(gallery @ query[0]).argsort()]):
        count.clear()
        benchmarks.top_k(query, images, 10, chunk=200)
        assert sum(count) < 20 * 4000 / 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_top_k_dtypes(dtype):
    query, gallery = (features.to(dtype) for features in top_k_cases()["random"])
    best = benchmarks.top_k(query, gallery, 9, chunk=20).tolist()
    assert best == brute_top_k(query.double(), gallery.double(), 9)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_top_k_of_a_file(tmp_path, dtype):
    query, gallery = top_k_cases()["copies"]
    gallery, path = gallery.numpy().astype(dtype), tmp_path / "g.npy"
    wanted = brute_top_k(query, torch.from_numpy(gallery), 20, [3] * 6)
    np.save(path, gallery)
    for chunk, file in [(1, path), (7, str(path)), (90, path), (4096, path)]:
        assert benchmarks.top_k(query, file, 20, [3] * 6, chunk).tolist() == wanted
    gallery[-1, -1] = np.inf
    np.save(path, gallery)
    with refused(ValueError, "NaN or infinity"):
        benchmarks.top_k(query, path, 1, chunk=40)


def test_top_k_refuses_files(tmp_path):
    query, gallery = top_k_cases()["random"]
    gallery, good = gallery.numpy(), tmp_path / "good.npy"
    np.save(good, gallery)
    with refused(ValueError, "needs"):
        benchmarks.top_k(query[:, 1:], good, 1)
    with refused(FileNotFoundError, "no.npy is missing"):
        benchmarks.top_k(query, tmp_path / "no.npy", 1)
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "cut.npy").write_bytes(good.read_bytes()[:-5])
    (tmp_path / "folder.npy").mkdir()
    for name, array in {"double": gallery.astype(float), "flat": gallery[0], "objects": [{}],
                        "big-endian": gallery.astype(">f4")}.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    np.savez(tmp_path / "many.npz", gallery)
    for path in set(tmp_path.iterdir()) - {good}:
        with refused(ValueError, path.name, "write it again"):
            benchmarks.top_k(query, path, 1)


def test_top_k_refuses():
    one, nan = torch.ones(2, 3), torch.tensor([[1.0, float("nan"), 0.0]])
    for bad, word in [((one, torch.ones(4, 2), 1), "needs"), ((one[0], one, 1), "needs"),
                      ((one, one, 1, [0]), "needs"), ((one, one, 0), "nothing"),
                      ((one, torch.ones(0, 3), 1), "nothing"), ((nan, one, 1), "NaN"),
                      ((one, nan, 1), "NaN"), ((one, one[:1], 1, [0, 0]), "nothing")]:
        with refused(ValueError, word):
            benchmarks.top_k(*bad)
    assert benchmarks.top_k(torch.ones(0, 3), one, 5).shape == (0, 2)


@pytest.mark.parametrize("name", ["cirr", "fashioniq"])
def test_rank(tmp_path, name):
    tree, category = (cirr_tree, None) if name == "cirr" else (fashioniq_tree, "dress")
    benchmark = benchmarks.load(name, tree(tmp_path), category=category)
    gallery = torch.eye(len(benchmark.gallery))
    query = gallery[[benchmark.gallery.index(query.reference) for query in benchmark.queries]]
    rankings = benchmarks.rank(benchmark, query, gallery)  # reference most similar, the rest ties
    for asked in benchmark.queries:
        rest = [image for image in benchmark.gallery if image != asked.reference]
        assert rankings[asked.id] == ([] if name == "cirr" else [asked.reference]) + rest
    for rank in (benchmarks.rank, benchmarks.rank_subsets)[:1 + (name == "cirr")]:
        for bad in [(query[:1], gallery), (query, gallery[:-1]), (query[:, :1], gallery),
                    (query, gallery * math.nan)]:
            with refused(ValueError, "features"):
                rank(benchmark, *bad)


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_products_of_two_similarities(tmp_path, chunk):
    """Against a loop; gallery images 2 and 5 are the same, and the reference is left out."""
    benchmark = benchmarks.load("cirr", cirr_tree(tmp_path))
    random = torch.Generator().manual_seed(0)
    q, gallery = torch.randn(2, 2, 6, generator=random), torch.randn(8, 6, generator=random) / 4
    gallery[5] = gallery[2]
    for metric, found in (("all", benchmarks.rank(benchmark, q, gallery, 9, chunk)),
                          ("subset", benchmarks.rank_subsets(benchmark, q, gallery))):
        for i, query in enumerate(benchmark.queries):
            names = query.subset if metric == "subset" else benchmark.gallery
            score = {name: math.prod(1 + math.fsum((a * gallery[benchmark.gallery.index(name)])
                                                   .double().tolist()) for a in q[i])
                     for name in benchmark.gallery if name in names and name != query.reference}
            score = {name: np.float32(value) for name, value in score.items()}
            assert found[query.id] == sorted(score, key=lambda name: -score[name])
    with refused(ValueError, "NaN"):
        benchmarks.rank(benchmark, q * math.nan, gallery)


def test_rank_subsets(tmp_path):
    benchmark = benchmarks.load("cirr", cirr_tree(tmp_path))
    for query in benchmark.queries:
        query.subset.reverse()
    gallery = torch.eye(8)
    ranked = benchmarks.rank_subsets(benchmark, gallery[[4, 6]], gallery)  # but for one, all tie
    wanted = {"12": [4, 1, 2, 3, 5], "40": [6, 2, 3, 4, 7]}
    assert ranked == {key: [benchmark.gallery[i] for i in row] for key, row in wanted.items()}
