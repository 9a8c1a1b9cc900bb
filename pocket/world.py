"""The pocket world on disk: training images, and composed-retrieval benchmarks in the layouts of the real ones.

`python -m pocket.world --out data/pocket --seed 0` writes train/ (unlabeled images) and the validation and test sets of cirr/
(scenes, one target), circo/ (scenes, several targets) and fashioniq/ (garments, two captions). Beyond the official fields each
query holds "modifier_type", one of specs.EDIT_KINDS. Unlike the real ones, the test sets hold their targets.

Four sets of specs never meet: pairs for BLIP's pre-training, unlabeled images for ISA, validation, test. Which spec belongs where
does not depend on the seed.
"""

import argparse
import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from plumbing.files import check_folder, explained
from plumbing.options import check_options

from .drawing import draw
from .specs import (
    BACKGROUNDS,
    GARMENTS,
    PLACES,
    Edit,
    Garment,
    Rng,
    Scene,
    Spec,
    Thing,
    describe,
    edit,
    forget,
    holds,
    random_garment,
    random_scene,
    sample,
    say,
    split_of,
)  # fmt: skip

MIX = {"one": 0.15, "multi": 0.25, "describe": 0.60}  # CIRR's writers mostly describe the target
FASHION_GALLERY = {"dress": 3817, "shirt": 6346, "toptee": 5373}  # FashionIQ's own sizes (validation)


def _fresh(spec: Spec, rng: Rng) -> Spec:
    """Another picture of the same content: new pose and clutter and, for most scenes, another arrangement."""
    spec = replace(spec, pose=rng.getrandbits(31))
    if isinstance(spec, Scene) and rng.random() < 0.6:
        places = rng.sample(PLACES, len(spec.things))
        spec = replace(spec, things=tuple(replace(t, place=p) for t, p in zip(spec.things, places, strict=True)))
    return spec


def _edited(reference: Spec, rng: Rng, split: str) -> tuple[Edit, Spec]:
    """A modifier for the reference and a target that shows it, both of `split`."""
    while True:
        change = edit(reference, rng, rng.choices(list(MIX), weights=MIX.values())[0])
        target = _fresh(change.apply(reference), rng)
        if split_of(target) == split and not _repeats(target):
            return change, target


def _repeats(spec: Spec) -> bool:
    """Does a kind of thing appear twice? Two changes at once may bring the same one."""
    return isinstance(spec, Scene) and len({t.kind for t in spec.things}) < len(spec.things)


def make_cirr(rng: Rng, split: str, groups: int):
    """Groups of six like images and four queries along each group -> images {name: spec}, CIRR's caption entries.

    Members 0..4 follow from each other by edits (the queries), the sixth is a near-duplicate of the first.
    """
    images, entries = {}, []
    folder = {"val": "dev", "test": "test1"}[split]
    for g in range(groups):
        names = [f"{folder}-{g}-{i // 2}-img{i % 2}" for i in range(6)]
        specs, changes = [sample(rng, split, random_scene)], []
        for _ in range(4):
            change, target = _edited(specs[-1], rng, split)
            changes.append(change)
            specs.append(target)
        duplicate = _fresh(specs[0], rng)
        specs.append(duplicate if split_of(duplicate) == split else replace(specs[0], pose=duplicate.pose))
        images.update(zip(names, specs, strict=True))
        order = rng.sample(names, 6)
        for i, change in enumerate(changes):
            entries.append({
                "pairid": 10000 + 4 * g + i, "reference": names[i], "target_hard": names[i + 1],
                "target_soft": {names[i + 1]: 1.0}, "caption": change.text,
                "img_set": {"id": g, "members": order}, "modifier_type": change.kind,
            })  # fmt: skip
    return images, entries


def _complete(facts: Scene, rng: Rng) -> Scene:
    """A scene that the facts are true of; what they leave open is drawn."""
    while True:
        scene = random_scene(rng, count=max(rng.choice((1, 2, 3)), len(facts.things)))
        things = list(scene.things)
        for i, fact in enumerate(facts.things):
            things[i] = replace(things[i], **{k: v for k, v in vars(fact).items() if v})
        scene = replace(scene, things=tuple(things), background=facts.background or scene.background)
        if not _repeats(scene):
            return scene


