"""Figures 4-8."""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import blip_lite
import evaluate
import isa
import query_side
from paper.runs import FIGURE_RUNS, folder
from plumbing.files import replacing
from plumbing.pictures import GREEN, overlay
from plumbing.precision import autocast, open_blip
from pocket import specs

TILE, GAP = 64, 6


def open_retrieval(checkpoints, data=None):
    """{run: path of isa.pt} -> the pocket CIRR test set ready to be queried, {run: query model}, {run: rankings}."""
    for path in checkpoints.values():
        query_side.read_checkpoint(path)  # now: the world may have to be drawn
    args = evaluate.parse_args(["table", "--benchmark", "cirr", *(["--data", str(data)] if data else [])])
    (benchmark,) = evaluate.open_benchmarks(args)
    blip, precision = open_blip(vars(args))
    setting = evaluate.Setting(blip, benchmark, args, precision)
    models = {run: query_side.load_query_model(path, blip) for run, path in checkpoints.items()}
    rankings = {run: setting.rank(setting.query_features("isa", m, trained["prompt"]))[0] for run, (m, trained) in models.items()}
    return setting, {run: model for run, (model, _) in models.items()}, rankings


def first_of_each_kind(benchmark, condition):
    """The first query of each type of modifier for which condition(query) holds: a rule instead of a hand that picks."""
    kinds = sorted({query.kind for query in benchmark.queries}, key=[*specs.EDIT_KINDS, ""].index)
    found = [next((q for q in benchmark.queries if q.kind == kind and condition(q)), None) for kind in kinds]
    return [query for query in found if query]


def is_first(query, ranking):
    return ranking[query.id][0] in query.targets


CHOICE = {  # figure -> what it shows, and which queries: condition(query, {run: rankings})
    "fig4": ("cross-attention of the sentence tokens (Eq. 4) for 2, 6 and 10 tokens, and what they retrieve. The first query of "
             "each type of modifier", lambda q, r: True),
    "fig5": ("good retrievals. The first query of each type of modifier whose target is ranked first",
             lambda q, r: is_first(q, r["isa"])),
    "fig6": ("failures. The first query of each type of modifier whose target is not among the first ten",
             lambda q, r: not set(q.targets) & set(r["isa"][q.id][:10])),
    "fig7": ("2 and 6 tokens. The first query of each type of modifier whose target is ranked first with 6 and not with 2",
             lambda q, r: is_first(q, r["isa"]) and not is_first(q, r["tokens-2"])),
    "fig8": ("6 and 10 tokens. The first query of each type of modifier whose target is ranked first with 6 and not with 10",
             lambda q, r: is_first(q, r["isa"]) and not is_first(q, r["tokens-10"])),
}  # fmt: skip


def draw_figure(name, args, data=None, out="pocket/figures"):
    """pocket/figures/NAME.png from the runs of seed args.seeds[0] -> its path, and in words what it shows."""
    runs = FIGURE_RUNS[name]
    checkpoints = {run: folder(run, args.seeds[0]) / "isa.pt" for run in runs}
    setting, models, rankings = open_retrieval(checkpoints, data)
    told, condition = CHOICE[name]
    chosen = first_of_each_kind(setting.benchmark, lambda query: condition(query, rankings))
    if not chosen:
        raise ValueError(f"{name}: no query of {setting.benchmark.name} {setting.benchmark.split} fits its rule")
    draw = draw_attention if name in ("fig5", "fig6") else draw_lengths
    blocks = [draw(setting, models, rankings, query) for query in chosen]
    sheet = Image.new("RGB", (max(b.width for b in blocks) + GAP, sum(b.height + 3 * GAP for b in blocks)), "white")
    y = 0
    for block in blocks:
        sheet.paste(block, (GAP, y + 2 * GAP))
        y += block.height + 3 * GAP
    path = Path(out) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        sheet.save(file, optimize=True)
    return path, f"{told} in the pocket CIRR test set. Framed green: the target."


def picture(setting, name):
    return blip_lite.to_rgb(Image.open(setting.benchmark.paths[name])).resize((TILE, TILE))


def paste_query(sheet, setting, query):
    """Reference image and modifier in the left 2.5 tiles of a sheet."""
    sheet.paste(picture(setting, query.reference), (GAP, 16))
    text = textwrap.fill(f"that {query.captions[0]}", 24)
    ImageDraw.Draw(sheet).multiline_text((GAP, TILE + 22), text, fill="black", font_size=12)


