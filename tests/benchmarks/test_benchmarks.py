"""benchmarks.py against the real annotations, rankings worked by hand, and brute force that shares no code with it."""
import json
import math
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import benchmarks  # noqa: E402
from benchmarks.readers import Benchmark, Query  # noqa: E402

SHARED = Path(os.environ.get("ISA_SHARED") or Path(__file__).resolve().parents[2] / "shared")
DATA = SHARED / "data" if (SHARED / "data").is_dir() else SHARED
real = pytest.mark.skipif(not (DATA / "cirr" / "captions").is_dir(),
                          reason="no real annotations: set ISA_SHARED or put them in ../shared/data")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"a picture")  # nothing here looks into it, but an empty file counts as missing


# ------------------------------------------------------------------------------------- small trees in each layout
CIRR_NAMES = [f"dev-{i}-0-img0" for i in range(8)]


def cirr_tree(root, searle=False):
    notes = root / "cirr" if searle else root
    write(notes / "image_splits" / "split.rc2.val.json", {name: f"./dev/{name}.png" for name in CIRR_NAMES})
    write(notes / "captions" / "cap.rc2.val.json", [
        {"pairid": 12, "reference": CIRR_NAMES[0], "target_hard": CIRR_NAMES[1], "target_soft": {CIRR_NAMES[2]: 1.0},
         "caption": " two  dogs ", "modifier_type": "one", "img_set": {"id": 1, "members": CIRR_NAMES[:6],
                                                                     "reference_rank": 5, "target_rank": 0}},
        {"pairid": 40, "reference": CIRR_NAMES[5], "target_hard": CIRR_NAMES[7], "target_soft": {}, "caption": " ",
         "modifier_type": "describing", "img_set": {"id": 2, "members": CIRR_NAMES[2:], "reference_rank": 0}}])
    touch(root / "dev" if searle else root / "img_raw" / "dev", *(f"{name}.png" for name in CIRR_NAMES))
    return root


def fashioniq_tree(root, extension=".png"):
    for category in benchmarks.CATEGORIES:
        write(root / "image_splits" / f"split.{category}.val.json", [f"{category}{i}" for i in range(4)])
        write(root / "captions" / f"cap.{category}.val.json", [
            {"target": f"{category}1", "candidate": f"{category}0", "captions": [" is red?, ", "has . dots, long."]},
            {"target": f"{category}3", "candidate": f"{category}1", "captions": ["", "shorter"]},
            {"target": f"{category}2", "candidate": f"{category}1", "captions": [" ", ".\t"]}])
        touch(root / "images", *(f"{category}{i}{extension}" for i in range(4)))
    return root


