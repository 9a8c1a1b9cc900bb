"""The pocket world on disk: training images, and benchmarks in the layouts of the real ones.

    python -m pocket.world --out data/pocket --seed 0

writes train/ (unlabeled images) and the validation and test sets of cirr/ and circo/ (scenes) and
fashioniq/ (garments). Beyond the official fields each query has a "modifier_type" of
specs.EDIT_KINDS, and the test sets have targets. Whatever the seed, pre-training, train/,
validation and test share no spec (specs.split_of).
"""

import argparse
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from plumbing.command import ignore_signals, run_command
from plumbing.files import check_folder, explained, locked, write_json
from plumbing.options import check_options

from . import specs
from .drawing import draw
from .specs import Garment, Scene, Thing, holds, random_garment, random_scene, sample, split_of

MIX = {"one": 0.15, "multi": 0.25, "describe": 0.60}  # CIRR's writers mostly describe the target
FASHION_GALLERY = {"dress": 3817, "shirt": 6346, "toptee": 5373}  # FashionIQ's validation galleries
ASPECTS = {  # CIRCO's semantic aspects, as far as a modifier's wording shows them
    "addition": ("also", "adds"), "compare_change": ("instead of",),
    "statement_with_conjunction": (" and ",),
    "spatial_relations_background": tuple(specs.BACKGROUNDS.values()),
}


def _fresh(spec, rng):
    """The same content in another pose and, for most scenes, in other places."""
    spec = replace(spec, pose=rng.getrandbits(31))
    if isinstance(spec, Scene) and rng.random() < 0.6:
        places = rng.sample(list(specs.PLACES), len(spec.things))
        for i, place in enumerate(places):
            spec = specs.set_thing(spec, i, place=place)
    return spec


def repeats(spec):
    """Does a kind of thing appear twice? Two changes may bring the same one."""
    return isinstance(spec, Scene) and len({t.kind for t in spec.things}) < len(spec.things)


def _edited(reference, rng, split):
    while True:
        change = specs.edit(reference, rng, rng.choices(list(MIX), weights=MIX.values())[0])
        target = _fresh(change.apply(reference), rng)
        if split_of(target) == split and not repeats(target):
            return change, target


def _complete(facts, rng):
    """A random scene that the facts are true of."""
    while True:
        scene = random_scene(rng, count=max(rng.choice((1, 2, 3)), len(facts.things)))
        for i, fact in enumerate(facts.things):
            scene = specs.set_thing(scene, i, **specs.known(fact))
        scene = replace(scene, background=facts.background or scene.background)
        if not repeats(scene):
            return scene


def make_cirr(rng, split, groups):
    """CIRR: groups of six similar images -> images {name: spec}, caption entries.

    Members 0 to 4 follow from each other by edits, the queries; the sixth is nearly the first.
    """
    images, entries = {}, []
    folder = {"val": "dev", "test": "test1"}[split]
    for group in range(groups):
        names = [f"{folder}-{group}-{i // 2}-img{i % 2}" for i in range(6)]
        members, changes = [sample(rng, split, random_scene)], []
        for _ in range(4):
            change, target = _edited(members[-1], rng, split)
            changes.append(change)
            members.append(target)
        near = _fresh(members[0], rng)
        members.append(near if split_of(near) == split else replace(members[0], pose=near.pose))
        images.update(zip(names, members, strict=True))
        img_set = {"id": group, "members": rng.sample(names, 6)}
        entries += [
            {"pairid": 10000 + 4 * group + i, "reference": names[i], "target_hard": names[i + 1],
             "target_soft": {names[i + 1]: 1.0}, "caption": change.text, "img_set": img_set,
             "modifier_type": change.kind} for i, change in enumerate(changes)]
    return images, entries


