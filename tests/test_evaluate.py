"""evaluate.py and baselines.py: their numbers against ones computed here from pixels and words; files against the protocol."""

import json
import re
import shutil
import statistics
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, ROOT, run_script
from PIL import Image

import baselines
import benchmarks
import blip_lite
import evaluate
import isa
import query_side
from benchmarks.readers import Query

PLAIN = ["--precision", "fp32", "--workers", 0]
real = pytest.mark.skipif(
    not (DATA / "cirr" / "captions").is_dir(), reason="no real annotations: set ISA_SHARED or put them in ../shared/data"
)


# ------------------------------------------------------------------------------------- computed here, one at a time
def image_feature(blip, path):
    return blip.encode_image(blip.preprocess(Image.open(path))[None])[0][0]


def text_feature(blip, text):
    ids, mask = blip.tokenize([text])
    return blip.encode_text(blip.embed_words(ids), mask)[0]


def isa_feature(blip, model, path, modifier):
    U = model(query_side.preprocess(model.encoder, Image.open(path))[None])
    return blip.encode_text(*isa.compose_query(blip, U, [modifier], "a photo of"))[0]


def place_of(target, similarity):
    """The place of a target, from 1: one more than those that are more alike. similarity: {name: value}."""
    return 1 + sum(value > similarity[target] for value in similarity.values())


@pytest.fixture(scope="module")
def cirr(small_world, pocket_blip):
    """CIRR's test queries read without benchmarks.py, and v of its images."""
    root = small_world / "cirr"
    entries = json.loads((root / "captions" / "cap.rc2.test1.json").read_text())
    paths = json.loads((root / "image_splits" / "split.rc2.test1.json").read_text())
    paths = {name: root / "img_raw" / path for name, path in paths.items()}
    with torch.no_grad():
        return entries, paths, {name: image_feature(pocket_blip, path) for name, path in paths.items()}


# ------------------------------------------------------------------------------------------------------ baselines
def test_baselines_are_their_formulas(pocket_blip):
    torch.manual_seed(0)
    v, words = F.normalize(torch.randn(3, 64), dim=-1), ["is red", "has a big dog instead of the cat", "is at night"]
    t = torch.stack([text_feature(pocket_blip, text) for text in words])
    assert torch.equal(baselines.image_only(pocket_blip, v, words), v)
    assert torch.allclose(baselines.text_only(pocket_blip, v, words), t, atol=1e-6)
    for weight in (1.0, 0.5):
        total = weight * v + t
        wanted = total / total.pow(2).sum(1, keepdim=True).sqrt()
        assert torch.allclose(baselines.image_plus_text(pocket_blip, v, words, weight), wanted, atol=1e-6)
    assert torch.allclose(evaluate.SIMPLE["0.5image+text"](pocket_blip, v, words), wanted, atol=1e-6)
    assert torch.allclose(evaluate.SIMPLE["image+text"](pocket_blip, v, words), F.normalize(v + t, dim=-1), atol=1e-6)


