"""pocket/: a reader of its captions that shares no code with their writer, and truth by brute force."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT
from PIL import Image

import benchmarks
import blip_lite
import isa
import query_side
from pocket import pretrain, specs, world
from pocket.drawing import draw
from pocket.specs import BACKGROUNDS, COLOURS, EDIT_KINDS, GARMENTS, KINDS, Garment, Rng, Scene, Thing
from query_side.query_model import MAY_CHANGE, load_query_model
from train import parse_args

MAKERS = (specs.random_scene, specs.random_garment)


# ------------------------------------------------------------------------------- a reader, and truth by definition
def true_of(facts, spec):
    """Is all that is said true of this image? Every thing with something said about it has to be found in the scene."""
    said = {f.name: getattr(facts, f.name) for f in fields(facts) if f.name not in ("pose", "things")}
    if any(value is not None and getattr(spec, name, None) != value for name, value in said.items()):
        return False
    if isinstance(facts, Scene) != isinstance(spec, Scene):  # nothing but a kind of garment could tell, and it did not
        return not any(any(vars(thing).values()) for thing in getattr(facts, "things", ()))
    for thing in getattr(facts, "things", ()):
        said = {name: value for name, value in vars(thing).items() if value is not None}
        if not any(all(getattr(there, name) == value for name, value in said.items()) for there in spec.things):
            return False
    return True


def one_of(words):
    return "(" + "|".join(words) + ")"


NOUN = re.compile(
    rf"\b(?:an?|the) (?:{one_of(specs.SIZES)} )?(?:{one_of(COLOURS)} )?{one_of(KINDS)}"
    r"(?: (?:on the (left|right)|in the (middle)))?\b"
)
STATED = re.compile(rf"\bis (?:{one_of(specs.SIZES)}|{one_of(COLOURS)})\b")  # of the one thing that there is


def read_scene(text):
    """A caption or a modifier about a scene -> the things that it speaks of, in order, and the background."""
    text = re.sub(rf" instead( of (the {one_of(KINDS)}|{one_of(BACKGROUNDS.values())}))?", "", text)
    background = [name for name, phrase in BACKGROUNDS.items() if phrase in text]
    assert len(background) <= 1, text
    things = [Thing(kind, colour, size, place or middle) for size, colour, kind, place, middle in
              ([x or None for x in found] for found in NOUN.findall(text))]
    things += [Thing(colour=colour or None, size=size or None) for size, colour in STATED.findall(text)]
    return Scene(tuple(things), background[0] if background else None)


def read_garment(text):
    """The same for garments. "is red" and "a red dress" say the colour, "red and blue striped" both colours."""
    text = re.sub(rf" instead( of {one_of(COLOURS)})?", "", text)
    find = lambda pattern: next((m.group(1) for m in [re.search(pattern, text)] if m), None)  # noqa: E731
    second = find(rf"{one_of(COLOURS)} (?:striped|dotted|checked)") if " and " in text else None
    if second and not re.search(rf"{one_of(COLOURS)} and {second} ", text):
        second = None
    second = second or find(rf"(?:striped|dotted|checked) with {one_of(COLOURS)}")
    kind = find(r"\b(dress|shirt|top)\b")
    sleeves = "no" if "sleeveless" in text else find(rf"\b{one_of(specs.SLEEVES)} sleeves")
    rest = re.sub(rf" and {second} | with {second}\b", " ", text) if second else text
    pattern = find(rf"\b{one_of(specs.PATTERNS)}\b")
    return Garment(
        "toptee" if kind == "top" else kind, next(iter(re.findall(rf"\b{one_of(COLOURS)}\b", rest)), None), pattern,
        "none" if pattern == "plain" else second, sleeves, find(one_of(specs.NECKLINES)),
        find(rf"\b{one_of(specs.LENGTHS)}(?:er)?\b(?! sleeves)"), find(rf"\b{one_of(specs.DETAILS[1:])}\b"),
    )


def read(text, like):
    return (read_scene if isinstance(like, Scene) else read_garment)(text)


def draws(count, seed=0):
    """`count` specs, scenes and garments in turn, and the generator that goes on from there."""
    rng = Rng(seed)
    for i in range(count):
        yield MAKERS[i % 2](rng), rng


# ----------------------------------------------------------------------------------------- specs, facts, captions
def test_each_spec_has_one_set_whatever_its_pose():
    some = [spec for spec, _ in draws(4000)]
    for spec in some:
        assert specs.split_of(spec) == specs.split_of(replace(spec, pose=7)) == specs.split_of(replace(spec, pose=0))
    share = Counter(map(specs.split_of, some))
    for split, wanted in {"pretrain": 0.50, "unlabeled": 0.20, "val": 0.15, "test": 0.15}.items():
        assert abs(share[split] / len(some) - wanted) < 0.03
    assert specs.split_of(specs.sample(Rng(1), "val", specs.random_scene)) == "val"


def test_sets_are_those_of_the_committed_weights():
    """Pre-training saw the "pretrain" set. A change of names or fields that moves a spec would leak test images into it."""
    scene = Scene((Thing("cat", "red", "big", "left"), Thing("boat", "blue", "small", "middle")), "sea")
    garment = Garment("dress", "red", "striped", "blue", "long", "v neck", "short", "belt")
    found = [specs.split_of(replace(scene, background=b)) for b in ("meadow", "night", "snow", "beach", "sea", "room")]
    found += [specs.split_of(replace(garment, detail=d)) for d in specs.DETAILS]
    assert " ".join(found) == (
        "unlabeled pretrain pretrain unlabeled test pretrain "
        "test pretrain pretrain pretrain test pretrain unlabeled pretrain"
    )


def test_holds_is_the_brute_force_definition():
    rng, facts, images = Rng(3), [], []
    for spec, _ in draws(120, seed=4):
        images.append(spec)
        facts.append(specs.forget(spec, rng, rng.choice((0.1, 0.3, 1.0))))
    facts += [Scene(()), Scene((Thing(),)), Garment(), Scene((), "sea"), Garment(kind="shirt"), Garment(detail="none")]
    facts += [Scene((Thing("cat"), Thing("cat", "red"))), Scene((Thing(place="left"), Thing(size="big"))), Garment(second="none")]
    wanted = np.array([[true_of(f, s) for s in images] for f in facts])
    assert np.array_equal(specs.holds(facts, images), wanted)
    assert 500 < wanted.sum() < wanted.size / 2  # both answers occur often


def test_captions_say_their_facts_and_the_facts_are_true():
    spoken = Counter()
    for spec, rng in draws(3000, seed=5):
        caption, facts = specs.describe(spec, rng)
        assert true_of(facts, spec), caption
        found = read(caption, spec)
        if isinstance(spec, Scene):
            assert found == Scene(tuple(t for t in facts.things if t.kind), facts.background), caption
            spoken[len(found.things)] += 1
        else:
            second = facts.second if facts.pattern and (facts.colour or facts.second == "none") else None
            assert found == replace(facts, second=second), caption
            spoken[facts.colour is None] += 1
    assert all(spoken[n] > 100 for n in (1, 2, 3, True, False))  # partial and varied


def test_full_captions_leave_nothing_out():
    for spec, rng in draws(200, seed=6):
        found = read(specs.say(specs.forget(spec, rng, 1.0), rng), spec)
        if isinstance(spec, Garment):
            assert found.colour and found.pattern and found.sleeves and (found.detail or "none") == spec.detail
        else:
            assert found.background and len(found.things) == len(spec.things) and all(t.kind for t in found.things)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_edits_make_a_target_of_which_modifier_and_claim_are_true(kind):
    phrases = Counter()
    for before, rng in draws(1500, seed=kind):
        change = specs.edit(before, rng, kind)
        after = change.apply(before)
        assert change.kind == kind and replace(after, pose=0) != replace(before, pose=0)
        assert true_of(read(change.text, before), after), f"{change.text!r} is not true of {after}"
        facts = specs.forget(before, rng, rng.choice((0.3, 1.0)))
        claimed = change.claim(facts)
        assert true_of(claimed, after), f"{change.text!r} makes of {facts} {claimed}, not true of {after}"
        said = read(change.text, before)
        if isinstance(said, Scene) and kind == "replace":
            said = replace(said, things=said.things[:1])  # what the writer names as kept is not claimed: facts may say less
        assert true_of(said, claimed), f"{claimed} says less than {change.text!r}"
        phrases[len(change.phrases)] += 1
    assert set(phrases) == {"one": {1}, "multi": {2, 3}}.get(kind, {1})


def test_pretraining_pairs_are_true_of_their_image_and_of_its_set():
    rng, seen = Rng(8), Counter()
    for _ in range(3000):
        spec, caption, facts = specs.pretraining_pair(rng)
        assert specs.split_of(spec) == "pretrain" and true_of(facts, spec), caption
        text = caption.removeprefix("a photo of ")
        head, _, modifier = text.partition(" that ")
        assert true_of(read(modifier or head, spec), spec), caption
        bare = not modifier and head.split()[0] in ("is", "has", "shows", "also", "adds")
        seen["corrected" if modifier else "bare" if bare else "plain"] += 1
    assert 0.55 < seen["plain"] / 3000 < 0.65 and 0.25 < seen["corrected"] / 3000 < 0.35 and seen["bare"] > 200


def test_wrong_captions_are_of_the_same_making_but_not_true():
    rng, kinds = Rng(8), Counter()
    for _ in range(2000):
        spec, caption, facts, mistaken = specs.pretraining_example(rng)
        assert true_of(facts, spec) and specs.split_of(spec) == "pretrain"
        if mistaken is None:
            continue
        prefix = caption.startswith("a photo of "), (" that " in caption)
        assert prefix == (mistaken.startswith("a photo of "), " that " in mistaken)  # nothing but the content gives it away
        head, _, modifier = mistaken.removeprefix("a photo of ").partition(" that ")
        if not modifier:  # where nothing is corrected, its own reader can tell
            kinds["plain"] += 1
            assert not true_of(read(head, spec), spec), (mistaken, spec)
        else:
            kinds["corrected"] += 1
    assert kinds["plain"] > 1200 and kinds["corrected"] > 400


def test_a_contradiction_changes_one_fact_and_a_twin_one_thing():
    rng, swaps = Rng(9), 0
    for spec, _ in draws(600, seed=10):
        _, facts = specs.describe(spec, rng)
        false = specs.contradict(facts, rng)
        flat = lambda x: [v for thing in getattr(x, "things", ()) for v in vars(thing).values()]  # noqa: E731
        a = flat(facts) + [v for name, v in vars(facts).items() if name != "things"]
        b = flat(false) + [v for name, v in vars(false).items() if name != "things"]
        changed = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
        swap = len(changed) == 2 and changed[0] == changed[1][::-1]
        second = isinstance(spec, Garment) and len(changed) == 2  # the second colour goes with the pattern
        assert len(changed) <= 1 or swap or second, (facts, false)
        swaps += swap
        other = specs.twin(spec, rng)
        assert other != spec and other.pose == spec.pose and specs.split_of(other) == "pretrain"
    assert swaps > 20


def test_every_word_is_in_the_vocabulary_of_pocket_blip():
    tokenizer, rng = blip_lite.Tokenizer(ROOT / "pocket" / "vocab.txt"), Rng(9)
    texts = [specs.pretraining_pair(rng)[1] for _ in range(1500)]
    for spec, _ in draws(600, seed=10):
        texts += [specs.describe(spec, rng)[0], *(specs.edit(spec, rng, kind).text for kind in EDIT_KINDS)]
    for text in texts:
        assert tokenizer.tokenize(text) == text.split()  # whole words: nothing unknown, nothing spelt out


# ------------------------------------------------------------------------------------------------------- drawings
def pixels(spec):
    return np.asarray(draw(spec)).astype(int)


def test_drawing_is_a_function_of_the_spec():
    for spec, rng in draws(40, seed=11):
        image = draw(spec)
        assert (image.size, image.mode) == ((64, 64), "RGB")
        assert image.tobytes() == draw(replace(spec)).tobytes()
        assert image.tobytes() != draw(replace(spec, pose=rng.getrandbits(31))).tobytes()


def test_every_attribute_is_visible():
    scene = Scene((Thing("cat", "red", "big", "left"), Thing("boat", "blue", "small", "middle")), "sea", 5)
    choices = dict(kind=KINDS, colour=COLOURS, size=specs.SIZES, place=specs.PLACES)
    images = {pixels(replace(scene, background=b)).tobytes() for b in BACKGROUNDS}
    for name, values in choices.items():
        cats = [replace(scene.things[0], **{name: value}) for value in values]
        images |= {pixels(replace(scene, things=(cat, scene.things[1]))).tobytes() for cat in cats}
    assert len(images) == len(BACKGROUNDS) + sum(map(len, choices.values())) - 4  # the scene itself is in all five lists
    garment = Garment("dress", "red", "striped", "blue", "long", "v neck", "short", "belt", 5)
    choices = dict(
        kind=GARMENTS, colour=[c for c in COLOURS if c != "blue"], second=[c for c in COLOURS if c != "red"],
        pattern=specs.PATTERNS, sleeves=specs.SLEEVES, neckline=specs.NECKLINES, length=specs.LENGTHS, detail=specs.DETAILS,
    )
    images = {pixels(replace(garment, **{name: v})).tobytes() for name, values in choices.items() for v in values}
    assert len(images) == sum(map(len, choices.values())) - 7


def test_colours_and_places_are_where_the_spec_says():
    for colour, rgb in COLOURS.items():
        for place, x in {"left": 11, "middle": 32, "right": 53}.items():
            for background in BACKGROUNDS:
                one = pixels(Scene((Thing("ball", colour, "big", place),), background, pose=3))
                columns = np.where((one == rgb).all(-1))[1]
                assert len(columns) > 40 and abs(np.median(columns) - x) < 5, (colour, place, background)
        cloth = pixels(Garment("shirt", colour, "plain", "none", "long", "collar", "long", "none", 3))
        assert (cloth == rgb).all(-1).sum() > 500


# --------------------------------------------------------------------------------------------- the world on disk
def digest(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


class Recorder:
    """Stands in for the process pool: draws here, and keeps (path, spec) of every image."""

    def __init__(self, *_, draw=True):
        self.jobs, self.draw = [], draw

    def __call__(self, workers):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, jobs):
        self.jobs += jobs
        done = Future()
        done.set_result(function(jobs) if self.draw else None)
        return done


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The small world once more, with another number of processes -> its folder, {path below it: spec}."""
    out, recorder = tmp_path_factory.mktemp("recorded") / "world", Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "ProcessPoolExecutor", recorder)
        world.write(out, seed=0, scale=0.02)
    draft = out.with_name("world.tmp")
    return out, {str(path.relative_to(draft)): spec for path, spec in recorder.jobs}