def circo_tree(root, images="folder", extension=".jpg"):
    write(root / "annotations" / "val.json", [
        {"reference_img_id": 7, "target_img_id": 30, "relative_caption": "is red", "shared_concept": "a cup",
         "gt_img_ids": [30, 2], "id": 0, "semantic_aspects": ["negation", "addition"]},
        {"reference_img_id": 2, "target_img_id": 111, "relative_caption": "is at night", "shared_concept": "a boat",
         "gt_img_ids": [111], "id": 1, "semantic_aspects": ["addition"]}])
    write(root / "annotations" / "test.json", [
        {"reference_img_id": 7, "relative_caption": "is blue", "shared_concept": "a cup", "id": 0}])
    coco = root / "COCO2017_unlabeled"
    if images != "none":
        touch(coco / "unlabeled2017", *(f"{i:012d}{extension}" for i in (2, 7, 30, 111, 5)), ".DS_Store", "notes.txt")
    if images == "list":
        write(coco / "annotations" / "image_info_unlabeled2017.json",
              {"info": {}, "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (111, 7, 30, 2, 5)]})
    return root


# ------------------------------------------------------------------------------------------------ real annotations
@real
@pytest.mark.parametrize("split, queries, gallery, references", [
    ("val", 4181, 2297, 2165), ("test1", 4148, 2315, 2178)])
def test_cirr_counts(split, queries, gallery, references):
    benchmark = benchmarks.load("cirr", DATA / "cirr", split)
    assert (len(benchmark.queries), len(benchmark.gallery)) == (queries, gallery)
    assert len({query.reference for query in benchmark.queries}) == references
    assert all(len(query.subset) == 5 and query.reference not in query.subset for query in benchmark.queries)
    assert all(len(query.targets) == (split == "val") for query in benchmark.queries)
    assert all(query.targets[0] in query.subset for query in benchmark.queries if query.targets)
    assert list(benchmark.paths) == benchmark.gallery and benchmarks.missing_images(benchmark) == benchmark.gallery
    name, folder = benchmark.gallery[0], "dev" if split == "val" else "test1"
    assert benchmark.paths[name] == DATA / "cirr" / "img_raw" / folder / f"{name}.png"


@real
def test_cirr_irregularities():
    val = benchmarks.load("cirr", DATA / "cirr")
    entries = json.loads((DATA / "cirr" / "captions" / "cap.rc2.val.json").read_text())
    # target_hard even where target_soft gives it no weight, or gives the reference a weight
    odd = [i for i, entry in enumerate(entries) if entry["target_hard"] not in entry["target_soft"]]
    assert len(odd) == 37
    assert all(val.queries[i].targets == [entries[i]["target_hard"]] for i in odd)
    # members by name: the ranks are no indices
    assert all(set(query.subset) | {query.reference} == set(entry["img_set"]["members"])
               for query, entry in zip(val.queries, entries, strict=True))
    assert val.queries[0] == Query(
        "12060", "dev-244-0-img0", ["show three bottles of soft drink"], ["dev-1028-1-img1"],
        ["dev-430-3-img0", "dev-63-0-img1", "dev-1028-1-img1", "dev-1028-2-img1", "dev-1028-2-img0"])
    assert all(query.captions == [entry["caption"].strip()] for query, entry in zip(val.queries, entries, strict=True))
    assert any("façade" in query.captions[0] for query in val.queries)
    test = {query.id: query for query in benchmarks.load("cirr", DATA / "cirr", "test1").queries}
    assert test["27098"].captions == [""]
    assert [key for key, query in test.items() if query.captions == [""]] == ["27098"]


@real
@pytest.mark.parametrize("category, queries, gallery, references, changed", [
    ("dress", 2017, 3817, 1331, 270), ("shirt", 2038, 6346, 1541, 207), ("toptee", 1961, 5373, 1454, 453)])
def test_fashioniq_counts(category, queries, gallery, references, changed):
    benchmark = benchmarks.load("fashioniq", DATA / "fashioniq", category=category)
    assert (len(benchmark.queries), len(benchmark.gallery)) == (queries, gallery)
    assert [query.id for query in benchmark.queries] == [str(i) for i in range(queries)]
    assert len({query.reference for query in benchmark.queries}) == references
    assert len({query.targets[0] for query in benchmark.queries}) == queries  # every target is used once
    entries = json.loads((DATA / "fashioniq" / "captions" / f"cap.{category}.val.json").read_text())
    # captions that lose more than blanks
    both = zip(benchmark.queries, entries, strict=True)
    pairs = [(query, text) for query, entry in both for text in entry["captions"]]
    assert sum(text.strip() not in (*query.captions, "") for query, text in pairs) == changed
    short = {i for i, query in enumerate(benchmark.queries) if len(query.captions) == 1}
    assert short == {"dress": set(), "shirt": {1928}, "toptee": {676, 1076}}[category]
    assert all(text and text == text.strip("?., ") for query in benchmark.queries for text in query.captions)


@real
@pytest.mark.parametrize("split, queries, references", [("val", 220, 220), ("test", 800, 798)])
def test_circo_counts(split, queries, references):
    benchmark = benchmarks.load("circo", DATA / "circo", split)
    assert benchmark.gallery == []  # neither list nor images: enough to score
    assert [query.id for query in benchmark.queries] == [str(i) for i in range(queries)]
    assert len({query.reference for query in benchmark.queries}) == references
    truths = [len(query.targets) for query in benchmark.queries]
    assert (sum(truths), min(truths), max(truths)) == ((916, 1, 14) if split == "val" else (0, 0, 0))
    aspects = Counter(aspect for query in benchmark.queries for aspect in query.aspects)
    assert len(aspects) == (9 if split == "val" else 0) and aspects["negation"] == (21 if split == "val" else 0)
    assert all(query.subset is None and query.kind == "" for query in benchmark.queries)
    if split == "val":
        first = benchmark.queries[0]
        assert (first.reference, first.targets) == ("271520", ["355099", "528417", "534704"])
        assert benchmark.paths["2097"].name == "000000002097.jpg"


@real
def test_perfect_and_worst_on_real_annotations():
    for name, category in [("cirr", None), *(("fashioniq", c) for c in benchmarks.CATEGORIES), ("circo", None)]:
        benchmark = benchmarks.load(name, DATA / name, category=category)
        others = benchmark.gallery[:60] or [str(10**9 + i) for i in range(60)]
        perfect, worst = {}, {}
        for query in benchmark.queries:
            rest = [other for other in others if other not in (*query.targets, *(query.subset or []))]
            perfect[query.id] = [query.reference] * (name == "cirr") + query.targets + [
                other for other in rest if other != query.reference]
            worst[query.id] = rest
        assert set(benchmarks.score(benchmark, perfect).values()) == {100.0}
        assert set(benchmarks.score(benchmark, worst).values()) == {0.0}
        if name == "circo":
            assert set(benchmarks.aspect_scores(benchmark, perfect).values()) == {100.0}


# -------------------------------------------------------------------------------------------------- layouts, reading
@pytest.mark.parametrize("searle", [False, True])
def test_cirr_both_trees(tmp_path, searle):
    benchmark = benchmarks.load("cirr", str(cirr_tree(tmp_path, searle)))
    assert benchmark.gallery == CIRR_NAMES and benchmarks.missing_images(benchmark) == []
    folder = tmp_path / "dev" if searle else tmp_path / "img_raw" / "dev"
    assert benchmark.paths[CIRR_NAMES[3]] == folder / "dev-3-0-img0.png"
    assert benchmark.queries[0] == Query("12", CIRR_NAMES[0], ["two  dogs"], [CIRR_NAMES[1]], CIRR_NAMES[1:6],
                                         kind="one")
    assert benchmark.queries[1].captions == [""]
    (folder / "dev-3-0-img0.png").unlink()
    (folder / "dev-6-0-img0.png").rename(folder / "dev-6-0-img0.jpg")
    assert benchmarks.missing_images(benchmark) == ["dev-3-0-img0", "dev-6-0-img0"]


def test_cirr_train_subfolders(tmp_path):
    write(tmp_path / "image_splits" / "split.rc2.train.json", {"a": "./train/34/a.png", "b": "train/7/b.png"})
    write(tmp_path / "captions" / "cap.rc2.train.json", [
        {"pairid": 0, "reference": "a", "target_hard": "b", "caption": "x", "img_set": {"members": ["a", "b"]}}])
    benchmark = benchmarks.load("cirr", tmp_path, "train")
    assert benchmark.paths["a"] == tmp_path / "img_raw" / "train" / "34" / "a.png"


@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_fashioniq_tree(tmp_path, extension):
    benchmark = benchmarks.load("fashioniq", fashioniq_tree(tmp_path, extension), category="shirt")
    assert benchmark.category == "shirt" and benchmark.gallery == ["shirt0", "shirt1", "shirt2", "shirt3"]
    assert [query.captions for query in benchmark.queries] == [["is red", "has . dots, long"], ["shorter"], [""]]
    assert benchmark.paths["shirt2"] == tmp_path / "images" / f"shirt2{extension}"
    assert benchmarks.missing_images(benchmark) == []


@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_circo_gallery_from_list_folder_or_nowhere(tmp_path, extension):
    listed = benchmarks.load("circo", circo_tree(tmp_path / "a", "list", extension))
    assert listed.gallery == ["111", "7", "30", "2", "5"]  # COCO's order
    folder = benchmarks.load("circo", circo_tree(tmp_path / "b", "folder", extension))
    assert folder.gallery == ["2", "5", "7", "30", "111"]
    for benchmark in (listed, folder):
        assert benchmark.paths["30"].name == f"000000000030{extension}"
        assert benchmarks.missing_images(benchmark) == []
    nowhere = benchmarks.load("circo", circo_tree(tmp_path / "c", "none"))
    assert nowhere.gallery == [] and benchmarks.missing_images(nowhere) == ["2", "7", "30", "111"]
    assert nowhere.queries[0] == Query("0", "7", ["is red"], ["30", "2"], aspects=["negation", "addition"])
    # A folder without one of the ground truths is an incomplete gallery, never a smaller one.
    (tmp_path / "b" / "COCO2017_unlabeled" / "unlabeled2017" / f"000000000030{extension}").unlink()
    assert benchmarks.missing_images(benchmarks.load("circo", tmp_path / "b")) == ["30"]


def test_check_layout(tmp_path):
    fashioniq_tree(tmp_path / "f")
    (tmp_path / "f" / "images" / "dress2.png").unlink()
    (tmp_path / "f" / "captions" / "cap.toptee.val.json").unlink()
    dress, shirt, toptee = benchmarks.check_layout("fashioniq", tmp_path / "f")
    assert (dress["gallery"], dress["queries"], dress["images_missing"]) == (4, 3, 1)
    assert dress["first_missing"] == [str(tmp_path / "f" / "images" / "dress2.png")]
    (tmp_path / "f" / "images" / "dress2.png").write_bytes(b"")
    assert benchmarks.check_layout("fashioniq", tmp_path / "f")[0] == dress
    assert shirt["images_missing"] == 0 and shirt["problem"] is None and len(shirt["found"]) == 2
    assert toptee["missing"] == [str(tmp_path / "f" / "captions" / "cap.toptee.val.json")]
    assert "cap.toptee.val.json is missing" in toptee["problem"] and "images" not in toptee
    rows = benchmarks.check_layout("cirr", tmp_path / "nowhere", splits=("val", "test1"))
    assert [len(row["missing"]) for row in rows] == [2, 2]
    for name, part in [("cirr", "img_raw/"), ("fashioniq", "image_splits/"), ("circo", "COCO2017_unlabeled/")]:
        assert part in benchmarks.expected_tree(name)


def test_check_layout_is_fast(tmp_path):
    names = [f"dev-{i}" for i in range(2000)]
    touch(tmp_path / "img_raw" / "dev", *(f"{name}.png" for name in names[10:]))
    write(tmp_path / "image_splits" / "split.rc2.val.json", {name: f"./dev/{name}.png" for name in names})
    write(tmp_path / "captions" / "cap.rc2.val.json", [
        {"pairid": i, "reference": names[i], "target_hard": names[0], "caption": "x", "img_set": {"members": names[:6]}}
        for i in range(1, 2000)])
    start = time.process_time()
    row, = benchmarks.check_layout("cirr", tmp_path)
    assert time.process_time() - start < 1  # 0.1 s
    assert (row["images"], row["images_missing"], len(row["first_missing"])) == (2000, 10, 5)


# ------------------------------------------------------------------------------------------------ refused annotations
def refused(error, *words):
    """One sentence, and all these words in it."""
    return pytest.raises(error, match="(?s)^[^\n]*" + "".join(f"(?=[^\n]*{word})" for word in words) + "[^\n]*$")


def test_refused_arguments(tmp_path):
    with refused(ValueError):
        benchmarks.load("coco", tmp_path)
    for name, category in [("fashioniq", None), ("fashioniq", "hat"), ("cirr", "dress")]:
        with refused(ValueError):
            benchmarks.load(name, tmp_path, category=category)
    for split in ("../val", "/etc/x", ""):
        with refused(ValueError):
            benchmarks.load("cirr", tmp_path, split)
    for name in ("cirr", "circo"):
        with pytest.raises(FileNotFoundError, match="val.json is missing.*evaluate.py check"):
            benchmarks.load(name, tmp_path)


def edited(path, change):
    content = json.loads(path.read_text())
    write(path, change(content) or content)


@pytest.mark.parametrize("evil", ["../x", "/etc/passwd", "a/b", "..", "", ".", "a\\b", "a\0b"])
def test_names_stay_inside_root(tmp_path, evil):
    cirr, fashioniq = cirr_tree(tmp_path / "c"), fashioniq_tree(tmp_path / "f")
    split = cirr / "image_splits" / "split.rc2.val.json"
    saved = split.read_text()
    edited(split, lambda content: content.update({evil: "./dev/x.png"}))
    with pytest.raises(ValueError, match="split.rc2.val.json"):
        benchmarks.load("cirr", cirr)
    if evil != "a/b":  # a sub-folder is fine in CIRR's relative paths
        write(split, saved)
        relative = evil if evil in ("", ".", "..", "../x", "/etc/passwd") else f"./dev/{evil}"
        edited(split, lambda content: content.update({CIRR_NAMES[0]: relative}))
        with pytest.raises(ValueError, match="split.rc2.val.json.*dev-0-0-img0"):
            benchmarks.load("cirr", cirr)
    edited(fashioniq / "image_splits" / "split.dress.val.json", lambda content: content.append(evil))
    edited(fashioniq / "captions" / "cap.shirt.val.json", lambda content: content[1].update(candidate=evil))
    for category in ("dress", "shirt"):
        with pytest.raises(ValueError, match=f"{category}.val.json"):
            benchmarks.load("fashioniq", fashioniq, category=category)
    circo = circo_tree(tmp_path / "o")
    edited(circo / "annotations" / "val.json", lambda content: content[1]["gt_img_ids"].append(evil))
    with pytest.raises(ValueError, match="val.json, entry 1.*COCO image id"):
        benchmarks.load("circo", circo)


@pytest.mark.parametrize("text", ["", "[", "{}", "[]", "[1]", "[null]", "null", '[{"pairid": 1}]', "\ufeff[]",
                                  pytest.param("[" * 100000, id="deep")])
@pytest.mark.parametrize("name, file", [("cirr", "captions/cap.rc2.val.json"), ("circo", "annotations/val.json")])
def test_malformed_json(tmp_path, name, file, text):
    root = cirr_tree(tmp_path) if name == "cirr" else circo_tree(tmp_path)
    write(root / file, text)
    with refused(ValueError, "val.json"):
        benchmarks.load(name, root)


def test_not_text(tmp_path):
    (cirr_tree(tmp_path) / "captions" / "cap.rc2.val.json").write_bytes(b"\xff\xfe\x00")
    with refused(ValueError, "cap.rc2.val.json"):
        benchmarks.load("cirr", tmp_path)


@pytest.mark.parametrize("change, word", [
    (lambda e: e.pop("reference"), "reference"), (lambda e: e.update(pairid="12"), "pairid"),
    (lambda e: e.update(pairid=True), "pairid"), (lambda e: e.update(caption=None), "caption"),
    (lambda e: e.update(caption=["x"]), "caption"), (lambda e: e.update(img_set=[]), "img_set"),
    (lambda e: e["img_set"].pop("members"), "members"), (lambda e: e["img_set"].update(members=[3]), "members"),
    (lambda e: e.update(reference="dev-99"), "dev-99"), (lambda e: e.update(target_hard="dev-99"), "dev-99"),
    (lambda e: e["img_set"]["members"].append("dev-99"), "dev-99"), (lambda e: e.pop("target_hard"), "target"),
    (lambda e: e.update(modifier_type=3), "modifier_type")])
def test_malformed_cirr_entry(tmp_path, change, word):
    file = cirr_tree(tmp_path) / "captions" / "cap.rc2.val.json"
    edited(file, lambda content: change(content[1]) and None)
    with refused(ValueError, "cap.rc2.val.json, entry 1", word):
        benchmarks.load("cirr", tmp_path)


def test_repeated_ids_names_and_keys(tmp_path):
    file = cirr_tree(tmp_path / "c") / "captions" / "cap.rc2.val.json"
    edited(file, lambda content: content[1].update(pairid=12))
    with refused(ValueError, "cap.rc2.val.json", "repeats"):
        benchmarks.load("cirr", tmp_path / "c")
    split = cirr_tree(tmp_path / "c") / "image_splits" / "split.rc2.val.json"
    write(split, split.read_text().replace("{", '{"dev-1-0-img0": "./dev/x.png", '))
    with refused(ValueError, "split.rc2.val.json", "dev-1-0-img0", "twice"):
        benchmarks.load("cirr", tmp_path / "c")
    split = fashioniq_tree(tmp_path / "f") / "image_splits" / "split.dress.val.json"
    edited(split, lambda content: content.append("dress0"))
    with refused(ValueError, "cap.dress.val.json", "repeats"):
        benchmarks.load("fashioniq", tmp_path / "f", category="dress")


def test_circo_truths_in_any_order_but_only_once(tmp_path):
    file = circo_tree(tmp_path) / "annotations" / "val.json"
    edited(file, lambda content: content[0].update(gt_img_ids=[2, 5, 30]))
    assert benchmarks.load("circo", tmp_path).queries[0].targets == ["30", "2", "5"]  # target_img_id first
    edited(file, lambda content: content[0]["gt_img_ids"].append(5))
    with refused(ValueError, "val.json, entry 0", "twice"):
        benchmarks.load("circo", tmp_path)


def test_malformed_circo_list(tmp_path):
    info = circo_tree(tmp_path, "list") / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json"
    for content in ({}, {"images": [{"file_name": "1.jpg"}]}, {"images": [{"id": -1}]}, {"images": [{"id": 7}]}):
        write(info, content)
        with refused(ValueError, "json"):
            benchmarks.load("circo", tmp_path)


# ---------------------------------------------------------------------------------------------------------- top_k
def brute_top_k(query, gallery, k, exclude=None):
    """Every pair by itself, then numpy's lexsort: by similarity, then by gallery index."""
    result = []
    for i, q in enumerate(query.numpy().astype(np.float64)):
        similarity = np.array([math.fsum(q * g) for g in gallery.numpy().astype(np.float64)]).astype(np.float32)
        order = np.lexsort((np.arange(len(gallery)), -similarity)).tolist()
        result.append([j for j in order if exclude is None or j != exclude[i]][:k])
    return result


@pytest.mark.parametrize("k", [1, 5, 37, 60, 1000])
def test_top_k_ties_by_gallery_order(k):
    generator = torch.Generator().manual_seed(k)
    query = torch.randint(-1, 2, (9, 4), generator=generator).float()  # few values: nearly everything ties
    gallery = torch.randint(-1, 2, (60, 4), generator=generator).float()
    best = benchmarks.top_k(query, gallery, k)
    assert best.dtype == torch.int64 and best.shape == (9, min(k, 60))
    assert best.tolist() == brute_top_k(query, gallery, k)
    exclude = [0, -1, 59, 7, -1, 3, 3, 3, 20]
    best = benchmarks.top_k(query, gallery, k, exclude)
    assert best.shape == (9, min(k, 59)) and best.tolist() == brute_top_k(query, gallery, min(k, 59), exclude)


def test_top_k_duplicates_and_chunks():
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    query = unit(torch.randn(70, 256, generator=generator), dim=1)
    gallery = unit(torch.randn(1200, 256, generator=generator), dim=1)
    gallery = torch.cat([gallery, gallery[:777]])  # copies: in a float32 matmul some differ in the last bit
    whole = benchmarks.top_k(query, gallery, 1977)
    for chunk in (64, 500, 1977):
        assert torch.equal(benchmarks.top_k(query, gallery, 50, chunk=chunk), whole[:, :50]), chunk
    assert torch.equal(benchmarks.top_k(query, gallery, 1977, chunk=1000), whole)
    place = whole.argsort(dim=1)  # [70, 1977] rank of each gallery item
    assert (place[:, 1200:] - place[:, :777] == 1).all()  # each copy comes right after its original
    assert whole[:4].tolist() == brute_top_k(query[:4], gallery, 1977)


def top_k_cases():
    """Name -> query [Q, E], gallery [N, E], each hard in its own way for a float32 matmul that discards."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(6, 33, generator=generator), torch.randn(90, 33, generator=generator)
    cases = {"random": (query, gallery), "all equal": (query, gallery[:1].repeat(90, 1))}
    cases["copies"] = query, gallery[torch.randint(0, 9, (90,), generator=generator)]
    cases["zeros"] = query * (torch.arange(6) % 2)[:, None], gallery * (torch.arange(90) % 3 > 0)[:, None]
    cases["huge"] = query * 1e18, gallery * torch.logspace(0, 18, 90)[torch.randperm(90, generator=generator), None]
    cases["overflow"] = query * 1e25, gallery * torch.logspace(-25, 17, 90).flip(0)[:, None]
    cases["tiny"] = query * 1e-22, gallery * 1e-23  # products near float32's least positive number
    # Neighbours in float32, whose sum passes through terms that are 2^20 times as large and cancel.
    steps = 1 + torch.randperm(90, generator=generator) * 2.0**-23
    large = torch.randn(90, 16, generator=generator) * 2**20
    cases["one ulp"] = torch.ones(6, 33), torch.cat([large, steps[:, None], -large], dim=1)
    return cases


@pytest.mark.parametrize("name", top_k_cases())
def test_top_k_is_exact(name):
    query, gallery = top_k_cases()[name]
    if name == "overflow":  # what passes float32's range ties, and keeps gallery order
        assert (query.double() @ gallery.double().T > torch.finfo(torch.float32).max).any(1).all()
    with np.errstate(over="ignore"):
        whole, left = brute_top_k(query, gallery, 90), brute_top_k(query, gallery, 89, [0, 89, 5, -1, 44, 44])
    for chunk in (1, 7, 40, 90, 4096):
        for k in (1, 2, 13, 90):
            assert benchmarks.top_k(query, gallery, k, chunk=chunk).tolist() == [row[:k] for row in whole], (chunk, k)
            best = benchmarks.top_k(query, gallery, k, [0, 89, 5, -1, 44, 44], chunk).tolist()
            assert best == [row[:min(k, 89)] for row in left], (chunk, k)


def test_top_k_discards_only_what_it_may():
    """Larger than a chunk: peaks and the running best both discard; near-ties and copies fill the cut at k."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1030, 64, generator=generator)  # more than one block of queries
    gallery = torch.randn(600, 64, generator=generator)
    gallery = torch.cat([gallery, gallery * (1 + 2**-22), gallery, gallery * (1 - 2**-22)])
    similarity = np.array([(query.numpy().astype(np.float64) * row).sum(1) for row in gallery.numpy()]).T
    order = np.argsort(-similarity.astype(np.float32), axis=1, kind="stable")
    for chunk in (130, 1000, 4096):
        for k in (1, 10, 50):
            assert (benchmarks.top_k(query, gallery, k, chunk=chunk).numpy() == order[:, :k]).all(), (chunk, k)
    exclude = order[:, 3]  # one of the best is left out
    rest = order[order != exclude[:, None]].reshape(1030, -1)[:, :10]
    assert (benchmarks.top_k(query, gallery, 10, exclude, 500).numpy() == rest).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_top_k_dtypes(dtype):
    query, gallery = top_k_cases()["random"]
    query, gallery = query.to(dtype), gallery.to(dtype)
    assert benchmarks.top_k(query, gallery, 9, chunk=20).tolist() == brute_top_k(query.double(), gallery.double(), 9)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_top_k_of_a_file(tmp_path, dtype):
    query, gallery = top_k_cases()["copies"]
    gallery, path = gallery.numpy().astype(dtype), tmp_path / "g.npy"
    np.save(path, gallery)
    for chunk in (1, 7, 90, 4096):
        for file in (path, str(path)):
            assert torch.equal(benchmarks.top_k(query, file, 20, [3] * 6, chunk),
                               benchmarks.top_k(query, torch.from_numpy(gallery), 20, [3] * 6))
    gallery[-1, -1] = np.inf
    np.save(path, gallery)
    with refused(ValueError, "NaN or infinity"):
        benchmarks.top_k(query, path, 1, chunk=40)


def test_top_k_refuses_files(tmp_path):
    query, gallery = top_k_cases()["random"]
    good = tmp_path / "good.npy"
    np.save(good, gallery.numpy())
    with refused(ValueError, "needs"):
        benchmarks.top_k(query[:, 1:], good, 1)
    with refused(FileNotFoundError, "no.npy is missing"):
        benchmarks.top_k(query, tmp_path / "no.npy", 1)
    write(tmp_path / "text.npy", "not an array")
    write(tmp_path / "empty.npy", "")
    (tmp_path / "cut.npy").write_bytes(good.read_bytes()[:-5])
    (tmp_path / "folder.npy").mkdir()
    np.save(tmp_path / "double.npy", gallery.numpy().astype(np.float64))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(gallery.numpy()))
    np.save(tmp_path / "flat.npy", gallery.numpy()[0])
    np.save(tmp_path / "big-endian.npy", gallery.numpy().astype(">f4"))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "many.npz", gallery.numpy())
    for path in tmp_path.iterdir():
        if path != good:
            with refused(ValueError, path.name, "write it again"):
                benchmarks.top_k(query, path, 1)