# ------------------------------------------------------------------------------------------------- encode_queries
def made_up(row, text):
    """A vector that tells which row and which text it is for; not of unit norm."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{row} {text}".encode()))
    return torch.randn(4, generator=generator) * 10 ** torch.rand(1, generator=generator)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_encode_queries_averages_both_orders_and_keeps_the_order(batch_size):
    captions = [["is much longer than the others"], ["b"], ["is red", "has a long sleeve"], ["dd", "is e"], [""], ["is blue", "x"]]
    queries, asked = [Query(str(i), "r", texts, []) for i, texts in enumerate(captions)], []

    def encode(rows, texts):
        asked.extend(texts)
        assert len(rows) <= batch_size and isinstance(texts, list)
        return torch.stack([made_up(row, text) for row, text in zip(rows.tolist(), texts, strict=True)])

    found = evaluate.encode_queries(encode, queries, "fp32", "cpu", batch_size)
    unit = lambda x: x / x.norm()  # noqa: E731
    for row, texts in enumerate(captions):
        if len(texts) == 2:
            a, b = texts
            wanted = unit(unit(made_up(row, f"{a} and {b}")) + unit(made_up(row, f"{b} and {a}")))
        else:
            wanted = unit(made_up(row, texts[0]))
        assert torch.allclose(found[row], wanted, atol=1e-6)
    assert sorted(map(len, asked)) == list(map(len, asked)) and len(asked) == 9  # like lengths together


def test_fashioniq_queries_of_isa_one_by_one(small_world, trained, pocket_blip, tmp_path):
    benchmark = benchmarks.load("fashioniq", small_world / "fashioniq", "val", "dress")
    benchmark = replace(benchmark, queries=benchmark.queries[::-1] + benchmark.queries[3:6])  # references out of order, and twice
    setting = evaluate.Setting(pocket_blip, benchmark, SimpleNamespace(cache_dir=tmp_path / "cache", workers=0), "fp32")
    model, _ = query_side.load_query_model(trained.isa, pocket_blip)
    found = setting.query_features("isa", model)
    entries = json.loads((small_world / "fashioniq" / "captions" / "cap.dress.val.json").read_text())
    entries = entries[::-1] + entries[3:6]
    assert found.shape == (len(entries), pocket_blip.embed_dim)
    with torch.no_grad():
        for row, entry in enumerate(entries):
            path, (first, second) = small_world / "fashioniq" / "images" / f"{entry['candidate']}.png", entry["captions"]
            both = isa_feature(pocket_blip, model, path, f"{first} and {second}") + isa_feature(
                pocket_blip, model, path, f"{second} and {first}"
            )
            assert torch.allclose(found[row], both / both.norm(), atol=1e-5)


def test_subsets_are_ranked_whole_however_short_the_ranking(small_world, pocket_blip, tmp_path):
    benchmark = benchmarks.load("cirr", small_world / "cirr", "val")
    setting = evaluate.Setting(pocket_blip, benchmark, SimpleNamespace(cache_dir=tmp_path / "cache", workers=0), "fp32")
    q = setting.query_features("text")
    rankings, subsets = setting.rank(q, k=3)
    for row, query in enumerate(benchmark.queries):
        similarity = dict(zip(benchmark.gallery, (setting.gallery @ q[row]).tolist(), strict=True))
        best = sorted(set(benchmark.gallery) - {query.reference}, key=lambda name, s=similarity: -s[name])
        assert rankings[query.id] == best[:3]
        assert subsets[query.id] == [name for name in best if name in query.subset] and len(subsets[query.id]) == 5


# ---------------------------------------------------------------------------------------------------------- table
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
    options = ["--data", small_world, "--precision", "fp32", "--json", "out/table.json", "--picture", "out/found.png"]
    done = run_script("evaluate.py", "table", *options, "--checkpoint", trained.isa, second, cwd=cwd)
    assert done.status == 0, done.err
    return SimpleNamespace(cwd=cwd, printed=done, report=json.loads((cwd / "out" / "table.json").read_text()))


def test_table_is_complete(table, trained, second, pocket_blip):
    settings, results = table.report["settings"], table.report["results"]
    assert settings["blip_fingerprint"] == pocket_blip.fingerprint and settings["precision"] == "fp32"
    assert settings["checkpoint"] == [str(trained.isa), str(second)]
    assert list(results) == ["cirr", "fashioniq", "circo"]
    wanted = {
        "cirr": {"R@1", "R@5", "R@10", "R@50", "Avg", "Rs@1", "Rs@2", "Rs@3"}, "fashioniq": {"R@10", "R@50"},
        "circo": {"mAP@5", "mAP@10", "mAP@25", "mAP@50", "Avg", "R@5", "R@10", "R@25", "R@50"},
    }  # fmt: skip
    for name, methods in results.items():
        assert list(methods) == ["image", "text", "image+text", "0.5image+text", "isa", "reference caption", "target caption"]
        for parts in methods.values():
            assert ({"dress", "shirt", "toptee"} <= set(parts)) == (name == "fashioniq")
            assert {"all", "describe"} <= set(parts) and set(parts["all"]) == wanted[name]
            assert all(0 <= mean <= 100 and spread >= 0 for metrics in parts.values() for mean, spread in metrics.values())
        assert f"{name} (test), percent, mean ± standard deviation over seeds where there are several" in table.printed.out
    row = next(line for line in table.printed.out.splitlines() if line.startswith("text "))
    assert row.split()[1] == f"{results['cirr']['text']['all']['R@1'][0]:.2f}"
    assert table.printed.err == ""


def test_table_of_cirr_from_scratch(table, cirr, trained, second, pocket_blip, small_world):
    """Recall, subset recall, mean, spread and types of modifier of every method, from pixels and words, one query at a time."""
    entries, paths, v = cirr
    captions = json.loads((small_world / "cirr" / "captions.json").read_text())
    models = [query_side.load_query_model(path, pocket_blip)[0] for path in (trained.isa, second)]
    unit = lambda x: x / x.norm()  # noqa: E731
    methods = {
        "image": [lambda ref, text, _: v[ref]],
        "text": [lambda ref, text, _: text_feature(pocket_blip, text)],
        "image+text": [lambda ref, text, _: unit(v[ref] + text_feature(pocket_blip, text))],
        "0.5image+text": [lambda ref, text, _: unit(0.5 * v[ref] + text_feature(pocket_blip, text))],
        "isa": [lambda ref, text, _, m=m: isa_feature(pocket_blip, m, paths[ref], text) for m in models],
        "reference caption": [lambda ref, text, _: text_feature(pocket_blip, f"a photo of {captions[ref]} that {text}")],
        "target caption": [lambda ref, text, target: text_feature(pocket_blip, f"a photo of {captions[target]}")],
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
                subset = {name: similarity[name] for name in entry["img_set"]["members"] if name != reference}
                found = (place_of(target, similarity), place_of(target, subset))
                for kind in ("all", entry["modifier_type"]):
                    places.setdefault(kind, []).append(found)
            for kind, pairs in places.items():
                recall = {f"R@{k}": 100 * np.mean([place <= k for place, _ in pairs]) for k in (1, 5, 10, 50)}
                recall["Avg"] = np.mean(list(recall.values()))
                recall |= {f"Rs@{k}": 100 * np.mean([place <= k for _, place in pairs]) for k in (1, 2, 3)}
                for metric, value in recall.items():
                    results.setdefault(kind, {}).setdefault(metric, []).append(value)
        assert set(results) == set(table.report["results"]["cirr"][method])
        for kind, metrics in results.items():
            for metric, values in metrics.items():
                found = table.report["results"]["cirr"][method][kind][metric]
                wanted = [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0]
                assert found == pytest.approx(wanted, abs=1e-9), (method, kind, metric)
    spreads = [spread for rows in table.report["results"].values() for _, spread in rows["isa"]["all"].values()]
    assert any(spread > 0 for spread in spreads)


def test_table_of_fashioniq_averages_the_categories(table, small_world, pocket_blip):
    root, recalls = small_world / "fashioniq", []
    for category in ("dress", "shirt", "toptee"):
        names = json.loads((root / "image_splits" / f"split.{category}.test.json").read_text())
        hits = []
        with torch.no_grad():
            v = {name: image_feature(pocket_blip, root / "images" / f"{name}.png") for name in names}
            for entry in json.loads((root / "captions" / f"cap.{category}.test.json").read_text()):
                first, second = entry["captions"]
                q = text_feature(pocket_blip, f"{first} and {second}") + text_feature(pocket_blip, f"{second} and {first}")
                hits.append(place_of(entry["target"], {name: float(q @ x) for name, x in v.items()}) <= 10)
        recalls.append(100 * np.mean(hits))
    assert table.report["results"]["fashioniq"]["text"]["all"]["R@10"][0] == pytest.approx(np.mean(recalls), abs=1e-9)


def test_picture_shows_queries_and_what_was_found(table, cirr):
    entries, paths, _ = cirr
    sheet = Image.open(table.cwd / "out" / "found.png")
    assert sheet.mode == "RGB" and sheet.width > 600 and sheet.height > 600
    corner = np.asarray(sheet.crop((8, 8, 96, 96)))
    references = {entry["reference"] for entry in entries}
    assert any(np.array_equal(corner, np.asarray(Image.open(paths[name]).resize((88, 88)))) for name in references)
    assert len(sheet.getcolors(10**6)) > 100


def isa_table(call_script, small_world, checkpoint, *options):
    run = ["evaluate.py", "table", "--data", small_world, "--checkpoint", checkpoint, "--methods", "isa", *PLAIN, *options]
    done = call_script(*run, "--json", "t.json")
    assert done.status == 0, done.err
    assert Image.open("runs/retrieved.png").width > 600
    return done


def test_gallery_is_encoded_once(table, call_script, small_world, trained, tmp_path):
    assert table.printed.out.count("storing v of") == 5  # CIRR, FashionIQ's three, CIRCO
    done = isa_table(call_script, small_world, trained.isa, "--cache-dir", table.cwd / "cache")
    assert "storing" not in done.out
    stored = sorted(path.name for path in (table.cwd / "cache").iterdir())
    options = ["--precision", "bf16", "--benchmark", "cirr", "--data", small_world / "cirr"]
    done = isa_table(call_script, small_world, trained.isa, "--cache-dir", table.cwd / "cache", *options)
    assert done.out.count("storing v of") == 1 and len(list((table.cwd / "cache").iterdir())) == len(stored) + 1
    assert list(json.loads((tmp_path / "t.json").read_text())["results"]) == ["cirr"]


def test_symmetric_model_in_the_table(call_script, table, small_world, trained, pocket_blip, tmp_path):
    """--encoder blip: a query model that stores no encoder, its own BLIP's patches are its feature map."""
    learner = isa.AdaptiveTokenLearner(pocket_blip.vision_proj.in_features, pocket_blip.word_dim)
    checkpoint = torch.load(trained.isa, weights_only=True)
    checkpoint["settings"]["encoder"] = "blip"
    checkpoint["query_model"] = {f"mapper.{name}": x for name, x in learner.state_dict().items()}
    torch.save(checkpoint, tmp_path / "symmetric.pt")
    cached = ["--cache-dir", table.cwd / "cache"]
    isa_table(call_script, small_world / "cirr", tmp_path / "symmetric.pt", "--benchmark", "cirr", *cached)