def make_circo(rng: Rng, counts: dict[str, int], extra: int):
    """CIRCO: -> images {COCO id: spec} of the one gallery, and {split: entries}.

    A query keeps part of its reference (the shared concept) and asks for a change; every image of the gallery that fits both is a
    ground truth: two to six are drawn for it, others turn up by chance. Queries with more than 14 (CIRCO's maximum) are dropped.
    """
    ids = iter(rng.sample(range(1, 600_000), 8 * sum(counts.values()) + 2 * extra))
    images, drafts = {}, []
    for split, count in counts.items():
        for _ in range(count):
            reference = sample(rng, split, random_scene)
            change, target = _edited(reference, rng, split)
            shared = [Thing(t.kind, t.colour if rng.random() < 0.8 else None) for t in reference.things]
            shared = Scene(tuple(shared), reference.background if rng.random() < 0.6 else None)
            facts = change.claim(shared)
            targets = [target] + [sample(rng, split, lambda r, f=facts: _complete(f, r)) for _ in range(rng.choice((1, 2, 3, 4)))]
            names = [next(ids) for _ in range(1 + len(targets))]
            images.update(zip(names, [reference, *targets], strict=True))
            drafts.append((split, names[0], names[1], change, shared, facts))
        for _ in range(extra):
            images[next(ids)] = sample(rng, split, random_scene)
    names, specs = list(images), list(images.values())
    true = np.concatenate([holds([d[-1] for d in drafts[i : i + 50]], specs) for i in range(0, len(drafts), 50)])
    entries = {split: [] for split in counts}
    for (split, reference, target, change, shared, _), row in zip(drafts, true, strict=True):
        found = [names[i] for i in np.flatnonzero(row) if names[i] not in (reference, target)]
        if row[names.index(reference)] or not row[names.index(target)] or len(found) > 13:
            continue
        entries[split].append({
            "reference_img_id": reference, "target_img_id": target, "relative_caption": change.text,
            "shared_concept": say(shared, rng), "gt_img_ids": [target, *found], "id": len(entries[split]),
            "semantic_aspects": _aspects(change.text), "modifier_type": change.kind,
        })  # fmt: skip
    return images, entries


def _aspects(text: str) -> list[str]:
    """CIRCO's semantic aspects, as far as the wording of a pocket modifier shows them."""
    signs = {"addition": ("also", "adds"), "compare_change": ("instead of",), "statement_with_conjunction": (" and ",),
             "spatial_relations_background": tuple(BACKGROUNDS.values())}  # fmt: skip
    return [a for a, words in signs.items() if any(w in text for w in words)] or ["direct_addressing"]


def make_fashioniq(rng: Rng, split: str, category: str, queries: int, gallery: int):
    """FashionIQ: -> images {name: spec}, caption entries (two captions, each a part of what is asked for)."""
    images, entries = {}, []
    name = lambda: f"{split[0].upper()}{category[0].upper()}{len(images):07d}"  # noqa: E731
    make = lambda r: random_garment(r, category)  # noqa: E731
    for _ in range(queries):
        reference = sample(rng, split, make)
        change, target = _edited(reference, rng, split)
        claim = say(forget(change.claim(Garment(kind=category)), rng, 1.0 if change.kind == "one" else 0.7), rng)
        half = max(1, len(change.phrases) // 2)
        captions = [" and ".join(change.phrases[:half]), " and ".join(change.phrases[half:]) or f"is {claim}"]
        rng.shuffle(captions)
        candidate = name()
        images[candidate] = reference
        images[name()] = target
        entries.append({"target": list(images)[-1], "candidate": candidate, "captions": captions, "modifier_type": change.kind})
    while len(images) < gallery:
        images[name()] = sample(rng, split, make)
    return images, entries


def _save(jobs):
    for path, spec in jobs:
        draw(spec).save(path, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {"compress_level": 1}))