def test_same_seed_same_bytes(small_world, recorded):
    assert digest(recorded[0]) == digest(small_world)


def test_same_seed_same_bytes_from_the_command_line(tmp_path, small_world):
    command = [sys.executable, "-m", "pocket.world", "--out", str(tmp_path / "w"), "--scale", "0.02"]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # the order of Python's sets changes with it
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(list(tmp_path.rglob('*.*g')))} images" in done.stdout, done.stderr
    assert digest(tmp_path / "w") == digest(small_world)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_another_seed_draws_other_images(tmp_path, small_world):
    world.write(tmp_path / "world", seed=1, scale=0.005, workers=1)
    theirs, ours = set(digest(tmp_path / "world" / "train").values()), set(digest(small_world / "train").values())
    assert len(theirs) > 50 and not theirs & ours


def test_sizes(small_world):
    count = lambda pattern: len(list(small_world.glob(pattern)))  # noqa: E731
    assert count("train/*.png") > 200
    assert count("cirr/img_raw/dev/*.png") == count("cirr/img_raw/test1/*.png") == 8 * 6  # 384 groups / 50
    assert count("fashioniq/images/*.png") == 2 * (76 + 127 + 107)  # FashionIQ's galleries / 50
    for split in ("val", "test"):
        for category, size in (("dress", 76), ("shirt", 127), ("toptee", 107)):
            benchmark = benchmarks.load("fashioniq", small_world / "fashioniq", split, category)
            assert (len(benchmark.gallery), len(benchmark.queries)) == (size, 14)
        assert 5 <= len(benchmarks.load("circo", small_world / "circo", split).queries) <= 12
    circo = count("circo/COCO2017_unlabeled/unlabeled2017/*.jpg")
    assert 24 * 3 + 40 <= circo <= 24 * 6 + 40  # 2 x 600 / 50 queries: reference and two to five targets; 2 x 1000 / 50 others
    assert json.loads((small_world / "world.json").read_text()) == {"seed": 0, "scale": 0.02, "images": count("**/*.*g")}