def test_top_k_refuses():
    one, nan = torch.ones(2, 3), torch.tensor([[1.0, float("nan"), 0.0]])
    for bad in [(one, torch.ones(4, 2), 1), (one[0], one, 1), (one, one, 0), (one, torch.ones(0, 3), 1), (nan, one, 1),
                (one, nan, 1), (one, one, 1, [0]), (one, one[:1], 1, [0, 0])]:
        with refused(ValueError):
            benchmarks.top_k(*bad)
    assert benchmarks.top_k(torch.ones(0, 3), one, 5).shape == (0, 2)


@pytest.mark.parametrize("name", ["cirr", "fashioniq"])
def test_rank(tmp_path, name):
    benchmark = benchmarks.load("cirr", cirr_tree(tmp_path)) if name == "cirr" else benchmarks.load(
        "fashioniq", fashioniq_tree(tmp_path), category="dress")
    place = [benchmark.gallery.index(query.reference) for query in benchmark.queries]
    gallery = torch.eye(len(benchmark.gallery))
    rankings = benchmarks.rank(benchmark, gallery[place], gallery)  # the reference is most similar, all else ties
    for query in benchmark.queries:
        rest = [image for image in benchmark.gallery if image != query.reference]
        assert rankings[query.id] == ([] if name == "cirr" else [query.reference]) + rest
    with refused(ValueError, name):
        benchmarks.rank(benchmark, gallery[place][:1], gallery)
    with refused(ValueError, name):
        benchmarks.rank(benchmark, gallery[place], gallery[:-1])