def make_circo(rng, counts, extra):
    """CIRCO: counts {split: queries} -> images {COCO id: spec} of both splits, {split: entries}.

    A query keeps part of its reference (the shared concept) and asks for a change. Every image that
    fits both is a ground truth: two to five are drawn for it, others turn up by chance. Queries
    with more than 14 (CIRCO's maximum) are dropped. extra: images for each split.
    """
    ids = iter(rng.sample(range(1, 600_000), 8 * sum(counts.values()) + 2 * extra))
    images, drafts = {}, []
    for split, count in counts.items():
        for _ in range(count):
            reference = sample(rng, split, random_scene)
            change, target = _edited(reference, rng, split)
            things = [Thing(thing.kind, thing.colour if rng.random() < 0.8 else None)
                      for thing in reference.things]
            shared = Scene(tuple(things), reference.background if rng.random() < 0.6 else None)
            facts = change.claim(shared)
            more = [sample(rng, split, partial(_complete, facts))
                    for _ in range(rng.choice((1, 2, 3, 4)))]
            names = [next(ids) for _ in range(2 + len(more))]
            images.update(zip(names, (reference, target, *more), strict=True))
            drafts.append((split, names[0], names[1], change, shared, facts))
        images |= {next(ids): sample(rng, split, random_scene) for _ in range(extra)}
    names, gallery, entries = list(images), list(images.values()), {split: [] for split in counts}
    facts = [draft[-1] for draft in drafts]
    true = [row for i in range(0, len(facts), 50) for row in holds(facts[i : i + 50], gallery)]
    for (split, reference, target, change, shared, _), row in zip(drafts, true, strict=True):
        fit = [names[i] for i in np.flatnonzero(row)]
        if reference in fit or target not in fit or len(fit) > 14:
            continue
        aspects = [a for a, signs in ASPECTS.items() if any(sign in change.text for sign in signs)]
        entries[split].append({
            "reference_img_id": reference, "target_img_id": target,
            "relative_caption": change.text, "shared_concept": specs.say(shared, rng),
            "gt_img_ids": [target, *(name for name in fit if name != target)],
            "id": len(entries[split]), "semantic_aspects": aspects or ["direct_addressing"],
            "modifier_type": change.kind})
    return images, entries


