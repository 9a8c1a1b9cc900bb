"""pocket/world.py: what is on disk, and which targets a query has, by brute force."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, ROOT
from PIL import Image
from reader import read, read_scene, true_of

import benchmarks
from plumbing.files import locked
from pocket import specs, world
from pocket.drawing import draw
from pocket.specs import EDIT_KINDS, GARMENTS, Rng, Scene

GALLERY = "circo/COCO2017_unlabeled/unlabeled2017"


def digest(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def start(out, *options):
    command = [sys.executable, "-m", "pocket.world", "--out", str(out), *options]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # the order of Python's sets changes
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.fixture(scope="module")
def drawn():
    """{path below the small world's folder: spec of the image}."""
    files = world.contents(seed=0, scale=0.02)
    return {path: content for path, content in files if isinstance(content, specs.Spec)}


def test_the_world_is_the_one_that_results_were_measured_on():
    """One random draw more anywhere changes all that follow; drawing plays no part here."""
    files = "\n".join(sorted(map(repr, world.contents(seed=0, scale=0.02))))
    assert hashlib.sha256(files.encode()).hexdigest()[:16] == "651e83452a2b09f2"


def test_same_seed_same_bytes_from_the_command_line(tmp_path, small_world):
    process = start(tmp_path / "w", "--scale", "0.02")
    out, error = process.communicate()
    assert process.returncode == 0 and f"{len(list(tmp_path.rglob('*.*g')))} images" in out, error
    assert digest(tmp_path / "w") == digest(small_world)  # drawn by another number of processes
    assert sorted(os.listdir(tmp_path)) == [".lock", "w"]


def test_a_seed_may_be_too_long_to_be_searched(tmp_path):
    """Each digit counts: numbers that differ by 2 ** 32 draw different worlds."""
    drawn = set()
    for seed in (7265193408816, 7265193408816 + 2**32, 2**63 - 1):
        args = world.parse_args(["--out", str(tmp_path / "w"), "--seed", str(seed)])
        assert args.seed == seed
        world.write(args.out, args.seed, scale=0.001, workers=1)
        assert json.loads((tmp_path / "w/world.json").read_text())["seed"] == seed
        drawn.add(tuple(digest(tmp_path / "w/train").values()))
    assert len(drawn) == 3
    with pytest.raises(SystemExit):
        world.parse_args(["--seed", str(2**63)])


def test_sizes_and_layouts_are_the_real_ones(small_world):
    def count(pattern):
        return len(list(small_world.glob(pattern)))

    assert count("train/*.png") == 480
    assert count("cirr/img_raw/dev/*.png") == count("cirr/img_raw/test1/*.png") == 8 * 6
    assert count("fashioniq/images/*.png") == 2 * (76 + 127 + 107)  # FashionIQ's galleries / 50
    # 2 x 600 / 50 queries: a reference and two to five targets; 2 x 1000 / 50 other images
    assert 24 * 3 + 40 <= count(f"{GALLERY}/*.jpg") <= 24 * 6 + 40
    marker = {"seed": 0, "scale": 0.02, "images": count("**/*.*g")}
    assert json.loads((small_world / "world.json").read_text()) == marker
    for split in ("val", "test"):
        cirr = benchmarks.load("cirr", small_world / "cirr", {"test": "test1"}.get(split, split))
        circo = benchmarks.load("circo", small_world / "circo", split)
        assert len(cirr.queries) == 4 * 8 and 5 <= len(circo.queries) <= 12
        fashion = [benchmarks.load("fashioniq", small_world / "fashioniq", split, category)
                   for category in GARMENTS]
        assert [len(some.gallery) for some in fashion] == [76, 127, 107]
        assert [len(some.queries) for some in fashion] == [14] * 3
        for some in (cirr, circo, *fashion):
            benchmarks.require_images(some)
    for category, size in world.FASHION_GALLERY.items():
        real = DATA / "fashioniq" / "image_splits" / f"split.{category}.val.json"
        assert not real.exists() or len(json.loads(real.read_text())) == size


def sets(path):
    """The sets that an image may come from; CIRCO has one gallery for both splits."""
    signs = {"train/": "unlabeled", "/dev/": "val", "/test1/": "test", "/V": "val", "/T": "test"}
    return [name for sign, name in signs.items() if sign in path] or ["val", "test"]


def test_the_four_sets_never_meet_and_no_kind_repeats_in_a_scene(drawn, small_world):
    by_set = {}
    for path, spec in drawn.items():
        assert specs.split_of(spec) in sets(path), path
        if isinstance(spec, Scene):
            assert len({thing.kind for thing in spec.things}) == len(spec.things), path
        by_set.setdefault(specs.split_of(spec), set()).add(replace(spec, pose=0))
    rng = Rng(12)
    by_set["pretrain"] = {replace(specs.pretraining_example(rng, wrong=False)[0], pose=0)
                          for _ in range(3000)}
    assert len(by_set) == 4 and sum(map(len, by_set.values())) == len(set().union(*by_set.values()))
    for query in benchmarks.load("circo", small_world / "circo", "val").queries:
        for name in (query.reference, query.targets[0]):
            assert specs.split_of(drawn[f"{GALLERY}/{int(name):012d}.jpg"]) == "val"


def test_files_show_their_specs_and_their_captions_are_true(drawn, small_world):
    for path, spec in list(drawn.items())[::40]:
        there = np.asarray(Image.open(small_world / path)).astype(int)
        error = np.abs(there - np.asarray(draw(spec))).mean()
        assert error == 0 if path.endswith(".png") else error < 3  # a JPEG of good quality
    for name in ("cirr", "fashioniq", "circo"):
        captions = json.loads((small_world / name / "captions.json").read_text())
        images = {Path(path).stem: spec for path, spec in drawn.items() if path.startswith(name)}
        if name == "circo":
            images = {str(int(stem)): spec for stem, spec in images.items()}
        assert images.keys() == captions.keys()
        assert all(true_of(read(captions[name], spec), spec) for name, spec in images.items())


@pytest.mark.parametrize("split, folder", [("val", "dev"), ("test1", "test1")])
def test_cirr_groups(drawn, small_world, split, folder):
    def spec(name):
        return drawn[f"cirr/img_raw/{folder}/{name}.png"]

    def content(name):
        return spec(name).background, {(t.kind, t.colour, t.size) for t in spec(name).things}

    entries = json.loads((small_world / f"cirr/captions/cap.rc2.{split}.json").read_text())
    assert len({entry["pairid"] for entry in entries}) == 4 * 8
    for entry in entries:
        reference, target = entry["reference"], entry["target_hard"]
        members = set(entry["img_set"]["members"])
        assert len(members) == 6 and {reference, target} < members
        assert true_of(read(entry["caption"], spec(reference)), spec(target))
        assert entry["modifier_type"] in EDIT_KINDS
    for i in range(0, len(entries), 4):  # a chain along the group; one is left, like the first
        group = entries[i : i + 4]
        chain = [group[0]["reference"], *(entry["target_hard"] for entry in group)]
        assert [entry["reference"] for entry in group] == chain[:4] and len(set(chain)) == 5
        (sixth,) = set(group[0]["img_set"]["members"]) - set(chain)
        assert content(sixth) == content(chain[0]) and spec(sixth) != spec(chain[0])


def test_fashioniq_captions_are_true_and_targets_used_once(drawn, small_world):
    for name in (f"{category}.{split}" for split in ("val", "test") for category in GARMENTS):
        entries = json.loads((small_world / f"fashioniq/captions/cap.{name}.json").read_text())
        names = [entry[key] for entry in entries for key in ("candidate", "target")]
        assert len(set(names)) == len(names) == 28
        for entry in entries:
            target = drawn[f"fashioniq/images/{entry['target']}.png"]
            assert len(entry["captions"]) == 2 and target.kind == name.split(".")[0]
            assert all(true_of(read(text, target), target) for text in entry["captions"]), entry


def test_circo_truths_are_all_images_of_which_the_facts_are_true(monkeypatch):
    drafts, asked, edited, checked = [], [], world._edited, 0

    def recorded(reference, *rest):
        drafts.append((reference, *edited(reference, *rest)))
        return drafts[-1][1:]

    def holds(facts, gallery):
        asked.extend(facts)
        return specs.holds(facts, gallery)

    monkeypatch.setattr(world, "_edited", recorded)
    monkeypatch.setattr(world, "holds", holds)
    images, by_split = world.make_circo(Rng(0), {"val": 60, "test": 60}, extra=300)
    entries = {entry["reference_img_id"]: entry for some in by_split.values() for entry in some}
    names = {spec: name for name, spec in images.items()}
    for (reference, change, target), facts in zip(drafts, asked, strict=True):
        true = {name for name, spec in images.items() if true_of(facts, spec)}
        if names[reference] in true or names[target] not in true or len(true) > 14:
            assert names[reference] not in entries
            continue
        checked, entry = checked + 1, entries[names[reference]]
        text, found = entry["relative_caption"], entry["gt_img_ids"]
        assert change.claim(read_scene(entry["shared_concept"])) == facts and text == change.text
        assert entry["target_img_id"] == found[0] == names[target]
        assert sorted(found) == sorted(true) and len(true) >= 2
        assert all(true_of(read_scene(text), images[name]) for name in found), text
    assert checked == len(entries) > 80


def test_ensure_draws_only_what_is_missing(tmp_path, monkeypatch, capsys):
    calls, write, out = [], world.write, tmp_path / "w"
    monkeypatch.setattr(
        world, "write", lambda out, again: calls.append(out) or write(out, 0, 0.001, 1, again))
    world.ensure(out)
    assert calls == [out] and "drawing" in capsys.readouterr().out
    before = digest(out)
    world.ensure(out)  # kept, though it is not the usual one
    assert digest(out) == before and "seed 0, scale 0.001" in capsys.readouterr().out
    marker = out / "world.json"
    marker.write_text(json.dumps({"seed": 0, "scale": 1.0}))
    world.ensure(out)
    assert capsys.readouterr().out == ""
    marker.write_text("{")
    with pytest.raises(ValueError, match="world.json is damaged; delete the folder .*w to draw it"):
        world.ensure(out)
    assert len(calls) == 1


def test_write_replaces_an_older_world_and_nothing_else(tmp_path, small_world):
    out, photos = tmp_path / "world", tmp_path / "photos"
    world.write(out, seed=0, scale=0.001, workers=1)
    (out / "train" / "left_over.png").write_text("")
    world.write(out, seed=1, scale=0.005, workers=1)
    assert json.loads((out / "world.json").read_text())["seed"] == 1
    theirs = digest(out / "train")
    ours = digest(small_world / "train")
    assert len(theirs) == 120 and not set(theirs.values()) & set(ours.values())
    photos.mkdir()
    (photos / "holiday.jpg").write_text("precious")
    with pytest.raises(ValueError, match="photos"):
        world.write(photos, seed=0, scale=0.001, workers=1)
    assert [path.name for path in photos.iterdir()] == ["holiday.jpg"]
    assert sorted(os.listdir(tmp_path)) == [".lock", "photos", "world"]


def test_a_world_that_another_process_draws_is_waited_for(tmp_path):
    made, out = tmp_path / "made/w", tmp_path / "data/w"
    world.write(made, scale=0.001, workers=1)
    with locked(out.with_name("w.tmp")):
        command = [sys.executable, "-c", f"from pocket import world; world.ensure({str(out)!r})"]
        other = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert "waiting for another process" in other.stderr.readline()
        made.rename(out)
    assert other.wait(60) == 0 and not out.with_name("w.tmp").exists()
    assert json.loads((out / "world.json").read_text())["scale"] == 0.001


def test_an_interrupted_write_leaves_the_older_world(tmp_path):
    out = tmp_path / "world"
    world.write(out, seed=0, scale=0.001, workers=1)
    before = digest(out)
    process, end = start(out, "--seed", "1", "--scale", "0.2"), time.monotonic() + 60
    while not list(tmp_path.glob("world.tmp/train/*.png")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "pocket.world: interrupted\n"
    assert process.returncode == 128 + signal.SIGTERM
    assert digest(out) == before and sorted(os.listdir(tmp_path)) == [".lock", "world"]