@pytest.fixture
def variant(trained, pocket_blip, tmp_path):
    """variant(name, settings...) writes an untrained query model of these settings as a checkpoint -> its path and the model."""

    def write(name, **changes):
        checkpoint = torch.load(trained.isa, weights_only=True)
        checkpoint["settings"] |= changes
        torch.manual_seed(5)
        model = query_side.build_query_model(checkpoint["settings"], pocket_blip).eval()
        torch.save({**checkpoint, "query_model": model.state_dict()}, tmp_path / f"{name}.pt")
        return tmp_path / f"{name}.pt", model

    return write


@pytest.mark.parametrize("encoder", ["pocketnet", "blip-tuned"])
def test_a_model_of_both_sides_is_asked_for_the_gallery_too(variant, small_world, pocket_blip, tmp_path, encoder):
    """Rankings are those of its own v, computed here image by image; the frozen BLIP's differ."""
    path, model = variant("both", encoder=encoder, gallery="query")
    if encoder == "blip-tuned":
        torch.nn.init.normal_(model.vision_proj.weight)  # as after training: no longer BLIP's
    benchmark = benchmarks.load("cirr", small_world / "cirr", "val")
    setting = evaluate.Setting(pocket_blip, benchmark, SimpleNamespace(cache_dir=tmp_path / "cache", workers=0), "fp32")
    q = setting.query_features("isa", model)
    rankings, subsets = setting.rank(q, model, k=5)
    with torch.no_grad():
        images = [query_side.preprocess(model.encoder, Image.open(benchmark.paths[name])) for name in benchmark.gallery]
        own = torch.cat([model(pixels[None])[1] for pixels in images])
    for row, query in enumerate(benchmark.queries[:30]):
        similarity = dict(zip(benchmark.gallery, (own @ q[row]).tolist(), strict=True))
        best = sorted(set(benchmark.gallery) - {query.reference}, key=lambda name, s=similarity: -s[name])
        assert [round(similarity[n], 4) for n in rankings[query.id]] == [round(similarity[n], 4) for n in best[:5]]
    assert rankings != setting.rank(q, None, k=5)[0]