def make_fashioniq(rng, split, category, queries, gallery):
    """FashionIQ -> images {name: spec}, entries with two captions each."""
    images, entries, make = {}, [], partial(random_garment, kind=category)
    name = f"{split[0].upper()}{category[0].upper()}{{:07d}}".format
    for _ in range(queries):
        reference = sample(rng, split, make)
        change, target = _edited(reference, rng, split)
        claim, keep = change.claim(Garment(category)), 1.0 if change.kind == "one" else 0.7
        again = specs.say(specs.forget(claim, rng, keep), rng)  # for modifiers of a single phrase
        half = max(1, len(change.phrases) // 2)
        captions = [" and ".join(change.phrases[:half]),
                    " and ".join(change.phrases[half:]) or f"is {again}"]
        rng.shuffle(captions)
        candidate, target_name = name(len(images)), name(len(images) + 1)
        images |= {candidate: reference, target_name: target}
        entries.append({"target": target_name, "candidate": candidate, "captions": captions,
                        "modifier_type": change.kind})
    for i in range(len(images), gallery):
        images[name(i)] = sample(rng, split, make)
    return images, entries


def scaled(full, scale):
    return max(4, round(full * scale))


def cirr_split(split, seed, scale):
    """A world's CIRR, "val" or "test" -> what make_cirr returns, and the generator after it."""
    rng = specs.Rng(f"cirr {split} {seed}")
    return *make_cirr(rng, split, scaled(384, scale)), rng


def contents(seed=0, scale=1.0):
    """Yields (path, content) of every file: the spec of an image, or what a JSON file holds.

    captions.json has a full caption of each image, for pocket.ceilings.
    """

    size = partial(scaled, scale=scale)

    def captions(images, rng):
        return {str(name): specs.describe(spec, rng, 1.0)[0] for name, spec in images.items()}

    rng = specs.Rng(f"train {seed}")
    for i in range(size(24000)):
        yield f"train/{i:06d}.png", sample(rng, "unlabeled", specs.MAKERS[i % 2])

    texts = {}
    for split, folder, official in (("val", "dev", "val"), ("test", "test1", "test1")):
        images, entries, rng = cirr_split(split, seed, scale)
        texts |= captions(images, rng)
        yield from ((f"cirr/img_raw/{folder}/{name}.png", spec) for name, spec in images.items())
        yield f"cirr/captions/cap.rc2.{official}.json", entries
        paths = {name: f"./{folder}/{name}.png" for name in images}
        yield f"cirr/image_splits/split.rc2.{official}.json", paths
    yield "cirr/captions.json", texts

    texts = {}
    for split in ("val", "test"):
        for category, gallery in FASHION_GALLERY.items():
            rng = specs.Rng(f"fashioniq {split} {category} {seed}")
            images, entries = make_fashioniq(rng, split, category, size(700), size(gallery))
            texts |= captions(images, rng)
            yield from ((f"fashioniq/images/{name}.png", spec) for name, spec in images.items())
            yield f"fashioniq/captions/cap.{category}.{split}.json", entries
            yield f"fashioniq/image_splits/split.{category}.{split}.json", list(images)
    yield "fashioniq/captions.json", texts

    rng = specs.Rng(f"circo {seed}")
    images, entries = make_circo(rng, {"val": size(600), "test": size(600)}, size(1000))
    yield "circo/captions.json", captions(images, rng)
    yield from ((f"circo/annotations/{split}.json", entries[split]) for split in entries)
    folder, info = "circo/COCO2017_unlabeled", []
    for name, spec in images.items():
        info.append({"id": name, "file_name": f"{name:012d}.jpg"})
        yield f"{folder}/unlabeled2017/{name:012d}.jpg", spec
    yield f"{folder}/annotations/image_info_unlabeled2017.json", {"images": info}


def _save(folder, images):
    for path, spec in images:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        draw(spec).save(folder / path, quality=95, subsampling=0, compress_level=1)


def write(out, seed=0, scale=1.0, workers=2, again=True):
    """Draw the whole world into the folder `out`, the same bytes for the same seed.

    The folder appears only when it is complete, in place of an older world; again=False: unless it
    has appeared meanwhile. Returns the number of images. ValueError if `out` holds anything else.
    """
    out = Path(out)
    check_folder(out.parent)
    is_world = (out / "world.json").exists()
    if out.is_file() or (out.exists() and not is_world and any(out.iterdir())):
        raise ValueError(f"{out}: holds other things than a pocket world; move it, or "
                         "give another --out")
    draft = out.with_name(out.name + ".tmp")
    pool, images, jobs = ProcessPoolExecutor(workers, initializer=ignore_signals), [], []
    with explained(out), locked(draft):
        try:
            if not again and (out / "world.json").exists():
                return 0
            shutil.rmtree(draft)  # a killed process may have left it
            for path, content in contents(seed, scale):
                if not isinstance(content, specs.Spec):
                    write_json(draft / path, content)
                    continue
                images.append((path, content))
                if len(images) % 500 == 0:  # workers draw while this process thinks up more
                    jobs.append(pool.submit(_save, draft, images[-500:]))
            _save(draft, images[len(images) // 500 * 500 :])
            for job in jobs:
                job.result()
            write_json(draft / "world.json", {"seed": seed, "scale": scale, "images": len(images)})
            shutil.rmtree(out, ignore_errors=True)
            draft.rename(out)
        finally:
            pool.shutdown(cancel_futures=True)
            shutil.rmtree(draft, ignore_errors=True)
    return len(images)


def ensure(out="data/pocket"):
    """Draw the world of seed 0 unless `out` holds a world already."""
    marker = Path(out) / "world.json"
    if not marker.exists():
        print(f"drawing the pocket world into {out} ...", flush=True)
        write(out, again=False)
        return
    try:
        seed, scale = (json.loads(marker.read_text())[key] for key in ("seed", "scale"))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{marker} is damaged; delete the folder {out} to draw it again") from None
    if (seed, scale) != (0, 1.0):
        print(f"{out} holds the pocket world of seed {seed}, scale {scale}; "
              "delete it to draw the usual one (seed 0, scale 1.0)")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m pocket.world", allow_abbrev=False,
        description="Draw training images and three benchmarks.")
    add = parser.add_argument
    add("--out", default="data/pocket", help="an older world there is replaced")
    add("--seed", type=int, default=0, help="another one draws other images")
    add("--scale", type=float, default=1.0, help="of its size; 0.02 is enough for a test")
    args = parser.parse_args(argv)
    check_options(parser, args, most={"seed": 2**63 - 1})  # a held-out world's cannot be searched
    if not 0 < args.scale <= 100:
        parser.error(f"--scale has to be above 0 and at most 100, not {args.scale}")
    return args


def main(args):
    print(f"{args.out}: {write(args.out, args.seed, args.scale)} images")


if __name__ == "__main__":
    run_command("pocket.world", main, parse_args())