def test_rank_subsets_is_the_ranking_restricted(tmp_path):
    benchmark = benchmarks.load("cirr", cirr_tree(tmp_path))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        query, gallery = (torch.randint(-1, 2, (rows, 3), generator=generator).float() for rows in (2, 8))
        full, subsets = (f(benchmark, query, gallery) for f in (benchmarks.rank, benchmarks.rank_subsets))
        assert subsets == {q.id: [name for name in full[q.id] if name in q.subset] for q in benchmark.queries}
    for bad in [(query[:, :1], gallery), (query[:1], gallery), (query, gallery * math.nan)]:
        with refused(ValueError, "features"):
            benchmarks.rank_subsets(benchmark, *bad)


# -------------------------------------------------------------------------------------------------------- metrics
def bench(name, queries, gallery=(), category=None):
    return Benchmark(name, "val", list(gallery), {}, queries, category)


def test_cirr_by_hand():
    gallery = ["r", *(f"g{i}" for i in range(1, 61))]
    subset = ["g3", "g7", "g12", "g30", "g55"]
    benchmark = bench("cirr", [Query(str(i), "r", [""], [target], subset)
                               for i, target in enumerate(["g3", "g7", "g12", "g55"])], gallery)
    order = ["r", *(f"g{i}" for i in range(60, 0, -1))]  # without r: g60 is 1st, g55 6th, g12 49th, g7 54th, g3 58th
    result = benchmarks.score(benchmark, {str(i): order for i in range(4)})
    assert result == {"R@1": 0, "R@5": 0, "R@10": 25, "R@50": 50, "Avg": 18.75, "Rs@1": 25, "Rs@2": 25, "Rs@3": 50}
    assert all(type(value) is float for value in result.values())
    # The reference at rank 5 does not push the 6th name out of R@5, and a ranking without it is the same.
    early = ["g60", "g59", "g58", "g57", "r", "g55", *(f"g{i}" for i in range(54, 0, -1))]
    for ranking in (early, [name for name in early if name != "r"]):
        assert benchmarks.score(benchmark, {str(i): ranking for i in range(4)})["R@5"] == 25
    # Members that a short ranking lacks come last: g30 and g12 are there, so of the four targets only g12 is found.
    short = benchmarks.score(benchmark, {str(i): ["g1", "g30", "g12"] for i in range(4)})
    assert [short[f"Rs@{k}"] for k in (1, 2, 3)] == [0, 25, 25]
    # A separate subset ranking counts instead, restricted to the members.
    apart = benchmarks.score(benchmark, {str(i): order for i in range(4)},
                             {str(i): ["r", "g9", "g7", "g3", "g12"] for i in range(4)})
    assert [apart[f"Rs@{k}"] for k in (1, 2, 3)] == [25, 50, 75] and apart["R@10"] == 25