def test_layouts_are_the_real_ones(small_world):
    for name, splits in (("cirr", ("val", "test1")), ("fashioniq", ("val", "test")), ("circo", ("val", "test"))):
        rows = benchmarks.check_layout(name, small_world / name, splits)
        assert len(rows) == (6 if name == "fashioniq" else 2)
        for row in rows:
            assert row["problem"] is None and not row["missing"] and row["images_missing"] == 0 and row["queries"] > 4, row


def set_of(path):
    if path.startswith("train/"):
        return {"unlabeled"}
    if path.startswith("cirr/"):
        return {{"dev": "val", "test1": "test"}[Path(path).parent.name]}
    if path.startswith("fashioniq/"):
        return {{"V": "val", "T": "test"}[Path(path).name[0]]}
    return {"val", "test"}  # CIRCO has one gallery for both splits


def test_the_four_sets_never_meet(recorded):
    out, drawn = recorded
    by_set = {}
    for path, spec in drawn.items():
        assert specs.split_of(spec) in set_of(path), path
        by_set.setdefault(specs.split_of(spec), set()).add(replace(spec, pose=0))
    rng = Rng(12)
    by_set["pretrain"] = {replace(specs.pretraining_pair(rng)[0], pose=0) for _ in range(3000)}
    assert len(by_set) == 4 and sum(map(len, by_set.values())) == len(set().union(*by_set.values()))
    for query in benchmarks.load("circo", out / "circo", "val").queries:
        for name in (query.reference, query.targets[0]):
            assert specs.split_of(drawn[f"circo/COCO2017_unlabeled/unlabeled2017/{int(name):012d}.jpg"]) == "val"


