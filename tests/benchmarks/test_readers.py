"""Annotations, layouts and names: the real annotations, small trees, and damaged ones."""

import json
from collections import Counter

import pytest
from conftest import DATA
from trees import (
    CIRR_NAMES,
    TREES,
    circo_tree,
    cirr_tree,
    edited,
    fashioniq_tree,
    refused,
    touch,
    write,
)

import benchmarks
from benchmarks import Query, metrics

CAPTIONS = {"cirr": "captions/cap.rc2.val.json", "fashioniq": "captions/cap.dress.val.json",
            "circo": "annotations/val.json"}
real = pytest.mark.skipif(not (DATA / "cirr" / "captions").is_dir(),
                          reason="no real annotations: set ISA_SHARED to their folder")


@real
@pytest.mark.parametrize("split, queries, gallery, references", [
    ("val", 4181, 2297, 2165), ("test1", 4148, 2315, 2178)])
def test_cirr_counts(split, queries, gallery, references):
    benchmark = benchmarks.load("cirr", DATA / "cirr", split)
    assert (len(benchmark.queries), len(benchmark.gallery)) == (queries, gallery)
    assert len({query.reference for query in benchmark.queries}) == references
    for query in benchmark.queries:
        assert len(query.subset) == 5 and query.reference not in query.subset
        assert len(query.targets) == (split == "val") and set(query.targets) <= set(query.subset)
    assert list(benchmark.paths) == benchmark.gallery == benchmarks.missing_images(benchmark)
    name, folder = benchmark.gallery[0], "dev" if split == "val" else "test1"
    assert benchmark.paths[name] == DATA / "cirr" / "img_raw" / folder / f"{name}.png"


@real
def test_cirr_irregularities():
    val = benchmarks.load("cirr", DATA / "cirr").queries
    entries = json.loads((DATA / "cirr" / "captions" / "cap.rc2.val.json").read_text())
    # target_hard even where target_soft gives it no weight, or gives the reference a weight
    odd = [i for i, entry in enumerate(entries) if entry["target_hard"] not in entry["target_soft"]]
    assert len(odd) == 37
    assert all(val[i].targets == [entries[i]["target_hard"]] for i in odd)
    for query, entry in zip(val, entries, strict=True):  # members by name: ranks are no indices
        assert {*query.subset, query.reference} == set(entry["img_set"]["members"])
        assert query.captions == [entry["caption"].strip()]
    assert (val[0].id, val[0].reference) == ("12060", "dev-244-0-img0")
    assert any("façade" in query.captions[0] for query in val)
    test = benchmarks.load("cirr", DATA / "cirr", "test1").queries
    assert [query.id for query in test if query.captions == [""]] == ["27098"]


@real
@pytest.mark.parametrize("category, queries, gallery, references, short", [
    ("dress", 2017, 3817, 1331, []), ("shirt", 2038, 6346, 1541, [1928]),
    ("toptee", 1961, 5373, 1454, [676, 1076])])
def test_fashioniq_counts(category, queries, gallery, references, short):
    benchmark = benchmarks.load("fashioniq", DATA / "fashioniq", category=category)
    assert len(benchmark.gallery) == gallery
    assert [query.id for query in benchmark.queries] == [str(i) for i in range(queries)]
    assert len({query.reference for query in benchmark.queries}) == references
    assert len({query.targets[0] for query in benchmark.queries}) == queries
    assert [i for i, query in enumerate(benchmark.queries) if len(query.captions) == 1] == short
    assert all(t and t == t.strip("?., ") for query in benchmark.queries for t in query.captions)


@real
@pytest.mark.parametrize("split, queries, references", [("val", 220, 220), ("test", 800, 798)])
def test_circo_counts(split, queries, references):
    benchmark = benchmarks.load("circo", DATA / "circo", split)
    assert benchmark.gallery == []  # neither list nor images: enough to score
    assert [query.id for query in benchmark.queries] == [str(i) for i in range(queries)]
    assert len({query.reference for query in benchmark.queries}) == references
    truths = [len(query.targets) for query in benchmark.queries]
    counts = (916, 1, 14) if split == "val" else (0, 0, 0)
    assert (sum(truths), min(truths), max(truths)) == counts
    aspects = Counter(aspect for query in benchmark.queries for aspect in query.aspects)
    assert (len(aspects), aspects["negation"]) == ((9, 21) if split == "val" else (0, 0))
    if split == "val":
        first = benchmark.queries[0]
        assert (first.reference, first.targets) == ("271520", ["355099", "528417", "534704"])
        assert benchmark.paths["2097"].name == "000000002097.jpg"


