"""evaluate.py: its numbers against ones computed here from pixels and words, one at a time."""

import json
import math
import re
import shutil
import statistics
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script
from PIL import Image

import baselines
import benchmarks
import blip_lite
import evaluate
import isa
import query_side
from baselines import setting as setting_module
from benchmarks import Query
from evaluate import Setting
from plumbing.options import check_lengths
from pocket import ceilings

PLAIN = ["--precision", "fp32", "--workers", 0]


# ---- computed here, one at a time
def unit(x):
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def image_feature(blip, path):
    return blip.encode_image(blip.preprocess(Image.open(path))[None])[0][0]


def text_feature(blip, text):
    ids, mask = blip.tokenize([text])
    return blip.encode_text(blip.embed_words(ids), mask)[0]


def isa_feature(blip, model, path, modifier):
    U = model(query_side.preprocess(model.encoder, Image.open(path))[None])
    return blip.encode_text(*isa.compose_query(blip, U, [modifier], "a photo of"))[0]


def place_of(target, similarity):
    """The place of a target, from 1, among {name: value}."""
    return 1 + sum(value > similarity[target] for value in similarity.values())


def best_of(benchmark, query, gallery, q):
    """CIRR's gallery in the order of similarity to q, without the reference -> {name: value}."""
    values = zip(benchmark.gallery, (gallery @ q).tolist(), strict=True)
    pairs = [pair for pair in values if pair[0] != query.reference]
    return dict(sorted(pairs, key=lambda pair: -pair[1]))


@pytest.fixture(scope="module")
def cirr(small_world, pocket_blip):
    """CIRR's test queries read without benchmarks.py, and v of its images."""
    root = small_world / "cirr"
    entries = json.loads((root / "captions" / "cap.rc2.test1.json").read_text())
    paths = json.loads((root / "image_splits" / "split.rc2.test1.json").read_text())
    paths = {name: root / "img_raw" / path for name, path in paths.items()}
    with torch.no_grad():
        return entries, paths, {n: image_feature(pocket_blip, path) for n, path in paths.items()}


# ---- query features
def test_baselines_are_their_formulas(pocket_blip):
    torch.manual_seed(0)
    v = F.normalize(torch.randn(3, 64), dim=-1)
    words = ["is red", "has a big dog instead of the cat", "is at night"]
    t = torch.stack([text_feature(pocket_blip, text) for text in words])
    wanted = {"image": v, "text": t, "image+text": unit(v + t), "0.5image+text": unit(v / 2 + t)}
    assert wanted.keys() == evaluate.SIMPLE.keys(), "a baseline without its formula here"
    of_the_paper = {"image", "text", "image+text", "pic2word", "searle", "searle-oti", "isa"}
    others = {*evaluate.METHODS} - of_the_paper - {*setting_module.ceilings.METHODS}
    assert others == {*evaluate.NOT_IN_THE_PAPER}, "NOT_IN_THE_PAPER: tables mark these with a *"
    for method, q in wanted.items():
        torch.testing.assert_close(evaluate.SIMPLE[method](pocket_blip, v, words), q)


def test_stronger_baselines_are_their_formulas(pocket_blip):
    """Row by row, with numpy: the sum, the arc from t to v, and both features for the product."""
    torch.manual_seed(0)
    v = F.normalize(torch.randn(3, 64), dim=-1)
    words = ["is red", "has a big dog instead of the cat", "is at night"]
    for row, text in enumerate(words):
        image, t = v[row].numpy(), text_feature(pocket_blip, text).numpy()
        angle = math.acos(image @ t)
        arc = (math.sin(0.3 * angle) * image + math.sin(0.7 * angle) * t) / math.sin(angle)
        total = 0.3 * image + t
        wanted = {"weighted": total / math.sqrt(total @ total), "slerp": arc,
                  "product": np.stack([image, t])}
        assert wanted.keys() == setting_module.STRONGER.keys()
        for method, q in wanted.items():
            found = setting_module.STRONGER[method](pocket_blip, v, words, weight=0.3)[row]
            np.testing.assert_allclose(found.numpy(), q, atol=1e-5)
            assert method == "product" or abs(found.norm() - 1) < 1e-5
    t = text_feature(pocket_blip, words[0])[None]
    assert torch.allclose(baselines.slerp(pocket_blip, t, words[:1]), t, atol=1e-4)  # no arc


