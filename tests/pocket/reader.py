"""A reader of the pocket world's captions that shares no code with their writer."""

import re

from pocket import specs
from pocket.specs import BACKGROUNDS, COLOURS, KINDS, Garment, Rng, Scene, Thing


def true_of(facts, spec):
    """Is all that is said true of this image? One thing of it has to show all said of a thing."""
    said = {k: v for k, v in vars(facts).items() if k not in ("pose", "things") and v is not None}
    if any(getattr(spec, name, None) != value for name, value in said.items()):
        return False
    for thing in getattr(facts, "things", ()):
        said = {name: value for name, value in vars(thing).items() if value is not None}
        there = [vars(other) for other in getattr(spec, "things", ())]
        if said and not any(all(other[name] == said[name] for name in said) for other in there):
            return False
    return True


def one_of(words):
    return "(" + "|".join(words) + ")"


NOUN = re.compile(
    rf"\b(?:an?|the) (?:{one_of(specs.SIZES)} )?(?:{one_of(COLOURS)} )?{one_of(KINDS)}"
    r"(?: (?:on the (left|right)|in the (middle)))?\b"
)
STATED = re.compile(rf"\bis (?:{one_of(specs.SIZES)}|{one_of(COLOURS)})\b")  # of a single thing


def read_scene(text):
    """A caption or a modifier of a scene -> the things and the background that it mentions."""
    places = one_of(BACKGROUNDS.values())
    text = re.sub(rf" instead( of (the {one_of(KINDS)}|{places}))?", "", text)
    background = [name for name, phrase in BACKGROUNDS.items() if phrase in text]
    assert len(background) <= 1, text
    things = [Thing(kind, colour or None, size or None, place or middle or None)
              for size, colour, kind, place, middle in NOUN.findall(text)]
    things += [Thing(colour=colour or None, size=size or None)
               for size, colour in STATED.findall(text)]
    return Scene(tuple(things), background[0] if background else None)


def read_garment(text):
    """The same for garments. "red and blue striped" says two colours, "a red dress" one."""
    text = re.sub(rf" instead( of {one_of(COLOURS)})?", "", text)

    def find(pattern, text=text):
        match = re.search(pattern, text)
        return match and match.group(1)

    colour, patterned = one_of(COLOURS), "(?:striped|dotted|checked)"
    second = find(rf"(?:{'|'.join(COLOURS)}) and {colour} {patterned}")
    second = second or find(rf"{patterned} with {colour}")
    rest = re.sub(rf" and {second} | with {second}\b", " ", text) if second else text
    kind, pattern = find(r"\b(dress|shirt|top)\b"), find(rf"\b{one_of(specs.PATTERNS)}\b")
    return Garment(
        "toptee" if kind == "top" else kind, find(rf"\b{colour}\b", rest), pattern,
        "none" if pattern == "plain" else second,
        "no" if "sleeveless" in text else find(rf"\b{one_of(specs.SLEEVES)} sleeves"),
        find(one_of(specs.NECKLINES)), find(rf"\b{one_of(specs.LENGTHS)}(?:er)?\b(?! sleeves)"),
        find(rf"\b{one_of(specs.DETAILS[1:])}\b"))


def read(text, like):
    return (read_scene if isinstance(like, Scene) else read_garment)(text)


def draws(count, seed=0):
    """`count` specs, scenes and garments in turn, each with the generator that they come from."""
    rng = Rng(seed)
    for i in range(count):
        yield specs.MAKERS[i % 2](rng), rng
