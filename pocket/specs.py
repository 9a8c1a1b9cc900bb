"""The language of the pocket world: specs of images, captions about them, and edits of both.

Two domains: *scenes* (one to three things on a background) and *garments*. A frozen dataclass describes an image; where a field
is None it is "not said", so the same dataclass also states what a caption claims (its *facts*):

    describe(spec, rng)        -> caption, facts          partial and varied, as captions on the web are
    edit(spec, rng, kind)      -> Edit: the modifier's text, and the changes it asks for
    holds(facts, specs)        -> which facts are true of which images
    pretraining_pair(rng)      -> spec, caption, facts    what pocket BLIP learns from
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import numpy as np

COLOURS = {
    "red": (214, 40, 40), "orange": (247, 127, 0), "yellow": (252, 216, 50), "green": (46, 160, 67),
    "blue": (40, 90, 220), "purple": (131, 56, 176), "pink": (255, 140, 190), "white": (250, 250, 250),
}  # fmt: skip
KINDS = ("cat", "dog", "bird", "fish", "boat", "car", "house", "tree", "flower", "cup", "ball", "star")
SIZES = ("small", "big")
PLACES = ("left", "middle", "right")
BACKGROUNDS = {
    "meadow": "in a meadow", "night": "at night", "snow": "in the snow", "beach": "on the beach", "sea": "on the sea",
    "room": "in a room",
}  # fmt: skip
GARMENTS = ("dress", "shirt", "toptee")  # FashionIQ's three categories
PATTERNS = ("plain", "striped", "dotted", "checked")
SLEEVES = ("no", "short", "long")
NECKLINES = ("round neck", "v neck", "square neck", "collar")
LENGTHS = ("short", "long")
DETAILS = ("none", "belt", "buttons", "bow", "pocket", "zip", "star", "heart")
EDIT_KINDS = ("one", "multi", "replace", "describe")  # see `edit`
EARLY_MIX = {"one": 3, "multi": 3, "replace": 4}  # weights of the edits in captions that correct themselves, at first ...
LATE_MIX = {"one": 2, "multi": 2, "replace": 2, "describe": 4}  # ... and later, when the short ones are learnt

Rng = random.Random


# ------------------------------------------------------------------------------------------------ specs and facts
@dataclass(frozen=True)
class Thing:
    kind: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str | None = None
    pose: int = 0  # seeds what no caption speaks of: jitter, direction, clutter


@dataclass(frozen=True)
class Garment:
    kind: str | None = None
    colour: str | None = None
    pattern: str | None = None
    second: str | None = None  # the pattern's colour, "none" for a plain garment
    sleeves: str | None = None
    neckline: str | None = None
    length: str | None = None
    detail: str | None = None
    pose: int = 0


Spec = Scene | Garment


def split_of(spec: Spec) -> str:
    """The one set that may show this spec: 50 % pretrain, 20 % unlabeled, 15 % val, 15 % test. Poses do not count."""
    bucket = zlib.crc32(repr(replace(spec, pose=0)).encode()) % 100
    return "pretrain" if bucket < 50 else "unlabeled" if bucket < 70 else "val" if bucket < 85 else "test"


def random_scene(rng: Rng, count=None) -> Scene:
    count = count or rng.choices((1, 2, 3), weights=(2, 5, 3))[0]
    places, kinds = rng.sample(PLACES, count), rng.sample(KINDS, count)
    things = [Thing(k, rng.choice(list(COLOURS)), rng.choice(SIZES), p) for k, p in zip(kinds, places, strict=True)]
    return Scene(tuple(things), rng.choice(list(BACKGROUNDS)), rng.getrandbits(31))


def random_garment(rng: Rng, kind=None) -> Garment:
    colour, pattern = rng.choice(list(COLOURS)), rng.choice(PATTERNS)
    second = "none" if pattern == "plain" else rng.choice([c for c in COLOURS if c != colour])
    return Garment(
        kind or rng.choice(GARMENTS), colour, pattern, second, rng.choice(SLEEVES), rng.choice(NECKLINES),
        rng.choice(LENGTHS), rng.choice(DETAILS), rng.getrandbits(31),
    )  # fmt: skip


def sample(rng: Rng, split: str, make: Callable[[Rng], Spec]) -> Spec:
    """The first spec that `make` draws which belongs to `split`."""
    while True:
        spec = make(rng)
        if split_of(spec) == split:
            return spec


_CODES = [{v: i for i, v in enumerate(values)} for values in (
    KINDS, COLOURS, SIZES, PLACES, BACKGROUNDS, GARMENTS, COLOURS, PATTERNS, ("none", *COLOURS), SLEEVES, NECKLINES,
    LENGTHS, DETAILS,
)]  # fmt: skip


def encode(spec: Spec) -> list[int]:
    """A spec or facts as 21 integers: 3 things x (kind, colour, size, place), background, 8 of a garment; -1 = not there."""
    if isinstance(spec, Garment):
        return [-1] * 13 + [codes.get(v, -1) for codes, v in zip(_CODES[5:], astuple(spec)[:8], strict=True)]
    things = [codes.get(v, -1) for t in spec.things for codes, v in zip(_CODES[:4], astuple(t), strict=True)]
    return things + [-1] * (12 - len(things)) + [_CODES[4].get(spec.background, -1)] + [-1] * 8


def holds(facts, specs) -> np.ndarray:
    """bool [A, B]: are all of facts[a] true of specs[b]? Every thing that is spoken of has to be found in the scene."""
    f, s = np.array([encode(x) for x in facts], np.int8), np.array([encode(x) for x in specs], np.int8)
    things_f, things_s = f[:, None, :12].reshape(-1, 1, 3, 1, 4), s[None, :, :12].reshape(1, -1, 1, 3, 4)
    found = ((things_f < 0) | (things_f == things_s)).all(-1).any(-1).all(-1)  # [A, B]
    rest_f, rest_s = f[:, None, 12:], s[None, :, 12:]
    return found & ((rest_f < 0) | (rest_f == rest_s)).all(-1)


# ------------------------------------------------------------------------------------------------ language
def _noun(thing: Thing) -> str:
    words = [w for w in (thing.size, thing.colour, thing.kind or "thing") if w]
    article = "an" if words[0][0] in "aeiou" else "a"
    place = {"left": " on the left", "right": " on the right", "middle": " in the middle"}.get(thing.place, "")
    return f"{article} {' '.join(words)}{place}"


def _scene_text(facts: Scene, rng: Rng) -> str:
    nouns = [_noun(t) for t in facts.things if t.kind]
    text = nouns[0] if nouns else "a picture"
    for noun in nouns[1:]:
        text += rng.choice((" and ", " and ", " with ", " next to ")) + noun
    return f"{text} {BACKGROUNDS[facts.background]}" if facts.background else text


def _garment_text(facts: Garment, rng: Rng) -> str:
    words = [facts.length] if facts.length else []
    words += [facts.colour] if facts.colour else []
    if facts.pattern:
        words += ["and", facts.second] if facts.colour and facts.second not in (None, "none") else []
        words += [facts.pattern]
    kind = {"toptee": "top"}.get(facts.kind, facts.kind)
    extras = ["no sleeves" if facts.sleeves == "no" else f"{facts.sleeves} sleeves"] if facts.sleeves else []
    extras += [f"a {facts.neckline}"] if facts.neckline else []
    extras += [_detail(facts.detail)] if facts.detail not in (None, "none") else []
    rng.shuffle(extras)
    text = " ".join(["a", *words, kind]).replace("a orange", "an orange")
    return f"{text} with {' and '.join(extras)}" if extras else text


def _detail(detail: str) -> str:
    return detail if detail == "buttons" else f"a {detail}"


def say(facts: Spec, rng: Rng) -> str:
    """Facts -> words."""
    return _scene_text(facts, rng) if isinstance(facts, Scene) else _garment_text(facts, rng)


def forget(spec: Spec, rng: Rng, keep: float) -> Spec:
    """Facts: the part of a spec that a writer mentions, each attribute with probability `keep`. Positions stay aligned."""
    some = lambda value, p=keep: value if rng.random() < p else None  # noqa: E731
    if isinstance(spec, Garment):
        colour, pattern = some(spec.colour, 0.5 + keep / 2), some(spec.pattern)
        second = spec.second if pattern == "plain" or (pattern and colour and rng.random() < keep) else None
        return Garment(
            spec.kind, colour, pattern, second,
            some(spec.sleeves), some(spec.neckline, keep * 0.8), some(spec.length, keep * 0.8),
            some(spec.detail) if spec.detail != "none" else None,
        )  # fmt: skip
    things = [
        Thing(t.kind, some(t.colour, 0.4 + keep / 2), some(t.size, keep * 0.7), some(t.place, keep * 0.6))
        for t in spec.things
    ]
    spoken = max(1, sum(rng.random() < 0.4 + keep * 0.6 for _ in things))
    silent = rng.sample(range(len(things)), len(things) - spoken)
    things = [Thing() if i in silent else t for i, t in enumerate(things)]
    return Scene(tuple(things), some(spec.background))


def describe(spec: Spec, rng: Rng, keep: float | None = None) -> tuple[str, Spec]:
    """A caption that is true of `spec`, and its facts. keep: how much is mentioned; None = anything from terse to full."""
    facts = forget(spec, rng, rng.choice((0.3, 0.6, 1.0)) if keep is None else keep)
    return say(facts, rng), facts


# ------------------------------------------------------------------------------------------------ edits
@dataclass(frozen=True)
class Edit:
    """A modifier: `text` continues "a photo of X that ...". `apply` makes the target of a reference; `claim` makes the facts
    of the composed query from the facts of its first half: only what is said, where `apply` has to fix every detail."""

    kind: str
    phrases: tuple[str, ...]
    changes: tuple[Callable[[Spec], Spec], ...]
    claims: tuple[Callable[[Spec], Spec], ...]

    @property
    def text(self) -> str:
        return " and ".join(self.phrases)

    def apply(self, spec: Spec) -> Spec:
        for change in self.changes:
            spec = change(spec)
        return spec

    def claim(self, facts: Spec) -> Spec:
        for change in self.claims:
            facts = change(facts)
        return facts


def _set_thing(index: int, **values) -> Callable[[Scene], Scene]:
    def change(scene):
        things = [replace(t, **values) if i == index else t for i, t in enumerate(scene.things)]
        return replace(scene, things=tuple(things))

    return change


def _set(**values) -> Callable[[Spec], Spec]:
    return lambda spec: replace(spec, **values)


def _add_thing(thing: Thing) -> Callable[[Scene], Scene]:
    return lambda scene: replace(scene, things=(*scene.things, thing))


def _other(rng: Rng, values, *taken) -> str:
    return rng.choice([v for v in values if v not in taken])


def _scene_change(scene: Scene, rng: Rng, what: str, index: int):
    """One change to a scene -> (change, claim, phrase)."""
    thing = scene.things[index]
    alone = len(scene.things) == 1
    if what == "background":
        new = _other(rng, BACKGROUNDS, scene.background)
        old = f" instead of {BACKGROUNDS[scene.background]}" if rng.random() < 0.2 else ""
        return _set(background=new), _set(background=new), f"is {BACKGROUNDS[new]}{old}"
    if what == "colour":
        new = _other(rng, COLOURS, thing.colour)
        phrase = f"is {new}" if alone and rng.random() < 0.6 else f"has a {new} {thing.kind}".replace("a orange", "an orange")
        change = _set_thing(index, kind=thing.kind, colour=new)
        return change, change, phrase
    if what == "size":
        new = _other(rng, SIZES, thing.size)
        phrase = f"is {new}" if alone and rng.random() < 0.6 else f"has a {new} {thing.kind}"
        change = _set_thing(index, kind=thing.kind, size=new)
        return change, change, phrase
    if what == "kind":
        new = _other(rng, KINDS, *(t.kind for t in scene.things))
        change = _set_thing(index, kind=new)
        return change, change, f"has a {new} instead of the {thing.kind}"
    new = Thing(  # "add"
        _other(rng, KINDS, *(t.kind for t in scene.things)), rng.choice(list(COLOURS)), rng.choice(SIZES),
        _other(rng, PLACES, *(t.place for t in scene.things)),
    )  # fmt: skip
    said = replace(new, size=None, place=None)
    return _add_thing(new), _add_thing(said), f"{rng.choice(('also has', 'adds', 'has'))} {_noun(said)}"


def _scene_edit(scene: Scene, rng: Rng, kind: str) -> Edit:
    if kind in ("replace", "describe"):
        return (_scene_replacement if kind == "replace" else _scene_description)(scene, rng)
    options = [("background", 0)] + [(w, i) for i in range(len(scene.things)) for w in ("colour", "size", "kind")]
    options += [("add", 0)] * 2 if len(scene.things) < 3 else []
    rng.shuffle(options)
    count = 1 if kind == "one" else rng.choice((2, 2, 3))
    chosen, touched = [], set()
    for what, index in options:  # at most one change to a thing: two phrases about it would contradict each other
        target = what if what in ("background", "add") else index
        if target not in touched and len(chosen) < count:
            touched.add(target)
            chosen.append((what, index))
    changes, claims, phrases = zip(*(_scene_change(scene, rng, w, i) for w, i in chosen), strict=True)
    return Edit(kind, phrases, changes, claims)


def _scene_replacement(scene: Scene, rng: Rng) -> Edit:
    """The writer describes a new thing that takes the place of an old one, often on another background."""
    index = rng.randrange(len(scene.things))
    new = Thing(_other(rng, KINDS, *(t.kind for t in scene.things)), rng.choice(list(COLOURS)))
    if rng.random() < 0.4:
        new = replace(new, size=rng.choice(SIZES))
    changes = [_set_thing(index, **{k: v for k, v in vars(new).items() if v})]
    said = Scene((new,))
    if rng.random() < 0.5:
        background = _other(rng, BACKGROUNDS, scene.background)
        changes.append(_set(background=background))
        said = replace(said, background=background)
    if len(scene.things) > 1 and rng.random() < 0.35:  # the writer also names something that stays
        kept = rng.choice([t for i, t in enumerate(scene.things) if i != index])
        said = replace(said, things=(*said.things, Thing(kept.kind)))
    instead = rng.choice((" instead", f" instead of the {scene.things[index].kind}", ""))
    text = f"{rng.choice(('shows', 'shows', 'has'))} {say(said, rng)}{instead}"
    return Edit("replace", (text,), tuple(changes), tuple(changes))


def _scene_description(scene: Scene, rng: Rng) -> Edit:
    """The writer describes the target. Things that go unmentioned are gone; a background that goes unmentioned stays; of a
    thing that stays ("next to the cat") only the kind is named, its looks are those of the reference."""
    kept = rng.randrange(len(scene.things)) if rng.random() < 0.5 else None
    old = scene.things[kept] if kept is not None else Thing()
    count = rng.choice((1, 2)) if kept is not None else rng.choice((1, 2, 2))
    kinds = rng.sample([k for k in KINDS if k not in {t.kind for t in scene.things}], count)
    places = rng.sample([p for p in PLACES if p != old.place], count)
    new = [Thing(k, rng.choice(list(COLOURS)), rng.choice(SIZES), p) for k, p in zip(kinds, places, strict=True)]
    said = [replace(t, size=t.size if rng.random() < 0.4 else None, place=None) for t in new]
    background = _other(rng, BACKGROUNDS, scene.background) if rng.random() < 0.5 else None

    def show(things):
        def change(scene):
            stays = [] if kept is None else [replace(scene.things[kept], kind=old.kind)]
            return replace(scene, things=(*stays, *things), background=background or scene.background)

        return (change,)

    text = f"{rng.choice(('shows', 'shows', 'has'))} {' and '.join(_noun(t) for t in said)}"
    text += f" {rng.choice(('next to', 'with'))} the {old.kind}" if kept is not None else ""
    text += f" {BACKGROUNDS[background]}" if background else ""
    text += " instead" if kept is None and rng.random() < 0.5 else ""
    return Edit("describe", (text,), show(new), show(said))


def _garment_changes(garment: Garment, rng: Rng, count: int):
    """`count` changes of different attributes -> list of (attribute, phrase, all new values, the values that are said)."""
    out = []
    for what in rng.sample(("colour", "colour", "pattern", "sleeves", "neckline", "length", "detail"), 7):
        if len(out) == count or what in {w for w, *_ in out}:
            continue
        if what == "colour":
            new = _other(rng, COLOURS, garment.colour, garment.second, *(v.get("second") for _, _, v, _ in out))
            old = f" instead of {garment.colour}" if rng.random() < 0.2 else ""
            out.append((what, f"is {new}{old}", {"colour": new}, {"colour": new}))
        elif what == "pattern":
            new = _other(rng, PATTERNS, garment.pattern)
            second = "none"
            if new != "plain":
                second = _other(rng, COLOURS, garment.colour, *(v.get("colour") for _, _, v, _ in out))
            named = new != "plain" and rng.random() < 0.5
            said = second if named or new == "plain" else None
            phrase = f"is {new} with {second}" if named else f"is {new}"
            out.append((what, phrase, {"pattern": new, "second": second}, {"pattern": new, "second": said}))
        elif what == "sleeves":
            new = _other(rng, SLEEVES, garment.sleeves)
            phrase = {"no": "is sleeveless" if rng.random() < 0.5 else "has no sleeves"}.get(new, f"has {new} sleeves")
            out.append((what, phrase, {"sleeves": new}, {"sleeves": new}))
        elif what == "neckline":
            new = _other(rng, NECKLINES, garment.neckline)
            out.append((what, f"has a {new}", {"neckline": new}, {"neckline": new}))
        elif what == "length":
            new = _other(rng, LENGTHS, garment.length)
            out.append((what, f"is {new}" + rng.choice(("", "er")), {"length": new}, {"length": new}))
        else:
            new = _other(rng, DETAILS, garment.detail, "none")  # never "has no bow": negation is beyond a small BLIP
            out.append((what, f"has {_detail(new)}", {"detail": new}, {"detail": new}))
    return out


def _garment_edit(garment: Garment, rng: Rng, kind: str) -> Edit:
    several, many = rng.choice((2, 2, 3)), rng.choice((3, 4))
    count = {"one": 1, "multi": several, "replace": many, "describe": many + 1}[kind]
    changes = _garment_changes(garment, rng, count)
    phrases = tuple(phrase for _, phrase, _, _ in changes)
    said = {k: v for *_, values in changes for k, v in values.items()}
    if kind in ("replace", "describe"):
        if "colour" not in said and said.get("second") != "none":
            said["second"] = None  # the second colour is only said after the first: "red and blue striped"
        text = f"{rng.choice(('is', 'shows', 'is'))} {say(Garment(kind=garment.kind, **said), rng)}"
        phrases = (text + rng.choice((" instead", "", "")),)
    return Edit(kind, phrases, tuple(_set(**values) for _, _, values, _ in changes), (_set(**said),))


def edit(spec: Spec, rng: Rng, kind: str) -> Edit:
    """A modifier for this image, of a kind in EDIT_KINDS.

    one: a single change ("is blue"). multi: two or three ("is at night and has a dog instead of the cat"). replace: one thing
    gives way to another that is described; for a garment three or four changes told as a description. describe: most of the
    target is new and told, as CIRR's writers mostly do; the reference says the rest.
    """
    return (_scene_edit if isinstance(spec, Scene) else _garment_edit)(spec, rng, kind)


def contradict(facts: Spec, rng: Rng) -> Spec:
    """The same facts but for one, which is changed; in a scene with two colours these may change places. Facts that say
    nothing come back as they are."""
    if isinstance(facts, Garment):
        values = {"kind": GARMENTS, "colour": COLOURS, "pattern": PATTERNS, "sleeves": SLEEVES, "neckline": NECKLINES,
                  "length": LENGTHS, "detail": DETAILS[1:], "second": COLOURS}  # fmt: skip
        said = [k for k in values if getattr(facts, k) not in (None, "none")]
        if not said:
            return facts
        what = rng.choice(said)
        facts = replace(facts, **{what: _other(rng, values[what], getattr(facts, what), facts.colour, facts.second)})
        return replace(facts, second="none" if facts.pattern == "plain" else None) if what == "pattern" else facts
    values = {"kind": KINDS, "colour": COLOURS, "size": SIZES, "place": PLACES}
    options = [(i, k) for i, t in enumerate(facts.things) for k in values if getattr(t, k) is not None]
    options += [(None, "background")] if facts.background else []
    painted = [i for i, t in enumerate(facts.things) if t.colour]
    if len(painted) > 1:
        options += [(None, "swap")] * 2
    if not options:
        return facts
    index, what = rng.choice(options)
    if what == "background":
        return replace(facts, background=_other(rng, BACKGROUNDS, facts.background))
    if what == "swap":
        a, b = rng.sample(painted, 2)
        one, two = facts.things[a].colour, facts.things[b].colour
        return _set_thing(b, colour=one)(_set_thing(a, colour=two)(facts))
    taken = {getattr(t, what) for t in facts.things if what == "kind"} | {getattr(facts.things[index], what)}
    return _set_thing(index, **{what: _other(rng, values[what], *taken)})(facts)


def twin(spec: Spec, rng: Rng) -> Spec:
    """Another image of the pretrain set that differs from this one in a single thing, pose included in what stays."""
    while True:
        other = edit(spec, rng, "one").apply(spec)
        if split_of(other) == "pretrain":
            return other


def pretraining_pair(rng: Rng, mix=LATE_MIX) -> tuple[Spec, str, Spec]:
    """One image of the pretrain set with its caption and the caption's facts: the first three of `pretraining_example`."""
    return pretraining_example(rng, mix, wrong=False)[:3]


