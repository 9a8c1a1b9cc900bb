"""What holds for any input: made up by hypothesis, checked against definitions in plain Python.

    python -m pytest tests/test_properties.py                               # seconds
    HYPOTHESIS_PROFILE=slow python -m pytest tests/test_properties.py       # twenty times as many

The examples are the same on every run. Of large inputs hypothesis chooses sizes and a seed, numpy
the rest.
"""

import io
import json
import math
import os
import re
import tarfile
import tempfile
import zlib
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, with_large_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import benchmarks
import blip_lite
import evaluate
import isa
from benchmarks.readers import Benchmark, Query
from plumbing.images import find_images

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("quick", max_examples=40, derandomize=True, deadline=None, database=None,
                          suppress_health_check=SLOW)
settings.register_profile("slow", settings.get_profile("quick"), max_examples=800)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
SEEDS = st.integers(0, 2**32 - 1)
EVERY_CHARACTER = st.characters(categories=["L", "M", "N", "P", "S", "Z", "C"])  # unassigned, too
NAMES = pytest.mark.parametrize("name", ["cirr", "fashioniq", "circo"])


def property_of(*strategies, times=1.0):
    """A test of every example, `times` as many as the profile says: more of cheap ones."""
    some = settings(PROFILE, max_examples=round(times * PROFILE.max_examples))
    return lambda test: some(given(*strategies)(test))


# ---- rankings
LARGEST = float(np.finfo(np.float32).max)
EXPONENTS = {  # products of 2^90 leave the range of float32, of 2^-149 too
    "float32": ((0,), (0, 1, -1), (0, 30, -30), (90,), (-149,), (-149, 0, 90)),
    "float16": ((0,), (0, 4, -13), (-24,))}


