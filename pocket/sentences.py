"""Sentences about the pocket world's concepts, in place of those that SEARLE has a language model (GPT-Neo 2.7B) make.

    python -m pocket.sentences          # writes pocket/sentences.json: {"red cat": ["a red cat next to a white boat", ...], ...}

The text regularization of baselines.py reads them. An LLM's sentences would be full of words that pocket BLIP has never seen, so
a grammar makes them here, without looking at any image. Half of them are of the form that SEARLE prompts its model with, "a photo
of {concept} that ...", which is also that of a composed query.
"""

import json
from dataclasses import replace
from pathlib import Path

from plumbing.files import replacing

from .specs import (
    BACKGROUNDS,
    COLOURS,
    DETAILS,
    GARMENTS,
    KINDS,
    LENGTHS,
    NECKLINES,
    SIZES,
    SLEEVES,
    Garment,
    Rng,
    Scene,
    Thing,
    random_scene,
    say,
)

FILE = Path(__file__).with_name("sentences.json")
SENTENCES = 8  # of each concept


def scene_sentence(concept, rng):
    """Something else in the picture, or the place, is told of the concept "red cat"."""
    colour, kind = concept.split()
    others = [replace(t, size=None, place=None) for t in random_scene(rng, 2).things if t.kind != kind]
    background = rng.choice((None, *BACKGROUNDS))
    if rng.random() < 0.5:
        told = [f"is {BACKGROUNDS[background]}"] if background else []
        told += [f"has {say(Scene((others[0],)), rng)}"] if not told or rng.random() < 0.5 else []
        return f"a photo of {say(Scene((Thing(kind, colour),)), rng)} that {' and '.join(told)}"
    thing = Thing(kind, colour, rng.choice((None, *SIZES)))
    return say(Scene((thing, *others[: rng.choice((0, 1, 1, 2))]), background or rng.choice(list(BACKGROUNDS))), rng)


def garment_sentence(concept, rng):
    """The cut is told of the concept "blue dress"; a pattern would come between its two words."""
    colour, name = concept.split()
    kind = "toptee" if name == "top" else name
    parts = dict(sleeves=rng.choice(SLEEVES), neckline=rng.choice(NECKLINES), detail=rng.choice(DETAILS[1:]))
    parts = {k: parts[k] for k in rng.sample(list(parts), rng.choice((1, 2)))}
    if rng.random() < 0.5:
        whole = say(Garment(kind=kind, **parts), rng)  # "a dress with long sleeves and a belt"
        return f"a photo of {say(Garment(kind, colour), rng)} that has {whole.split(' with ', 1)[1]}"
    return say(Garment(kind, colour, length=rng.choice((None, *LENGTHS)), **parts), rng)


def make(seed=0):
    """{concept: SENTENCES different sentences that contain it}: every colour with every kind of thing and of garment."""
    made = {}
    for kinds, sentence in ((KINDS, scene_sentence), (GARMENTS, garment_sentence)):
        for concept in (f"{colour} {'top' if kind == 'toptee' else kind}" for kind in kinds for colour in COLOURS):
            rng, found = Rng(f"{seed} {concept}"), {}
            while len(found) < SENTENCES:
                found[sentence(concept, rng)] = None  # a dict keeps the order in which they were made
            made[concept] = list(found)
    return made


def write(path=FILE):
    with replacing(path) as file:
        file.write((json.dumps(make(), indent=0) + "\n").encode())


if __name__ == "__main__":
    write()
    print(f"wrote {FILE}")
