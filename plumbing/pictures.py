"""Pictures of queries, attention maps and results."""

import os
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import blip_lite
from plumbing.files import check_output, replacing
from plumbing.images import SUFFIXES, open_image

GREEN, RED = (30, 160, 60), (215, 20, 20)  # frames of targets; what a token looks at
GREY, PAPER = (110, 110, 110), (244, 244, 244)  # small print; around a photo that is not square
TILE, SIDE, PHOTO, MARGIN = 72, 220, 150, 16  # pixels of a contact sheet: map, query, result, gap
ACROSS = 5  # results a line


def check_picture(path):
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: names no picture format; give a name that ends in .png or .jpg")
    check_output(path)


def save_picture(picture, path):
    with replacing(path) as file:  # its suffix tells PIL the format
        picture.save(file, quality=90)


def overlay(image, weights):
    """A faded image under one token's weights [H, W] in red, deepest at their maximum."""
    weights = np.asarray(weights, np.float32)
    mask = Image.fromarray(0.75 * weights / max(float(weights.max()), 1e-9))
    mask = np.asarray(mask.resize(image.size, Image.Resampling.BILINEAR))
    white, red = (Image.new("RGB", image.size, color) for color in ("white", RED))
    faded = Image.blend(image.convert("L").convert("RGB"), white, 0.5)
    return Image.composite(red, faded, Image.fromarray((255 * mask).astype(np.uint8)))


def word_rows(blip):
    """BLIP's words, without letters, pieces and special tokens -> V strings, rows [V, d_w]."""
    kept = blip.tokenizer.words()
    return list(kept), blip.embed_words(torch.tensor(list(kept.values()), device=blip.temp.device))


@torch.no_grad()
def nearest_words(blip, U):
    """U [M, L, d_w] -> the word nearest to each token, M lists of L; their cosines [M, L]."""
    words, rows = word_rows(blip)
    cosines = F.normalize(U.float(), dim=-1) @ F.normalize(rows, dim=-1).T  # [M, L, V]
    cosine, nearest = cosines.max(dim=-1)
    return [[words[i] for i in row] for row in nearest.tolist()], cosine


def scaled(image, side):  # the longer side; proportions are kept
    size = [max(1, round(x * side / max(image.size))) for x in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)


def paste(sheet, image, x, y, side):
    """Paste a scaled image into the middle of a square of the sheet."""
    image = scaled(image, side)
    sheet.paste(PAPER, (x, y, x + side, y + side))
    sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))


def shortened(text, font, width):
    """The text without as much of its middle as does not fit into `width` pixels."""
    short, half = text, len(text) // 2
    while half and font.getlength(short) > width:
        short, half = f"{text[:half]}...{text[-half:]}", half - 1
    return short


def draw_picture(benchmark, rankings, count=6, top=5, side=96):
    """A PIL image of some queries: reference, modifier, best images with the targets framed."""
    queries = benchmark.queries  # from all over the split, with modifiers that fit their column
    order = sorted(range(len(queries)), key=lambda i: (len(queries[i].captions[0]) > 44, i % 97))
    sheet = Image.new("RGB", (side * (top + 4) + 8, (side + 8) * count + 8), "white")
    pen = ImageDraw.Draw(sheet)

    def put(name, x, y):
        paste(sheet, blip_lite.to_rgb(open_image(benchmark.paths[name])), x, y, side - 8)

    for line, i in enumerate(order[:count]):
        query, y = queries[i], 8 + line * (side + 8)
        put(query.reference, 8, y)
        text = textwrap.fill(f"that {query.captions[0]}", 34)
        pen.text((side + 8, y + 24), text, "black", font_size=15)
        for place, name in enumerate(rankings[query.id][:top]):
            x = side * (4 + place) + 4
            if name in query.targets:
                pen.rectangle((x - 4, y - 4, x + side - 5, y + side - 5), fill=GREEN)
            put(name, x, y)
    return sheet


def contact_sheet(query, text, words, maps, found, scores):
    """A search -> PIL image: left the query, right the photos at the paths `found`.

    Below the query, its L tokens: the nearest words and two maps [L, H, W] or None, as in search.
    """
    labels = ("owns (Eq. 1)", "looks at (Eq. 4)")
    rows = [(label, m) for label, m in zip(labels, maps, strict=True) if m is not None]
    step, row, per_line = TILE + 6, TILE + 22, min(len(words), 6)
    block = len(rows) * row + 30  # the height of a line of tokens
    left = max(per_line * step, 2 * SIDE) + 2 * MARGIN
    lines = textwrap.wrap(f"that {text}", 24) if text.strip() else ["(no text)"]
    top = max(SIDE, 20 * len(lines)) + 2 * MARGIN
    bottom = top + -(-len(words) // per_line) * block
    across, cell = min(ACROSS, len(found)), PHOTO + 44
    bottom = max(bottom, MARGIN + -(-len(found) // across) * cell)
    sheet = Image.new("RGB", (left + MARGIN + across * (PHOTO + MARGIN), bottom), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)

    def write(x, y, text, color="black", width=PHOTO):
        pen.text((x, y), shortened(text, font, width), color, font)

    paste(sheet, query, MARGIN, MARGIN, SIDE)
    pen.text((MARGIN * 2 + SIDE, MARGIN), "\n".join(lines), "black", spacing=5, font_size=15)
    query = scaled(query, TILE)
    for i, word in enumerate(words):
        x, y = MARGIN + i % per_line * step, top + i // per_line * block
        write(x, y, f"u{i + 1} {word}", width=TILE + 4)
        for n, (label, weights) in enumerate(rows):
            if x == MARGIN:
                write(x, y + 17 + n * row, label, GREY)
            paste(sheet, overlay(query, weights[i]), x, y + 34 + n * row, TILE)

    for i, (path, score) in enumerate(zip(found, scores, strict=True)):
        x, y = left + MARGIN + i % across * (PHOTO + MARGIN), MARGIN + i // across * cell
        paste(sheet, blip_lite.to_rgb(open_image(path)), x, y, PHOTO)
        write(x, y + PHOTO + 3, f"{i + 1}.  {score:.3f}")
        name = os.fsencode(os.path.basename(path)).decode(errors="replace")
        write(x, y + PHOTO + 18, name, GREY)
    return sheet
