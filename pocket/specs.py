"""The language of the pocket world: specs of images, captions about them, and edits of both.

A frozen dataclass describes an image: a *scene* (one to three things on a background) or a
*garment*. None is "not said", so it also holds what a caption claims, its *facts*:

    describe(spec, rng)     -> caption, facts     partial and varied, as captions on the web are
    edit(spec, rng, kind)   -> Edit               the modifier's text, and the changes it asks for
    holds(facts, specs)     -> bool [A, B]        which facts are true of which images

The order of random draws is part of the world: the shipped weights and results rest on it.
"""

import random
import zlib
from dataclasses import dataclass, replace

import numpy as np

COLOURS = {"red": (214, 40, 40), "orange": (247, 127, 0), "yellow": (252, 216, 50),
           "green": (46, 160, 67), "blue": (40, 90, 220), "purple": (131, 56, 176),
           "pink": (255, 140, 190), "white": (250, 250, 250)}
KINDS = ("cat", "dog", "bird", "fish", "boat", "car", "house", "tree", "flower", "cup", "ball",
         "star")
SIZES = ("small", "big")
PLACES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
BACKGROUNDS = {"meadow": "in a meadow", "night": "at night", "snow": "in the snow",
               "beach": "on the beach", "sea": "on the sea", "room": "in a room"}
GARMENTS = ("dress", "shirt", "toptee")  # FashionIQ's three categories
PATTERNS = ("plain", "striped", "dotted", "checked")
SLEEVES = ("no", "short", "long")
NECKLINES = ("round neck", "v neck", "square neck", "collar")
LENGTHS = ("short", "long")
DETAILS = ("none", "belt", "buttons", "bow", "pocket", "zip", "star", "heart")

# Attribute -> its values. A garment's `second` is its pattern's colour, "none" for a plain one.
THING = {"kind": KINDS, "colour": COLOURS, "size": SIZES, "place": PLACES}
GARMENT = {"kind": GARMENTS, "colour": COLOURS, "pattern": PATTERNS, "sleeves": SLEEVES,
           "neckline": NECKLINES, "length": LENGTHS, "detail": DETAILS,
           "second": ("none", *COLOURS)}

SETS = {"pretrain": 50, "unlabeled": 70, "val": 85, "test": 100}  # where each ends, in percent
EDIT_KINDS = ("one", "multi", "replace", "describe")  # see `edit`
EARLY_MIX = {"one": 3, "multi": 3, "replace": 4}  # weights in pre-training at first, and later
LATE_MIX = {"one": 2, "multi": 2, "replace": 2, "describe": 4}
TRIES = 8  # at a wrong caption, before an image goes without one

Rng = random.Random


# --- specs and facts
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
    pose: int = 0  # seeds what no caption mentions: jitter, direction, clutter


@dataclass(frozen=True)
class Garment:
    kind: str | None = None
    colour: str | None = None
    pattern: str | None = None
    second: str | None = None
    sleeves: str | None = None
    neckline: str | None = None
    length: str | None = None
    detail: str | None = None
    pose: int = 0


Spec = Scene | Garment


def split_of(spec: Spec) -> str:
    """The one set of SETS that may show this spec, whatever its pose."""
    bucket = zlib.crc32(repr(replace(spec, pose=0)).encode()) % 100
    return next(name for name, end in SETS.items() if bucket < end)


def pick(rng, values, *taken):
    return rng.choice([v for v in values if v not in taken])


def random_scene(rng: Rng, count=None) -> Scene:
    count = count or rng.choices((1, 2, 3), weights=(2, 5, 3))[0]
    places, kinds = rng.sample(list(PLACES), count), rng.sample(KINDS, count)
    things = [Thing(kind, pick(rng, COLOURS), pick(rng, SIZES), place)
              for kind, place in zip(kinds, places, strict=True)]
    return Scene(tuple(things), pick(rng, BACKGROUNDS), rng.getrandbits(31))