def test_files_show_their_specs_and_their_captions_are_true(recorded):
    out, drawn = recorded
    for path, spec in list(drawn.items())[::40]:
        there = np.asarray(Image.open(out / path)).astype(int)
        if path.endswith(".png"):
            assert np.array_equal(there, pixels(spec))
        else:
            assert np.abs(there - pixels(spec)).mean() < 3  # a JPEG of good quality
    for name in ("cirr", "fashioniq", "circo"):
        captions = json.loads((out / name / "captions.json").read_text())
        images = {Path(path).stem: spec for path, spec in drawn.items() if path.startswith(name)}
        assert {int(stem) if name == "circo" else stem for stem in images} == {int(n) if name == "circo" else n for n in captions}
        for stem, spec in images.items():
            assert true_of(read(captions[str(int(stem)) if name == "circo" else stem], spec), spec)


def test_no_kind_repeats_in_a_scene(recorded):
    for path, spec in recorded[1].items():
        if isinstance(spec, Scene):
            assert len({t.kind for t in spec.things}) == len(spec.things), path


def test_cirr_groups(recorded):
    out, drawn = recorded
    for split, folder in (("val", "dev"), ("test1", "test1")):
        entries = json.loads((out / f"cirr/captions/cap.rc2.{split}.json").read_text())
        spec = lambda name, folder=folder: drawn[f"cirr/img_raw/{folder}/{name}.png"]  # noqa: E731
        assert len({entry["pairid"] for entry in entries}) == 4 * 8
        for entry in entries:
            members = entry["img_set"]["members"]
            assert len(set(members)) == 6 and {entry["reference"], entry["target_hard"]} < set(members)
            claimed = read(entry["caption"], spec(entry["reference"]))
            assert true_of(claimed, spec(entry["target_hard"])) and entry["modifier_type"] in EDIT_KINDS
        for start in range(0, len(entries), 4):  # a chain along the group; the member left over is like the first
            chain = [entries[start]["reference"], *(entry["target_hard"] for entry in entries[start : start + 4])]
            assert [entry["reference"] for entry in entries[start : start + 4]] == chain[:4] and len(set(chain)) == 5
            (sixth,) = set(entries[start]["img_set"]["members"]) - set(chain)
            content = lambda s: (s.background, sorted((t.kind, t.colour, t.size) for t in s.things))  # noqa: E731
            assert content(spec(sixth)) == content(spec(chain[0])) and spec(sixth) != spec(chain[0])