@pytest.mark.parametrize("name", benchmarks.NAMES)
def test_every_benchmark_is_read_checked_and_scored(name, tmp_path, capsys):
    """From a small tree in its layout; a ranking with the targets first has 100 everywhere."""
    for place, names in {"trees.TREES": TREES, "metrics.CUTOFFS": metrics.CUTOFFS,
                         "metrics.HEADLINE": metrics.HEADLINE}.items():
        assert name in names, f"{place} has no {name}"
    root, category = TREES[name](tmp_path), "dress" if name == "fashioniq" else None
    benchmarks.check_benchmark(name, root)
    assert str(root) in capsys.readouterr().out
    read = benchmarks.load(name, root, "val", category)
    said = " ".join(file.read_text() for file in root.rglob("*.json"))
    for query in read.queries:
        texts = [query.id, query.reference, *query.captions, *query.targets]
        assert query.targets and all(type(text) is str for text in texts), query
        assert type(query.captions) is list and all(text in said for text in query.captions), query
    best = {query.id: query.targets + [image for image in read.gallery
                                       if image not in query.targets] for query in read.queries}
    perfect = benchmarks.score(read, best)
    assert perfect[benchmarks.HEADLINE[name]] == 100 and {*perfect.values()} == {100}, perfect
    path = tmp_path / "predictions.json"
    benchmarks.write_predictions(path, benchmarks.predictions(read, best))
    again = benchmarks.score(read, benchmarks.read_predictions(path, read))
    assert again == perfect
    path.unlink()
    first = read.queries[0].reference
    for file in root.rglob("*.json"):
        edited(file, lambda notes: renamed(notes, first, "../../x"))
    if "../../x" in " ".join(file.read_text() for file in root.rglob("*.json")):  # CIRCO has ids
        with refused(ValueError, r"\.\./\.\./x"):  # it would leave the root
            benchmarks.load(name, root, "val", category)


def renamed(content, old, new):
    """JSON with another name wherever a string is `old`, also as a key."""
    if isinstance(content, dict):
        return {new if k == old else k: renamed(x, old, new) for k, x in content.items()}
    if isinstance(content, list):
        return [renamed(x, old, new) for x in content]
    return new if content == old else content


@pytest.mark.parametrize("searle", [False, True])
def test_cirr_both_trees(tmp_path, searle):
    benchmark = benchmarks.load("cirr", str(cirr_tree(tmp_path, searle)))
    assert benchmark.gallery == CIRR_NAMES and benchmarks.missing_images(benchmark) == []
    folder = tmp_path / "dev" if searle else tmp_path / "img_raw" / "dev"
    assert benchmark.paths[CIRR_NAMES[3]] == folder / "dev-3-0-img0.png"
    assert benchmark.queries[0] == Query("12", CIRR_NAMES[0], ["two  dogs"], [CIRR_NAMES[1]],
                                         CIRR_NAMES[1:6], kind="one")
    assert benchmark.queries[1].captions == [""]
    split = tmp_path / ("cirr" if searle else "") / "image_splits"
    edited(split / "split.rc2.val.json", lambda c: c.update({CIRR_NAMES[0]: "train/7/x.png"}))
    deep = benchmarks.load("cirr", tmp_path).paths[CIRR_NAMES[0]]
    assert deep == folder.parent / "train" / "7" / "x.png"  # as in the training split
    (folder / "dev-3-0-img0.png").unlink()
    (folder / "dev-4-0-img0.png").write_bytes(b"")
    (folder / "dev-5-0-img0.png").unlink()
    (folder / "dev-5-0-img0.png").symlink_to("nowhere")
    (folder / "dev-6-0-img0.png").rename(folder / "dev-6-0-img0.jpg")
    missing = [f"dev-{i}-0-img0" for i in (3, 4, 5, 6)]
    assert benchmarks.missing_images(benchmark) == missing
    with refused(ValueError, "4 of 8 images of cirr", "dev-3-0-img0.png", "evaluate.py check"):
        benchmarks.require_images(benchmark)


