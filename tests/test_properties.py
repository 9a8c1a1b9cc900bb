"""What holds for any input, tried on inputs that hypothesis makes up: against definitions in plain Python, and laws.

    python -m pytest tests/test_properties.py                               # seconds
    HYPOTHESIS_PROFILE=slow python -m pytest tests/test_properties.py       # twenty times as many examples

The examples are the same on every run. Where an input is large, hypothesis chooses its sizes and a seed, numpy the rest.
"""

import contextlib
import io
import json
import math
import os
import re
import tarfile
import tempfile
from fractions import Fraction
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, with_large_weights
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import nn

import benchmarks
import blip_lite
import evaluate
import isa
import train
from benchmarks.readers import Benchmark, Query
from plumbing.images import find_images
from plumbing.training_data import batches, epoch_order

settings.register_profile("quick", max_examples=40, derandomize=True, deadline=None, database=None,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])  # fmt: skip
settings.register_profile("slow", settings.get_profile("quick"), max_examples=800)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
SEEDS = st.integers(0, 2**32 - 1)
EVERY_CHARACTER = st.characters(categories=["L", "M", "N", "P", "S", "Z", "C"])  # C: control, surrogate, private, unassigned


def property_of(*strategies, times=1.0, **named):
    """A test of every example, `times` as many as the profile says: cheap ones take more, costly ones fewer."""
    return lambda test: settings(PROFILE, max_examples=round(times * PROFILE.max_examples))(given(*strategies, **named)(test))


# ------------------------------------------------------------------------------------------------ rankings
LARGEST = float(np.finfo(np.float32).max)
EXPONENTS = {"float32": ((0,), (0, 1, -1), (0, 30, -30), (90,), (-149,), (-149, 0, 90)), "float16": ((0,), (0, 4, -13), (-24,))}