def test_fashioniq_captions_are_true_and_targets_used_once(recorded):
    out, drawn = recorded
    for split in ("val", "test"):
        for category in GARMENTS:
            entries = json.loads((out / f"fashioniq/captions/cap.{category}.{split}.json").read_text())
            names = [entry[key] for entry in entries for key in ("candidate", "target")]
            assert len(set(names)) == len(names) == 28
            for entry in entries:
                target = drawn[f"fashioniq/images/{entry['target']}.png"]
                assert len(entry["captions"]) == 2 and target.kind == category
                for caption in entry["captions"]:
                    assert true_of(read(caption, target), target), caption


def test_mix_of_modifiers():
    _, entries = world.make_cirr(Rng(0), "val", 250)
    share = Counter(entry["modifier_type"] for entry in entries)
    for kind, wanted in (("one", 0.15), ("multi", 0.25), ("describe", 0.60)):
        assert abs(share[kind] / 1000 - wanted) < 0.05


# ------------------------------------------------------------------------------------------------ CIRCO's ground truth
@pytest.fixture(scope="module")
def circo():
    """Images, entries by reference, and of every query that make_circo drafted [reference, modifier, target, facts]."""
    drafts, asked, edited = [], [], world._edited
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "_edited", lambda r, *rest: drafts.append((r, *edited(r, *rest))) or drafts[-1][1:])
        patch.setattr(world, "holds", lambda facts, images: asked.extend(facts) or specs.holds(facts, images))
        images, entries = world.make_circo(Rng(0), {"val": 60, "test": 60}, extra=300)
    by_reference = {entry["reference_img_id"]: entry for split in ("val", "test") for entry in entries[split]}
    return images, by_reference, [(*draft, facts) for draft, facts in zip(drafts, asked, strict=True)]


def test_circo_truths_are_all_images_of_which_the_facts_are_true(circo):
    images, entries, drafts = circo
    name_of, kept = {spec: name for name, spec in images.items()}, 0
    for reference, change, target, facts in drafts:
        true = {name for name, spec in images.items() if true_of(facts, spec)}
        reference, target = name_of[reference], name_of[target]
        if reference in true or target not in true or len(true) > 14:
            assert reference not in entries
            continue
        kept, entry = kept + 1, entries[reference]
        assert (entry["relative_caption"], entry["target_img_id"]) == (change.text, target)
        assert entry["gt_img_ids"][0] == target and sorted(entry["gt_img_ids"]) == sorted(true) and len(true) >= 2
    assert kept == len(entries) > 80


def test_circo_truths_follow_from_the_written_words(circo):
    """For modifiers that say what they change: read the shared concept and the modifier, change, look at all images."""
    images, entries, _ = circo
    checked = 0
    for entry in entries.values():
        text = entry["relative_caption"]
        for name in entry["gt_img_ids"]:
            assert true_of(read_scene(text), images[name]), text
        if entry["modifier_type"] == "one":
            facts = read_scene(entry["shared_concept"])
            new, old = read_scene(text), re.search("instead of the ([a-z]+)", text)
            things = list(facts.things)
            for said in new.things:
                replaced = old.group(1) if old else said.kind or things[0].kind
                place = [i for i, thing in enumerate(things) if thing.kind == replaced]
                said = {key: value for key, value in vars(said).items() if value}
                if place:
                    things[place[0]] = replace(things[place[0]], **said)
                else:
                    things.append(Thing(**said))
            facts = Scene(tuple(things), new.background or facts.background)
            assert {name for name, spec in images.items() if true_of(facts, spec)} == set(entry["gt_img_ids"]), entry
            checked += 1
    assert checked > 8


# ---------------------------------------------------------------------------------------------- world: ensure, write
def test_ensure_draws_only_what_is_missing(tmp_path, monkeypatch, capsys):
    calls, write = [], world.write
    monkeypatch.setattr(world, "write", lambda out: calls.append(out) or write(out, scale=0.001, workers=1))
    world.ensure(tmp_path / "w")
    assert calls == [tmp_path / "w"] and "drawing" in capsys.readouterr().out
    world.ensure(tmp_path / "w")  # kept, though it is another one than usual
    assert len(calls) == 1 and "seed 0, scale 0.001" in capsys.readouterr().out
    marker = tmp_path / "w" / "world.json"
    marker.write_text(json.dumps({"seed": 0, "scale": 1.0}))
    world.ensure(tmp_path / "w")
    assert len(calls) == 1 and capsys.readouterr().out == ""
    marker.write_text("{")
    with pytest.raises(ValueError, match=r"world.json is damaged; delete the folder .*w, it is then drawn again"):
        world.ensure(tmp_path / "w")