def test_both_orders_of_two_captions_count_the_same():
    """Features are normalized before they are averaged, and after."""
    said = {"a and b": [3.0, 0.0], "b and a": [0.0, 0.5]}
    encode = lambda rows, texts: torch.tensor([said[text] for text in texts])  # noqa: E731
    q = evaluate.encode_queries(encode, [Query("0", "r", ["a", "b"], [])], "fp32", "cpu")
    torch.testing.assert_close(q, torch.full((1, 2), 0.5**0.5))


@pytest.fixture
def setting(small_world, pocket_blip, tmp_path):
    """setting(name, split, category, change) -> that benchmark of the small world as a Setting."""

    def make(name, split="val", category=None, change=lambda benchmark: benchmark):
        benchmark = change(benchmarks.load(name, small_world / name, split, category))
        options = {"cache_dir": tmp_path / "cache", "workers": 0}
        return Setting(pocket_blip, benchmark, sentences=ROOT / "pocket/sentences.json", **options)

    return make


def test_fashioniq_queries_of_isa_one_by_one(setting, small_world, trained, pocket_blip):
    """The references are out of order, and some come twice."""
    shuffled = lambda queries: queries[::-1] + queries[3:6]  # noqa: E731
    dress = setting("fashioniq", "val", "dress", lambda b: replace(b, queries=shuffled(b.queries)))
    model, _ = query_side.load_query_model(trained.isa, pocket_blip)
    found = dress.query_features("isa", model)
    root = small_world / "fashioniq"
    entries = shuffled(json.loads((root / "captions" / "cap.dress.val.json").read_text()))
    assert found.shape == (len(entries), pocket_blip.embed_dim)
    for row, entry in enumerate(entries):
        path, (a, b) = root / "images" / f"{entry['candidate']}.png", entry["captions"]
        with torch.no_grad():
            both = [isa_feature(pocket_blip, model, path, text)
                    for text in (f"{a} and {b}", f"{b} and {a}")]
        torch.testing.assert_close(found[row], unit(sum(both)), atol=1e-5, rtol=0)


def test_inversion_of_the_references_is_a_method(setting, monkeypatch, pocket_blip):
    """searle-oti inverts each reference once, also one that the gallery does not hold."""
    asked = []

    def invert(blip, v, regularize, numbers, **options):
        asked.extend(numbers.tolist())
        assert len(v) == len(numbers) <= 5
        return torch.zeros(len(v), 1, 128) + v[:, :1, None]

    monkeypatch.setattr(setting_module, "invert", invert)
    monkeypatch.setattr(setting_module, "INVERTED_TOGETHER", 5)

    def without_one(b):
        return replace(b, gallery=[x for x in b.gallery[::-1] if x != b.queries[3].reference])

    val = setting("circo", change=without_one)
    q, queries = val.query_features("searle-oti"), val.benchmark.queries
    assert val.names == [*val.benchmark.gallery, queries[3].reference]
    assert asked == [*range(len({query.reference for query in queries}))] and 5 < len(asked)
    assert len(asked) < len(q) + 1
    for row in (0, 3):
        U = torch.zeros(1, 1, 128) + val.v[val.names.index(queries[row].reference)][0]
        with torch.no_grad():
            words = isa.compose_query(pocket_blip, U, queries[row].captions)
            torch.testing.assert_close(q[row], pocket_blip.encode_text(*words)[0])