def paste_retrieved(sheet, setting, query, names, x, y):
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        at = x + i * (TILE + GAP)
        if name in query.targets:
            pen.rectangle((at - 4, y - 4, at + TILE + 3, y + TILE + 3), fill=GREEN)
        sheet.paste(picture(setting, name), (at, y))


@torch.no_grad()
def look(setting, model, query):
    """-> grouping and cross-attention maps [L, H, W] and U [1, L, d_w] of a query's reference image."""
    image, device = Image.open(setting.benchmark.paths[query.reference]), setting.blip.temp.device
    with autocast(device, setting.precision):
        feature_map = model.encoder(query_side.preprocess(model.encoder, image)[None].to(device))
        grouping, cross = model.mapper.attention_maps(feature_map)
        return grouping[0].float().cpu(), cross[0].float().cpu(), model.mapper(feature_map)


def draw_lengths(setting, models, rankings, query, top=5):
    """One query under several token lengths, a line each: the cross-attention maps, then the best images. -> PIL image."""
    left, step, most = 2.5 * TILE, TILE + GAP, max(len(look(setting, m, query)[1]) for m in models.values())
    sheet = Image.new("RGB", (int(left + (most + top) * step + 3 * GAP), len(models) * (step + 16)), "white")
    pen = ImageDraw.Draw(sheet)
    paste_query(sheet, setting, query)
    image = picture(setting, query.reference)
    for line, (run, model) in enumerate(models.items()):
        y, (_, cross, _) = line * (step + 16) + 16, look(setting, model, query)
        pen.text((left, y - 15), f"{len(cross)} tokens", fill="black", font_size=11)
        for i, weights in enumerate(cross):
            sheet.paste(overlay(image, weights), (int(left + i * step), y))
        paste_retrieved(sheet, setting, query, rankings[run][query.id][:top], int(left + most * step + 2 * GAP), y)
    return sheet


@torch.no_grad()
def words_to_tokens(setting, U, modifier):
    """How much each word of the modifier attends to each sentence token in BLIP's text encoder: words, float [words, L].

    The mean over heads and layers, text mode, the composed query of inference.
    """
    blip = setting.blip
    words, mask = isa.compose_query(blip, U, [modifier])
    with autocast(words.device, setting.precision):
        attention = blip.text_encoder.attention_maps(words, mask)[0].float().mean(dim=(0, 1))  # [T, T]
    pieces = blip.tokenizer.tokenize(isa.continuation(modifier))
    first = words.shape[1] - 1 - len(pieces) - U.shape[1]  # u1; after it the tokens, the pieces and [SEP]
    after = first + U.shape[1]
    return pieces[1:], attention[after + 1 : after + len(pieces), first:after].cpu()


def draw_attention(setting, models, rankings, query, top=5):
    """One query of figures 5 and 6: maps of every token (grouping, then cross-attention), words to tokens, best images."""
    (run, model), *_ = models.items()
    grouping, cross, U = look(setting, model, query)
    pieces, attention = words_to_tokens(setting, U, query.captions[0])
    left, step, row = int(2.5 * TILE), TILE + GAP, 13
    right = left + len(cross) * step + 2 * GAP
    table_width = 84 + 22 * len(cross)
    height = max(2 * (step + 16) + 4, row * len(pieces) + 20)
    sheet = Image.new("RGB", (right + table_width + 3 * GAP + top * step, height), "white")
    pen = ImageDraw.Draw(sheet)
    paste_query(sheet, setting, query)
    image = picture(setting, query.reference)
    for line, (label, maps) in enumerate((("grouping (Eq. 1)", grouping), ("cross-attention (Eq. 4)", cross))):
        y = line * (step + 16) + 16
        pen.text((left, y - 15), f"{label} of u1 .. u{len(maps)}", fill="black", font_size=11)
        for i, weights in enumerate(maps):
            sheet.paste(overlay(image, weights), (left + i * step, y))
    for i in range(len(cross)):
        pen.text((right + 84 + 22 * i, 1), f"u{i + 1}", fill="black", font_size=11)
    for i, (piece, weights) in enumerate(zip(pieces, attention, strict=True)):
        y = 16 + row * i
        pen.text((right, y - 1), piece[:13], fill="black", font_size=11)
        for j, weight in enumerate(weights.tolist()):
            shade = int(255 * (1 - weight / float(attention.max())))
            pen.rectangle((right + 84 + 22 * j, y, right + 84 + 22 * j + 20, y + row - 2), fill=(shade, shade, 255))
    paste_retrieved(sheet, setting, query, rankings[run][query.id][:top], right + table_width + 3 * GAP, 16)
    return sheet