def test_write_replaces_an_older_world_and_nothing_else(tmp_path):
    out = tmp_path / "world"
    world.write(out, seed=0, scale=0.001, workers=1)
    (out / "train" / "left_over.png").write_text("")
    world.write(out, seed=1, scale=0.001, workers=1)
    assert not (out / "train" / "left_over.png").exists() and json.loads((out / "world.json").read_text())["seed"] == 1
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_text("precious")
    with pytest.raises(ValueError, match="photos"):
        world.write(photos, seed=0, scale=0.001, workers=1)
    assert [path.name for path in photos.iterdir()] == ["holiday.jpg"] and len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_write_leaves_the_older_world(tmp_path, monkeypatch):
    out = tmp_path / "world"
    world.write(out, seed=0, scale=0.001, workers=1)
    before = digest(out)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "make_circo", fail)
    with pytest.raises(KeyboardInterrupt):
        world.write(out, seed=1, scale=0.001, workers=1)
    assert digest(out) == before


@pytest.mark.slow
def test_full_size(monkeypatch, tmp_path):
    """Galleries of the real sizes (CIRR 2297, FashionIQ 3817 / 6346 / 5373); drawing itself is left out."""
    recorder = Recorder(draw=False)
    monkeypatch.setattr(world, "ProcessPoolExecutor", recorder)
    world.write(tmp_path / "world", seed=0)
    folders = Counter(str(path.parent.relative_to(tmp_path / "world.tmp")) for path, _ in recorder.jobs)
    assert folders["train"] >= 10_000 and folders["cirr/img_raw/dev"] == folders["cirr/img_raw/test1"] == 2304
    for split in ("val", "test"):
        for category, size in (("dress", 3817), ("shirt", 6346), ("toptee", 5373)):
            benchmark = benchmarks.load("fashioniq", tmp_path / "world" / "fashioniq", split, category)
            assert (len(benchmark.gallery), len(benchmark.queries)) == (size, 700)
        circo = benchmarks.load("circo", tmp_path / "world" / "circo", split)
        assert len(circo.queries) > 400 and 5000 < len(circo.gallery) < 12000
        assert 2 < np.mean([len(query.targets) for query in circo.queries]) < 10
    for category, size in world.FASHION_GALLERY.items():
        real = DATA / "fashioniq" / "image_splits" / f"split.{category}.val.json"
        assert not real.exists() or len(json.loads(real.read_text())) == size


# ---------------------------------------------------------------------------------------------------- pre-training
def test_contrastive_loss_is_symmetric_infonce_without_false_negatives():
    generator = torch.Generator().manual_seed(0)
    v, t = (torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=-1) for _ in range(2))
    true = torch.rand(6, 6, generator=generator) < 0.3
    true |= torch.eye(6, dtype=torch.bool)
    assert 8 < true.sum() < 24
    wanted = 0.0
    for i in range(6):
        own = math.exp(float(t[i] @ v[i]) / 0.1)
        for line in range(2):  # text i among the images, image i among the texts
            others = 0.0
            for j in range(6):
                text, image = (i, j) if line == 0 else (j, i)
                if j != i and not true[text, image]:
                    others += math.exp(float(t[text] @ v[image]) / 0.1)
            wanted -= math.log(own / (own + others)) / 12
    assert pretrain.contrastive_loss(v, t, 0.1, true).item() == pytest.approx(wanted, rel=1e-5)


def test_by_length_changes_nothing_but_the_padding():
    lengths, shapes = [5, 2, 9, 3, 3, 8, 4, 7], []
    mask = torch.tensor([[1] * n + [0] * (9 - n) for n in lengths])
    words, image = torch.rand(8, 9, 2), torch.rand(8, 2)

    def encode(words, mask, image):
        shapes.append(words.shape[1])
        return (words * mask[..., None]).sum(1) * image

    assert torch.allclose(pretrain.by_length(encode, words, mask, image), encode(words, mask, image))
    assert shapes == [3, 4, 7, 9, 9]  # four groups, (2 3) (3 4) (5 7) (8 9), and then all at once


