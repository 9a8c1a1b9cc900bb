"""Upper bounds in the pocket world: query BLIP with the true captions of what was drawn."""

import json

import isa

METHODS = (
    "reference caption",  # the modifier after what a perfect query model would say of the reference
    "target caption",  # what a perfect modifier would say
)


def read_captions(benchmark):
    """{name of an image: its full caption}, as `pocket.world` wrote them; None for real data."""
    image = next(iter(benchmark.paths.values())).absolute()
    root = image.parents[1 if benchmark.name == "fashioniq" else 2]
    path = root / "captions.json"
    return json.loads(path.read_text()) if path.exists() else None


def speaker(blip, benchmark, method, prompt="a photo of"):
    """A function (rows of queries, int64 [B]; B modifiers) -> words [B, T, d_w], mask [B, T]."""
    captions = read_captions(benchmark)
    if captions is None:
        raise ValueError(f'{benchmark.name}: has no captions.json, which "{method}" needs')

    def speak(rows, modifiers):
        queries = [benchmark.queries[i] for i in rows.tolist()]
        if method == "target caption":
            texts = [captions[query.targets[0]] for query in queries]
        else:
            texts = [f"{captions[query.reference]} {isa.continuation(modifier)}"
                     for query, modifier in zip(queries, modifiers, strict=True)]
        ids, mask = blip.tokenize([f"{prompt} {text}" for text in texts])
        return blip.embed_words(ids), mask

    return speak