def pretraining_example(rng: Rng, mix=LATE_MIX, wrong=True) -> tuple[Spec, str, Spec, str | None]:
    """One image of the pretrain set, its caption, the caption's facts, and a wrong caption of the same making (or None).

    Six in ten captions just describe. Three in ten correct themselves ("a red cat that is blue" for a blue cat): that is
    where the frozen text encoder learns to follow a modifier, as text; ISA itself never sees a triplet. One in ten is a
    bare statement ("is at night"). About a third begin with "a photo of". mix: weights of the kinds of edit.
    """
    make = rng.choice((random_scene, random_garment))
    roll = rng.random()
    prefix = "a photo of " if rng.random() < 0.35 else ""
    if roll < 0.6:
        return described(sample(rng, "pretrain", make), rng, prefix, wrong)
    while True:
        before = make(rng)
        change = edit(before, rng, rng.choices(list(mix), weights=mix.values())[0])
        spec = change.apply(before)
        if split_of(spec) == "pretrain":
            break
    said, start = Scene((Thing(),) * len(before.things)) if isinstance(before, Scene) else Garment(), ""
    if roll < 0.9:
        caption, said = describe(before, rng, keep=rng.choice((0.6, 1.0, 1.0)))
        start = f"{prefix}{caption} that "

    def err():
        if start and rng.random() < 0.5:  # the same modifier of another image
            false = contradict(said, rng)
            return f"{prefix}{say(false, rng)} that {change.text}", change.claim(false)
        other = edit(before, rng, change.kind)  # another modifier of the same image
        return start + other.text, other.claim(said)

    return spec, start + change.text, change.claim(said), _false_caption(spec, err) if wrong else None


def described(spec: Spec, rng: Rng, prefix="", wrong=True) -> tuple[Spec, str, Spec, str | None]:
    """An image with a caption that just describes it: as `pretraining_example`."""
    caption, facts = describe(spec, rng)

    def err():
        false = contradict(facts, rng)
        return prefix + say(false, rng), false

    return spec, prefix + caption, facts, _false_caption(spec, err) if wrong else None


def _false_caption(spec, err) -> str | None:
    """Of eight (words, facts) from err() the first words whose facts are not true of the image, or None."""
    tries = (err() for _ in range(8))
    return next((words for words, facts in tries if not holds([facts], [spec])[0, 0]), None)


def vocabulary() -> list[str]:
    """The WordPiece vocabulary of pocket BLIP: special tokens, letters (so that any word can be spelt), the grammar's words."""
    rng, words = Rng(0), set("a photo of that picture".split())
    for _ in range(20000):
        words |= set(pretraining_pair(rng, EARLY_MIX)[1].split())
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*specials, *".,!?'-", *letters, *(f"##{c}" for c in letters), *sorted(w for w in words if len(w) > 1)]