def test_fashioniq_by_hand():
    gallery = ["r", *(f"g{i}" for i in range(1, 61))]
    queries = [Query(str(i), "r", [""], [f"g{target}"]) for i, target in enumerate((9, 10, 49, 50))]
    benchmark = bench("fashioniq", queries, gallery, "dress")
    result = benchmarks.score(benchmark, {str(i): gallery for i in range(4)})  # the reference keeps rank 1
    assert result == {"R@10": 25, "R@50": 75}
    assert benchmarks.average([result, {"R@10": 50, "R@50": 75}, {"R@10": 0, "R@50": 0}]) == {"R@10": 25, "R@50": 50}
    for bad in ([], [result, {"R@10": 1.0}]):
        with refused(ValueError):
            benchmarks.average(bad)


def test_circo_by_hand():
    # Two truths at ranks 1 and 4: (1/1 + 2/4) / min(K, 2) = 3/4. R@K looks at targets[0], at rank 4.
    # Seven truths, hits at 2 and 6: AP@5 = (1/2) / 5, AP@10 = (1/2 + 2/6) / 7.
    queries = [Query("0", "1", [""], ["40", "10"], aspects=["negation", "addition"]),
               Query("1", "2", [""], ["21", "22", "23", "24", "25", "26", "27"], aspects=["addition"])]
    rankings = {"0": ["10", "1", "30", "40", "50"], "1": ["2", "22", "3", "4", "5", "21", "6", "7"]}
    result = benchmarks.score(bench("circo", queries), rankings)
    ap = {5: (3 / 4, 1 / 10), 10: (3 / 4, 5 / 42), 25: (3 / 4, 5 / 42), 50: (3 / 4, 5 / 42)}
    for k, values in ap.items():
        assert result[f"mAP@{k}"] == pytest.approx(50 * sum(values))
    assert [result[f"R@{k}"] for k in (5, 10, 25, 50)] == [50, 100, 100, 100]
    assert result["Avg"] == pytest.approx(sum(50 * sum(values) for values in ap.values()) / 4)
    assert set(result) == {*(f"{m}@{k}" for m in ("mAP", "R") for k in (5, 10, 25, 50)), "Avg"}
    aspects = benchmarks.aspect_scores(bench("circo", queries), rankings)
    assert list(aspects) == ["addition", "negation"]
    assert aspects == pytest.approx({"addition": result["mAP@10"], "negation": 75})
    # The divisor: six truths, the first five right, is perfect at 5 and 5/6 at 10.
    names = ["a", "b", "c", "d", "e"]
    assert benchmarks.average_precision(names, [*names, "f"], 5) == 1
    assert benchmarks.average_precision(names, [*names, "f"], 10) == pytest.approx(5 / 6)