@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_fashioniq_tree(tmp_path, extension):
    root = fashioniq_tree(tmp_path, extension)
    benchmark = benchmarks.load("fashioniq", root, category="shirt")
    assert (benchmark.category, benchmark.gallery) == ("shirt", [f"shirt{i}" for i in range(4)])
    captions = [["is red", "has . dots, long"], ["shorter"], [""]]
    assert [query.captions for query in benchmark.queries] == captions
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
    assert nowhere.gallery == []
    assert benchmarks.missing_images(nowhere) == ["2", "7", "30", "111"]
    aspects = ["negation", "addition"]
    # target_img_id comes first
    assert nowhere.queries[0] == Query("0", "7", ["is red"], ["30", "2"], aspects=aspects)
    # A folder without one of the ground truths is an incomplete gallery, never a smaller one.
    folder.paths["30"].unlink()
    assert benchmarks.missing_images(benchmarks.load("circo", tmp_path / "b")) == ["30"]


LAYOUTS = [  # where the official tree has the images, where users have them
    ("fashioniq", "images", "images/shirt"), ("fashioniq", "images", "shirt"),
    ("cirr", "img_raw", "images"), ("cirr", "img_raw", "NLVR2/images"),
    ("cirr", "img_raw/dev", "dev"), ("circo", "COCO2017_unlabeled/unlabeled2017", "unlabeled2017"),
    ("circo", "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json",
     "annotations/image_info_unlabeled2017.json")]


@pytest.mark.parametrize("name, official, place", LAYOUTS)
def test_other_layouts(tmp_path, name, official, place):
    root = circo_tree(tmp_path, "list") if name == "circo" else TREES[name](tmp_path)
    category = "shirt" if name == "fashioniq" else None
    before = benchmarks.load(name, root, category=category)
    aside = (root / official).rename(root / "aside")
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    aside.rename(root / place)
    if "/" not in official:
        touch(root / official, "another.png")
    moved = benchmarks.load(name, root, category=category)
    assert moved.gallery == before.gallery and benchmarks.missing_images(moved) == []


def test_check_says_where_images_seem_to_be(tmp_path, capsys):
    root = cirr_tree(tmp_path)
    (root / "img_raw").rename(root / "NLVR")
    images = root / "NLVR" / "dev"
    (images / "dev-0-0-img0.png").unlink()
    (images / "dev-1-0-img0.png").rename(images / "dev-1-0-img0.jpg")
    with refused(ValueError, "not complete"):
        benchmarks.check_benchmark("cirr", root)
    hint = f"  images seem to be in {images}; link or move them to {root}/img_raw/dev\n"
    assert hint in capsys.readouterr().out
    (root / "img_raw").mkdir()
    images.rename(root / "img_raw" / "dev")
    touch(root / "copy", "dev-0-0-img0.png")  # six of eight are found: no guess
    with refused(ValueError, "not complete"):
        benchmarks.check_benchmark("cirr", root)
    assert "seem" not in capsys.readouterr().out


def test_check_benchmark(tmp_path, capsys):
    root = fashioniq_tree(tmp_path / "f")
    benchmarks.check_benchmark("fashioniq", root)
    rows = [f"fashioniq {c} val: 3 queries, gallery of 4, 4 of 4 images found"
            for c in benchmarks.CATEGORIES]
    sound = "  4 of 4 decoded, 0 damaged"
    tree, found = capsys.readouterr().out.rsplit("\n\n", 1)
    assert tree.startswith(f"expected below {root}:\n\n") and "NAME.png or NAME.jpg" in tree
    assert found.splitlines() == [line for row in rows for line in (row, sound)]
    empty, pages = root / "images" / "dress2.png", [root / f"images/shirt{i}.png" for i in (1, 3)]
    captions = root / "captions" / "cap.toptee.val.json"
    empty.write_bytes(b"")
    for page in pages:
        page.write_text("<html>404</html>")
    captions.unlink()
    with refused(ValueError, f"{root} is not complete"):
        benchmarks.check_benchmark("fashioniq", root)
    page = "is a web page (HTML or XML)"
    assert capsys.readouterr().out.rsplit("\n\n", 1)[1].splitlines() == [
        rows[0].replace("4 of 4", "3 of 4"), f"  empty: {empty}", "  3 of 3 decoded, 0 damaged",
        rows[1], "  4 of 4 decoded, 2 damaged", f"  2: {page}",
        *(f"  {path}: {page}; replace or remove the file" for path in pages),
        "fashioniq toptee val: annotations are missing", f"  missing: {captions}"]
    fashioniq_tree(root)
    pages[1].write_text("<html>404</html>")
    with refused(ValueError, f"{root} is not complete"):  # for this alone
        benchmarks.check_benchmark("fashioniq", root)
    benchmarks.check_benchmark("fashioniq", root, decode=0)
    for name, part in [("cirr", "img_raw/"), ("circo", "COCO2017_unlabeled/")]:
        with refused(ValueError, "nowhere is not complete"):
            benchmarks.check_benchmark(name, tmp_path / "nowhere")
        out = capsys.readouterr().out
        assert part in out and f"{name}  val: annotations are missing" in out