@pytest.mark.parametrize("hardness", [0.0, 1.0])
def test_matching_negatives_are_wrong_and_at_full_hardness_the_most_alike(hardness):
    """Texts and images carry their number; true pairs besides one's own must not be drawn as wrong ones."""
    size, seen = 8, []
    true = torch.eye(size, dtype=torch.bool)
    true[0, 3] = true[2, 5] = True
    similarity = torch.zeros(size, size)
    similarity[0, 3] = similarity[2, 5] = similarity[1, 6] = similarity[7, 1] = 40.0
    number = torch.arange(size).float()

    class Blip:
        def match(self, words, mask, F_v):
            seen.append(torch.stack([words[:, 0, 0], F_v[:, 0, 0]], dim=1))
            own = words[:, 0, 0] == F_v[:, 0, 0]
            return torch.stack([~own, own], dim=1).float() * 50

    words, F_v = number[:, None, None].expand(size, 4, 1), number[:, None, None].expand(size, 2, 1)
    mask = torch.ones(size, 4, dtype=torch.int64)
    torch.manual_seed(0)
    for _ in range(20):
        chosen = pretrain.coarse_pairs(similarity, true, hardness, size // 2)
        loss, accuracy = pretrain.matching_loss(Blip(), words, mask, F_v, *chosen)
        assert loss < 1e-6 and accuracy == 1  # so the first half are matches, the rest are not
    pairs = Counter(tuple(pair) for pair in torch.cat(seen).int().tolist())
    assert sum(pairs.values()) == 20 * 3 * size // 2
    assert all(pairs[i, i] == 20 for i in range(size // 2))
    assert not any(pairs[i, j] for i in range(size) for j in range(size) if i != j and true[i, j])
    hard = pairs[1, 6] + pairs[7, 1]  # a hard image for text 1, a hard text for image 1
    assert hard == 40 if hardness else hard < 20
    texts, images, labels = pretrain.coarse_pairs(similarity, true, hardness, size)
    assert len(texts) == len(images) == 3 * size and labels.tolist() == [1] * size + [0] * 2 * size
    assert texts[: 2 * size].tolist() == 2 * list(range(size)) and images[2 * size :].tolist() == list(range(size))


def test_matching_loss_weighs_true_pairs():
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0], [3.0, 0.0]])

    class Blip:
        def match(self, words, mask, F_v):
            return logits[words[:, 0, 0].long()]

    words, F_v, mask = torch.arange(3.0)[:, None, None].expand(3, 4, 1), torch.zeros(3, 2, 1), torch.ones(3, 4, dtype=torch.int64)
    own, labels = torch.arange(3), torch.tensor([1, 1, 0])
    each = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(2)), math.log(1 + math.exp(-3))]
    for weight, wanted in ((1.0, sum(each) / 3), (2.0, (2 * each[0] + 2 * each[1] + each[2]) / 5)):
        loss, accuracy = pretrain.matching_loss(Blip(), words, mask, F_v, own, own, labels, weight)
        assert loss.item() == pytest.approx(wanted, rel=1e-6) and accuracy.item() == pytest.approx(2 / 3)


def test_terse_captions_of_a_batch_only_describe_the_same_images():
    tokenizer = blip_lite.Tokenizer(ROOT / "pocket" / "vocab.txt")
    usual, terse = (pretrain.batch(Rng(5), 40, tokenizer, terse=count) for count in (0, 20))
    assert torch.equal(usual[0], terse[0]) and terse[3].diagonal().all()
    that = tokenizer(["that"])[0][0, 1]
    length = lambda drawn: drawn[2].sum(1)  # noqa: E731
    assert (usual[1][:20] == that).any() and not (terse[1][:20] == that).any()
    assert length(terse)[:20].float().mean() < length(usual)[:20].float().mean()
    assert torch.equal(length(usual)[20:], length(terse)[20:]) and (terse[1][20:] == that).any()


def test_fine_pairs_add_captions_that_are_wrong_in_one_thing():
    size, true = 8, torch.eye(8, dtype=torch.bool)
    similarity = torch.zeros(size, size)
    similarity[0, 3] = similarity[1, 6] = similarity[7, 1] = similarity[5, 4] = 40.0
    wrong = torch.tensor([True, True, True, True, False, True, True, True])  # image 4 has none, and gets a hard text
    texts, images, labels = pretrain.fine_pairs(similarity, true, wrong)
    assert len(texts) == 20 and labels.tolist() == [1] * 8 + [0] * 12
    assert texts[:8].tolist() == images[:8].tolist() == list(range(8))
    assert texts[8:16].tolist() == [8, 9, 10, 11, 5, 13, 14, 15] and images[8:16].tolist() == list(range(8))
    assert texts[16:18].tolist() == [0, 1] and images[16:18].tolist() == [3, 6]  # hard images of the first texts
    assert images[18:].tolist() == [0, 1] and texts[19] == 7 and texts[18] != 0  # and hard texts of the first images


def test_fine_batches_hold_twins():
    tokenizer = blip_lite.Tokenizer(ROOT / "pocket" / "vocab.txt")
    pixels, ids, mask, true, wrong = pretrain.fine_batch(Rng(3), 12, tokenizer)
    assert pixels.shape == (12, 3, 64, 64) and ids.shape == mask.shape and len(ids) == 24
    assert true.diagonal().all() and wrong.shape == (12,) and wrong.sum() > 6
    alike = (pixels[:, None] == pixels[None]).float().flatten(2).mean(2) - torch.eye(12)
    assert (alike.max(1).values > 0.6).sum() >= 6  # twins share most of their pixels
    assert torch.equal(pretrain.fine_batch(Rng(3), 12, tokenizer)[0], pixels)


def test_learning_rate_of_pretraining():
    rate = lambda step: pretrain.learning_rate(step, 3000, 2.0)  # noqa: E731
    assert [rate(0), rate(99), rate(199), rate(2000)] == pytest.approx([0.01, 1.0, 2.0, 2.0])
    assert [rate(2100), rate(2550), rate(3000)] == pytest.approx([2.0, 1.0, 0.0])
    assert pretrain.learning_rate(3999, 6000, 2.0) == pytest.approx(2 / 1200)  # more steps are fine ones, after the others' end
    peak = 2.0 * pretrain.FINE_LR
    for steps in (5600, 6600):  # and more than these are for matching
        assert pretrain.learning_rate(4200, steps, 2.0) == pytest.approx(peak * 0.875)
        assert pretrain.learning_rate(4800, steps, 2.0) == pytest.approx(peak * 0.5)
    rate = lambda step: pretrain.learning_rate(step, 6600, 2.0)  # noqa: E731
    assert [rate(5599), rate(5600), rate(5800), rate(6100), rate(6600)] == pytest.approx([peak / 1600, 0.01, 1.6, 1.0, 0.0])