def random_garment(rng: Rng, kind=None) -> Garment:
    colour, pattern = pick(rng, COLOURS), pick(rng, PATTERNS)
    second = "none" if pattern == "plain" else pick(rng, COLOURS, colour)
    kind = kind or pick(rng, GARMENTS)
    rest = [pick(rng, values) for values in (SLEEVES, NECKLINES, LENGTHS, DETAILS)]
    return Garment(kind, colour, pattern, second, *rest, rng.getrandbits(31))


MAKERS = (random_scene, random_garment)


def sample(rng: Rng, split: str, make) -> Spec:
    while True:
        spec = make(rng)
        if split_of(spec) == split:
            return spec


def known(thing: Thing) -> dict[str, str]:
    return {name: value for name, value in vars(thing).items() if value}


def set_thing(scene: Scene, index: int, **values) -> Scene:
    """An index one past the last adds a thing."""
    things = list(scene.things) + [Thing()] * (index == len(scene.things))
    things[index] = replace(things[index], **values)
    return replace(scene, things=tuple(things))


def _said(spec):
    """Sets of (attribute, value): of the image itself, and of each of its things."""
    whole = {(k, v) for k, v in vars(spec).items() if v is not None and k not in ("things", "pose")}
    things = [set(known(thing).items()) for thing in getattr(spec, "things", ())]
    return whole, [thing for thing in things if thing]


def holds(facts, specs) -> np.ndarray:
    """bool [A, B]: are all of facts[a] true of specs[b], those about a thing of one thing?"""
    facts, specs = map(_said, facts), [_said(spec) for spec in specs]
    return np.array([[whole <= there and all(any(map(thing.issubset, seen)) for thing in things)
                      for there, seen in specs] for whole, things in facts])


# --- captions
def _join(*words):
    text = " ".join(filter(None, words))
    return text.replace("a orange", "an orange").replace("a buttons", "buttons")


def _noun(thing):
    return _join("a", thing.size, thing.colour, thing.kind, PLACES.get(thing.place))


def say(facts: Spec, rng: Rng) -> str:
    if isinstance(facts, Scene):
        words = [_noun(thing) for thing in facts.things if thing.kind] or ["a picture"]
        for i in range(1, len(words)):
            words[i] = rng.choice(("and ", "and ", "with ", "next to ")) + words[i]
        return _join(*words, BACKGROUNDS.get(facts.background))
    words = ["a", facts.length, facts.colour]
    if facts.pattern:
        two = facts.colour and facts.second not in (None, "none")
        words += ["and", facts.second, facts.pattern] if two else [facts.pattern]
    words.append("top" if facts.kind == "toptee" else facts.kind)
    extras = [f"{facts.sleeves} sleeves"] if facts.sleeves else []
    extras += [f"a {part}" for part in (facts.neckline, facts.detail) if part not in (None, "none")]
    rng.shuffle(extras)
    return _join(*words, "with" if extras else None, " and ".join(extras))


def forget(spec: Spec, rng: Rng, keep: float) -> Spec:
    """Facts: what a writer mentions of a spec, each attribute with a probability near `keep`.

    An unmentioned thing becomes an empty Thing(), so indices stay.
    """

    def some(value, probability=keep):
        return value if rng.random() < probability else None

    if isinstance(spec, Garment):
        colour, pattern = some(spec.colour, 0.5 + keep / 2), some(spec.pattern)
        two = pattern == "plain" or (pattern and colour and rng.random() < keep)
        second, sleeves = spec.second if two else None, some(spec.sleeves)
        neckline, length = some(spec.neckline, keep * 0.8), some(spec.length, keep * 0.8)
        detail = some(spec.detail) if spec.detail != "none" else None
        return Garment(spec.kind, colour, pattern, second, sleeves, neckline, length, detail)
    things = [Thing(thing.kind, some(thing.colour, 0.4 + keep / 2), some(thing.size, keep * 0.7),
                    some(thing.place, keep * 0.6)) for thing in spec.things]
    spoken = max(1, sum(rng.random() < 0.4 + keep * 0.6 for _ in things))
    for silent in rng.sample(range(len(things)), len(things) - spoken):
        things[silent] = Thing()
    return Scene(tuple(things), some(spec.background))


def describe(spec: Spec, rng: Rng, keep: float | None = None) -> tuple[str, Spec]:
    """A true caption and its facts. keep: as for `forget`; None = from terse to full."""
    facts = forget(spec, rng, rng.choice((0.3, 0.6, 1.0)) if keep is None else keep)
    return say(facts, rng), facts