@st.composite
def features(draw, rows, width, dtype="float32"):
    """float [rows, width]: whole numbers of at most 11 bits times a power of two for each row, so
    that inner products are exact in float64. Rows repeat, some are zero, some huge or tiny."""
    rng = np.random.default_rng(draw(SEEDS))
    limit = draw(st.sampled_from((2047, 2047, 3, 1)))
    distinct = draw(st.sampled_from((rows, rows, (rows + 1) // 2, 1)))
    exponents = draw(st.sampled_from(EXPONENTS[dtype]))
    some = rng.integers(-limit, limit + 1, (distinct, width)) * 2.0 ** rng.choice(
        exponents, (distinct, 1))
    some *= rng.random((distinct, 1)) >= draw(st.sampled_from((0, 0.3)))
    stored = some.astype(dtype)
    assert (stored.astype(np.float64) == some).all()  # nothing was rounded
    return stored[rng.integers(0, distinct, rows)]


def similarity(q, g):
    """The inner product, rounded once to float32 and kept finite."""
    exact = math.fsum(float(a) * float(b) for a, b in zip(q, g, strict=True))
    return float(np.float32(max(-LARGEST, min(LARGEST, exact))))


def full_sort(q, gallery, left_out=-1):
    """Every index of the gallery but one, most similar first; equal ones keep their order."""
    values = [similarity(q, g) for g in gallery]
    return [j for j in sorted(range(len(gallery)), key=lambda j: -values[j]) if j != left_out]


@st.composite
def searches(draw, dtype="float32"):
    """query [Q, E], gallery [N, E], k, what each query leaves out (or None), chunk."""
    # top_k discards in blocks of 16
    n = draw(st.integers(1, 8) | st.integers(17, 80) | st.integers(33, 80))
    q, width = draw(st.integers(1, 4)), draw(st.sampled_from((3, 5, 4, 1)))
    query, gallery = draw(features(q, width)), draw(features(n, width, dtype))
    if dtype == "float32" and width > 2 and draw(st.booleans()):
        query[:, -1] = query[:, 0]  # large terms that cancel, where float32 loses the rest
        gallery[:, 0] *= 2**20
        gallery[:, -1] = -gallery[:, 0]
    k = draw(st.just(1) | st.integers(1, 4) | st.integers(1, n + 3))
    exclude = None
    if draw(st.booleans()):  # nothing, the best one or any
        exclude = [draw(st.sampled_from((full_sort(one, gallery)[0], -1, n // 2))) for one in query]
    return query, gallery, k, exclude, draw(st.sampled_from((4096, 4096, 4096, 40, 7, 1)))


@pytest.mark.parametrize("dtype, stored", [
    ("float32", False), ("float32", True), ("float16", True)])
def test_top_k_is_a_full_sort(tmp_path, dtype, stored):
    @property_of(searches(dtype), times=1 if stored else 4)
    def check(search):
        query, gallery, k, exclude, chunk = search
        given_gallery = torch.from_numpy(gallery)
        if stored:
            given_gallery = tmp_path / "gallery.npy"
            np.save(given_gallery, gallery)
        best = lambda: benchmarks.top_k(  # noqa: E731
            torch.from_numpy(query), given_gallery, k, exclude, chunk)
        room = len(gallery) - (exclude is not None and max(exclude) >= 0)
        if room == 0:
            with pytest.raises(ValueError, match="nothing to return"):
                best()
            return
        pairs = zip(query, exclude or [-1] * len(query), strict=True)
        assert best().tolist() == [full_sort(q, gallery, j)[: min(k, room)] for q, j in pairs]

    check()


@st.composite
def searched(draw, name):
    """A benchmark with a made-up gallery, query features [Q, E], gallery features [N, E]."""
    n, q, width = draw(st.integers(6, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    names = [f"image{i}" for i in draw(st.permutations(range(n)))]
    queries = []
    for i in range(q):
        reference, *members = draw(st.permutations(names))[:6]
        target = draw(st.sampled_from(members))
        queries.append(Query(str(i), reference, [""], [target], members))
    return Benchmark(name, "val", names, {}, queries), draw(features(q, width)), draw(
        features(n, width))


@NAMES
def test_rank_and_rank_subsets_are_full_sorts(name):
    @property_of(searched(name), st.integers(1, 60))
    def check(case, k):
        benchmark, query, gallery = case
        both = torch.from_numpy(query), torch.from_numpy(gallery)
        ranked, subsets = (benchmarks.rank(benchmark, *both, k),
                           benchmarks.rank_subsets(benchmark, *both))
        for one, q in zip(benchmark.queries, query, strict=True):
            order = [benchmark.gallery[j] for j in full_sort(q, gallery)]
            assert subsets[one.id] == [x for x in order if x in one.subset]
            order = [x for x in order if name != "cirr" or x != one.reference]
            assert ranked[one.id] == order[:k]

    check()


# ---- metrics
def average_precision(ranking, targets, k):
    """AP@K, exactly: precision at each rank that holds a truth, over min(K, number of truths)."""
    hits = [i for i, x in enumerate(ranking[:k], 1) if x in targets]
    total = sum(Fraction(len(set(ranking[:i]) & set(targets)), i) for i in hits)
    return total / min(k, len(targets))


def percent(values):
    values = list(values)
    return float(100 * Fraction(sum(values)) / len(values))


def expected_scores(name, queries, rankings, subsets):
    lists = [(q, [x for x in rankings[q.id] if name != "cirr" or x != q.reference])
             for q in queries]

    def recall(*ks, lists=lists, metric="R"):
        return {f"{metric}@{k}": percent(q.targets[0] in x[:k] for q, x in lists) for k in ks}

    if name == "fashioniq":
        return recall(10, 50)
    if name == "cirr":
        result = recall(1, 5, 10, 50)
        members = [(q, [x for x in subsets[q.id] if x in q.subset]) for q in queries]
        return result | {"Avg": sum(result.values()) / 4} | recall(
            1, 2, 3, lists=members, metric="Rs")
    result = {f"mAP@{k}": percent(average_precision(x, q.targets, k) for q, x in lists)
              for k in (5, 10, 25, 50)}
    return result | recall(5, 10, 25, 50) | {"Avg": sum(result.values()) / 4}


@st.composite
def answered(draw, name):
    """A benchmark and rankings of it, short ones too: benchmark, rankings, subset rankings."""
    rng = np.random.default_rng(draw(SEEDS))
    n = draw(st.integers(6, 12) | st.integers(50, 70))
    names = [str(i) for i in rng.permutation(10 * n)[:n]]
    queries, rankings, subsets = [], {}, {}
    for i in range(draw(st.integers(1, 5))):
        reference, *rest = rng.permutation(names).tolist()
        truths = rest[: draw(st.integers(1, min(n - 1, 14)) if name == "circo" else st.just(1))]
        subset = rng.permutation([truths[0], *rest[-4:]]).tolist() if name == "cirr" else None
        aspects = draw(st.sets(st.sampled_from("abc")))
        kind = draw(st.sampled_from(("one", "multi")))
        queries.append(Query(str(i), reference, [""], truths, subset, sorted(aspects), kind))
        order = rng.permutation(names).tolist()
        if draw(st.booleans()):  # so that something is found at small K as well
            order = sorted(order, key=lambda x: x not in truths or rng.random() < 0.5)
        rankings[str(i)] = order[: draw(st.integers(1, n))]
        subsets[str(i)] = rng.permutation(subset or names).tolist()[: draw(st.integers(1, 5))]
    return Benchmark(name, "val", names, {}, queries), rankings, subsets


@NAMES
def test_scores_are_the_definitions(name):
    @property_of(answered(name), times=2)
    def check(case):
        benchmark, rankings, subsets = case
        queries = benchmark.queries
        wanted = expected_scores(name, queries, rankings, subsets)
        found = benchmarks.score(benchmark, rankings, subsets)
        assert found == pytest.approx(wanted, rel=1e-12) and list(found) == list(wanted)
        assert benchmarks.score(benchmark, rankings) == pytest.approx(
            expected_scores(name, queries, rankings, rankings), rel=1e-12)
        kinds = benchmarks.score_by_kind(benchmark, rankings, subsets)
        assert kinds.keys() == {query.kind for query in queries}
        for kind, scores in kinds.items():
            some = [query for query in queries if query.kind == kind]
            wanted = expected_scores(name, some, rankings, subsets)
            assert scores == pytest.approx(wanted, rel=1e-12)
        if name == "circo":
            aspects = benchmarks.aspect_scores(benchmark, rankings)
            assert aspects.keys() == {aspect for query in queries for aspect in query.aspects}
            for aspect, value in aspects.items():
                some = [query for query in queries if aspect in query.aspects]
                wanted = expected_scores(name, some, rankings, None)["mAP@10"]
                assert value == pytest.approx(wanted, rel=1e-12)

    check()


@property_of(answered("cirr"), st.booleans(), times=0.75)
def test_evaluate_score_prints_the_definitions(case, with_subset):
    """Annotations and prediction files of CIRR, read and scored as a user does it."""
    benchmark, rankings, subsets = case
    entries = [{"pairid": int(q.id), "reference": q.reference, "target_hard": q.targets[0],
                "caption": "x", "img_set": {"members": [*q.subset, q.reference]}}
               for q in benchmark.queries]
    head = {"version": "rc2"}
    files = {"image_splits/split.rc2.val.json": {x: f"./dev/{x}.png" for x in benchmark.gallery},
             "captions/cap.rc2.val.json": entries, "p.json": head | {"metric": "recall"} | rankings,
             "s.json": head | {"metric": "recall_subset"} | subsets}
    with tempfile.TemporaryDirectory() as folder, mock.patch("sys.stdout", io.StringIO()) as out:
        root = Path(folder)
        for path, content in files.items():
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_text(json.dumps(content))
        options = ["--subset", str(root / "s.json")] if with_subset else []
        evaluate.score(evaluate.parse_args([
            "score", "--benchmark", "cirr", "--data", folder, str(root / "p.json"), *options]))
    wanted = expected_scores("cirr", benchmark.queries, rankings, subsets)
    printed = {metric: float(x) for metric, x in re.findall(r"(\S+) (\d+\.\d\d)\b", out.getvalue())}
    assert printed == pytest.approx({metric: x for metric, x in wanted.items()
                                     if with_subset or metric[:2] != "Rs"}, abs=0.00501, rel=0)


FILE_NAMES = st.text(EVERY_CHARACTER.filter(lambda c: c not in "/\\\0"), min_size=1, max_size=6)


@NAMES
def test_predictions_are_read_back_as_written(tmp_path, name):
    ids = FILE_NAMES.filter(lambda x: x not in (".", ".."))
    ids = st.integers(0, 10**12).map(str) if name == "circo" else ids

    @property_of(st.lists(ids, min_size=7, max_size=60, unique=True), st.data())
    def check(names, data):
        queries = []
        numbers = st.lists(st.integers(0, 10**6), min_size=1, max_size=3, unique=True)
        for i in data.draw(numbers):
            reference, *members = data.draw(st.permutations(names[:6]))
            subset = members if name == "cirr" else None
            queries.append(Query(str(i), reference, [""], members[:1], subset))
        benchmark = Benchmark(name, "val", names, {}, queries,
                              "shirt" if name == "fashioniq" else None)
        rankings = {query.id: data.draw(st.permutations(names)) for query in queries}
        for metric in ("recall", "recall_subset") if name == "cirr" else ("recall",):
            document = benchmarks.predictions(benchmark, rankings, metric)
            benchmarks.write_predictions(tmp_path / "p.json", document)
            read = benchmarks.read_predictions(tmp_path / "p.json", benchmark, metric)
            assert read.keys() == rankings.keys()
            for query in queries:
                wanted = [x for x in rankings[query.id] if name != "cirr" or x != query.reference]
                if metric == "recall_subset":
                    wanted = [x for x in wanted if x in query.subset][:3]
                assert read[query.id] == wanted[:50]

    check()


CAPTIONS = st.lists(st.text("ab", max_size=5), min_size=1, max_size=2)


@property_of(st.lists(CAPTIONS, min_size=1, max_size=8), st.integers(1, 6))
def test_queries_are_encoded_in_any_batches_and_two_captions_averaged(captions, batch):
    def feature(row, text):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{row} {text}".encode()))
        return nn.functional.normalize(torch.randn(4, generator=generator), dim=0)

    def encode(rows, texts):
        return 3 * torch.stack([feature(*one) for one in zip(rows.tolist(), texts, strict=True)])

    queries = [Query(str(i), "r", texts, []) for i, texts in enumerate(captions)]
    found = evaluate.encode_queries(encode, queries, "fp32", "cpu", batch)
    for row, texts in enumerate(captions):
        total = sum(feature(row, " and ".join(order)) for order in (texts, texts[::-1]))
        torch.testing.assert_close(found[row], nn.functional.normalize(total, dim=0))


# ---- tokenizer
ODD = [
    "[SEP]", "[CLS]", "[PAD]", "[UNK]", "[MASK]", "[ENC]", "[DEC]", "[sep]", "##s", "##", "[", "]",
    "#", " ", "\t\n", "\x00", "\x1c", "\x85", "\u2028", "\u200d", "\u200b", "\ufeff", "\u202e",
    "\xa0", "\xad", "\ufffd", "\ud83d", "\ude00", "👩‍👩‍👧🏽", "🇫🇷", "שלום", "مرحبا", "e\u0301",
    "\u0301", "\u0345", "İ", "Σ", "ΑΣ", "ß", "ﬁ", "ﾊﾝ", "漢字", "\uf900", "\U0002f800", "한국",
    "ก็", "a", "red", "that", "Dress", "don't", "x" * 99, "é" * 51, "striped" * 15]
PIECES = st.lists(st.sampled_from(ODD) | EVERY_CHARACTER, max_size=8)
REPEATED = [
    st.tuples(st.text(EVERY_CHARACTER, min_size=1, max_size=3), st.integers(30, 200)),
    st.tuples(st.sampled_from(("x", "É", "e\u0301", "x.")), st.integers(98, 103))]  # limit: 100
TEXTS = st.one_of(
    st.text(EVERY_CHARACTER, max_size=12), PIECES.map("".join),
    st.lists(st.sampled_from(ODD), max_size=8).map(" ".join),
    *(pairs.map(lambda pair: pair[0] * pair[1]) for pairs in REPEATED))
VOCABULARIES = {"pocket": ROOT / "pocket/vocab.txt", "bert": DATA / "bert/vocab.txt"}


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
    """transformers' tokenizer in Python, with the two tokens that BLIP's official code adds."""
    try:
        from transformers.models.bert.tokenization_bert_legacy import (
            BertTokenizerLegacy as BertTokenizer,
        )
    except ImportError:
        BertTokenizer = pytest.importorskip("transformers").BertTokenizer
    theirs = BertTokenizer(str(vocabulary))
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    theirs.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return theirs


def test_any_texts_become_ids_and_a_mask(tokenizer):
    @property_of(st.lists(TEXTS, min_size=1, max_size=4), times=2)
    def check(texts):
        ids, mask = tokenizer(texts)
        assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape
        rows = [[tokenizer.cls_id, *(tokenizer.vocab[piece] for piece in tokenizer.tokenize(text)),
                 tokenizer.sep_id] for text in texts]
        longest = max(map(len, rows))
        pad = lambda row, value: row + [value] * (longest - len(row))  # noqa: E731
        assert ids.tolist() == [pad(row, tokenizer.pad_id) for row in rows]
        assert mask.tolist() == [pad([1] * len(row), 0) for row in rows]

    check()


def test_decoding_and_encoding_again_changes_nothing(tokenizer):
    """But [PAD], [CLS] and [SEP] that are written out are lost; other special tokens have names."""
    lost = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id)

    @property_of(TEXTS, times=3)
    def check(text):
        ids = tokenizer([text])[0][0].tolist()
        again = tokenizer([tokenizer.decode(ids)])[0][0].tolist()
        assert again[1:-1] == [i for i in ids[1:-1] if i not in lost]

    check()


def test_any_text_is_split_as_by_transformers(tokenizer, reference):
    @property_of(TEXTS, times=4)
    def check(text):
        assert tokenizer.tokenize(text) == reference.tokenize(text)

    check()


@pytest.mark.slow
def test_every_character_is_split_as_by_transformers(tokenizer, reference):
    for start in range(0, 0x110000, 64):
        characters = map(chr, range(start, start + 64))
        text = "".join(f"A{character}s x{character} " for character in characters)
        assert tokenizer.tokenize(text) == reference.tokenize(text), hex(start)


# ---- query, losses
WIDTH = 64
SIZES = dict(image_size=32, patch_size=16, image_width=64, image_depth=1, max_positions=4000,
             word_dim=WIDTH, text_depth=2, embed_dim=32)


@pytest.fixture(scope="module")
def blip():
    """A frozen BLIP of made-up weights with the pocket world's vocabulary."""
    tokenizer = blip_lite.Tokenizer(VOCABULARIES["pocket"])
    torch.manual_seed(0)
    blip = blip_lite.Blip({**SIZES, "vocab_size": tokenizer.vocab_size}, tokenizer)
    return with_large_weights(blip)


MODIFIERS = st.one_of(
    st.sampled_from(("", "  ", "\n", "is red", "That is blue", " that\tshows a dog", "that",
                     "THAT that", "that's a", "thatched")),
    st.lists(st.sampled_from("is has a red cat that zeppelin ! é 漢".split()), max_size=12).map(
        " ".join),
    st.text(EVERY_CHARACTER, max_size=12))
PROMPTS = st.sampled_from(("a photo of", "", " a picture ")) | st.text(EVERY_CHARACTER, max_size=6)


@st.composite
def compositions(draw):
    """U [B, L, d_w], B modifiers, prompt."""
    b, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    U = torch.randn(b, tokens, WIDTH, generator=torch.Generator().manual_seed(draw(SEEDS)))
    U *= draw(st.sampled_from((0.1, 1.0, 14.0)))
    return U, draw(st.lists(MODIFIERS, min_size=b, max_size=b)), draw(PROMPTS)


def sentence(blip, u, modifier, prompt):
    """[CLS] prompt u1 .. uL that modifier [SEP]; a "that" of the modifier's own is not repeated."""

    def words(*pieces):
        ids = [blip.tokenizer.vocab[piece] for piece in pieces]
        return blip.embed_words(torch.tensor([ids], dtype=torch.int64))[0]

    if re.match(r"\s*that\b", modifier, re.IGNORECASE):
        modifier = modifier.strip()[len("that") :]
    end = ["that", *blip.tokenizer.tokenize(modifier)] if modifier.strip() else []
    return torch.cat([words("[CLS]", *blip.tokenizer.tokenize(prompt)), u, words(*end, "[SEP]")])


def test_composed_sentences_token_by_token(blip):
    @property_of(compositions(), times=1.5)
    def check(case):
        U, modifiers, prompt = case
        words, mask = isa.compose_query(blip, U, modifiers, prompt)
        wanted = [sentence(blip, *one, prompt) for one in zip(U, modifiers, strict=True)]
        assert words.shape == (len(U), max(map(len, wanted)), WIDTH)
        assert mask.dtype == torch.int64 and words.dtype == torch.float32
        for row, seen, rows in zip(words, mask, wanted, strict=True):
            assert seen.tolist() == [1] * len(rows) + [0] * (words.shape[1] - len(rows))
            assert torch.equal(row[: len(rows)], rows)

    check()


@st.composite
def feature_pairs(draw):
    """v and t [B, E] of unit norm, temperature."""
    b, width = draw(st.integers(2, 9)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    v, t = (nn.functional.normalize(torch.randn(b, width, generator=generator)) for _ in range(2))
    if draw(st.booleans()):
        t = nn.functional.normalize(t + 2 * v)
    return v, t, draw(st.sampled_from((0.005, 0.07, 1.0)))


@property_of(feature_pairs(), SEEDS, times=0.2)
def test_hard_negatives_are_drawn_as_stated(pair, seed):
    """Of 400 draws no count is six standard deviations off, and none is the own partner."""
    v, t, temperature = pair
    torch.manual_seed(seed)
    counts, b, draws = np.zeros((2, len(v), len(v))), len(v), 400
    for _ in range(draws):
        for table, drawn in zip(counts, isa.sample_hard_negatives(v, t, temperature), strict=True):
            table[np.arange(b), drawn.numpy()] += 1
    similarity = (t.double() @ v.double().T).numpy() / temperature  # [sentences, images]
    for table, logits in zip(counts, (similarity, similarity.T), strict=True):
        exps = np.exp(logits - logits.max(1, keepdims=True))
        weights = (exps / exps.sum(1, keepdims=True) + 1e-4) * (1 - np.eye(b))
        p = weights / weights.sum(1, keepdims=True)
        assert table.trace() == 0
        assert (np.abs(table - draws * p) < 6 * np.sqrt(draws * p * (1 - p)) + 2).all()


@st.composite
def learners(draw):
    """A learner of any variant and size, and a feature map [B, C, H, W], in float64."""
    torch.manual_seed(draw(SEEDS))
    channels, tokens, width = (draw(st.integers(1, 6)) for _ in range(3))
    parts = dict(self_attention=draw(st.booleans()), cross_attention=draw(st.booleans()))
    module = isa.AdaptiveTokenLearner(channels, 5, tokens, width, 4, 3, **parts).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=draw(st.sampled_from((0.3, 1.0))))
    shape = draw(st.integers(1, 4)), channels, draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return module, torch.randn(shape).double() * draw(st.sampled_from((0.1, 1.0, 10.0)))


@property_of(learners(), times=2)
@torch.no_grad()
def test_tokens_do_not_depend_on_the_order_of_pixels_and_images(case):
    module, maps = case
    (b, _, h, w), tokens = maps.shape, module.W.out_channels
    grouping, cross = module.attention_maps(maps)
    torch.testing.assert_close(grouping.sum(1), torch.ones(b, h, w).double())
    if cross is not None:
        torch.testing.assert_close(cross.sum((2, 3)), torch.ones(b, tokens).double())
    U = module(maps)
    assert U.shape == (b, tokens, 5) and U.isfinite().all()
    images, pixels = torch.randperm(b), torch.randperm(h * w)
    mixed = maps[images].flatten(2)[..., pixels].view(b, -1, w, h)
    torch.testing.assert_close(module(mixed), U[images], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(module(maps[:1]), U[:1], rtol=1e-7, atol=1e-9)


# ---- images
MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B I;16L".split()


@st.composite
def pictures(draw):
    """An image of any mode and size, its bytes random: NaN, negative numbers, 16 bits included."""
    mode, *size = draw(st.sampled_from(MODES) | st.sampled_from("PL")), *(
        draw(st.integers(1, 40)) for _ in range(2))
    rng = np.random.default_rng(draw(SEEDS))
    image = Image.frombytes(mode, size, rng.bytes(len(Image.new(mode, size).tobytes())))
    if mode in ("P", "PA") and draw(st.booleans()):
        image.putpalette(rng.bytes(3 * draw(st.integers(1, 256))))
    if mode in ("1", "L", "P", "RGB", "I;16") and draw(st.sampled_from((True, True, False))):
        level = st.integers(0, 65535)  # PNG's tRNS, damaged too
        grey = level | st.binary(max_size=300)
        image.info["transparency"] = draw(st.tuples(*[level] * 3) if mode == "RGB" else grey)
    if draw(st.booleans()):
        strange = st.text(max_size=2) | st.binary(max_size=2)
        image.getexif()[0x0112] = draw(st.integers(0, 9) | strange)
    return image


@pytest.mark.filterwarnings("error")
def test_any_picture_gives_pixels():
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (blip_lite.MEAN, blip_lite.STD))

    @property_of(pictures(), st.sampled_from((1, 7, 32)), times=4)
    def check(image, side):
        pixels = blip_lite.to_pixels(image, side, blip_lite.MEAN, blip_lite.STD)
        assert pixels.dtype == torch.float32 and pixels.shape == (3, side, side)
        values = pixels * std + mean
        assert -1e-6 < values.min() and values.max() < 1 + 1e-6  # false for NaN
        rgb = blip_lite.to_rgb(image)
        assert rgb.mode == "RGB" and rgb.size in (image.size, image.size[::-1])

    check()


FILES = st.lists(st.tuples(st.binary(min_size=1, max_size=8), st.sampled_from((b".png", b".JPeG"))),
                 min_size=1, max_size=3)


@property_of(FILES, FILES, times=0.5)
def test_images_of_any_name_are_found(in_folder, in_shard):
    """Names are any bytes. The colour of its pixel identifies an image."""

    def coloured(names):
        plain = {name.translate(None, b"/\0") or b"_" for name, _ in names}
        for i, (name, suffix) in enumerate(zip(sorted(plain), (s for _, s in names), strict=False)):
            file = io.BytesIO()
            Image.new("RGB", (1, 1), (i, 7, 9)).save(file, "PNG")
            yield os.fsdecode(name + suffix), i, file.getvalue()

    with tempfile.TemporaryDirectory() as root:
        folder, wanted = f"{root}/images", {}
        os.mkdir(folder)
        for name, i, content in coloured(in_folder):
            wanted[f"{folder}/{name}"] = i
            with open(f"{folder}/{name}", "wb") as file:
                file.write(content)
        with tarfile.open(f"{folder}/shard.tar", "w") as tar:
            for name, i, content in coloured(in_shard):
                wanted[f"{folder}/shard.tar/{name}"] = i
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        images = find_images(folder, f"{root}/cache")
        found = {images.name(i): images.open(i).getpixel((0, 0))[0] for i in range(len(images))}
        assert found == wanted and len(images) == len(wanted)