def brute_metrics(benchmark, order):
    """From 1-based positions in complete rankings, one query at a time, in numpy."""
    rows = []
    for query in benchmark.queries:
        names = [n for n in order[query.id] if not (benchmark.name == "cirr" and n == query.reference)]
        position = {n: i + 1 for i, n in enumerate(names)}
        row = {f"R@{k}": position[query.targets[0]] <= k for k in (1, 5, 10, 25, 50)}
        if query.subset:
            better = sum(position[n] < position[query.targets[0]] for n in query.subset)
            row |= {f"Rs@{k}": better < k for k in (1, 2, 3)}
        hits = np.sort([position[t] for t in query.targets])
        for k in (5, 10, 25, 50):
            row[f"mAP@{k}"] = np.sum(np.arange(1, len(hits) + 1) / hits * (hits <= k)) / min(k, len(hits))
        rows.append(row)
    return {metric: 100 * float(np.mean([row[metric] for row in rows])) for metric in rows[0]}


@pytest.mark.parametrize("name, metrics", [
    ("cirr", ["R@1", "R@5", "R@10", "R@50", "Avg", "Rs@1", "Rs@2", "Rs@3"]), ("fashioniq", ["R@10", "R@50"]),
    ("circo", ["mAP@5", "mAP@10", "mAP@25", "mAP@50", "R@5", "R@10", "R@25", "R@50", "Avg"])])