def test_pretraining_pixels_are_those_of_preprocess(pocket_blip):
    some = [spec for spec, _ in draws(4, seed=13)]
    wanted = torch.stack([pocket_blip.preprocess(draw(spec)) for spec in some])
    assert torch.allclose(pretrain.to_pixels(some), wanted, atol=1e-6)


def pretrain_here(monkeypatch, out, *options):
    arguments = ["--steps", "3", "--batch", "8", "--held-out", "4", "--save-every", "2", "--precision", "fp32", "--out", out]
    monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, [*arguments, *options])])
    pretrain.main()


@pytest.mark.parametrize("fine_at, match_at", [pytest.param(4000, 5600, marks=pytest.mark.slow), (1, 5600), (0, 2), (0, 1)])
def test_pretraining_killed_in_a_step_resumes_to_the_same_weights(tmp_path, monkeypatch, fine_at, match_at):
    monkeypatch.setattr(pretrain, "FINE_AT", fine_at)
    monkeypatch.setattr(pretrain, "MATCH_AT", match_at)
    pretrain_here(monkeypatch, tmp_path / "whole.pth")
    calls, contrastive_loss = [], pretrain.contrastive_loss

    def killed(*arguments):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt  # in the third step; the last state is that of step 2
        return contrastive_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "contrastive_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain_here(monkeypatch, tmp_path / "parts.pth")
    assert not (tmp_path / "parts.pth").exists() and len(calls) == 3
    pretrain_here(monkeypatch, tmp_path / "parts.pth")
    whole, parts = (torch.load(tmp_path / f"{name}.pth", weights_only=True)["model"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    whole, parts = (json.loads((tmp_path / f"{name}.pth.log").read_text().splitlines()[-1]) for name in ("whole", "parts"))
    assert whole.pop("seconds") >= 0 and parts.pop("seconds") >= 0 and whole == parts and whole["step"] == 3
    assert blip_lite.load(tmp_path / "whole.pth", vocab=ROOT / "pocket" / "vocab.txt").image_size == 64


def test_training_matching_alone_leaves_every_ranking_as_it_is(tmp_path, monkeypatch, pocket_blip):
    out = tmp_path / "matching.pth"
    options = ["--steps", pretrain.MATCH_AT + 2, "--lr", 0.5]  # so that two steps of warm-up show in fp16 weights near one
    pretrain_here(monkeypatch, out, "--matching-of", "pocket", *options)
    blip = blip_lite.load(out, vocab=ROOT / "pocket" / "vocab.txt")
    before, after = pocket_blip.state_dict(), blip.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "crossattention" in name or "itm_head" in name}
    ids, mask = blip.tokenizer(["a red cat", "a photo of a dress with short sleeves"])
    pixels = pretrain.to_pixels([spec for spec, _ in draws(2, seed=4)])
    with torch.no_grad():
        (v, F_v), (w, F_w), words = pocket_blip.encode_image(pixels), blip.encode_image(pixels), blip.embed_words(ids)
        assert torch.equal(v, w) and torch.equal(F_v, F_w)
        assert torch.equal(pocket_blip.encode_text(pocket_blip.embed_words(ids), mask), blip.encode_text(words, mask))
        assert not torch.allclose(pocket_blip.match(words, mask, F_v), blip.match(words, mask, F_v), atol=1e-3)
    assert json.loads((tmp_path / "matching.pth.log").read_text())["step"] == pretrain.MATCH_AT + 2
    with pytest.raises(ValueError, match="is of --matching-of pocket, not None; give --matching-of pocket, or delete"):
        pretrain_here(monkeypatch, out, *options)


def test_unknown_options_of_the_world_and_pretraining_are_errors(monkeypatch, capsys):
    for main in (world.main, pretrain.main):
        monkeypatch.setattr(sys, "argv", ["main", "--sead", "1"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2 and "--sead" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- pocket/isa.pt
def test_the_shipped_query_model_fits_the_shipped_blip(small_world, pocket_blip):
    """pocket/isa.pt was trained by `python train.py` against pocket/blip.pth; its sentences name their own images."""
    model, settings = load_query_model(ROOT / "pocket" / "isa.pt", pocket_blip)
    defaults = vars(parse_args([]))
    assert {k: v for k, v in settings.items() if k not in MAY_CHANGE | {"precision"}} == {
        k: v for k, v in defaults.items() if k not in MAY_CHANGE | {"precision"}}
    paths = sorted((small_world / "cirr/img_raw/test1").iterdir())
    pixels = torch.stack([query_side.preprocess(model.encoder, Image.open(path)) for path in paths])
    with torch.no_grad():
        v, _ = pocket_blip.encode_image(torch.stack([pocket_blip.preprocess(Image.open(path)) for path in paths]))
        t = pocket_blip.encode_text(*isa.compose_query(pocket_blip, model(pixels)))
    right = ((t @ v.T).argmax(1) == torch.arange(len(paths))).float().mean()
    assert right > 0.8, right  # of 48, in groups of six that are alike; without training 0.02