def _write_json(path: Path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def _captions(images, rng: Rng):
    """{name: a full caption}: not part of the benchmarks, but the ceilings of evaluate.py are made of it."""
    return {str(name): describe(spec, rng, keep=1.0)[0] for name, spec in images.items()}


def write(out, seed=0, scale=1.0, workers=2):
    """Draw the whole world into the folder `out`: train/, cirr/, circo/, fashioniq/. The same bytes for the same seed.

    scale below 1 makes a smaller world for tests. The folder appears only when it is complete; an older world there is replaced.
    Raises ValueError for a folder that holds anything else.
    """
    out = Path(out)
    check_folder(out.parent)
    if out.is_file() or (out.exists() and not (out / "world.json").exists() and any(out.iterdir())):
        raise ValueError(f"{out}: holds other things than a pocket world, which would be lost; move it, or give another --out")
    draft = out.with_name(out.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with explained(out):
            _write(draft, seed, scale, workers)
        shutil.rmtree(out, ignore_errors=True)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(draft, seed, scale, workers):
    """All of `write` but the folder's name."""
    size = lambda n: max(4, round(n * scale))  # noqa: E731
    captions = {"cirr": {}, "fashioniq": {}, "circo": {}}
    with ProcessPoolExecutor(workers) as pool:
        drawing = []

        def save(folder, images):  # the workers draw while the next part is thought up here
            folder.mkdir(parents=True, exist_ok=True)
            jobs = [(folder / name, spec) for name, spec in images.items()]
            drawing.extend(pool.submit(_save, jobs[i::4]) for i in range(4))
            return len(jobs)

        rng, makers = Rng(f"train {seed}"), (random_scene, random_garment)
        count = save(draft / "train", {f"{i:06d}.png": sample(rng, "unlabeled", makers[i % 2]) for i in range(size(24000))})
        for split, (folder, official) in {"val": ("dev", "val"), "test": ("test1", "test1")}.items():
            rng = Rng(f"cirr {split} {seed}")
            images, entries = make_cirr(rng, split, size(384))
            captions["cirr"] |= _captions(images, rng)
            count += save(draft / f"cirr/img_raw/{folder}", {f"{name}.png": spec for name, spec in images.items()})
            _write_json(draft / f"cirr/captions/cap.rc2.{official}.json", entries)
            paths = {name: f"./{folder}/{name}.png" for name in images}
            _write_json(draft / f"cirr/image_splits/split.rc2.{official}.json", paths)
            for category in GARMENTS:
                rng = Rng(f"fashioniq {split} {category} {seed}")
                images, entries = make_fashioniq(rng, split, category, size(700), size(FASHION_GALLERY[category]))
                captions["fashioniq"] |= _captions(images, rng)
                count += save(draft / "fashioniq/images", {f"{name}.png": spec for name, spec in images.items()})
                _write_json(draft / f"fashioniq/captions/cap.{category}.{split}.json", entries)
                _write_json(draft / f"fashioniq/image_splits/split.{category}.{split}.json", list(images))
        rng = Rng(f"circo {seed}")
        images, entries = make_circo(rng, {"val": size(600), "test": size(600)}, size(1000))
        captions["circo"] |= _captions(images, rng)
        gallery = draft / "circo/COCO2017_unlabeled"
        count += save(gallery / "unlabeled2017", {f"{name:012d}.jpg": spec for name, spec in images.items()})
        info = [{"id": name, "file_name": f"{name:012d}.jpg"} for name in images]
        _write_json(gallery / "annotations/image_info_unlabeled2017.json", {"images": info})
        for split in entries:
            _write_json(draft / f"circo/annotations/{split}.json", entries[split])
        for name, texts in captions.items():
            _write_json(draft / name / "captions.json", texts)
        for part in drawing:
            part.result()
    _write_json(draft / "world.json", {"seed": seed, "scale": scale, "images": count})


def ensure(out="data/pocket"):
    """Draw the world of seed 0 unless `out` already holds a world; says what it draws, and what it finds if that is another one."""
    marker = Path(out) / "world.json"
    if not marker.exists():
        print(f"drawing the pocket world into {out} ...", flush=True)
        return write(out)
    try:
        seed, scale = (json.loads(marker.read_text())[key] for key in ("seed", "scale"))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{marker} is damaged; delete the folder {out}, it is then drawn again") from None
    if (seed, scale) != (0, 1.0):
        print(f"{out} holds the pocket world of seed {seed}, scale {scale}; remove it to have the usual one (0, 1.0) drawn")


def main():
    parser = argparse.ArgumentParser(prog="python -m pocket.world", allow_abbrev=False,
                                     description="Draw the pocket world: training images and three benchmarks.")  # fmt: skip
    parser.add_argument("--out", default="data/pocket", help="folder to write; an older world there is replaced")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other images of the same kind")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the world; 0.02 is enough for a test")
    args = parser.parse_args()
    check_options(parser, args, seed=0)
    if not 0 < args.scale <= 100:
        parser.error(f"--scale has to be above 0 and at most 100, not {args.scale}")
    try:
        write(args.out, args.seed, args.scale)
    except (ValueError, OSError) as error:
        sys.exit(f"pocket.world: {error}")
    print(f"{args.out}: {json.loads((Path(args.out) / 'world.json').read_text())['images']} images")


if __name__ == "__main__":
    main()