# --- edits
@dataclass(frozen=True)
class Change:
    thing: int | None  # its index; one past the last adds a thing; None = the whole image
    new: dict
    said: dict | None = None  # of these, None = all; a value None: not known


@dataclass(frozen=True)
class Edit:
    """A modifier. Its text continues "a photo of X that ..."."""

    kind: str
    phrases: tuple[str, ...]
    changes: tuple[Change, ...]
    keep: tuple[int, ...] | None = None  # the things that stay, before any change; None = all

    @property
    def text(self) -> str:
        return " and ".join(self.phrases)

    def apply(self, spec: Spec, said=False) -> Spec:
        """Reference -> target. said: change only what the modifier says."""
        if self.keep is not None:
            spec = replace(spec, things=tuple(spec.things[i] for i in self.keep))
        for change in self.changes:
            values = said and change.said or change.new
            whole = change.thing is None
            spec = replace(spec, **values) if whole else set_thing(spec, change.thing, **values)
        return spec

    def claim(self, facts: Spec) -> Spec:
        """Facts of the reference -> facts of the composed query."""
        return self.apply(facts, said=True)


def edit(spec: Spec, rng: Rng, kind: str) -> Edit:
    """A modifier for this image.

    kind: "one" change ("is blue"), or "multi": two or three; "replace": another thing takes one's
    place (a garment: three or four changes worded as a description); "describe": most of the target
    is new and described, as CIRR's writers mostly do; the reference says the rest.
    """
    if isinstance(spec, Garment):
        return _garment_edit(spec, rng, kind)
    make = {"replace": _scene_replacement, "describe": _scene_description}.get(kind, _scene_edit)
    return make(spec, rng, kind)


def _scene_edit(scene, rng, kind):
    last = len(scene.things)
    options = [("background", None)]
    options += [(what, i) for i in range(last) for what in ("colour", "size", "kind")]
    options += [("add", last)] * 2 if last < 3 else []
    rng.shuffle(options)
    count = 1 if kind == "one" else rng.choice((2, 2, 3))
    chosen = {}  # one change a thing: two could contradict each other
    for what, index in options:
        if index not in chosen and len(chosen) < count:
            chosen[index] = what
    parts = [_scene_change(scene, rng, what, index) for index, what in chosen.items()]
    return Edit(kind, *zip(*parts, strict=True))


def _scene_change(scene, rng, what, index):
    """-> phrase, Change."""
    kinds = [thing.kind for thing in scene.things]
    if what == "background":
        new = pick(rng, BACKGROUNDS, scene.background)
        old = f" instead of {BACKGROUNDS[scene.background]}" if rng.random() < 0.2 else ""
        return f"is {BACKGROUNDS[new]}{old}", Change(None, {"background": new})
    if what == "add":
        said = Thing(pick(rng, KINDS, *kinds), pick(rng, COLOURS))
        new = replace(said, size=pick(rng, SIZES),
                      place=pick(rng, PLACES, *(t.place for t in scene.things)))
        phrase = f"{rng.choice(('also has', 'adds', 'has'))} {_noun(said)}"
        return phrase, Change(index, known(new), known(said))
    thing = scene.things[index]
    if what == "kind":
        new = pick(rng, KINDS, *kinds)
        return f"has a {new} instead of the {thing.kind}", Change(index, {"kind": new})
    new = pick(rng, THING[what], getattr(thing, what))  # colour or size
    short = len(kinds) == 1 and rng.random() < 0.6
    phrase = f"is {new}" if short else _join("has a", new, thing.kind)
    return phrase, Change(index, {"kind": thing.kind, what: new})


