"""Re-ranking against a loop that asks BLIP's matching head about one pair at a time."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from trees import bench, refused

import benchmarks
from benchmarks import Query, reranking
from plumbing.images import list_images

TEXTS = ["a red cat", "a photo of a big blue dog at night", "a dress", "is green instead"]


@pytest.fixture(scope="module")
def photos(small_world):
    return sorted((small_world / "train").iterdir())[:9]


@pytest.fixture
def pairs():
    """21 pairs, out of order: images 0 and 7 for no sentence, some pairs more than once."""
    random = torch.Generator().manual_seed(0)
    image = torch.tensor([1, 2, 3, 4, 5, 6, 8])[torch.randint(0, 7, (21,), generator=random)]
    return torch.randint(0, len(TEXTS), (21,), generator=random), image


def speaker(blip):
    def speak(rows):
        ids, mask = blip.tokenize([TEXTS[i] for i in rows.tolist()])
        return blip.embed_words(ids), mask

    return speak


def one_by_one(blip, photos, pairs):
    found = []
    for i, j in zip(*(x.tolist() for x in pairs), strict=True):
        ids, mask = blip.tokenize([TEXTS[i]])
        _, F_v = blip.encode_image(blip.preprocess(Image.open(photos[j]))[None])
        no, yes = blip.match(blip.embed_words(ids), mask, F_v)[0].tolist()
        found.append(math.exp(yes) / (math.exp(no) + math.exp(yes)))
    return found


@pytest.mark.parametrize("images, size", [(64, 64), (1, 64), (2, 3), (64, 1), (4, 2)])
def test_each_pair_is_matched_as_if_alone(pocket_blip, photos, pairs, monkeypatch, images, size):
    """In chunks of any size; no image is encoded twice, and none that nobody asks for."""
    with torch.no_grad():
        wanted = one_by_one(pocket_blip, photos, pairs)
    monkeypatch.setattr(reranking, "IMAGES", images)
    monkeypatch.setattr(reranking, "PAIRS", size)
    encoded, plain = [], type(pocket_blip).encode_image
    monkeypatch.setattr(type(pocket_blip), "encode_image",
                        lambda blip, x: encoded.append(len(x)) or plain(blip, x))
    found = benchmarks.matching_probabilities(
        pocket_blip, list_images(photos), speaker(pocket_blip), *pairs, workers=0)
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)
    assert len({round(p, 4) for p in wanted}) > 5  # they differ
    assert sum(encoded) == len(pairs[1].unique()) and max(encoded) <= images


def test_a_damaged_candidate_is_an_error(pocket_blip, photos, pairs, tmp_path):
    (tmp_path / "bad.png").write_text("text")
    images = list_images([*photos[:4], tmp_path / "bad.png", *photos[5:]])
    with refused(ValueError, "bad.png", "replace"):
        benchmarks.matching_probabilities(pocket_blip, images, speaker(pocket_blip), *pairs,
                                          workers=0)


@pytest.mark.parametrize("k", [1, 3, 5, 50])
def test_rerank_is_a_sort_of_the_first_k(k):
    random = np.random.default_rng(1)
    names = [f"n{i}" for i in range(12)]
    queries = [Query(str(i), names[i], ["text"], []) for i in range(6)]
    part, q, gallery = bench("circo", queries, names), random.normal(size=(6, 4)), \
        random.normal(size=(12, 4)) / 10
    q, gallery = torch.tensor(q).float(), torch.tensor(gallery).float()
    rankings = benchmarks.rank(part, q, gallery, 8)
    chances = {(query.id, name): round(random.random(), 1) for query in queries for name in names}
    found = benchmarks.rerank(part, rankings, q, gallery, chances, k, weight=0.3)
    for i, query in enumerate(queries):
        score = {name: float(np.float32(q[i].numpy() @ gallery[names.index(name)].numpy()))
                 + 0.3 * chances[query.id, name] for name in rankings[query.id]}
        first = sorted(rankings[query.id][:k], key=lambda name: -score[name])
        assert found[query.id] == first + rankings[query.id][k:]
    assert (found == rankings) == (k == 1)


def test_without_weight_or_difference_nothing_moves():
    names = ["a", "b", "c", "d"]
    part = bench("circo", [Query("0", "a", ["text"], [])], names)
    q, gallery = torch.ones(1, 2), torch.ones(4, 2)  # all tie
    chances = {("0", name): p for name, p in zip(names, (0.1, 0.9, 0.5, 0.9), strict=True)}
    rankings = {"0": ["a", "b", "c", "d"]}
    assert benchmarks.rerank(part, rankings, q, gallery, chances, 4, weight=0) == rankings
    assert benchmarks.rerank(part, rankings, q, gallery, chances, 4)["0"] == ["b", "d", "c", "a"]


def test_what_cannot_be_reranked(pocket_blip):
    benchmarks.check_reranking(pocket_blip, 5, {"dress": 5, "shirt": 9})
    with refused(ValueError, "--rerank 6", "dress has 5 images", "at most"):
        benchmarks.check_reranking(pocket_blip, 6, {"shirt": 9, "dress": 5})
    with refused(ValueError, "--rerank", "SimpleNamespace has no matching head", "BLIP"):
        benchmarks.check_reranking(SimpleNamespace(), 1, {"dress": 5})