def test_isa_and_a_share_of_the_text(setting, trained, pocket_blip):
    dress = setting("fashioniq", "val", "dress")
    model, _ = query_side.load_query_model(trained.isa, pocket_blip)
    dress.weights["isa+text"] = 0.7
    found, query = dress.query_features("isa+text", model), dress.benchmark.queries[4]
    path, (a, b) = dress.benchmark.paths[query.reference], query.captions
    with torch.no_grad():
        both = [unit(isa_feature(pocket_blip, model, path, text)
                     + 0.7 * text_feature(pocket_blip, text))
                for text in (f"{a} and {b}", f"{b} and {a}")]
    torch.testing.assert_close(found[4], unit(sum(both)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["isa", "text", "reference caption"])
def test_fashioniq_is_reranked_by_the_mean_of_both_orders(setting, trained, pocket_blip, method):
    dress = setting("fashioniq", "val", "dress")
    benchmark, (model, _) = dress.benchmark, query_side.load_query_model(trained.isa, pocket_blip)
    captions, blip, k, weight = ceilings.read_captions(benchmark), pocket_blip, 4, 0.5
    speak = dress.speaker(method, model)
    q = dress.query_features(method, speak=speak)
    best, _ = dress.rank(q)
    again, nothing = dress.rerank(q, best, None, speak, k, weight)
    assert nothing is None and again != best

    def sentence(query, text):
        if method == "isa":
            pixels = query_side.preprocess(model.encoder,
                                           Image.open(benchmark.paths[query.reference]))
            return isa.compose_query(blip, model(pixels[None]), [text])
        if method != "text":
            text = f"a photo of {captions[query.reference]} that {text}"
        ids, mask = blip.tokenize([text])
        return blip.embed_words(ids), mask

    for row, query in list(enumerate(benchmark.queries))[:6]:
        (a, b), scores = query.captions, {}
        for name in best[query.id][:k]:
            pixels = blip.preprocess(Image.open(benchmark.paths[name]))[None]
            with torch.no_grad():
                v, F_v = blip.encode_image(pixels)
                chance = [blip.match(*sentence(query, text), F_v)[0].softmax(0)[1]
                          for text in (f"{a} and {b}", f"{b} and {a}")]
            scores[name] = float(q[row] @ v[0] + weight * sum(chance) / 2)
        first = again[query.id][:k]
        assert sorted(first) == sorted(scores) and again[query.id][k:] == best[query.id][k:]
        assert [scores[x] for x in first] == pytest.approx(
            sorted(scores.values(), reverse=True), abs=1e-5)


@pytest.fixture
def variant(trained, pocket_blip, tmp_path):
    """variant(name, settings...) writes an untrained query model as a checkpoint -> path, model."""

    def write(name, **changes):
        checkpoint = torch.load(trained.isa, weights_only=True)
        checkpoint["settings"] |= changes
        torch.manual_seed(5)
        model = query_side.build_query_model(checkpoint["settings"], pocket_blip).eval()
        torch.save({**checkpoint, "query_model": model.state_dict()}, tmp_path / f"{name}.pt")
        return tmp_path / f"{name}.pt", model

    return write


@pytest.mark.parametrize("encoder", ["pocketnet", "blip-tuned"])
def test_a_two_sided_model_encodes_the_gallery_too(variant, setting, encoder):
    """Rankings are those of its own v, computed here image by image; the frozen BLIP's differ.

    A short ranking does not shorten the subsets.
    """
    _, model = variant("both", encoder=encoder, gallery="query")
    if encoder == "blip-tuned":
        torch.nn.init.normal_(model.vision_proj.weight)  # as after training: no longer BLIP's
    val = setting("cirr")
    q = val.query_features("isa", model)
    rankings, subsets = val.rank(q, model, k=3)
    assert {len(names) for names in subsets.values()} == {5}
    paths = [val.benchmark.paths[name] for name in val.benchmark.gallery]
    with torch.no_grad():
        pixels = [query_side.preprocess(model.encoder, Image.open(path)) for path in paths]
        own = torch.cat([model(x[None])[1] for x in pixels])
    for row, query in enumerate(val.benchmark.queries[:30]):
        best = best_of(val.benchmark, query, own, q[row])
        wanted, found = list(best.values())[:3], [best[name] for name in rankings[query.id]]
        assert found == pytest.approx(wanted, abs=1e-4)
    assert rankings != val.rank(q, None, k=3)[0]


# ---- table
@pytest.fixture(scope="module")
def second(trained):
    """A second "seed": the trained query model with some noise."""
    checkpoint = torch.load(trained.isa, weights_only=True)
    noise = torch.Generator().manual_seed(1)
    for name, x in checkpoint["query_model"].items():
        if x.is_floating_point() and "mapper" in name:
            x += 0.5 * x.abs().mean() * torch.randn(x.shape, generator=noise)
    torch.save(checkpoint, trained.cwd / "second.pt")
    return trained.cwd / "second.pt"


@pytest.fixture(scope="module")
def table(small_world, trained, second, tmp_path_factory):
    """evaluate.py table, all methods and benchmarks, two checkpoints, as a user runs it."""
    cwd = tmp_path_factory.mktemp("table")
    options = ["--data", small_world, "--precision", "fp32", "--json", "out/table.json"]
    options += ["--picture", "out/found.png", "--checkpoint", trained.isa, second]
    done = run_script("evaluate.py", "table", *options, cwd=cwd)
    assert done.status == 0, done.err
    report = json.loads((cwd / "out" / "table.json").read_text())
    return SimpleNamespace(cwd=cwd, printed=done, report=report, results=report["results"])


METRICS = {
    "cirr": {"R@1", "R@5", "R@10", "R@50", "Avg", "Rs@1", "Rs@2", "Rs@3"},
    "fashioniq": {"R@10", "R@50"},
    "circo": {"mAP@5", "mAP@10", "mAP@25", "mAP@50", "Avg", "R@5", "R@10", "R@25", "R@50"},
}


def test_table_is_complete(table, trained, second, pocket_blip):
    settings = table.report["settings"]
    assert settings["blip_fingerprint"] == pocket_blip.fingerprint
    assert settings["precision"] == "fp32" and settings["command"] == "table"
    assert settings["checkpoint"] == [str(trained.isa), str(second)]
    assert list(table.results) == list(METRICS) and table.printed.err == ""
    for name, methods in table.results.items():
        assert list(methods) == [*evaluate.SIMPLE, "isa", "reference caption", "target caption"]
        for parts in methods.values():
            assert ({"dress", "shirt", "toptee"} <= set(parts)) == (name == "fashioniq")
            assert {"all", "describe"} <= set(parts) and set(parts["all"]) == METRICS[name]
        title = f"{name} (test), percent, mean ± standard deviation over seeds where there are"
        assert title in table.printed.out
    row = re.search(r"^text +(\S+)", table.printed.out, re.M)
    assert row[1] == f"{table.results['cirr']['text']['all']['R@1'][0]:.2f}"


def test_table_of_cirr_from_scratch(table, cirr, trained, second, pocket_blip, small_world):
    """Every method: recalls, mean, spread, types of modifier, from pixels and words, one by one."""
    entries, paths, v = cirr
    captions = json.loads((small_world / "cirr" / "captions.json").read_text())
    models = [query_side.load_query_model(p, pocket_blip)[0] for p in (trained.isa, second)]

    def say(text):
        return text_feature(pocket_blip, text)

    methods = {  # functions of reference, modifier, target
        "image": [lambda ref, text, _: v[ref]],
        "text": [lambda ref, text, _: say(text)],
        "image+text": [lambda ref, text, _: unit(v[ref] + say(text))],
        "0.5image+text": [lambda ref, text, _: unit(0.5 * v[ref] + say(text))],
        "isa": [lambda ref, text, _, m=m: isa_feature(pocket_blip, m, paths[ref], text)
                for m in models],
        "reference caption": [lambda ref, text, _: say(f"a photo of {captions[ref]} that {text}")],
        "target caption": [lambda ref, text, target: say(f"a photo of {captions[target]}")],
    }
    for method, seeds in methods.items():
        results = {}
        for query_of in seeds:
            places = {}
            for entry in entries:
                reference, target = entry["reference"], entry["target_hard"]
                with torch.no_grad():
                    q = query_of(reference, entry["caption"], target)
                similarity = {name: float(q @ v[name]) for name in paths if name != reference}
                members = set(entry["img_set"]["members"]) - {reference}
                subset = {name: similarity[name] for name in members}
                found = (place_of(target, similarity), place_of(target, subset))
                for kind in ("all", entry["modifier_type"]):
                    places.setdefault(kind, []).append(found)
            for kind, pairs in places.items():
                recall = {f"R@{k}": np.mean([p <= k for p, _ in pairs]) for k in (1, 5, 10, 50)}
                recall["Avg"] = np.mean(list(recall.values()))
                recall |= {f"Rs@{k}": np.mean([p <= k for _, p in pairs]) for k in (1, 2, 3)}
                for metric, value in recall.items():
                    results.setdefault(kind, {}).setdefault(metric, []).append(100 * value)
        rows = table.results["cirr"][method]
        assert set(results) == set(rows)
        for kind, metrics in results.items():
            for metric, values in metrics.items():
                spread = statistics.stdev(values) if len(values) > 1 else 0
                assert rows[kind][metric] == pytest.approx([np.mean(values), spread], abs=1e-9)
    means = [rows["isa"]["all"].values() for rows in table.results.values()]
    assert any(spread > 0 for values in means for _, spread in values)


def test_table_of_fashioniq_averages_the_categories(table, small_world, pocket_blip):
    root, recalls = small_world / "fashioniq", []
    for category in ("dress", "shirt", "toptee"):
        names = json.loads((root / "image_splits" / f"split.{category}.test.json").read_text())
        entries = json.loads((root / "captions" / f"cap.{category}.test.json").read_text())
        hits = []
        with torch.no_grad():
            v = {n: image_feature(pocket_blip, root / "images" / f"{n}.png") for n in names}
            for entry in entries:
                a, b = entry["captions"]
                q = text_feature(pocket_blip, f"{a} and {b}")
                q = q + text_feature(pocket_blip, f"{b} and {a}")
                similarity = {name: float(q @ x) for name, x in v.items()}
                hits.append(place_of(entry["target"], similarity) <= 10)
        recalls.append(100 * np.mean(hits))
        found = table.results["fashioniq"]["text"][category]["R@10"][0]
        assert found == pytest.approx(recalls[-1], abs=1e-9)
    found = table.results["fashioniq"]["text"]["all"]["R@10"][0]
    assert found == pytest.approx(np.mean(recalls), abs=1e-9)


def test_picture_shows_a_query(table, cirr):
    entries, paths, _ = cirr
    corner = np.asarray(Image.open(table.cwd / "out" / "found.png").crop((8, 8, 96, 96)))
    shown = [Image.open(paths[entry["reference"]]).resize((88, 88)) for entry in entries]
    assert any(np.array_equal(corner, np.asarray(image)) for image in shown)


@pytest.fixture
def run(call_script, table, trained, tmp_path):
    """run(command, options...) with the gallery features of `table` -> finished, results."""

    def run(command, *options, checkpoint=trained.isa):
        cached = [*PLAIN, "--cache-dir", table.cwd / "cache", "--checkpoint", checkpoint]
        done = call_script("evaluate.py", command, *cached, *options)
        written = tmp_path / "runs" / "table.json"
        return done, json.loads(written.read_text())["results"] if written.exists() else None

    return run


def test_reranked_rows_stand_beside_the_others(table, run, small_world, tmp_path, variant):
    """Only rows with sentences; a file for the server has the re-ranked lists."""
    one = ["--benchmark", "cirr", "--data", small_world / "cirr", "--rerank", 7]
    done, results = run("table", *one, "--rerank-weight", 0.5, "--methods", "text", "image+text",
                        "slerp", "isa")
    methods = ["text", "text re-ranked", "image+text", "slerp", "isa", "isa re-ranked"]
    assert list(results["cirr"]) == methods
    assert re.findall(r"^(.+?) \*  ", done.out, re.M) == ["text re-ranked", "slerp",
                                                          "isa re-ranked"]
    assert "* not in the paper" in done.out
    ranked = {}
    for extra in ([], ["--rerank", 7, "--rerank-weight", 0.5]):
        done, _ = run("submit", "--benchmark", "cirr", "--data", small_world / "cirr", "--split",
                      "test1", "--out", "s.json", *extra)
        document = json.loads((tmp_path / "s.json").read_text())
        names = json.loads((tmp_path / "s_subset.json").read_text())
        ranked[bool(extra)] = {i: (document[i], names[i]) for i in document if i.isdigit()}
    moved = [i for i in ranked[0] if ranked[0][i][0] != ranked[1][i][0]]
    assert moved and any(ranked[0][i][1] != ranked[1][i][1] for i in moved)
    for i in ranked[0]:
        a, b = ranked[0][i][0], ranked[1][i][0]
        assert sorted(a[:7]) == sorted(b[:7]) and a[7:] == b[7:]
    path, _ = variant("both", gallery="query")
    done, _ = run("table", *one, "--methods", "isa", checkpoint=path)
    assert done.status == 1 and "both.pt was trained for its own gallery" in done.message


def test_gallery_is_encoded_once(table, run, small_world):
    """test_submitted_files_score_as_the_table_says stores nothing anew either."""
    assert table.printed.out.count("storing v of") == 5  # CIRR, FashionIQ's three, CIRCO
    stored = len(list((table.cwd / "cache").iterdir()))
    one = ["--benchmark", "cirr", "--data", small_world / "cirr", "--methods", "isa"]
    done, results = run("table", *one, "--precision", "bf16")
    assert done.out.count("storing v of") == 1 and list(results) == ["cirr"]
    assert len(list((table.cwd / "cache").iterdir())) == stored + 1


def test_other_models_in_the_table(variant, run, small_world, tmp_path):
    """--encoder blip, whose checkpoint holds no encoder, beside Pic2Word and SEARLE."""
    symmetric, _ = variant("symmetric", encoder="blip")
    pic2word, _ = variant("pic2word", encoder="blip-v", mapper="mlp", tokens=1)
    searle, _ = variant("searle", encoder="blip-v", mapper="phi", tokens=1)
    stored = torch.load(symmetric, weights_only=True)["query_model"]
    assert all(name.startswith("mapper.") for name in stored)
    options = ["--data", small_world / "circo", "--benchmark", "circo", "--picture", "",
               "--methods", "isa", "pic2word", "searle", "--pic2word", pic2word, pic2word]
    done, results = run("table", *options, "--searle", searle, checkpoint=symmetric)
    assert done.status == 0 and list(results["circo"]) == ["isa", "pic2word", "searle"], done.err
    values = [rows["all"]["mAP@50"][0] for rows in results["circo"].values()]
    assert len(set(values)) == 3 and not list(tmp_path.glob("**/*.png"))
    done, _ = run("table", *options, "--searle", "nowhere.pt")
    assert done.status == 1 and "nowhere.pt" in done.message


# ---- submit
def scores_printed(text):
    """The last line of `score` with metrics -> {metric: value}."""
    line = [line for line in text.splitlines() if "@" in line and "mAP@10 " not in line[:9]][-1]
    words = line.split(": ", 1)[1].split()
    return dict(zip(words[::2], map(float, words[1::2]), strict=True))


def test_submitted_files_score_as_the_table_says(call_script, run, small_world, tmp_path):
    _, results = run("table", "--data", small_world, "--methods", "isa")
    for name, split in (("cirr", "test1"), ("fashioniq", "test"), ("circo", "test")):
        where = ["--benchmark", name, "--data", small_world / name, "--split", split]
        done, _ = run("submit", *where, "--out", f"new/{name}.json")
        assert done.status == 0 and "storing" not in done.out, done.err
        for category in benchmarks.CATEGORIES if name == "fashioniq" else (None,):
            benchmark = benchmarks.load(name, small_world / name, split, category)
            file = tmp_path / "new" / f"{name}.json"
            rankings = benchmarks.read_predictions(file, benchmark)
            length = min(50, len(benchmark.gallery) - (name == "cirr"))
            assert all(len(names) == length for names in rankings.values())
        subset = ["--subset", "new/cirr_subset.json"] if name == "cirr" else []
        if name == "circo":  # scoring it needs the annotations alone
            where[3] = tmp_path / "circo"
            shutil.copytree(small_world / "circo" / "annotations", where[3] / "annotations")
        scored = call_script("evaluate.py", "score", *where, f"new/{name}.json", *subset)
        assert scored.status == 0, scored.err
        wanted = {metric: mean for metric, (mean, _) in results[name]["isa"]["all"].items()}
        assert scores_printed(scored.out) == pytest.approx(wanted, abs=0.0051)
        assert ("average: R@10 " in scored.out) == (name == "fashioniq")
        assert ("mAP@10 direct_addressing: " in scored.out) == (name == "circo")
    subset = json.loads((tmp_path / "new" / "cirr_subset.json").read_text())
    assert subset.pop("metric") == "recall_subset" and subset.pop("version") == "rc2"
    assert all(len(names) == 3 for names in subset.values())
    written = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert written == ["circo.json", "cirr.json", "cirr_subset.json", "fashioniq.json"]


def one_line(finished, *parts):
    assert finished.status == 1 and finished.err.startswith("evaluate.py: "), finished.err
    assert finished.err.count("\n") == 1, finished.err
    for part in parts:
        assert part in finished.err


# ---- check
@pytest.fixture
def check(call_script):
    return lambda *options: call_script("evaluate.py", "check", *options)


CHECK_CIRR = ["--benchmark", "cirr", "--data", "cirr"]


@pytest.mark.parametrize("name, tree, parts", [
    ("cirr", "captions/cap.rc2.", 2), ("fashioniq", "captions/cap.{dress", 6),
    ("circo", "COCO2017_unlabeled/", 2)])
def test_check_of_complete_folders(check, small_world, name, tree, parts):
    splits = ["val", "test1" if name == "cirr" else "test"]
    where = ["--benchmark", name, "--data", small_world / name]
    done = check(*where, "--decode", 3, "--splits", *splits)
    assert done.status == 0 and done.err == "" and tree in done.out
    assert done.out.count("images found") == parts
    decoded = 1 if name == "circo" else parts  # its splits share a gallery
    assert done.out.count("  3 of ") == done.out.count("decoded, 0 damaged") == decoded


@pytest.fixture
def broken(small_world, tmp_path):
    """A copy of the small world's CIRR that a test may break."""
    shutil.copytree(small_world / "cirr", tmp_path / "cirr")
    return tmp_path / "cirr"


def test_check_of_a_training_folder(check, small_world, tmp_path):
    photos = tmp_path / ".photos" / "more"  # what the user names may be hidden
    photos.mkdir(parents=True)
    for i, path in enumerate(sorted((small_world / "train").iterdir())[:300]):
        shutil.copy(path, photos / f"{i}.{'PNG' if i % 3 else 'jpg'}")
    (photos.parent / "notes.txt").write_text("no image")
    (photos / "@eaDir").mkdir()
    for name in ("._0.png", ".DS_Store", "@eaDir/0.png"):
        (photos / name).write_bytes(b"")
    done = check("--images", ".photos")
    assert done.status == 0 and done.err == ""
    for part in ("300 files (200 .png, 100 .jpg)", "00000.tar", "300 images to train on, 0 of them",
                 "passed over: 4 files (3 hidden or left by the system, 1 .txt)",
                 "200 of 300 decoded, 0 damaged"):
        assert part in done.out
    (photos / "empty.png").write_bytes(b"")
    with tarfile.open(photos / "0.tar", "w") as shard:
        shard.add(photos / "0.jpg", "._0.jpg")
    done = check("--images", ".photos")  # below 1 %: train.py leaves it out
    assert done.status == 0 and "more/empty.png: is empty" in done.out
    assert "301 images to train on, 1 of them empty" in done.out
    assert "passed over in shards: 1 hidden" in done.out
    for i in range(100):
        (photos / f"{3 * i + 1}.PNG").write_text("<html>" if i % 4 else "not a picture")
    done = check("--images", ".photos")
    one_line(done, ".photos", "more than 1 %", "--skip-bad-images")
    damaged = int(done.out.split("200 of 301 decoded, ")[1].split()[0])
    assert 40 < damaged < 100  # a third of 200, drawn at random
    assert check("--images", ".photos").out == done.out
    done = check("--images", ".photos", "--decode", "all", "--workers", 2)
    for part in ("301 of 301 decoded, 101 damaged", " 75: is a web page", " 25: cannot be read as",
                 " 1: is empty"):
        assert part in done.out
    done = check("--images", ".photos", "--decode", 0)
    assert done.status == 0 and "0 of 301 decoded" in done.out


# ---- bad input
@pytest.fixture
def no_blip(monkeypatch):
    monkeypatch.setattr(blip_lite, "load", lambda *_, **__: pytest.fail("loaded BLIP"))


@pytest.mark.parametrize("command", [["table"], ["submit", "--split", "test1", "--out", "x.json"]])
def test_a_gallery_is_never_silently_smaller(call_script, broken, trained, command, no_blip):
    (broken / "img_raw" / "test1" / "test1-2-1-img0.png").unlink()
    done = call_script("evaluate.py", *command, *CHECK_CIRR, "--checkpoint", trained.isa)
    one_line(done, "test1-2-1-img0.png", "1 of 48 images")


def test_tables_and_scores_need_targets(call_script, broken, trained, request, tmp_path):
    """Submissions do not."""
    path = broken / "captions" / "cap.rc2.test1.json"
    entries = json.loads(path.read_text())
    for entry in entries:
        del entry["target_hard"]
    path.write_text(json.dumps(entries))
    isa_pt = ["--checkpoint", trained.isa, *PLAIN]
    submit = ["submit", *CHECK_CIRR, "--split", "test1", *isa_pt, "--out", "p.json"]
    done = call_script("evaluate.py", *submit)
    assert done.status == 0 and (tmp_path / "p_subset.json").exists()
    request.getfixturevalue("no_blip")
    for command in (["table", *isa_pt], ["score", "--split", "test1", "p.json"]):
        one_line(call_script("evaluate.py", *command, *CHECK_CIRR), "no ground truth", "submit")


@pytest.mark.parametrize("options, part", [
    ("--checkpoint text.pt", "text.pt: is damaged"), ("--image-size 96", "trained against BLIP"),
    ("--split none", "is missing"), ("--picture text.pt/x.png", "text.pt"),
    ("--json text.pt/x.json", "text.pt"),
    ("--methods searle-oti --sentences text.pt", "text.pt: is not JSON")])
def test_failures_come_early(run, small_world, tmp_path, monkeypatch, options, part):
    """Before a gallery is encoded."""
    (tmp_path / "text.pt").write_text("text")
    monkeypatch.setattr(setting_module, "image_features", lambda *_, **__: pytest.fail("encoded"))
    where = ["--benchmark", "cirr", "--data", small_world / "cirr"]
    one_line(run("table", *where, *options.split())[0], part)


@pytest.mark.parametrize("options", [
    "table --method isa", "submit --benchmark cirr --data x --split val", "score p.json",
    "score --benchmark all --data x p.json", "check", "check --benchmark cirr",
    "check --images x --data x", "check --images x --decode most", "check --images x --decode -1",
    "score --benchmark circo --data x --subset s p"])
def test_wrong_options_are_usage_errors(options, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args(options.split())
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_paths_relative_to_the_current_folder(run, small_world, tmp_path):
    """SEARLE's variant of CIRR has no captions for the upper bounds."""
    for folder in ("captions", "image_splits"):
        shutil.copytree(small_world / "cirr" / folder, tmp_path / "cirr" / folder)
    shutil.copytree(small_world / "cirr" / "img_raw" / "test1", tmp_path / "test1")
    where = ["--benchmark", "cirr", "--data", ".", "--methods", "target caption"]
    done, results = run("table", *where, "image", "image")
    assert done.status == 0 and list(results["cirr"]) == ["image"], done.err
    one_line(run("table", *where, "reference caption")[0], "captions.json")


@pytest.mark.parametrize("head", ("", "that ", "  That "))
def test_a_modifier_is_too_long_where_the_query_is(head, pocket_blip):
    """Pocket BLIP has 64 positions: [CLS], a, photo, of, u1..u6, one "that", 52 words, [SEP]."""
    for words in (52, 53):
        text = head + "red " * words
        composed = isa.compose_query(pocket_blip, torch.zeros(1, 6, pocket_blip.word_dim), [text])
        assert composed[0].shape[1] == 12 + words
        check = [pocket_blip, "a photo of", 6, [("it", isa.continuation(text))]]
        if words == 52:
            check_lengths(*check)
    with pytest.raises(ValueError, match="it: makes a sentence of 65 tokens"):
        check_lengths(*check)