def test_check_benchmark_chooses_splits_and_lists_five_images(tmp_path, capsys):
    root = cirr_tree(tmp_path)
    for kind in ("captions/cap", "image_splits/split"):
        text = (root / f"{kind}.rc2.val.json").read_text()
        write(root / f"{kind}.rc2.test1.json", text.replace("./dev", "./test1"))
    with refused(ValueError, "not complete"):
        benchmarks.check_benchmark("cirr", root)
    assert capsys.readouterr().out.rsplit("\n\n", 1)[1].splitlines() == [
        "cirr  val: 2 queries, gallery of 8, 8 of 8 images found", "  8 of 8 decoded, 0 damaged",
        "cirr  test1: 2 queries, gallery of 8, 0 of 8 images found",
        *(f"  missing: {root}/img_raw/test1/{name}.png" for name in CIRR_NAMES[:5]),
        f"  images seem to be in {root}/img_raw/dev; link or move them to {root}/img_raw/test1"]
    benchmarks.check_benchmark("cirr", root, ["val"])
    write(root / "captions" / "cap.rc2.val.json", "{")
    with refused(ValueError, "not complete"):
        benchmarks.check_benchmark("cirr", root, ["val"])
    assert "cap.rc2.val.json is not usable JSON" in capsys.readouterr().out


def test_refused_arguments(tmp_path):
    for name, category in [("coco", None), ("fashioniq", None), ("fashioniq", "hat"),
                           ("cirr", "dress")]:
        with refused(ValueError, name, "fashioniq with one of dress"):
            benchmarks.load(name, tmp_path, category=category)
    for split in ("../val", "/etc/x", ""):
        with refused(ValueError, "split", "not a plain file name"):
            benchmarks.load("cirr", tmp_path, split)
    for name in ("cirr", "circo"):
        with refused(FileNotFoundError, "val.json is missing", "evaluate.py check"):
            benchmarks.load(name, tmp_path)
    write(tmp_path / "annotations" / "test.json", [])
    with refused(FileNotFoundError, r"val.json is missing \(there is test.json\)"):
        benchmarks.load("circo", tmp_path)


@pytest.mark.parametrize("evil", ["../x", "/etc/passwd", "a/b", "..", "", ".", "a\\b", "a\0b"])
def test_names_stay_inside_root(tmp_path, evil):
    split, path = "image_splits/split.rc2.val.json", "a/../b" if evil == "a/b" else evil
    deep = path if path in ("", ".", "..", "../x", "/etc/passwd") else f"./dev/{path}"
    for name, file, change, word in [
            ("cirr", split, lambda paths: paths.update({evil: "./dev/x.png"}), "plain"),
            ("cirr", split, lambda paths: paths.update({CIRR_NAMES[0]: deep}), "dev-0.*plain"),
            ("fashioniq", "image_splits/split.dress.val.json", lambda n: n.append(evil), "plain"),
            ("fashioniq", "captions/cap.dress.val.json", lambda c: c[1].update(candidate=evil), ""),
            ("circo", "annotations/val.json", lambda c: c[1]["gt_img_ids"].append(evil), "COCO")]:
        root = TREES[name](tmp_path / name)
        edited(root / file, change)
        with refused(ValueError, file.split("/")[1], word):
            benchmarks.load(name, root, category="dress" if name == "fashioniq" else None)


@pytest.mark.parametrize("text", [
    "", "[", "{}", "[]", "[1]", "[null]", "null", '[{"pairid": 1}]', "\ufeff[]", b"\xff\xfe\x00",
    pytest.param("[" * 100000, id="deep")])
@pytest.mark.parametrize("name, file", [
    ("cirr", "captions/cap.rc2.val.json"), ("circo", "annotations/val.json")])