@pytest.mark.parametrize("seed", range(5))
def test_score_against_brute_force(name, metrics, seed):
    rng = random.Random(seed)
    gallery = [str(i) for i in range(90)]
    queries, order = [], {}
    for i in range(60):
        reference, *others = rng.sample(gallery, 20)
        targets = others[:rng.randint(1, 14) if name == "circo" else 1]
        subset = rng.sample(others[:5], 5) if name == "cirr" else None
        queries.append(Query(str(i), reference, [""], targets, subset, kind=rng.choice(["one", "multi", ""])))
        order[str(i)] = rng.sample(gallery, 90)
        for early in targets:  # so that no metric is near 0
            if rng.random() < 0.5:
                order[str(i)].remove(early)
                order[str(i)].insert(rng.randrange(12), early)
    benchmark = bench(name, queries, gallery)
    result, brute = benchmarks.score(benchmark, order), brute_metrics(benchmark, order)
    if name != "fashioniq":
        brute["Avg"] = np.mean([brute[m] for m in metrics if m.startswith("R@" if name == "cirr" else "mAP")])
    assert sorted(result) == sorted(metrics)
    assert result == pytest.approx({metric: brute[metric] for metric in metrics})
    kinds = benchmarks.score_by_kind(benchmark, order)
    assert sorted(kinds) == ["multi", "one"]
    for kind, values in kinds.items():
        part = brute_metrics(bench(name, [query for query in queries if query.kind == kind]), order)
        values.pop("Avg", None)
        assert values == pytest.approx({metric: part[metric] for metric in values})


def test_score_refuses(tmp_path):
    benchmark = benchmarks.load("circo", circo_tree(tmp_path), "test")
    with refused(ValueError, "circo", "test", "no ground truth; write a submission instead"):
        benchmarks.score(benchmark, {"0": ["1"]})
    benchmark = benchmarks.load("circo", tmp_path)
    with refused(ValueError, "1 queries have no ranking", "first: 1"):
        benchmarks.score(benchmark, {"0": ["1"]})
    with refused(ValueError, "query 1", "twice"):
        benchmarks.score(benchmark, {"0": ["1"], "1": ["30", "2", "30"]})
    assert benchmarks.score(benchmark, {"0": ["30"], "1": ["1"], "other": []})["mAP@5"] == 25
    assert benchmarks.score_by_kind(benchmark, {"0": ["30"], "1": ["1"]}) == {}
    cirr = benchmarks.load("cirr", cirr_tree(tmp_path / "c"))
    with refused(ValueError, "1 queries have no ranking", "first: 40"):
        benchmarks.score(cirr, {"12": [], "40": []}, {"12": []})


# ------------------------------------------------------------------------------------------------ prediction files
def big(name, queries=3, gallery=80):
    names = [str(i) for i in range(gallery)] if name == "circo" else [f"img{i}" for i in range(gallery)]
    asked = [Query(str(10 + i), names[i], [""], [names[i + 1]], names[1 + i:6 + i] if name == "cirr" else None)
             for i in range(queries)]
    benchmark = bench(name, asked, names, "shirt" if name == "fashioniq" else None)
    return benchmark, {query.id: random.Random(int(query.id)).sample(names, gallery) for query in asked}


@pytest.mark.parametrize("name, metric", [
    ("cirr", "recall"), ("cirr", "recall_subset"), ("fashioniq", "recall"), ("circo", "recall")])
def test_round_trip(tmp_path, name, metric):
    benchmark, rankings = big(name)
    path = tmp_path / "p.json"
    benchmarks.write_predictions(path, benchmarks.predictions(benchmark, rankings, metric))
    assert os.listdir(tmp_path) == ["p.json"]
    document, expected = json.loads(path.read_text()), {}
    for query in benchmark.queries:
        names = [n for n in rankings[query.id] if name != "cirr" or n != query.reference]
        expected[query.id] = names[:50] if metric == "recall" else [n for n in names if n in query.subset][:3]
    assert benchmarks.read_predictions(path, benchmark, metric) == expected
    if name == "circo":
        expected = {key: [int(n) for n in names] for key, names in expected.items()}
    head = {"version": "rc2", "metric": metric} if name == "cirr" else {}
    assert document == ({"shirt": expected} if name == "fashioniq" else head | expected)


@real
def test_round_trip_of_the_test_servers_files(tmp_path):
    cirr, circo = benchmarks.load("cirr", DATA / "cirr", "test1"), benchmarks.load("circo", DATA / "circo", "test")
    rng, path = random.Random(0), tmp_path / "p.json"
    full = {query.id: rng.sample(cirr.gallery, 51) for query in cirr.queries}
    subsets = {query.id: rng.sample(query.subset, 5) for query in cirr.queries}
    for metric, rankings, count in (("recall", full, 50), ("recall_subset", subsets, 3)):
        benchmarks.write_predictions(path, benchmarks.predictions(cirr, rankings, metric))
        assert path.stat().st_size < 5_000_000  # the server's limit
        assert {len(names) for names in benchmarks.read_predictions(path, cirr, metric).values()} == {count}
    benchmarks.write_predictions(path, benchmarks.predictions(
        circo, {query.id: [str(i) for i in rng.sample(range(600_000), 60)] for query in circo.queries}))
    back = benchmarks.read_predictions(path, circo)
    assert list(back) == [str(i) for i in range(800)] and all(len(names) == 50 for names in back.values())


def test_read_accepts_ints_and_strings(tmp_path):
    benchmark, _ = big("circo", queries=1)
    path = write(tmp_path / "p.json", {"10": [5, "7", "000000000009"]})
    assert benchmarks.read_predictions(path, benchmark) == {"10": ["5", "7", "9"]}
    benchmark.gallery.clear()  # annotations only: any id passes, other text does not
    assert benchmarks.read_predictions(write(path, {"10": [123456]}), benchmark) == {"10": ["123456"]}
    with refused(ValueError, "cat", "COCO image id"):
        benchmarks.read_predictions(write(path, {"10": ["cat"]}), benchmark)


