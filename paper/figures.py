"""Figures 4-8: what the sentence tokens look at, and what the sentences retrieve."""

import textwrap

import torch
from PIL import Image, ImageDraw

import blip_lite
import evaluate
import isa
import query_side
from paper.runs import folder
from plumbing.files import replacing
from plumbing.images import open_image
from plumbing.pictures import GREEN, overlay
from plumbing.precision import autocast, open_blip
from pocket.specs import EDIT_KINDS

TILE, GAP, STEP, LEFT = 64, 6, 70, 160  # pixels: an image, between two, both; left margin


def is_first(query, rankings, run="isa"):
    return rankings[run][query.id][0] in query.targets


FIGURES = {  # name -> its runs, and the queries it shows: condition(query, {run: rankings})
    "fig4": (("tokens-2", "isa", "tokens-10"), lambda q, r: True),
    "fig5": (("isa",), is_first),
    "fig6": (("isa",), lambda q, r: not set(q.targets) & set(r["isa"][q.id][:10])),
    "fig7": (("tokens-2", "isa"), lambda q, r: is_first(q, r) and not is_first(q, r, "tokens-2")),
    "fig8": (("isa", "tokens-10"), lambda q, r: is_first(q, r) and not is_first(q, r, "tokens-10")),
}


def first_of_each_kind(benchmark, condition):
    """The first query of each type of modifier that meets a condition."""
    found = {}
    for query in filter(condition, benchmark.queries):
        found.setdefault(query.kind, query)
    return [found[kind] for kind in (*EDIT_KINDS, "") if kind in found]


def draw_figure(name, out, seed=0, threads=0):
    """Draw a figure of FIGURES from the runs of one seed into a PNG file. Raises ValueError."""
    runs, condition = FIGURES[name]
    paths = {run: folder(run, seed) / "isa.pt" for run in runs}
    for path in paths.values():
        query_side.read_checkpoint(path)  # now: the world may have to be drawn
    (benchmark,) = evaluate.open_benchmarks("cirr")
    options = evaluate.parse_args(["table", "--threads", str(threads)])
    blip, precision = open_blip(vars(options))
    setting, models, rankings = evaluate.Setting(blip, benchmark, precision=precision), {}, {}
    for run, path in paths.items():
        models[run], settings = query_side.load_query_model(path, blip)
        q = setting.query_features("isa", models[run], settings["prompt"])
        rankings[run], _ = setting.rank(q)
    chosen = first_of_each_kind(benchmark, lambda query: condition(query, rankings))
    if not chosen:
        raise ValueError("no query of the pocket CIRR test set meets its condition")
    blocks = [draw_query(setting, models, rankings, query) for query in chosen]
    size = max(b.width for b in blocks) + GAP, sum(b.height + 3 * GAP for b in blocks)
    sheet, y = Image.new("RGB", size, "white"), 2 * GAP
    for block in blocks:
        sheet.paste(block, (GAP, y))
        y += block.height + 3 * GAP
    with replacing(out) as file:
        sheet.save(file, optimize=True)


def picture(setting, name):
    return blip_lite.to_rgb(open_image(setting.benchmark.paths[name])).resize((TILE, TILE))


def write(sheet, x, y, text, size=11):
    ImageDraw.Draw(sheet).text((x, y), text, fill="black", font_size=size)


def paste_retrieved(sheet, setting, query, names, x, y):
    """The images found, best first; targets are framed."""
    for i, name in enumerate(names):
        at = x + i * STEP
        if name in query.targets:
            sheet.paste(GREEN, (at - 4, y - 4, at + TILE + 4, y + TILE + 4))
        sheet.paste(picture(setting, name), (at, y))


@torch.no_grad()
def look(setting, model, query):
    """A query's image -> grouping and cross-attention maps [L, H, W], U [1, L, d_w]."""
    image, device = open_image(setting.benchmark.paths[query.reference]), setting.blip.temp.device
    with autocast(device, setting.precision):
        pixels = query_side.preprocess(model.encoder, image)[None].to(device)
        feature_map = model.encoder(pixels)
        grouping, cross = model.mapper.attention_maps(feature_map)
        return grouping[0].float().cpu(), cross[0].float().cpu(), model.mapper(feature_map)


@torch.no_grad()
def words_to_tokens(setting, U, modifier):
    """How much each word of the modifier attends to each sentence token in a composed query.

    -> words, weights [words, L]: means over the layers and heads of BLIP's text encoder.
    """
    blip = setting.blip
    words, mask = isa.compose_query(blip, U, [modifier])
    with autocast(words.device, setting.precision):
        maps = blip.text_encoder.attention_maps(words, mask)  # [1, layers, heads, T, T]
    attention = maps[0].float().mean(dim=(0, 1))  # [T, T]
    pieces = blip.tokenizer.tokenize(isa.continuation(modifier))  # "that ..."
    after = words.shape[1] - 1 - len(pieces)  # ... u1 .. uL, pieces, [SEP]
    first = after - U.shape[1]
    return pieces[1:], attention[after + 1 : after + len(pieces), first:after].cpu()


def draw_words(pieces, attention):
    """The words of a modifier, and in blue their attention to each token -> PIL image."""
    left, column, row, L = 84, 22, 13, attention.shape[1]
    size = left + column * L + 3 * GAP, row * len(pieces) + 20
    sheet = Image.new("RGB", size, "white")
    for j in range(L):
        write(sheet, left + column * j, 1, f"u{j + 1}")
    for i, (piece, weights) in enumerate(zip(pieces, attention / attention.max(), strict=True)):
        y = 16 + row * i
        write(sheet, 0, y - 1, piece[:13])
        for j, weight in enumerate(weights.tolist()):
            x, shade = left + column * j, int(255 * (1 - weight))
            sheet.paste((shade, shade, 255), (x, y, x + column - 1, y + row - 1))
    return sheet


def draw_query(setting, models, rankings, query, top=5):
    """One query: each model's cross-attention maps and best images -> PIL image.

    A single model also shows its grouping, and how the words attend to its tokens.
    """
    seen = [look(setting, model, query) for model in models.values()]
    lines = [(f"{len(cross)} tokens", cross) for _, cross, _ in seen]
    words = Image.new("RGB", (0, 0))
    if len(models) == 1:
        ((grouping, cross, U),) = seen
        words = draw_words(*words_to_tokens(setting, U, query.captions[0]))
        lines = [(f"grouping (Eq. 1) of u1 .. u{len(cross)}", grouping),
                 (f"cross-attention (Eq. 4) of u1 .. u{len(cross)}", cross)]
    middle = LEFT + max(len(maps) for _, maps in lines) * STEP + 2 * GAP
    right, line = middle + words.width, STEP + 16
    height = max(line * len(lines), words.height)
    sheet = Image.new("RGB", (right + top * STEP + GAP, height), "white")
    image = picture(setting, query.reference)
    sheet.paste(image, (GAP, 16))
    write(sheet, GAP, TILE + 22, textwrap.fill(f"that {query.captions[0]}", 24), 12)
    for i, (label, maps) in enumerate(lines):
        write(sheet, LEFT, 1 + i * line, label)
        for j, weights in enumerate(maps):
            sheet.paste(overlay(image, weights), (LEFT + j * STEP, 16 + i * line))
    sheet.paste(words, (middle, 0))
    for i, run in enumerate(models):
        paste_retrieved(sheet, setting, query, rankings[run][query.id][:top], right, 16 + i * line)
    return sheet