@st.composite
def features(draw, rows, width, dtype="float32"):
    """float [rows, width]: whole numbers of at most 11 bits times a power of two for each row, so that inner products are
    exact in float64. Rows repeat, some are zero, some huge or tiny."""
    rng = np.random.default_rng(draw(SEEDS))
    limit = draw(st.sampled_from((2047, 2047, 3, 1)))
    distinct = draw(st.sampled_from((rows, rows, (rows + 1) // 2, 1)))
    exponents = draw(st.sampled_from(EXPONENTS[dtype]))  # products of 2^90 leave the range of float32, of 2^-149 too
    some = rng.integers(-limit, limit + 1, (distinct, width)) * 2.0 ** rng.choice(exponents, (distinct, 1))
    some *= rng.random((distinct, 1)) >= draw(st.sampled_from((0, 0.3)))
    stored = some.astype(dtype)
    assert (stored.astype(np.float64) == some).all()  # nothing was rounded
    return stored[rng.integers(0, distinct, rows)]


def similarity(q, g):
    """The inner product, rounded once to float32 and kept finite."""
    exact = math.fsum(float(a) * float(b) for a, b in zip(q, g, strict=True))
    return float(np.float32(max(-LARGEST, min(LARGEST, exact))))


def full_sort(q, gallery, left_out=-1):
    """Every index of the gallery but one, the most similar first; Python's sort keeps the order of equal ones."""
    values = [similarity(q, g) for g in gallery]
    return [j for j in sorted(range(len(gallery)), key=lambda j: -values[j]) if j != left_out]


@st.composite
def searches(draw, dtype="float32"):
    """query [Q, E], gallery [N, E], k, what each query leaves out (or None), chunk."""
    n = draw(st.integers(1, 8) | st.integers(17, 80) | st.integers(33, 80))  # top_k discards in blocks of 16
    q, width = draw(st.integers(1, 4)), draw(st.sampled_from((3, 5, 4, 1)))
    query, gallery = draw(features(q, width)), draw(features(n, width, dtype))
    if dtype == "float32" and width > 2 and draw(st.booleans()):  # large terms that cancel, where float32 loses the rest
        query[:, -1] = query[:, 0]
        gallery[:, 0] *= 2**20
        gallery[:, -1] = -gallery[:, 0]
    k = draw(st.just(1) | st.integers(1, 4) | st.integers(1, n + 3))
    exclude = None
    if draw(st.booleans()):  # nothing, the best one or any
        exclude = [draw(st.sampled_from((full_sort(one, gallery)[0], -1, n // 2))) for one in query]
    return query, gallery, k, exclude, draw(st.sampled_from((4096, 4096, 4096, 40, 7, 1)))


def check_top_k(query, gallery, k, exclude, chunk, given_gallery):
    room = len(gallery) - (exclude is not None and max(exclude) >= 0)
    if room == 0:
        with pytest.raises(ValueError, match="nothing to return"):
            benchmarks.top_k(torch.from_numpy(query), given_gallery, k, exclude, chunk)
        return
    best = benchmarks.top_k(torch.from_numpy(query), given_gallery, k, exclude, chunk)
    wanted = [full_sort(q, gallery, j)[: min(k, room)] for q, j in zip(query, exclude or [-1] * len(query), strict=True)]
    assert best.tolist() == wanted


@property_of(searches(), times=4)
def test_top_k_is_a_full_sort(search):
    check_top_k(*search, torch.from_numpy(search[1]))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_top_k_of_a_file_is_a_full_sort(tmp_path, dtype):
    @property_of(searches(dtype))
    def check(search):
        np.save(tmp_path / "gallery.npy", search[1])
        check_top_k(*search, tmp_path / "gallery.npy")

    check()


@property_of(searches(), st.data(), times=1.5)
def test_one_more_image_changes_a_ranking_only_where_it_appears(search, data):
    query, gallery, k, exclude, chunk = search
    assume(len(gallery) > 1)
    more = np.concatenate([gallery, data.draw(features(1, gallery.shape[1]))])
    before, after = (benchmarks.top_k(torch.from_numpy(query), torch.from_numpy(g), k, exclude, chunk).tolist()
                     for g in (gallery, more))  # fmt: skip
    for old, new in zip(before, after, strict=True):
        kept = [j for j in new if j != len(gallery)]
        shared = min(len(old), len(kept))
        assert kept[:shared] == old[:shared] and shared >= len(old) - (len(gallery) in new)


@st.composite
def searched(draw, name):
    """A benchmark of a made-up gallery with its features: benchmark, query [Q, E], gallery [N, E]."""
    n, q, width = draw(st.integers(6, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    names = [f"image{i}" for i in draw(st.permutations(range(n)))]
    queries = []
    for i in range(q):
        reference, *members = draw(st.permutations(names))[:6]
        queries.append(Query(str(i), reference, [""], [draw(st.sampled_from(members))], members))
    benchmark = Benchmark(name, "val", names, {}, queries, "dress" if name == "fashioniq" else None)
    return benchmark, draw(features(q, width)), draw(features(n, width))


@pytest.mark.parametrize("name", ["cirr", "fashioniq", "circo"])
def test_rank_and_rank_subsets_are_full_sorts(name):
    @property_of(searched(name), st.integers(1, 60))
    def check(case, k):
        benchmark, query, gallery = case
        both = torch.from_numpy(query), torch.from_numpy(gallery)
        ranked, subsets = benchmarks.rank(benchmark, *both, k), benchmarks.rank_subsets(benchmark, *both)
        for one, q in zip(benchmark.queries, query, strict=True):
            order = [benchmark.gallery[j] for j in full_sort(q, gallery)]
            assert subsets[one.id] == [name for name in order if name in one.subset]
            order = [name for name in order if benchmark.name != "cirr" or name != one.reference]
            assert ranked[one.id] == order[:k]
        backwards = Benchmark(**{**vars(benchmark), "queries": benchmark.queries[::-1]})
        assert benchmarks.rank(backwards, both[0].flip(0), both[1], k) == ranked  # the order of queries does not matter

    check()


# ------------------------------------------------------------------------------------------------ metrics
def found(ranking, target, k):
    """1 if the target is among the first k names, else 0."""
    return sum(name == target for name in ranking[:k])


def precision_average(ranking, targets, k):
    """AP@K by its definition, exactly: precision at each rank that holds a truth, over min(K, number of truths)."""
    total = Fraction(0)
    for i in range(1, min(k, len(ranking)) + 1):
        if ranking[i - 1] in targets:
            total += Fraction(len(set(ranking[:i]) & set(targets)), i)
    return total / min(k, len(targets))


def percent(values):
    values = list(values)
    return float(100 * Fraction(sum(values)) / len(values))


def expected_scores(name, queries, rankings, subsets):
    """Metrics of plain dicts: a query has id, reference, targets, subset; rankings and subsets: id -> names."""
    lists = [(q, [x for x in rankings[q["id"]] if name != "cirr" or x != q["reference"]]) for q in queries]
    recall = lambda k: percent(found(names, q["targets"][0], k) for q, names in lists)  # noqa: E731
    if name == "fashioniq":
        return {f"R@{k}": recall(k) for k in (10, 50)}
    if name == "cirr":
        result = {f"R@{k}": recall(k) for k in (1, 5, 10, 50)}
        result["Avg"] = sum(result.values()) / 4
        lists = [(q, [x for x in subsets[q["id"]] if x in q["subset"]]) for q in queries]
        return result | {f"Rs@{k}": percent(found(names, q["targets"][0], k) for q, names in lists) for k in (1, 2, 3)}
    result = {f"mAP@{k}": percent(precision_average(names, q["targets"], k) for q, names in lists) for k in (5, 10, 25, 50)}
    average = sum(result.values()) / 4
    return result | {f"R@{k}": recall(k) for k in (5, 10, 25, 50)} | {"Avg": average}


@st.composite
def answered(draw, name):
    """A benchmark and rankings of it, short ones too: benchmark, rankings, subset rankings."""
    rng = np.random.default_rng(draw(SEEDS))
    n = draw(st.one_of(st.integers(6, 12), st.integers(50, 70)))
    names = [str(i) for i in rng.permutation(10 * n)[:n]]
    queries, rankings, subsets = [], {}, {}
    for i in range(draw(st.integers(1, 5))):
        reference, *rest = rng.permutation(names).tolist()
        truths = rest[: draw(st.integers(1, min(n - 1, 14)) if name == "circo" else st.just(1))]
        subset = rng.permutation([truths[0], *rest[-4:]]).tolist() if name == "cirr" else None
        aspects, kind = draw(st.sets(st.sampled_from("abc"))), draw(st.sampled_from(("one", "multi")))
        queries.append(Query(str(i), reference, [""], truths, subset, sorted(aspects), kind))
        order = rng.permutation(names).tolist()
        if draw(st.booleans()):  # so that something is found at small K as well
            order = sorted(order, key=lambda x: x not in truths or rng.random() < 0.5)
        rankings[str(i)] = order[: draw(st.integers(1, n))]
        subsets[str(i)] = rng.permutation(subset or names).tolist()[: draw(st.integers(1, 5))]
    return Benchmark(name, "val", names, {}, queries, "dress" if name == "fashioniq" else None), rankings, subsets


NAMES = pytest.mark.parametrize("name", ["cirr", "fashioniq", "circo"])


@NAMES
def test_scores_are_the_definitions(name):
    @property_of(answered(name), times=2)
    def check(case):
        benchmark, rankings, subsets = case
        plain = [vars(query) for query in benchmark.queries]
        wanted = expected_scores(name, plain, rankings, subsets)
        got = benchmarks.score(benchmark, rankings, subsets)
        assert got == pytest.approx(wanted, rel=1e-12) and list(got) == list(wanted)
        from_rankings = benchmarks.score(benchmark, rankings)
        assert from_rankings == pytest.approx(expected_scores(name, plain, rankings, rankings), rel=1e-12)
        for kind, scores in benchmarks.score_by_kind(benchmark, rankings, subsets).items():
            of_kind = [query for query in plain if query["kind"] == kind]
            assert scores == pytest.approx(expected_scores(name, of_kind, rankings, subsets), rel=1e-12)
        if name == "circo":
            aspects = benchmarks.aspect_scores(benchmark, rankings)
            assert set(aspects) == {aspect for query in plain for aspect in query["aspects"]}
            for aspect, value in aspects.items():
                of_aspect = [query for query in plain if aspect in query["aspects"]]
                assert value == pytest.approx(expected_scores(name, of_aspect, rankings, None)["mAP@10"], rel=1e-12)

    check()


@NAMES
def test_laws_of_scores(name):
    @property_of(answered(name), st.randoms(use_true_random=False))
    def check(case, random):
        benchmark, rankings, subsets = case
        got = benchmarks.score(benchmark, rankings, subsets)
        queries = random.sample(benchmark.queries, len(benchmark.queries))
        shuffled = Benchmark(name, "val", benchmark.gallery, {}, queries)
        assert benchmarks.score(shuffled, rankings, subsets) == pytest.approx(got, rel=1e-12)
        larger = Benchmark(name, "val", [*benchmark.gallery, "never found"], {}, benchmark.queries)
        assert benchmarks.score(larger, rankings, subsets) == got
        assert all(0 <= value <= 100 for value in got.values())
        for kind in ("R@", "Rs@"):
            recalls = [value for metric, value in got.items() if metric.startswith(kind)]
            assert recalls == sorted(recalls)  # the larger K, the more is found
        perfect = {q.id: q.targets + [x for x in benchmark.gallery if x not in q.targets] for q in benchmark.queries}
        best = benchmarks.score(benchmark, perfect, perfect)
        assert best == pytest.approx(dict.fromkeys(best, 100.0))
        for query in benchmark.queries:
            for k in range(1, len(benchmark.gallery) + 5):
                assert benchmarks.average_precision(perfect[query.id], query.targets, k) == pytest.approx(1)
                ours = benchmarks.average_precision(rankings[query.id], query.targets, k)
                assert ours == pytest.approx(float(precision_average(rankings[query.id], query.targets, k)), rel=1e-12)

    check()


FILE_NAMES = st.text(EVERY_CHARACTER.filter(lambda c: c not in "/\\\0"), min_size=1, max_size=6)


@NAMES
def test_predictions_are_read_back_as_written(tmp_path, name):
    ids = st.integers(0, 10**12).map(str) if name == "circo" else FILE_NAMES.filter(lambda x: x not in (".", ".."))

    @property_of(st.lists(ids, min_size=7, max_size=60, unique=True), st.data())
    def check(names, data):
        queries = []
        for i in data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=3, unique=True)):
            reference, *members = data.draw(st.permutations(names[:6]))
            queries.append(Query(str(i), reference, [""], members[:1], members if name == "cirr" else None))
        benchmark = Benchmark(name, "val", names, {}, queries, "shirt" if name == "fashioniq" else None)
        rankings = {query.id: data.draw(st.permutations(names)) for query in queries}
        for metric in ("recall", "recall_subset") if name == "cirr" else ("recall",):
            benchmarks.write_predictions(tmp_path / "p.json", benchmarks.predictions(benchmark, rankings, metric))
            read = benchmarks.read_predictions(tmp_path / "p.json", benchmark, metric)
            for query in queries:
                wanted = [x for x in rankings[query.id] if name != "cirr" or x != query.reference]
                wanted = [x for x in wanted if x in query.subset][:3] if metric == "recall_subset" else wanted[:50]
                assert read[query.id] == wanted
            assert set(read) == {query.id for query in queries}

    check()


# ------------------------------------------------------------------------------------------------ evaluate.py score
def cirr_tree(root, rng, data):
    names = [f"dev-{i}-0-img{i % 2}" for i in range(data.draw(st.integers(7, 60)))]
    entries = []
    for i in range(data.draw(st.integers(1, 5))):
        reference, target, *others = rng.permutation(names)[:6].tolist()
        soft = {target: 1.0, others[0]: 0.5}
        entries.append({"pairid": 7 * i, "reference": reference, "target_hard": target, "target_soft": soft, "caption": "x",
                        "img_set": {"id": 3, "members": rng.permutation([reference, target, *others]).tolist()}})  # fmt: skip
    files = {"image_splits/split.rc2.val.json": {name: f"./dev/{name}.png" for name in names},
             "captions/cap.rc2.val.json": entries}  # fmt: skip
    queries = [{"id": str(e["pairid"]), "reference": e["reference"], "targets": [e["target_hard"]],
                "subset": [x for x in e["img_set"]["members"] if x != e["reference"]]} for e in entries]  # fmt: skip
    answers = {q["id"]: rng.permutation(names).tolist()[: data.draw(st.integers(1, 50))] for q in queries}
    subsets = {q["id"]: rng.permutation(q["subset"]).tolist()[:3] for q in queries}
    head = {"version": "rc2"}
    files |= {"p.json": head | {"metric": "recall"} | answers, "s.json": head | {"metric": "recall_subset"} | subsets}
    return files, {"cirr": expected_scores("cirr", queries, answers, subsets)}


def fashioniq_tree(root, rng, data):
    files, document, wanted = {}, {}, {}
    for category in benchmarks.CATEGORIES:
        names = [f"B{i:04d}" for i in range(data.draw(st.integers(2, 60)))]
        pairs = [rng.permutation(names)[:2].tolist() for _ in range(data.draw(st.integers(1, 4)))]
        files[f"image_splits/split.{category}.val.json"] = names
        files[f"captions/cap.{category}.val.json"] = [{"candidate": a, "target": b, "captions": ["x", ""]} for a, b in pairs]
        queries = [{"id": str(i), "reference": a, "targets": [b]} for i, (a, b) in enumerate(pairs)]
        answers = {q["id"]: rng.permutation(names).tolist()[: data.draw(st.integers(1, 60))] for q in queries}
        document[category], wanted[category] = answers, expected_scores("fashioniq", queries, answers, None)
    wanted["average"] = {m: sum(wanted[c][m] for c in benchmarks.CATEGORIES) / 3 for m in ("R@10", "R@50")}
    return files | {"p.json": document}, wanted


def circo_tree(root, rng, data):
    names = rng.permutation(10**6)[: data.draw(st.integers(5, 60))].tolist()
    entries = []
    for i in range(data.draw(st.integers(1, 5))):
        reference, target, *others = rng.permutation(names).tolist()
        truths = [target, *others[: data.draw(st.integers(0, 8))]]
        aspects = data.draw(st.lists(st.sampled_from("abc"), unique=True))
        entries.append({"id": i, "reference_img_id": reference, "target_img_id": target, "relative_caption": "x",
                        "gt_img_ids": rng.permutation(truths).tolist(), "semantic_aspects": aspects})  # fmt: skip
    queries = [{"id": str(e["id"]), "reference": e["reference_img_id"], "aspects": e["semantic_aspects"],
                "targets": sorted(e["gt_img_ids"], key=lambda x: x != e["target_img_id"])} for e in entries]  # fmt: skip
    answers = {q["id"]: rng.permutation(names).tolist()[: data.draw(st.integers(1, 50))] for q in queries}
    wanted = {"circo": expected_scores("circo", queries, answers, None)}
    for aspect in sorted({aspect for q in queries for aspect in q["aspects"]}):
        of_aspect = [q for q in queries if aspect in q["aspects"]]
        wanted[f"mAP@10 {aspect}"] = {"": expected_scores("circo", of_aspect, answers, None)["mAP@10"]}
    return {"annotations/val.json": entries, "p.json": answers}, wanted


@NAMES
def test_evaluate_score_prints_the_definitions(tmp_path, name):
    """The annotation files in the official layouts and a prediction file, read and scored as a user does it."""
    make = {"cirr": cirr_tree, "fashioniq": fashioniq_tree, "circo": circo_tree}[name]

    @property_of(SEEDS, st.data(), st.booleans(), times=0.75)
    def check(seed, data, with_subset):
        files, wanted = make(tmp_path, np.random.default_rng(seed), data)
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(json.dumps(content))
        subset = tmp_path / "s.json" if name == "cirr" and with_subset else None
        if name == "cirr" and not with_subset:
            wanted["cirr"] = {k: v for k, v in wanted["cirr"].items() if not k.startswith("Rs@")}
        printed = io.StringIO()
        options = SimpleNamespace(benchmark=name, data=tmp_path, split="val", predictions=tmp_path / "p.json", subset=subset)
        with contextlib.redirect_stdout(printed):
            evaluate.score(options)
        got = {}
        for line in printed.getvalue().splitlines():
            if ": " not in line:  # a note on lists that are shorter than the test server wants
                continue
            title, values = line.split(": ")
            title = next(t for t in wanted if title.strip() in (t, f"{t}  val", f"fashioniq {t} val"))
            pairs = re.findall(r"(?:(\S+) )?(\d+\.\d\d)(?:  |$)", values)
            got[title] = {metric: float(value) for metric, value in pairs}
        assert got.keys() == wanted.keys()
        for title in wanted:
            assert got[title] == pytest.approx(wanted[title], abs=0.00501, rel=0)

    check()


@property_of(st.lists(st.lists(st.text("ab", max_size=5), min_size=1, max_size=2), min_size=1, max_size=8), st.integers(1, 6))
def test_queries_are_encoded_in_any_batches_and_two_captions_averaged(captions, batch):
    """The encoder is one that tells every (row, text) apart; FashionIQ's two captions are joined in both orders."""

    def feature(row, text):
        generator = torch.Generator().manual_seed(hash((row, len(text), text.count("a"), text.find("b"))) % 2**32)
        return nn.functional.normalize(torch.randn(4, generator=generator), dim=0)

    def encode(rows, texts):
        return 3 * torch.stack([feature(row, text) for row, text in zip(rows.tolist(), texts, strict=True)])

    queries = [Query(str(i), "r", texts, []) for i, texts in enumerate(captions)]
    got = evaluate.encode_queries(encode, queries, "fp32", "cpu", batch)
    for i, texts in enumerate(captions):
        joined = [" and ".join(order) for order in (texts, texts[::-1])]
        wanted = nn.functional.normalize(sum(feature(i, text) for text in joined), dim=0)
        torch.testing.assert_close(got[i], wanted)


# ------------------------------------------------------------------------------------------------ tokenizer
ODD = [
    "[SEP]", "[CLS]", "[PAD]", "[UNK]", "[MASK]", "[ENC]", "[DEC]", "[sep]", "##s", "##", "[", "]", "#",
    " ", "\t\n", "\x00", "\x1c", "\x85", "\u2028", "\u200d", "\u200b", "\ufeff", "\u202e", "\xa0", "\xad", "\ufffd", "\ud83d",
    "\ude00", "👩‍👩‍👧🏽", "🇫🇷", "שלום", "مرحبا", "e\u0301", "\u0301", "\u0345", "İ", "Σ", "ΑΣ", "ß", "ﬁ", "ﾊﾝ", "漢字",
    "\uf900", "\U0002f800", "한국", "ก็", "a", "red", "that", "Dress", "don't", "x" * 99, "é" * 51, "striped" * 15,
]  # fmt: skip
TEXTS = st.one_of(
    st.text(EVERY_CHARACTER, max_size=12),
    st.lists(st.one_of(st.sampled_from(ODD), EVERY_CHARACTER), max_size=8).map("".join),
    st.lists(st.sampled_from(ODD), max_size=8).map(" ".join),
    st.tuples(st.text(EVERY_CHARACTER, min_size=1, max_size=3), st.integers(30, 200)).map(lambda pair: pair[0] * pair[1]),
    st.tuples(st.sampled_from(("x", "É", "e\u0301", "x.")), st.integers(98, 103)).map(lambda pair: pair[0] * pair[1]),
)
VOCABULARIES = {"pocket": ROOT / "pocket" / "vocab.txt", "bert": DATA / "bert" / "vocab.txt"}


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request):
    if not VOCABULARIES[request.param].is_file():
        pytest.skip("no BERT vocabulary in ../shared/data; set ISA_SHARED")
    return VOCABULARIES[request.param]


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return blip_lite.Tokenizer(vocabulary)


@pytest.fixture(scope="module")
def reference(vocabulary):
    """transformers' tokenizer in Python, with the two tokens that BLIP's official code adds to it."""
    try:
        from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy as BertTokenizer
    except ImportError:
        from transformers import BertTokenizer
    theirs = BertTokenizer(str(vocabulary))
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    theirs.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return theirs


def test_any_texts_become_ids_and_a_mask(tokenizer):
    @property_of(st.lists(TEXTS, min_size=1, max_size=4), times=2)
    def check(texts):
        ids, mask = tokenizer(texts)
        assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape
        assert ids.shape[1] == mask.sum(1).max()  # the longest has no padding
        for text, row, seen in zip(texts, ids.tolist(), mask.tolist(), strict=True):
            length = sum(seen)
            assert seen == [1] * length + [0] * (len(seen) - length)
            alone, alone_mask = tokenizer([text])  # a batch changes the padding and nothing else
            assert alone[0].tolist() == row[:length] and alone_mask.all()
            assert row[length:] == [tokenizer.pad_id] * (len(row) - length)
            assert row[0] == tokenizer.cls_id and row[length - 1] == tokenizer.sep_id
            assert all(0 <= i < tokenizer.vocab_size for i in row)
            assert row[1 : length - 1] == [tokenizer.vocab[piece] for piece in tokenizer.tokenize(text)]

    check()


def test_decoding_and_encoding_again_changes_nothing(tokenizer):
    """For every text in which [PAD], [CLS] and [SEP] are not written out, which `decode` leaves out; with them, for the rest.
    [UNK], [MASK], [DEC] and [ENC] are decoded to their names, which are read as these tokens again."""
    dropped = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id)

    @property_of(TEXTS, times=3)
    def check(text):
        ids = tokenizer([text])[0][0].tolist()
        again = tokenizer([tokenizer.decode(ids)])[0][0].tolist()
        assert again[1:-1] == [i for i in ids[1:-1] if i not in dropped]

    check()


def test_any_text_is_split_as_by_transformers(tokenizer, reference):
    @property_of(TEXTS, times=4)
    def check(text):
        assert tokenizer.tokenize(text) == reference.tokenize(text)

    check()


@pytest.mark.slow
def test_every_character_is_split_as_by_transformers(tokenizer, reference):
    for start in range(0, 0x110000, 64):
        text = "".join(f"A{chr(point)}s x{chr(point)} " for point in range(start, start + 64))
        assert tokenizer.tokenize(text) == reference.tokenize(text), hex(start)


# ------------------------------------------------------------------------------------------------ the composed query
WIDTH = 64
SIZES = dict(image_size=32, patch_size=16, image_width=64, image_depth=1, max_positions=4000, word_dim=WIDTH, text_depth=2,
             embed_dim=32)  # fmt: skip


@pytest.fixture(scope="module")
def blip():
    """A frozen BLIP of made-up weights and the pocket world's vocabulary."""
    tokenizer = blip_lite.Tokenizer(VOCABULARIES["pocket"])
    torch.manual_seed(0)
    blip = blip_lite.Blip({**SIZES, "vocab_size": tokenizer.vocab_size}, tokenizer)
    return with_large_weights(blip)


MODIFIERS = st.one_of(
    st.sampled_from(("", "  ", "\n", "is red", "That is blue", " that\tshows a dog", "that", "THAT that", "that's a", "thatched")),
    st.lists(st.sampled_from("is has a red blue cat that zeppelin ! é 漢".split()), max_size=12).map(" ".join),
    st.text(EVERY_CHARACTER, max_size=12),
)
PROMPTS = st.one_of(st.sampled_from(("a photo of", "", " a picture ")), st.text(EVERY_CHARACTER, max_size=6))


@st.composite
def compositions(draw, prompts=PROMPTS):
    """U [B, L, d_w], B modifiers, prompt."""
    b, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    U = torch.randn(b, tokens, WIDTH, generator=torch.Generator().manual_seed(draw(SEEDS)))
    return U * draw(st.sampled_from((0.1, 1.0, 14.0))), draw(st.lists(MODIFIERS, min_size=b, max_size=b)), draw(prompts)


def sentence(blip, u, modifier, prompt):
    """[CLS] prompt u1 .. uL that modifier [SEP], one row after the other; no "that" of the modifier's own is repeated."""

    def word(piece):
        return blip.embed_words(torch.tensor([[blip.tokenizer.vocab[piece]]]))[0, 0]

    rows = [word("[CLS]")] + [word(piece) for piece in blip.tokenizer.tokenize(prompt)] + list(u)
    if re.match(r"\s*that\b", modifier, re.IGNORECASE):
        modifier = modifier.strip()[len("that") :]
    if modifier.strip():
        rows += [word("that")] + [word(piece) for piece in blip.tokenizer.tokenize(modifier)]
    return torch.stack([*rows, word("[SEP]")])


def test_composed_sentences_token_by_token(blip):
    @property_of(compositions(), times=1.5)
    def check(case):
        U, modifiers, prompt = case
        words, mask = isa.compose_query(blip, U, modifiers, prompt)
        wanted = [sentence(blip, *one, prompt) for one in zip(U, modifiers, strict=True)]
        assert words.shape == (len(U), max(map(len, wanted)), WIDTH) and mask.shape == words.shape[:2]
        assert mask.dtype == torch.int64 and words.dtype == torch.float32
        for row, seen, rows in zip(words, mask, wanted, strict=True):
            assert seen.tolist() == [1] * len(rows) + [0] * (words.shape[1] - len(rows))
            assert torch.equal(row[: len(rows)], rows)
        rough, _ = isa.compose_query(blip, U.bfloat16(), modifiers, prompt)
        assert rough.dtype == torch.float32  # BLIP's, whatever the query model runs in

    check()


def test_a_sentence_means_the_same_alone_and_in_a_batch(blip):
    @property_of(compositions(), times=0.5)
    def check(case):
        U, modifiers, prompt = case
        together = blip.encode_text(*isa.compose_query(blip, U, modifiers, prompt))
        for u, modifier, t in zip(U, modifiers, together, strict=True):
            alone = blip.encode_text(*isa.compose_query(blip, u[None], [modifier], prompt))[0]
            torch.testing.assert_close(alone, t, rtol=0, atol=1e-5)

    check()


def test_no_modifiers_are_blank_modifiers_and_gradients_reach_U_alone(blip):
    @property_of(compositions(), st.sampled_from(("", " ", "\t\n")), times=0.5)
    def check(case, blank):
        U, modifiers, prompt = case
        without, blanks = (isa.compose_query(blip, U, m, prompt) for m in (None, [blank] * len(U)))
        assert torch.equal(without[0], blanks[0]) and torch.equal(without[1], blanks[1])
        U.requires_grad_(True)
        blip.encode_text(*isa.compose_query(blip, U, modifiers, prompt)).square().cumsum(1).sum().backward()
        assert U.grad.isfinite().all() and (U.grad.abs().amax(2) > 0).all()
        assert all(parameter.grad is None for parameter in blip.parameters())

    check()


# ------------------------------------------------------------------------------------------------ losses
@st.composite
def feature_pairs(draw, least=1):
    """v and t [B, E] of unit norm, temperature."""
    b, width = draw(st.integers(least, 9)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    v, t = (nn.functional.normalize(torch.randn(b, width, generator=generator), dim=1) for _ in range(2))
    if draw(st.booleans()):
        t = nn.functional.normalize(t + 2 * v, dim=1)
    return v, t, draw(st.sampled_from((0.005, 0.07, 1.0)))


@property_of(feature_pairs(), st.randoms(use_true_random=False), times=2.5)
def test_gcd_does_not_depend_on_the_order_and_is_bounded(pair, random):
    v, t, temperature = pair
    loss = isa.global_contrastive_distillation(v, t, temperature)
    order = random.sample(range(len(v)), len(v))
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(isa.global_contrastive_distillation(v[order], t[order], temperature), loss, **close)
    torch.testing.assert_close(isa.global_contrastive_distillation(t, v, temperature), loss, **close)
    assert 0 <= loss.item() <= math.log(len(v)) + 2 / temperature + 1e-4  # logits differ by 2 / tau at most
    silent = isa.global_contrastive_distillation(v, torch.zeros_like(t), temperature)
    assert silent.item() == pytest.approx(math.log(len(v)), abs=1e-6)


@property_of(feature_pairs(least=2), SEEDS, times=2.5)
def test_hard_negatives_are_never_the_own_partner(pair, seed):
    v, t, temperature = pair
    torch.manual_seed(seed)
    for drawn in isa.sample_hard_negatives(v, t, temperature):
        assert drawn.shape == (len(v),) and drawn.dtype == torch.int64
        assert all(0 <= j < len(v) and j != i for i, j in enumerate(drawn.tolist()))


@property_of(feature_pairs(least=3), SEEDS, times=0.2)
def test_hard_negatives_are_drawn_as_stated(pair, seed):
    """Chi-square of 400 draws, for each sentence and for each image; the limit is six standard deviations away."""
    v, t, temperature = pair
    torch.manual_seed(seed)
    draws, b = 400, len(v)
    counts = np.zeros((2, b, b))
    for _ in range(draws):
        for table, drawn in zip(counts, isa.sample_hard_negatives(v, t, temperature), strict=True):
            table[np.arange(b), drawn.numpy()] += 1
    for table, asking, answering in ((counts[0], t, v), (counts[1], v, t)):
        for i in range(b):
            logits = [float(asking[i].double() @ answering[j].double()) / temperature for j in range(b)]
            exps = [math.exp(x - max(logits)) for x in logits]
            weights = np.array([0 if j == i else exps[j] / sum(exps) + 1e-4 for j in range(b)])
            expected = draws * weights / weights.sum()
            rare = (expected < 5) & (np.arange(b) != i)  # chi-square wants at least five in a cell: these become one
            cells = [(table[i, j], expected[j]) for j in range(b) if j != i and not rare[j]]
            if expected[rare].sum() >= 5:
                cells.append((table[i, rare].sum(), expected[rare].sum()))
            else:
                assert table[i, rare].sum() <= expected[rare].sum() + 6 * math.sqrt(expected[rare].sum()) + 3
            freedom = max(1, len(cells) - 1)
            assert sum((seen - wanted) ** 2 / wanted for seen, wanted in cells) < freedom + 6 * math.sqrt(2 * freedom) + 12


# ------------------------------------------------------------------------------------------------ adaptive token learner
@st.composite
def learners(draw):
    """A learner of any variant and size, and a feature map [B, C, H, W], in float64."""
    torch.manual_seed(draw(SEEDS))
    channels, tokens, width = (draw(st.integers(1, 6)) for _ in range(3))
    parts = dict(self_attention=draw(st.booleans()), cross_attention=draw(st.booleans()))
    module = isa.AdaptiveTokenLearner(channels, 5, tokens, width, self_hidden=4, cross_hidden=3, **parts).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=draw(st.sampled_from((0.3, 1.0))))
    shape = (draw(st.integers(1, 4)), channels, draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    return module, torch.randn(shape, dtype=torch.float64) * draw(st.sampled_from((0.1, 1.0, 10.0)))


@property_of(learners(), times=2)
@torch.no_grad()
def test_attention_sums_to_one_and_the_order_of_pixels_and_images_does_not_matter(case):
    module, maps = case
    (b, _, h, w), tokens = maps.shape, module.W.out_channels
    grouping, cross = module.attention_maps(maps)
    assert grouping.shape == (b, tokens, h, w) and (grouping >= 0).all()
    torch.testing.assert_close(grouping.sum(1), torch.ones(b, h, w).double())
    assert (cross is None) == (not module.cross_attention)
    if cross is not None:
        assert cross.shape == grouping.shape and (cross >= 0).all()
        torch.testing.assert_close(cross.sum((2, 3)), torch.ones(b, tokens).double())
    U, close = module(maps), dict(rtol=1e-7, atol=1e-9)
    assert U.shape == (b, tokens, 5) and U.isfinite().all()
    order = torch.randperm(h * w)
    torch.testing.assert_close(module(maps.flatten(2)[..., order].view(maps.shape)), U, **close)
    torch.testing.assert_close(module(maps.transpose(2, 3)), U, **close)
    order = torch.randperm(b)
    torch.testing.assert_close(module(maps[order]), U[order], **close)
    torch.testing.assert_close(module(maps[:1]), U[:1], **close)


# ------------------------------------------------------------------------------------------------ preprocessing
MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B I;16L".split()
ORIENTATIONS = {  # EXIF's orientation -> how the upright array is stored
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


@st.composite
def pictures(draw):
    """An image of any mode and size, its bytes random: floats that are no numbers, negative ones and 16 bits included."""
    mode, size = draw(st.sampled_from(MODES) | st.sampled_from("PL")), (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    rng = np.random.default_rng(draw(SEEDS))
    image = Image.frombytes(mode, size, rng.bytes(len(Image.new(mode, size).tobytes())))
    if mode in ("P", "PA") and draw(st.booleans()):
        image.putpalette(rng.bytes(3 * draw(st.integers(1, 256))))
    if mode in ("1", "L", "P", "RGB", "I;16") and draw(st.sampled_from((True, True, False))):  # PNG's tRNS, damaged too
        grey = st.integers(0, 65535) | st.binary(max_size=300)
        image.info["transparency"] = draw(st.tuples(*[st.integers(0, 65535)] * 3) if mode == "RGB" else grey)
    if draw(st.booleans()):
        image.getexif()[0x0112] = draw(st.one_of(st.integers(0, 9), st.text(max_size=2), st.binary(max_size=2)))
    return image


@pytest.mark.filterwarnings("error")
def test_any_picture_gives_pixels():
    @property_of(pictures(), st.sampled_from((1, 7, 32)), times=4)
    def check(image, side):
        pixels = blip_lite.to_pixels(image, side, blip_lite.MEAN, blip_lite.STD)
        assert pixels.dtype == torch.float32 and pixels.shape == (3, side, side) and pixels.isfinite().all()
        values = pixels * torch.tensor(blip_lite.STD).view(3, 1, 1) + torch.tensor(blip_lite.MEAN).view(3, 1, 1)
        assert -1e-6 < values.min() and values.max() < 1 + 1e-6
        rgb = blip_lite.to_rgb(image)
        assert rgb.mode == "RGB" and rgb.size in (image.size, image.size[::-1])

    check()


@property_of(st.sampled_from(sorted(ORIENTATIONS)), st.sampled_from(("PNG", "TIFF", "WEBP")), st.integers(1, 9), SEEDS, times=2)
def test_exif_orientations_give_the_same_picture(orientation, kind, width, seed):
    height = 1 + seed % 7
    upright = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    stored = Image.fromarray(np.ascontiguousarray(ORIENTATIONS[orientation](upright)))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored.save(file, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    reopened = Image.open(file)
    assert np.array_equal(blip_lite.to_rgb(reopened), upright)
    assert np.array_equal(ImageOps.exif_transpose(reopened), upright)  # PIL's own reading of the tag


FILES = st.lists(st.tuples(st.binary(min_size=1, max_size=8), st.sampled_from((b".png", b".JPeG"))), min_size=1, max_size=3)


@property_of(FILES, FILES, times=0.5)
def test_images_of_any_name_are_found(in_folder, in_shard):
    """Names are bytes: line ends, control characters and what is no UTF-8 included. The colour of its pixel tells an image."""

    def coloured(names):
        clean = {name.replace(b"/", b"_").replace(b"\0", b"_") + suffix for name, suffix in names}
        for i, name in enumerate(sorted(clean)):
            file = io.BytesIO()
            Image.new("RGB", (1, 1), (i, 7, 9)).save(file, "PNG")
            yield os.fsdecode(name), i, file.getvalue()

    with tempfile.TemporaryDirectory() as folder:
        wanted = {}
        for name, i, content in coloured(in_folder):
            wanted[f"{folder}/images/{name}"] = i
            os.makedirs(f"{folder}/images", exist_ok=True)
            with open(f"{folder}/images/{name}", "wb") as file:
                file.write(content)
        with tarfile.open(f"{folder}/images/shard.tar", "w") as tar:
            for name, i, content in coloured(in_shard):
                wanted[f"{folder}/images/shard.tar/{name}"] = i
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        images = find_images(f"{folder}/images", f"{folder}/cache")
        assert {images.name(i): images.open(i).getpixel((0, 0))[0] for i in range(len(images))} == wanted
        assert len(images) == len(wanted)


# ------------------------------------------------------------------------------------------------ training
@property_of(st.integers(1, 60), st.integers(1, 25), st.integers(1, 25), SEEDS, st.integers(0, 3), st.data(), times=2)
def test_an_epoch_holds_each_row_once_from_any_place(n, run, buffer, seed, epoch, data):
    start = data.draw(st.integers(0, n))
    with mock.patch.object(train, "RUN", run):
        blocks = list(epoch_order(n, seed, epoch, buffer))
        rest = [row for block in epoch_order(n, seed, epoch, buffer, start) for row in block.tolist()]
    rows = [row for block in blocks for row in block.tolist()]
    assert sorted(rows) == list(range(n)) and max(map(len, blocks)) <= buffer
    assert rest == rows[start:]


@st.composite
def trainings(draw):
    """Settings of `batches`: the number of files, which of them are bad, batch, seed, epochs, buffer, processes, RUN."""
    count = draw(st.integers(1, 60))
    bad = sorted(draw(st.sets(st.integers(0, count - 1), max_size=count - 1)))
    n, processes = count - len(bad), draw(st.integers(1, 4))
    assume(n >= processes)
    batch = processes * draw(st.integers(1, n // processes))
    return SimpleNamespace(count=count, bad=bad, n=n, batch=batch, seed=draw(SEEDS), epochs=draw(st.integers(1, 3)),
                           buffer=draw(st.integers(1, 70)), processes=processes, run=draw(st.integers(1, 25)))  # fmt: skip


@property_of(trainings(), st.data(), times=2)
def test_batches_show_good_rows_once_an_epoch_and_resume_at_any_step(one, data):
    per_epoch = one.n // one.batch
    steps = one.epochs * per_epoch
    first = data.draw(st.integers(0, steps))
    with mock.patch.object(train, "RUN", one.run):
        make = lambda *place: list(batches(one.n, one.bad, one.batch, one.seed, first_step, steps, one.buffer, *place))  # noqa: E731
        first_step = 0
        whole, shares = make(), [make(rank, one.processes) for rank in range(one.processes)]
        first_step = first
        resumed = make()
    assert resumed == whole[first:] and len(whole) == steps
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    assert all(len(batch) == one.batch for batch in whole)
    good = set(range(one.count)) - set(one.bad)
    for epoch in range(one.epochs):
        pairs = sum(whole[epoch * per_epoch : (epoch + 1) * per_epoch], [])
        rows = {row for _, row in pairs}
        assert {e for e, _ in pairs} == {epoch} and len(rows) == len(pairs) and rows <= good
        assert len(good) - len(rows) == one.n % one.batch  # only what fills no batch is left out


@property_of(st.one_of(st.integers(1, 12), st.integers(1, 10**6)), st.floats(1e-8, 10), times=5)
def test_learning_rate_is_positive_up_to_its_peak_and_ends_near_zero(steps, peak):
    rates = [train.learning_rate(step, steps, peak) for step in {0, steps // 8, steps // 4, steps // 2, steps - 1}]
    assert all(0 < rate <= peak * (1 + 1e-15) for rate in rates)  # up to rounding
    assert train.learning_rate(steps // 4, steps, peak) == peak  # reached in every run, however short
    if steps >= 4:
        assert train.learning_rate(steps // 4 - 1, steps, peak) == pytest.approx(peak, rel=1e-15)
    left = steps - steps // 4  # steps of the cosine, of which the last is one short of the end
    assert train.learning_rate(steps - 1, steps, peak) <= peak * ((math.pi / 2 / left) ** 2 + 1e-15)