def _scene_replacement(scene, rng, kind):
    index = rng.randrange(len(scene.things))
    new = Thing(pick(rng, KINDS, *(t.kind for t in scene.things)), pick(rng, COLOURS))
    if rng.random() < 0.4:
        new = replace(new, size=pick(rng, SIZES))
    changes, things, background = [Change(index, known(new))], [new], None
    if rng.random() < 0.5:
        background = pick(rng, BACKGROUNDS, scene.background)
        changes.append(Change(None, {"background": background}))
    if len(scene.things) > 1 and rng.random() < 0.35:  # the writer also names something that stays
        kept = rng.choice([thing for i, thing in enumerate(scene.things) if i != index])
        things.append(Thing(kept.kind))
    instead = rng.choice((" instead", f" instead of the {scene.things[index].kind}", ""))
    verb = rng.choice(("shows", "shows", "has"))
    text = f"{verb} {say(Scene(tuple(things), background), rng)}{instead}"
    return Edit(kind, (text,), tuple(changes))


def _scene_description(scene, rng, kind):
    """Unmentioned things are gone, an unmentioned background stays.

    A thing that stays ("next to the cat") looks as in the reference.
    """
    kept = rng.randrange(len(scene.things)) if rng.random() < 0.5 else None
    old = Thing() if kept is None else scene.things[kept]
    count = rng.choice((1, 2, 2) if kept is None else (1, 2))
    taken = {thing.kind for thing in scene.things}
    kinds = rng.sample([kind for kind in KINDS if kind not in taken], count)
    places = rng.sample([place for place in PLACES if place != old.place], count)
    new = [Thing(k, pick(rng, COLOURS), pick(rng, SIZES), p)
           for k, p in zip(kinds, places, strict=True)]
    said = [replace(t, size=t.size if rng.random() < 0.4 else None, place=None) for t in new]
    background = pick(rng, BACKGROUNDS, scene.background) if rng.random() < 0.5 else None

    text = f"{rng.choice(('shows', 'shows', 'has'))} {' and '.join(map(_noun, said))}"
    changes, keep = [], ()
    if kept is not None:
        text += f" {rng.choice(('next to', 'with'))} the {old.kind}"
        changes, keep = [Change(0, {"kind": old.kind})], (kept,)
    changes += [Change(len(keep) + i, known(new[i]), known(said[i])) for i in range(count)]
    if background:
        text += f" {BACKGROUNDS[background]}"
        changes.append(Change(None, {"background": background}))
    text += " instead" if kept is None and rng.random() < 0.5 else ""
    return Edit(kind, (text,), tuple(changes), keep)


def _garment_edit(garment, rng, kind):
    several, many = rng.choice((2, 2, 3)), rng.choice((3, 4))
    count = {"one": 1, "multi": several, "replace": many, "describe": many + 1}[kind]
    phrases, new, said = [], {}, {}
    attributes = ("colour", "colour", "pattern", "sleeves", "neckline", "length", "detail")
    for what in rng.sample(attributes, len(attributes)):
        if len(phrases) < count and what not in new:
            phrase, values, spoken = _garment_change(garment, rng, what, new)
            phrases.append(phrase)
            new |= values
            said |= spoken
    if kind in ("replace", "describe"):
        if "colour" not in said and said.get("second") != "none":
            said["second"] = None  # it is only said after the first: "red and blue striped"
        text = f"{rng.choice(('is', 'shows', 'is'))} {say(Garment(garment.kind, **said), rng)}"
        phrases = [text + rng.choice((" instead", "", ""))]
    return Edit(kind, tuple(phrases), (Change(None, new, said),))


def _garment_change(garment, rng, what, before):
    """-> phrase, new values, what is said of them. before: new values of the earlier changes."""
    if what == "colour":  # always another one than the second
        new = pick(rng, COLOURS, garment.colour, garment.second, before.get("second"))
        phrase = f"is {new}" + (f" instead of {garment.colour}" if rng.random() < 0.2 else "")
        return phrase, {what: new}, {what: new}
    # Never "has no bow": negation is beyond a small BLIP.
    new = pick(rng, GARMENT[what], "none", getattr(garment, what))
    if what == "pattern":
        values = {what: new, "second": "none"}
        if new == "plain":
            return "is plain", values, values
        second = pick(rng, COLOURS, garment.colour, before.get("colour"))
        named = rng.random() < 0.5
        phrase = f"is {new} with {second}" if named else f"is {new}"
        return phrase, values | {"second": second}, values | {"second": second if named else None}
    if what == "sleeves":
        bare = "is sleeveless" if rng.random() < 0.5 else "has no sleeves"
        phrase = bare if new == "no" else f"has {new} sleeves"
    elif what == "length":
        phrase = f"is {new}" + rng.choice(("", "er"))
    else:
        phrase = _join("has a", new)
    return phrase, {what: new}, {what: new}