def test_malformed_json(tmp_path, name, file, text):
    root = cirr_tree(tmp_path) if name == "cirr" else circo_tree(tmp_path)
    (root / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(ValueError, "val.json", "download it again from the official source"):
        benchmarks.load(name, root)


@pytest.mark.parametrize("name", CAPTIONS)
def test_other_spellings_of_the_same_annotations(tmp_path, name):
    """Numbers as strings or padded as in file names, null for what is absent, more fields."""
    root, category = TREES[name](tmp_path), "dress" if name == "fashioniq" else None
    expected = benchmarks.load(name, root, category=category).queries

    def spell(content):
        for entry in content:
            entry |= {"annotator": 7, "modifier_type": None, "semantic_aspects": None}
            entry |= {k: str(x) for k, x in entry.items() if k in ("pairid", "id")}
            entry |= {k: f"{x:012d}" for k, x in entry.items() if k.endswith("_img_id")}

    for query in expected:
        query.kind, query.aspects = "", []
    edited(root / CAPTIONS[name], spell)
    assert benchmarks.load(name, root, category=category).queries == expected


def no(key):
    return lambda entry: entry.pop(key) and None


@pytest.mark.parametrize("name, change, words", [
    ("cirr", no("reference"), "'reference' is missing"), ("cirr", {"pairid": 1.5}, "int or str"),
    ("cirr", {"pairid": True}, "pairid"), ("cirr", {"caption": None}, "caption"),
    ("cirr", {"caption": ["x"]}, "caption"), ("cirr", {"img_set": []}, "img_set"),
    ("cirr", {"img_set": {}}, "members"), ("cirr", {"img_set": {"members": [3]}}, "members"),
    ("cirr", {"reference": "dev-99"}, "dev-99"), ("cirr", {"target_hard": "dev-99"}, "dev-99"),
    ("cirr", lambda entry: entry["img_set"]["members"].append("dev-99"), "dev-99"),
    ("cirr", no("target_hard"), "target"), ("cirr", {"target_hard": None}, "target"),
    ("cirr", {"modifier_type": 3}, "modifier_type"), ("fashioniq", {"captions": "x"}, "captions"),
    ("fashioniq", {"captions": [1, "x"]}, "captions"), ("fashioniq", {"target": 3}, "target"),
    ("circo", {"gt_img_ids": [111, 111]}, "listed twice"), ("circo", {"gt_img_ids": 3}, "list"),
    ("circo", {"semantic_aspects": [1]}, "semantic_aspects"), ("circo", {"id": None}, "'id'")])
def test_malformed_entry(tmp_path, name, change, words):
    root, file = TREES[name](tmp_path), CAPTIONS[name]
    edited(root / file, lambda content: (
        content[1].update(change) if isinstance(change, dict) else change(content[1])))
    with refused(ValueError, f"{file}, entry 1", words):
        benchmarks.load(name, root, category="dress" if name == "fashioniq" else None)


def test_repeated_ids_names_and_keys(tmp_path):
    cirr, fashioniq = cirr_tree(tmp_path / "c"), fashioniq_tree(tmp_path / "f")
    split = cirr / "image_splits" / "split.rc2.val.json"
    write(split, split.read_text().replace("{", '{"dev-1-0-img0": "./dev/x.png", '))
    with refused(ValueError, "split.rc2.val.json", "dev-1-0-img0", "twice"):
        benchmarks.load("cirr", cirr)
    edited(cirr_tree(cirr) / "captions" / "cap.rc2.val.json", lambda c: c[1].update(pairid=12))
    with refused(ValueError, "cap.rc2.val.json", "repeats"):
        benchmarks.load("cirr", cirr)
    edited(fashioniq / "image_splits" / "split.dress.val.json", lambda c: c.append("dress0"))
    with refused(ValueError, "cap.dress.val.json", "repeats"):
        benchmarks.load("fashioniq", fashioniq, category="dress")


def test_malformed_circo_list(tmp_path):
    coco = circo_tree(tmp_path, "list") / "COCO2017_unlabeled"
    info = coco / "annotations" / "image_info_unlabeled2017.json"
    for content, word in [({}, "images"), ({"images": [{"file_name": "1.jpg"}]}, "'id'"),
                          ({"images": [{"id": -1}]}, "-1"), ({"images": [{"id": 7}]}, "'30'")]:
        write(info, content)
        with refused(ValueError, "json", word):
            benchmarks.load("circo", tmp_path)