def test_trained_baselines_stand_beside_isa_in_the_table(variant, call_script, table, small_world, trained, tmp_path):
    pic2word, _ = variant("pic2word", encoder="blip-v", mapper="mlp", tokens=1)
    searle, _ = variant("searle", encoder="blip-v", mapper="phi", tokens=1)
    options = ["--data", small_world / "circo", "--benchmark", "circo", "--methods", "isa", "pic2word", "searle", "--picture", ""]
    options += ["--checkpoint", trained.isa, "--pic2word", pic2word, pic2word, "--searle", searle]
    done = call_script("evaluate.py", "table", *options, *PLAIN, "--cache-dir", table.cwd / "cache", "--json", "t.json")
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "t.json").read_text())["results"]["circo"]
    assert list(rows) == ["isa", "pic2word", "searle"] and not list(tmp_path.glob("**/*.png"))
    values = [rows[method]["all"]["mAP@50"][0] for method in rows]
    assert len(set(values)) == 3 and all(0 <= value <= 100 for value in values)
    missing = call_script("evaluate.py", "table", *options[:-1], "nowhere.pt", *PLAIN, "--json", "t.json")
    assert missing.status == 1 and "nowhere.pt" in missing.message


def test_inversion_of_the_references_is_a_method(call_script, table, small_world, tmp_path, monkeypatch, pocket_blip):
    """searle-oti: the word of each reference image, however often it is asked about, stands in for its sentence."""
    asked = []

    def invert(blip, v, regularize, **options):
        asked.append(v)
        return torch.zeros(len(v), 1, 128) + v[:, :1, None]

    monkeypatch.setattr(evaluate.baselines, "invert", invert)
    benchmark = benchmarks.load("circo", small_world / "circo", "val")
    args = SimpleNamespace(cache_dir=tmp_path / "cache", workers=0, sentences=str(ROOT / "pocket" / "sentences.json"))
    setting = evaluate.Setting(pocket_blip, benchmark, args, "fp32")
    q = setting.query_features("searle-oti")
    references = {query.reference for query in benchmark.queries}
    assert len(asked[0]) == len(references) < len(q) + 1
    query, place = benchmark.queries[3], setting.references[3]
    U = torch.zeros(1, 1, 128) + setting.v[place][0]
    with torch.no_grad():
        wanted = pocket_blip.encode_text(*isa.compose_query(pocket_blip, U, query.captions))[0]
    assert torch.allclose(q[3], wanted, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- submit
def scores_printed(text):
    """The last line of `score` with metrics -> {metric: value}."""
    line = [line for line in text.splitlines() if "@" in line and "mAP@10 " not in line[:9]][-1]
    words = line.split(": ", 1)[1].split()
    return dict(zip(words[::2], map(float, words[1::2]), strict=True))


def test_submitted_files_score_as_the_table_says(call_script, table, small_world, trained, tmp_path):
    isa_table(call_script, small_world, trained.isa, "--cache-dir", table.cwd / "cache")
    results = json.loads((tmp_path / "t.json").read_text())["results"]
    for name, split in (("cirr", "test1"), ("fashioniq", "test"), ("circo", "test")):
        where = ["--benchmark", name, "--data", small_world / name, "--split", split]
        done = call_script("evaluate.py", "submit", *where, "--checkpoint", trained.isa, "--out", f"new/{name}.json", *PLAIN,
                           "--cache-dir", table.cwd / "cache")  # fmt: skip
        assert done.status == 0 and "storing" not in done.out, done.err
        for category in benchmarks.CATEGORIES if name == "fashioniq" else (None,):
            benchmark = benchmarks.load(name, small_world / name, split, category)
            rankings = benchmarks.read_predictions(tmp_path / "new" / f"{name}.json", benchmark)
            assert len(rankings) == len(benchmark.queries) and all(len(names) == min(50, len(benchmark.gallery) - (name == "cirr"))
                                                                   for names in rankings.values())  # fmt: skip
        subset = ["--subset", "new/cirr_subset.json"] if name == "cirr" else []
        scored = call_script("evaluate.py", "score", *where, f"new/{name}.json", *subset)
        assert scored.status == 0, scored.err
        wanted = {metric: round(mean, 2) for metric, (mean, _) in results[name]["isa"]["all"].items()}
        assert scores_printed(scored.out) == pytest.approx(wanted, abs=0.011)
    assert json.loads((tmp_path / "new" / "cirr.json").read_text())["metric"] == "recall"
    subset = json.loads((tmp_path / "new" / "cirr_subset.json").read_text())
    assert subset.pop("metric") == "recall_subset" and subset.pop("version") == "rc2"
    assert all(len(names) == 3 for names in subset.values())
    written = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert written == ["circo.json", "cirr.json", "cirr_subset.json", "fashioniq.json"]


# ----------------------------------------------------------------------------------------------------------- score
def perfect(name, root, split):
    """The best prediction files there can be, written as the servers describe them -> document, CIRR's subset document."""
    document, subset = {}, {"version": "rc2", "metric": "recall_subset"}
    if name == "cirr":
        gallery = list(json.loads((root / "image_splits" / f"split.rc2.{split}.json").read_text()))[:60]
        document |= {"version": "rc2", "metric": "recall"}
        for entry in json.loads((root / "captions" / f"cap.rc2.{split}.json").read_text()):
            target, gone = entry["target_hard"], {entry["target_hard"], entry["reference"]}
            document[str(entry["pairid"])] = [target, *(x for x in gallery if x not in gone)][:50]
            subset[str(entry["pairid"])] = [target, *(x for x in entry["img_set"]["members"] if x not in gone)][:3]
    elif name == "circo":
        for entry in json.loads((root / "annotations" / f"{split}.json").read_text()):
            document[str(entry["id"])] = entry["gt_img_ids"]
    else:
        for category in ("dress", "shirt", "toptee"):
            gallery = json.loads((root / "image_splits" / f"split.{category}.{split}.json").read_text())[:60]
            entries = json.loads((root / "captions" / f"cap.{category}.{split}.json").read_text())
            targets = [entry["target"] for entry in entries]
            document[category] = {str(i): [target, *(x for x in gallery if x != target)][:50] for i, target in enumerate(targets)}
    return document, subset


def score_perfect(call_script, name, root, split, folder):
    document, subset = perfect(name, root, split)
    (folder / "p.json").write_text(json.dumps(document))
    (folder / "s.json").write_text(json.dumps(subset))
    more = ["--subset", "s.json"] if name == "cirr" else []
    done = call_script("evaluate.py", "score", "--benchmark", name, "--data", root, "--split", split, "p.json", *more)
    assert done.status == 0, done.err
    numbers = re.findall(r" (\d+\.\d\d)\b", done.out)
    assert set(numbers) == {"100.00"} and len(numbers) >= 8
    return done


@pytest.mark.parametrize("name", ["cirr", "fashioniq", "circo"])
def test_perfect_predictions_score_100(call_script, small_world, tmp_path, name):
    done = score_perfect(call_script, name, small_world / name, "val", tmp_path)
    assert ("average: R@10 100.00  R@50 100.00" in done.out) == (name == "fashioniq")
    assert ("mAP@10 direct_addressing: 100.00" in done.out) == (name == "circo") and ("Rs@1 100.00" in done.out) == (name == "cirr")


@real
@pytest.mark.parametrize("name", ["cirr", "fashioniq", "circo"])
def test_perfect_predictions_on_the_real_annotations(call_script, tmp_path, name):
    score_perfect(call_script, name, DATA / name, "val", tmp_path)


@real
def test_one_real_query_wrong(call_script, tmp_path):
    """CIRR val has 4181 queries: one target at place 6 costs 100 / 4181 at R@1 and R@5."""
    document, _ = perfect("cirr", DATA / "cirr", "val")
    names = document[list(document)[2]]  # the first entry after "version" and "metric"
    names.insert(5, names.pop(0))
    (tmp_path / "p.json").write_text(json.dumps(document))
    done = call_script("evaluate.py", "score", "--benchmark", "cirr", "--data", DATA / "cirr", "p.json")
    assert "R@1 99.98  R@5 99.98  R@10 100.00  R@50 100.00  Avg 99.99" in done.out and "Rs@" not in done.out


def test_score_needs_annotations_alone(call_script, small_world, tmp_path):
    shutil.copytree(small_world / "circo" / "annotations", tmp_path / "circo" / "annotations")
    score_perfect(call_script, "circo", tmp_path / "circo", "val", tmp_path)


def one_line(finished, *parts):
    assert finished.status == 1 and finished.err.startswith("evaluate.py: ") and finished.err.count("\n") == 1, finished.err
    for part in parts:
        assert part in finished.err


@pytest.mark.parametrize("spoil, part", [
    (lambda d: d.pop("10000"), "1 queries are missing (first: 10000)"), (lambda d: d["10000"].append("dev-9"), "'dev-9' is not"),
    (lambda d: d.update({"77": ["x"]}), "not in this split (first: 77)"), (lambda d: d.update({"10000": []}), "is empty"),
    (lambda d: d["10000"].append(d["10000"][0]), "repeats a name"), (lambda d: d.clear(), '"version" should be'),
    (lambda d: d.update({"metric": "recall_subset"}), '"metric" should be "recall"'),
    (lambda d: d.update({"10000": "dev-0-0-img0"}), "expected list"),
], ids=range(8))  # fmt: skip
def test_wrong_prediction_files_are_refused(call_script, small_world, tmp_path, spoil, part):
    document, _ = perfect("cirr", small_world / "cirr", "val")
    spoil(document)
    (tmp_path / "p.json").write_text(json.dumps(document))
    one_line(call_script("evaluate.py", "score", "--benchmark", "cirr", "--data", small_world / "cirr", "p.json"), "p.json", part)


def test_files_that_are_none(call_script, small_world, tmp_path):
    score = ["evaluate.py", "score", "--benchmark", "cirr", "--data", small_world / "cirr"]
    one_line(call_script(*score, "none.json"), "none.json")
    for content in ("", "[1, 2]", '{"a": 1', '{"version": "rc2", "version": "rc2"}'):
        (tmp_path / "p.json").write_text(content)
        one_line(call_script(*score, "p.json"), "p.json")
    one_line(call_script(*score[:-1], tmp_path, "p.json"), "split.rc2.val.json is missing")


@real
def test_a_split_without_targets_cannot_be_scored(call_script, tmp_path):
    root = DATA / "cirr"
    gallery = list(json.loads((root / "image_splits" / "split.rc2.test1.json").read_text()))[:50]
    entries = json.loads((root / "captions" / "cap.rc2.test1.json").read_text())
    document = {"version": "rc2", "metric": "recall"} | {str(entry["pairid"]): gallery for entry in entries}
    (tmp_path / "p.json").write_text(json.dumps(document))
    done = call_script("evaluate.py", "score", "--benchmark", "cirr", "--data", root, "--split", "test1", "p.json")
    one_line(done, "no ground truth", "submission")


# ----------------------------------------------------------------------------------------------------------- check
def test_check_of_complete_folders(call_script, small_world):
    for name, splits in (("cirr", ["val", "test1"]), ("fashioniq", ["val", "test"]), ("circo", ["val", "test"])):
        done = call_script("evaluate.py", "check", "--benchmark", name, "--data", small_world / name, "--splits", *splits)
        assert done.status == 0 and done.err == "" and done.out.count("images found") == (6 if name == "fashioniq" else 2)
        assert benchmarks.expected_tree(name) in done.out


@pytest.fixture
def broken(small_world, tmp_path):
    """A copy of the small world's CIRR that a test may break."""
    shutil.copytree(small_world / "cirr", tmp_path / "cirr")
    return tmp_path / "cirr"


def test_check_names_what_is_missing(call_script, broken):
    check = ["evaluate.py", "check", "--benchmark", "cirr", "--data", "cirr"]
    for name in ("dev-0-0-img0", "dev-3-1-img1"):
        (broken / "img_raw" / "dev" / f"{name}.png").unlink()
    done = call_script(*check)
    one_line(done, "cirr is not complete")
    assert "46 of 48 images found" in done.out and "dev/dev-0-0-img0.png" in done.out and "dev/dev-3-1-img1.png" in done.out
    (broken / "captions" / "cap.rc2.val.json").unlink()
    done = call_script(*check)
    one_line(done, "cirr is not complete")
    assert "annotations are missing" in done.out and "captions/cap.rc2.val.json" in done.out
    one_line(call_script(*check[:-1], "nowhere"), "nowhere is not complete")


def test_check_counts_empty_images_as_missing(call_script, broken):
    (broken / "img_raw" / "dev" / "dev-0-0-img0.png").write_bytes(b"")
    done = call_script("evaluate.py", "check", "--benchmark", "cirr", "--data", "cirr", "--splits", "val")
    one_line(done, "cirr is not complete")
    assert "47 of 48 images found" in done.out and "dev/dev-0-0-img0.png" in done.out


def test_check_takes_the_splits_that_are_there(call_script, broken):
    for path in broken.rglob("*rc2.val.json"):
        path.unlink()
    done = call_script("evaluate.py", "check", "--benchmark", "cirr", "--data", "cirr")
    assert done.status == 0 and "cirr  test1: " in done.out and "val:" not in done.out


@pytest.mark.parametrize("given", (".", "cirr/captions", "..."))
def test_check_says_where_the_root_is_instead(call_script, broken, given):
    """One level too high (SEARLE's variant has a folder cirr/ in its root), one too deep, and nowhere near."""
    (broken.parent / "...").mkdir(exist_ok=True)
    (broken.parent / "cirr").rename(broken.parent / "b")
    broken.parent.joinpath("a").mkdir()
    (broken.parent / "b").rename(broken.parent / "a" / "cirr")
    done = call_script("evaluate.py", "check", "--benchmark", "cirr", "--data", given if given == "..." else f"a/{given}")
    one_line(done, "is not complete", "see the list above")
    hint = {".": "--data a/cirr has", "cirr/captions": f"--data {broken.parent}/a/cirr has", "...": "above"}[given]
    assert hint in done.message and (given != "..." or "has its annotations" not in done.message)


def test_check_of_a_training_folder(call_script, small_world, tmp_path):
    photos = tmp_path / "photos" / "more"
    photos.mkdir(parents=True)
    for i, path in enumerate(sorted((small_world / "train").iterdir())[:300]):
        shutil.copy(path, photos / f"{i}.{'PNG' if i % 3 else 'jpg'}")
    (photos.parent / "notes.txt").write_text("no image")
    check = ["evaluate.py", "check", "--images", "photos"]
    done = call_script(*check)
    assert done.status == 0 and done.err == ""
    for part in ("300 files (200 .png, 100 .jpg)", "passed over: 1 files (1 .txt)", "300 images to train on; 0 are empty",
                 "of 200 that were decoded 0 are damaged", "NAME.jpg", "00000.tar"):  # fmt: skip
        assert part in done.out
    (photos / "empty.png").write_bytes(b"")
    assert call_script(*check).status == 0  # below 1 %: train.py leaves it out
    done = call_script(*check)
    assert "301 images to train on; 1 are empty" in done.out and "more/empty.png: is empty" in done.out
    for i in range(100):
        (photos / f"{3 * i + 1}.PNG").write_text("not a picture")
    done = call_script(*check)
    one_line(done, "photos", "more than 1 %", "--skip-bad-images")
    damaged = int(done.out.split("that were decoded ")[1].split()[0])
    assert 40 < damaged < 100  # a third of 200, drawn at random
    assert ".PNG: cannot be read as an image" in done.out


def test_check_of_no_training_folder(call_script, tmp_path):
    one_line(call_script("evaluate.py", "check", "--images", "nowhere"), "nowhere", "no such folder")
    (tmp_path / "texts").mkdir()
    one_line(call_script("evaluate.py", "check", "--images", "texts"), "texts", "holds 0 images")


# ------------------------------------------------------------------------------------------------------- bad input
def test_a_gallery_is_never_silently_smaller(call_script, broken, trained, tmp_path):
    run = ["evaluate.py", "table", "--benchmark", "cirr", "--data", "cirr", "--checkpoint", trained.isa, *PLAIN]
    path = broken / "img_raw" / "test1" / "test1-2-1-img0.png"
    for damage in (lambda: path.write_bytes(path.read_bytes()[:200]), lambda: path.write_bytes(b""), path.unlink):
        damage()
        done = call_script(*run)
        one_line(done, "test1-2-1-img0.png")
        assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("cache/*"))
    assert "1 of 48 images" in done.err


