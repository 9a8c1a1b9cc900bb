"""Figures 4-8: what the sentence tokens look at, and what the sentences retrieve."""

import textwrap
from pathlib import Path

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

TILE, GAP, LEFT = 64, 6, 160  # pixels: an image, between two, the query on the left
STEP = TILE + GAP


def is_first(query, rankings, run="isa"):
    return rankings[run][query.id][0] in query.targets


FIGURES = {  # name -> its runs, and the queries it shows: condition(query, {run: rankings})
    "fig4": (("tokens-2", "isa", "tokens-10"), lambda q, r: True),
    "fig5": (("isa",), is_first),
    "fig6": (("isa",), lambda q, r: not set(q.targets) & set(r["isa"][q.id][:10])),
    "fig7": (("tokens-2", "isa"), lambda q, r: is_first(q, r) and not is_first(q, r, "tokens-2")),
    "fig8": (("isa", "tokens-10"), lambda q, r: is_first(q, r) and not is_first(q, r, "tokens-10")),
}


def retrieve(runs, seed, threads):
    """The pocket CIRR test set, queried -> Setting, {run: query model}, {run: rankings}."""
    paths = {run: folder(run, seed) / "isa.pt" for run in runs}
    for path in paths.values():
        query_side.read_checkpoint(path)  # now: the world may have to be drawn
    options = vars(evaluate.parse_args(["table", "--threads", str(threads)]))
    (benchmark,) = evaluate.open_benchmarks("cirr")
    blip, precision = open_blip(options)
    setting = evaluate.Setting(blip, benchmark, precision=precision,
                               cache_dir=options["cache_dir"], workers=options["workers"])  # fmt: skip
    models, rankings = {}, {}
    for run, path in paths.items():
        models[run], settings = query_side.load_query_model(path, blip)
        q = setting.query_features("isa", models[run], settings["prompt"])
        rankings[run], _ = setting.rank(q)
    return setting, models, rankings


def first_of_each_kind(benchmark, condition):
    """The first query of each type of modifier that meets a condition: not picked by hand."""
    found = {}
    for query in filter(condition, benchmark.queries):
        found.setdefault(query.kind, query)
    return [found[kind] for kind in (*EDIT_KINDS, "") if kind in found]


def draw_figure(name, seed=0, threads=0, out="paper/figures"):
    """Draw OUT/NAME.png from the runs of one seed -> its path. Raises ValueError."""
    runs, condition = FIGURES[name]
    setting, models, rankings = retrieve(runs, seed, threads)
    chosen = first_of_each_kind(setting.benchmark, lambda query: condition(query, rankings))
    if not chosen:
        raise ValueError("no query of the pocket CIRR test set meets its condition")
    draw = draw_attention if name in ("fig5", "fig6") else draw_lengths
    blocks = [draw(setting, models, rankings, query) for query in chosen]
    size = max(b.width for b in blocks) + GAP, sum(b.height + 3 * GAP for b in blocks)
    sheet, y = Image.new("RGB", size, "white"), 2 * GAP
    for block in blocks:
        sheet.paste(block, (GAP, y))
        y += block.height + 3 * GAP
    path = Path(out) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        sheet.save(file, optimize=True)
    return path


def picture(setting, name):
    image = blip_lite.to_rgb(open_image(setting.benchmark.paths[name]))
    return image.resize((TILE, TILE))


def write(sheet, x, y, text, size=11):
    ImageDraw.Draw(sheet).multiline_text((x, y), text, fill="black", font_size=size)


def paste_query(sheet, setting, query):
    """Reference image and modifier, on the left of a sheet."""
    sheet.paste(picture(setting, query.reference), (GAP, 16))
    write(sheet, GAP, TILE + 22, textwrap.fill(f"that {query.captions[0]}", 24), 12)


def paste_maps(sheet, y, label, image, maps):
    """A label and under it the image, once for the map of each token: maps [L, H, W]."""
    write(sheet, LEFT, y - 15, label)
    for i, weights in enumerate(maps):
        sheet.paste(overlay(image, weights), (LEFT + i * STEP, y))


def paste_retrieved(sheet, setting, query, names, x, y):
    """The images found, best first; targets are framed."""
    for i, name in enumerate(names):
        at = x + i * STEP
        if name in query.targets:
            sheet.paste(GREEN, (at - 4, y - 4, at + TILE + 4, y + TILE + 4))
        sheet.paste(picture(setting, name), (at, y))


@torch.no_grad()
def look(setting, model, query):
    """A query's reference image -> grouping and cross-attention maps [L, H, W], U [1, L, d_w]."""
    image, device = open_image(setting.benchmark.paths[query.reference]), setting.blip.temp.device
    with autocast(device, setting.precision):
        pixels = query_side.preprocess(model.encoder, image)[None].to(device)
        feature_map = model.encoder(pixels)
        grouping, cross = model.mapper.attention_maps(feature_map)
        return grouping[0].float().cpu(), cross[0].float().cpu(), model.mapper(feature_map)


def draw_lengths(setting, models, rankings, query, top=5):
    """One query under several token lengths, a line each: cross-attention maps, best images."""
    maps = {run: look(setting, model, query)[1] for run, model in models.items()}
    right, line = LEFT + max(map(len, maps.values())) * STEP + 2 * GAP, STEP + 16
    sheet = Image.new("RGB", (right + top * STEP + GAP, len(maps) * line), "white")
    paste_query(sheet, setting, query)
    image = picture(setting, query.reference)
    for i, (run, cross) in enumerate(maps.items()):
        y = 16 + i * line
        paste_maps(sheet, y, f"{len(cross)} tokens", image, cross)
        paste_retrieved(sheet, setting, query, rankings[run][query.id][:top], right, y)
    return sheet


@torch.no_grad()
def words_to_tokens(setting, U, modifier):
    """How much each word of the modifier attends to each sentence token in BLIP's text encoder.

    -> words, weights [words, L]: means over layers and heads in text mode, for a composed query.
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


def draw_attention(setting, models, rankings, query, top=5):
    """One query of Figures 5 and 6: both maps of every token, words to tokens, best images."""
    ((run, model),) = models.items()
    grouping, cross, U = look(setting, model, query)
    pieces, attention = words_to_tokens(setting, U, query.captions[0])
    line, row, column = STEP + 16, 13, 22  # pixels: of the maps; of the words, by tokens
    middle = LEFT + len(cross) * STEP + 2 * GAP
    cells = middle + 84
    right = cells + column * len(cross) + 3 * GAP
    size = right + top * STEP, max(2 * line + 4, row * len(pieces) + 20)
    sheet = Image.new("RGB", size, "white")
    paste_query(sheet, setting, query)
    image, tokens = picture(setting, query.reference), f"of u1 .. u{len(cross)}"
    paste_maps(sheet, 16, f"grouping (Eq. 1) {tokens}", image, grouping)
    paste_maps(sheet, 16 + line, f"cross-attention (Eq. 4) {tokens}", image, cross)
    for j in range(len(cross)):
        write(sheet, cells + column * j, 1, f"u{j + 1}")
    for i, (piece, weights) in enumerate(zip(pieces, attention / attention.max(), strict=True)):
        y = 16 + row * i
        write(sheet, middle, y - 1, piece[:13])
        for j, weight in enumerate(weights.tolist()):
            x, shade = cells + column * j, int(255 * (1 - weight))
            sheet.paste((shade, shade, 255), (x, y, x + column - 1, y + row - 1))
    paste_retrieved(sheet, setting, query, rankings[run][query.id][:top], right, 16)
    return sheet
