"""Sentences about the pocket world's concepts, where SEARLE asks a language model (GPT-Neo 2.7B).

    python -m pocket.sentences   # sentences.json: {"red cat": ["a red cat at night", ...], ...}

An LLM would use words that pocket BLIP has never seen, so a grammar writes them. Half have the form
of SEARLE's prompt and of a composed query, "a photo of {concept} that ...".
"""

import json
from dataclasses import replace
from pathlib import Path

from plumbing.command import run_command
from plumbing.files import replacing

from . import specs
from .specs import BACKGROUNDS, COLOURS, GARMENTS, KINDS, Garment, Rng, Scene, Thing, say

FILE = Path(__file__).with_name("sentences.json")
SENTENCES = 8  # of each concept


def scene_sentence(colour, kind, rng):
    others = [replace(t, size=None, place=None) for t in specs.random_scene(rng, 2).things
              if t.kind != kind]
    background = rng.choice((None, *BACKGROUNDS))
    if rng.random() < 0.5:
        added = [f"is {BACKGROUNDS[background]}"] if background else []
        if not added or rng.random() < 0.5:
            added.append(f"has {say(Scene((others[0],)), rng)}")
        return f"a photo of {say(Scene((Thing(kind, colour),)), rng)} that {' and '.join(added)}"
    thing = Thing(kind, colour, rng.choice((None, *specs.SIZES)))
    things = (thing, *others[: rng.choice((0, 1, 1, 2))])
    return say(Scene(things, background or specs.pick(rng, BACKGROUNDS)), rng)


def garment_sentence(colour, kind, rng):
    """Adds details of the cut; a pattern would come between colour and kind."""
    values = {"sleeves": specs.SLEEVES, "neckline": specs.NECKLINES, "detail": specs.DETAILS[1:]}
    cut = {name: rng.choice(some) for name, some in values.items()}
    cut = {name: cut[name] for name in rng.sample(list(cut), rng.choice((1, 2)))}
    if rng.random() < 0.5:
        whole = say(Garment(kind=kind, **cut), rng)  # "a dress with long sleeves and a belt"
        return f"a photo of {say(Garment(kind, colour), rng)} that has {whole.split(' with ')[1]}"
    return say(Garment(kind, colour, length=rng.choice((None, *specs.LENGTHS)), **cut), rng)


def make(seed=0):
    """{concept, a colour and a kind: SENTENCES different sentences}."""
    made = {}
    for kinds, sentence in ((KINDS, scene_sentence), (GARMENTS, garment_sentence)):
        for kind in kinds:
            for colour in COLOURS:
                concept, found = f"{colour} {'top' if kind == 'toptee' else kind}", {}
                rng = Rng(f"{seed} {concept}")
                while len(found) < SENTENCES:
                    found[sentence(colour, kind, rng)] = None  # a dict: a set has no order
                made[concept] = list(found)
    return made


def main(_):
    with replacing(FILE) as file:
        file.write((json.dumps(make(), indent=0) + "\n").encode())
    print(f"wrote {FILE}")


if __name__ == "__main__":
    run_command("pocket.sentences", main, None)
