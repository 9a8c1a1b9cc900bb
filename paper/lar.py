"""What LAR changes, beyond Table 8: results by type of modifier, and the learnt words."""

import statistics
from collections import Counter
from json import loads

import torch

import benchmarks
import blip_lite
import evaluate
import isa
import query_side
from paper import results
from paper.numbers import NOTES, ROWS
from paper.runs import folder, seeds_of, trained
from paper.tables import cell, markdown, value
from plumbing.pictures import nearest_words, word_rows
from pocket.specs import EDIT_KINDS

IMAGES = 500  # of pocket CIRR's test gallery, whose learnt words are looked at


def lar_table(seeds):
    """Two tables -> lines of markdown."""
    kinds = [kind for kind in EDIT_KINDS if kind != "replace"]  # only pre-training has that one
    columns = [(b, benchmarks.HEADLINE[b], kind) for b in benchmarks.PAPERS for kind in kinds]
    scores, words, looks = [], [], look_at_runs(seeds)
    for label, row in ROWS["lar"].items():
        measured = results.measured(row["ours"], seeds_of(row["ours"], seeds), "test")
        cells = [cell([value(r, b, f"{kind} {m}") for r in measured]) for b, m, kind in columns]
        scores.append([label, *cells])
        seen = [look for (run, _), look in looks.items() if run == row["ours"]]
        cells = [cell([look[i] for look in seen]) for i in range(4)]
        words.append([label, *cells, seen[0][4] if seen else "–"])
    _, rows = word_rows(blip_lite.load("pocket"))
    score_head = ["loss", *(f"{b} {metric}, {kind}" for b, metric, kind in columns)]
    word_head = ["loss", "norm of a token", "cosine to the nearest word", "true, %",
                 "own image, R@1", "nearest words, most often"]
    note = NOTES["lar, words"].format(images=IMAGES, norm=rows.norm(dim=1).mean())
    return [NOTES["lar, scores"], "", *markdown(score_head, scores), "",
            note, "", *markdown(word_head, words)]


def look_at_runs(seeds):
    """{(run, seed): its look_at_words}: of this folder's finished runs, else of results.json."""
    blip, published = blip_lite.load("pocket"), results.published()
    keys = [(row["ours"], seed) for row in ROWS["lar"].values()
            for seed in seeds_of(row["ours"], seeds)]
    found = {key: published.get(folder(*key).name, {}).get("words") for key in keys}
    here = [key for key in keys if trained(*key, blip.fingerprint) == "done"]
    if here:
        (benchmark,) = evaluate.open_benchmarks("cirr")
        paths = [benchmark.paths[name] for name in benchmark.gallery[:IMAGES]]
        v = evaluate.Setting(blip, benchmark).gallery[:IMAGES]  # [M, E]
    for key in here:
        found[key] = look_at_words(folder(*key) / "isa.pt", blip, paths, v)
    return {key: look for key, look in found.items() if look}


@torch.no_grad()
def look_at_words(checkpoint, blip, paths, v):
    """What a query model says of images with features v [M, E].

    -> the tokens' mean norm and cosine to the nearest word, the percentage of those words that the
    image's full caption contains, R@1 of the sentence among the images, the commonest words.
    """
    model, settings = query_side.load_query_model(checkpoint, blip)
    U, _ = evaluate.through_query_model(model, paths, "fp32", "cpu", 1)  # [M, L, d_w]
    words, cosine = nearest_words(blip, U)  # [M, L] each
    captions = loads((paths[0].absolute().parents[2] / "captions.json").read_text())
    said = [(path.stem, word) for path, row in zip(paths, words, strict=True) for word in row]
    true = 100 * statistics.mean(word in captions[image].split() for image, word in said)
    t = blip.encode_text(*isa.compose_query(blip, U, prompt=settings["prompt"]))  # [M, E]
    own = 100 * ((t @ v.T).argmax(dim=1) == torch.arange(len(paths))).float().mean().item()
    often = " ".join(word for word, _ in Counter(word for _, word in said).most_common(6))
    return [*(round(float(x), 4) for x in (U.norm(dim=-1).mean(), cosine.mean(), true, own)), often]