def test_read_keeps_the_reference_and_score_removes_it(tmp_path):
    benchmark, _ = big("cirr", queries=1)
    query = benchmark.queries[0]
    path = write(tmp_path / "p.json", {"version": "rc2", "metric": "recall", "10": [query.reference, query.targets[0]]})
    rankings = benchmarks.read_predictions(path, benchmark)
    assert rankings == {"10": [query.reference, query.targets[0]]}
    assert benchmarks.score(benchmark, rankings)["R@1"] == 100


GOOD = {"10": ["img3"], "11": ["img4"], "12": ["img5"]}
HEAD = {"version": "rc2", "metric": "recall"}


@pytest.mark.parametrize("content, words", [
    (HEAD | GOOD | {"11": ["img4", "img5", "img4"]}, ["query 11", "repeats"]),
    (HEAD | GOOD | {"11": []}, ["query 11", "empty"]),
    (HEAD | GOOD | {"11": ["img4", "img99"]}, ["query 11", "img99"]),
    (HEAD | GOOD | {"11": ["img4.png"]}, ["query 11", "img4.png"]),
    (HEAD | GOOD | {"11": "img4"}, ["query 11", "list"]),
    (HEAD | GOOD | {"11": {"img4": 1}}, ["query 11", "list"]),
    (HEAD | GOOD | {"11": [4]}, ["query 11", "expected str"]),
    (HEAD | GOOD | {"11": [None]}, ["query 11", "expected str"]),
    (HEAD | GOOD | {"99": ["img4"], "98": ["img4"]}, ["2 queries are not in this split", "98, 99"]),
    (HEAD | {"12": ["img4"]}, ["2 queries are missing", "10, 11"]),
    (HEAD | GOOD | {"metric": "recall_subset"}, ["metric", "recall"]),
    (HEAD | GOOD | {"version": "rc1"}, ["version", "rc2"]),
    ({"version": "rc2"} | GOOD, ["metric"]), ({"metric": "recall"} | GOOD, ["version"]),
    ([GOOD], ["expected dict"]), ("{", ["JSON"]), ("", ["JSON"]),
    ('{"10": ["img3"], "11": ["img4"], "10": ["img4"]}', ["10", "twice"])])
def test_refused_cirr_predictions(tmp_path, content, words):
    benchmark, _ = big("cirr")
    benchmarks.read_predictions(write(tmp_path / "p.json", HEAD | GOOD), benchmark)
    with refused(ValueError, "p.json", *words):
        benchmarks.read_predictions(write(tmp_path / "p.json", content), benchmark)


def test_refused_subset_predictions(tmp_path):
    benchmark, _ = big("cirr", queries=1)  # the group of img0: img1 ... img5
    path = tmp_path / "p.json"
    head = {"version": "rc2", "metric": "recall_subset"}
    assert benchmarks.read_predictions(write(path, head | {"10": ["img5"]}), benchmark, "recall_subset")
    for name in ("img0", "img9"):
        with refused(ValueError, "query 10", name):
            benchmarks.read_predictions(write(path, head | {"10": ["img5", name]}), benchmark, "recall_subset")
    with refused(ValueError, "metric", "recall_subset"):
        benchmarks.read_predictions(write(path, HEAD | {"10": ["img5"]}), benchmark, "recall_subset")
    for other, metric in ((benchmark, "map"), (big("circo")[0], "recall_subset")):
        with refused(ValueError, "unknown metric", metric):
            benchmarks.read_predictions(path, other, metric)
        with refused(ValueError, "unknown metric", metric):
            benchmarks.predictions(other, {}, metric)


@pytest.mark.parametrize("bad", [True, 1.0, -3, "-3", "3 ", "٣", None, [3], "9" * 5000, ""])
def test_refused_circo_ids(tmp_path, bad):
    benchmark, _ = big("circo", queries=1)
    with refused(ValueError, "query 10", "COCO image id"):
        benchmarks.read_predictions(write(tmp_path / "p.json", {"10": [5, bad]}), benchmark)
    for repeated in ([5, 5], [5, "5"], [5, "05"]):
        with refused(ValueError, "repeats"):
            benchmarks.read_predictions(write(tmp_path / "p.json", {"10": repeated}), benchmark)
    with refused(ValueError, "80"):
        benchmarks.read_predictions(write(tmp_path / "p.json", {"10": [80]}), benchmark)


def test_fashioniq_predictions_by_category(tmp_path):
    benchmark, rankings = big("fashioniq")
    both = {"dress": {"0": ["x"]}} | benchmarks.predictions(benchmark, rankings)
    benchmarks.write_predictions(tmp_path / "p.json", both)
    assert benchmarks.read_predictions(tmp_path / "p.json", benchmark)["11"] == rankings["11"][:50]
    for content in ({"dress": {}}, GOOD, {"shirt": []}):
        with refused(ValueError, "p.json", "shirt"):
            benchmarks.read_predictions(write(tmp_path / "p.json", content), benchmark)


def test_predictions_refuse_short_rankings():
    for name, metric in (("cirr", "recall"), ("fashioniq", "recall"), ("circo", "recall"), ("cirr", "recall_subset")):
        benchmark, rankings = big(name)
        names = rankings["11"][:49] if metric == "recall" else benchmark.queries[1].subset[:2]
        with refused(ValueError, "query 11", f"{len(names)} names" if name != "cirr" else "names"):
            benchmarks.predictions(benchmark, rankings | {"11": names}, metric)
    benchmark, rankings = big("cirr", gallery=12)  # a small gallery has fewer than 50 to give
    assert {len(names) for key, names in benchmarks.predictions(benchmark, rankings).items() if key.isdigit()} == {11}


def test_writing_is_atomic(tmp_path):
    path = write(tmp_path / "p.json", "old")
    with pytest.raises(TypeError):
        benchmarks.write_predictions(path, {"10": [object()]})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["p.json"]
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="p.json: cannot be written"):
        benchmarks.write_predictions(path, {})
    assert os.listdir(tmp_path) == ["p.json"]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        benchmarks.write_predictions(tmp_path / "no" / "p.json", {})
    with pytest.raises(FileNotFoundError, match="no.json is missing"):
        benchmarks.read_predictions(tmp_path / "no.json", big("circo")[0])
