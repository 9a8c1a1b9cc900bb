"""What the page of search.py shows of the pocket world: drawings, and modifiers that work."""

import json
from dataclasses import replace
from pathlib import Path

from . import specs, world
from .specs import Scene, Thing

PHOTOS = "cirr/img_raw/test1"
DRAWN = 32  # candidates of each kind, in one batch


def read_gallery(folder="data/pocket"):
    """The pocket world in `folder` -> {name of a test image of CIRR: its spec}."""
    drawn = json.loads((Path(folder) / "world.json").read_text())
    return world.cirr_split("test", drawn["seed"], drawn["scale"])[0]


def caption(spec):
    """All of a scene but its pose, for those who cannot see it."""
    return specs.say(spec, specs.Rng(0))


def is_right(edit, reference, found):
    """Does `found` show what the modifier says, and beside it the first thing of the reference?

    Colour, kind and background count; size and place do only where the modifier names them.
    """
    first, *others = reference.things
    kept = Scene((Thing(first.kind, first.colour), *(Thing() for _ in others)),
                 reference.background)
    return bool(specs.holds([edit.claim(kept)], [found])[0, 0])


def suggest(reference, find):
    """Up to three modifiers of a scene: of one change, of several, a description, if possible.

    find(texts) -> the spec of the first image found for each: a modifier is suggested only if that
    one is right. The same modifiers for the same scene, unless the models change.
    """
    rng, texts, more = specs.Rng(repr(replace(reference, pose=0))), [], []
    for kind in ("one", "multi", "describe"):
        edits = [specs.edit(reference, rng, kind) for _ in range(DRAWN)]
        edits = {e.text: e for e in edits if not world.repeats(e.apply(reference))}
        found = zip(edits, find(list(edits)), strict=True)
        right = [text for text, spec in found if is_right(edits[text], reference, spec)]
        texts, more = texts + right[:1], right[1:] + more
    return [*texts, *more][:3]