# --- what pocket BLIP reads
def contradict(facts: Spec, rng: Rng) -> Spec:
    """The same facts with one changed, or with two colours of a scene swapped."""
    things = getattr(facts, "things", ())
    options = [(i, name) for i, thing in enumerate(things) for name in known(thing)]
    options += [(None, name) for name in ("background", *GARMENT)
                if getattr(facts, name, None) not in (None, "none")]
    painted = [i for i, thing in enumerate(things) if thing.colour]
    options += [(None, "swap")] * 2 if len(painted) > 1 else []
    if not options:
        return facts
    index, what = rng.choice(options)
    if what == "swap":
        a, b = rng.sample(painted, 2)
        return set_thing(set_thing(facts, a, colour=things[b].colour), b, colour=things[a].colour)
    if index is not None:
        taken = [t.kind for t in things] if what == "kind" else [getattr(things[index], what)]
        return set_thing(facts, index, **{what: pick(rng, THING[what], *taken)})
    if what == "background":
        return replace(facts, background=pick(rng, BACKGROUNDS, facts.background))
    new = pick(rng, GARMENT[what], "none", getattr(facts, what), facts.colour, facts.second)
    second = {"second": "none" if new == "plain" else None} if what == "pattern" else {}
    return replace(facts, **{what: new}, **second)


def twin(spec: Spec, rng: Rng) -> Spec:
    """An image of the pretrain set that is one edit away, in the same pose."""
    return sample(rng, "pretrain", lambda rng: edit(spec, rng, "one").apply(spec))


def pretraining_example(rng: Rng, mix=LATE_MIX, wrong=True) -> tuple[Spec, str, Spec, str | None]:
    """An image of the pretrain set, its caption, the caption's facts, a wrong caption or None.

    Six in ten captions just describe. Three in ten correct themselves ("a red cat that is blue" for
    a blue cat): that is where the frozen text encoder learns to follow a modifier, as text; ISA
    itself never sees a triplet. One in ten is a bare statement ("is at night"). mix: weights of
    EDIT_KINDS.
    """
    make = rng.choice(MAKERS)
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
    said, start = Scene((Thing(),) * len(before.things)) if make is random_scene else Garment(), ""
    if roll < 0.9:
        caption, said = describe(before, rng, keep=rng.choice((0.6, 1.0, 1.0)))
        start = f"{prefix}{caption} that "
    pair = spec, start + change.text, change.claim(said)
    for _ in range(TRIES if wrong else 0):
        if start and rng.random() < 0.5:  # the same modifier of another image
            false = contradict(said, rng)
            text, facts = f"{prefix}{say(false, rng)} that {change.text}", change.claim(false)
        else:  # another modifier of the same image
            other = edit(before, rng, change.kind)
            text, facts = start + other.text, other.claim(said)
        if not holds([facts], [spec])[0, 0]:
            return *pair, text
    return *pair, None


def described(spec: Spec, rng: Rng, prefix="", wrong=True) -> tuple[Spec, str, Spec, str | None]:
    """As pretraining_example, for a given image and with a caption that just describes it."""
    caption, facts = describe(spec, rng)
    for _ in range(TRIES if wrong else 0):
        false = contradict(facts, rng)
        text = prefix + say(false, rng)
        if not holds([false], [spec])[0, 0]:
            return spec, prefix + caption, facts, text
    return spec, prefix + caption, facts, None


def vocabulary() -> list[str]:
    """Pocket BLIP's WordPieces; with the letters, any word can be spelt."""
    rng, words = Rng(0), set("a photo of that picture".split())
    for _ in range(20000):
        words |= set(pretraining_example(rng, EARLY_MIX, wrong=False)[1].split())
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = sorted(word for word in words if len(word) > 1)
    pieces = [*letters, *(f"##{letter}" for letter in letters), *words]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,!?'-", *pieces]