def test_layout_is_checked_before_a_model_is_loaded(call_script, broken, trained, monkeypatch):
    (broken / "img_raw" / "test1" / "test1-2-1-img0.png").unlink()
    monkeypatch.setattr(blip_lite, "load", lambda *_, **__: pytest.fail("loaded BLIP"))
    for command in (["table"], ["submit", "--split", "test1", "--out", "x.json"]):
        done = call_script("evaluate.py", *command, "--benchmark", "cirr", "--data", "cirr", "--checkpoint", trained.isa)
        one_line(done, "1 of 48 images", "test1-2-1-img0.png")


def test_a_table_needs_targets(call_script, broken, trained, monkeypatch):
    path = broken / "captions" / "cap.rc2.test1.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([{k: v for k, v in entry.items() if k != "target_hard"} for entry in entries]))
    monkeypatch.setattr(blip_lite, "load", lambda *_, **__: pytest.fail("loaded BLIP"))
    done = call_script("evaluate.py", "table", "--benchmark", "cirr", "--data", "cirr", "--checkpoint", trained.isa)
    one_line(done, "no ground truth")


@pytest.mark.parametrize("options, part", [
    (["--checkpoint", "none.pt"], "none.pt: there is no such file"), (["--checkpoint", "text.pt"], "text.pt: is damaged"),
    (["--blip", "none.pth"], "none.pth: there is no such file"), (["--image-size", 96], "was trained against BLIP"),
    (["--split", "../val"], "is not a plain file name"), (["--split", "none"], "split.rc2.none.json is missing"),
    (["--data", "nowhere"], "is missing"), (["--picture", "text.pt/x.png"], "text.pt"),
], ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")  # fmt: skip
def test_failures_are_one_line(call_script, table, small_world, trained, tmp_path, options, part):
    (tmp_path / "text.pt").write_text("text")
    run = ["evaluate.py", "table", "--benchmark", "cirr", "--data", small_world / "cirr", "--checkpoint", trained.isa]
    one_line(call_script(*run, "--cache-dir", table.cwd / "cache", *PLAIN, *options), part)


@pytest.mark.parametrize("options", [
    ["table", "--checkpoints", "x"], ["table", "--method", "isa"], ["table", "--methods", "clip"], ["score", "p.json"], [],
    ["submit", "--benchmark", "cirr", "--data", "x", "--split", "val"], ["check", "--benchmark", "coco", "--data", "x"],
    ["table", "--device", "abacus"], ["table", "--workers", "-1"], ["table", "--threads", "-1"],
    ["check"], ["check", "--benchmark", "cirr"], ["check", "--images", "x", "--benchmark", "cirr", "--data", "x"],
], ids=" ".join)  # fmt: skip
def test_wrong_options_are_usage_errors(options, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args(options)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_paths_relative_to_the_current_folder(call_script, small_world, trained, table, tmp_path, monkeypatch):
    """SEARLE's variant of CIRR, with the data in the current folder."""
    for folder in ("captions", "image_splits"):
        shutil.copytree(small_world / "cirr" / folder, tmp_path / "cirr" / folder)
    shutil.copytree(small_world / "cirr" / "img_raw" / "test1", tmp_path / "test1")
    done = call_script("evaluate.py", "table", "--benchmark", "cirr", "--data", ".", "--checkpoint", trained.isa, *PLAIN,
                       "--methods", "image", "target caption")  # fmt: skip
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "runs" / "table.json").read_text())["results"]["cirr"]
    assert list(found) == ["image"]  # without captions.json the ceilings are left out


@pytest.mark.parametrize("head", ("", "that ", "  That "))
def test_a_modifier_is_too_long_where_the_composed_query_is(head, pocket_blip):
    """Pocket BLIP has 64 positions: what just fits passes and can be encoded, a word more is refused, "that" not counted twice."""
    U = torch.zeros(1, 6, pocket_blip.word_dim)
    for count, fits in ((64 - 2 - 3 - 6 - 1, True), (64 - 2 - 3 - 6, False)):  # [CLS] [SEP], "a photo of", u1..u6, "that"
        text = head + "red " * count
        words, mask = isa.compose_query(pocket_blip, U, [text])
        assert (words.shape[1] <= 64) == fits
        if fits:
            evaluate.check_lengths(pocket_blip, "a photo of", 6, [("it", isa.continuation(text))])
            pocket_blip.encode_text(words, mask)
        else:
            with pytest.raises(ValueError, match="it: makes a sentence of 65 tokens, longer than BLIP's 64 positions"):
                evaluate.check_lengths(pocket_blip, "a photo of", 6, [("it", isa.continuation(text))])
