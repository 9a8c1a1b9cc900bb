"""Pictures of queries, attention maps and results."""

import os
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import blip_lite
from plumbing.images import open_image

GREEN, RED = (30, 160, 60), (215, 20, 20)  # frames of targets; what a token looks at


def draw_picture(setting, rankings, count=6, top=5, side=96):
    """The first queries of each type: reference, modifier, best images; a frame marks the targets. -> PIL image."""
    benchmark = setting.benchmark
    order = sorted(range(len(benchmark.queries)), key=lambda i: (len(benchmark.queries[i].captions[0]) > 44, i % 97))
    chosen = [benchmark.queries[i] for i in order[:count]]
    sheet = Image.new("RGB", (side * (top + 4) + 8, (side + 8) * count + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for line, query in enumerate(chosen):
        y = 8 + line * (side + 8)

        def paste(name, x, frame=None, y=y):
            image = blip_lite.to_rgb(open_image(benchmark.paths[name])).resize((side - 8, side - 8))
            if frame:
                pen.rectangle((x - 4, y - 4, x + side - 5, y + side - 5), fill=frame)
            sheet.paste(image, (x, y))

        paste(query.reference, 8)
        pen.multiline_text((side + 8, y + 24), textwrap.fill(f"that {query.captions[0]}", 34), fill="black", font_size=15)
        for i, name in enumerate(rankings[query.id][:top]):
            paste(name, side * (4 + i) + 4, GREEN if name in query.targets else None)
    return sheet


def overlay(image, weights):
    """A faded image under the weights [H, W] of one token, in red; the deepest red is the token's own maximum."""
    weights = np.asarray(weights, np.float32)
    mask = Image.fromarray(0.75 * weights / max(float(weights.max()), 1e-9)).resize(image.size, Image.Resampling.BILINEAR)
    faded = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.5)
    red = Image.new("RGB", image.size, RED)
    return Image.composite(red, faded, Image.fromarray((255 * np.asarray(mask)).astype(np.uint8)))


def word_rows(blip):
    """The whole words of BLIP's vocabulary, without single letters, pieces and special tokens -> words, rows [V, d_w]."""
    kept = [(word, i) for word, i in blip.tokenizer.vocab.items() if word.isalpha() and len(word) > 1]
    return [word for word, _ in kept], blip.text_encoder.embeddings.word_embeddings.weight[[i for _, i in kept]]


@torch.no_grad()
def nearest_words(blip, U):
    """Sentences U [M, L, d_w] -> for each token the word whose row is nearest, lists of M x L strings, and the cosines [M, L]."""
    words, rows = word_rows(blip)
    cosine, nearest = (F.normalize(U.float(), dim=-1) @ F.normalize(rows, dim=-1).T).max(dim=-1)  # [M, L]
    return [[words[i] for i in row] for row in nearest.tolist()], cosine


TILE, SIDE, PHOTO, MARGIN, ACROSS = 72, 220, 150, 16, 5  # pixels: a map, the query, a photo found, what is left empty; photos a row


GREY, PAPER = (110, 110, 110), (244, 244, 244)  # small print; what lies under a photo that is not square


def scaled(image, side):
    """The image with its proportions kept, its longer side `side` pixels long."""
    size = [max(1, round(x * side / max(image.size))) for x in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)


def paste(sheet, image, x, y, side):
    """Put an image in the middle of a square of the sheet."""
    image = scaled(image, side)
    sheet.paste(PAPER, (x, y, x + side, y + side))
    sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))


def shortened(text, font, width):
    """The text, its middle left out until it is at most `width` pixels long."""
    if font.getlength(text) <= width:
        return text
    half = len(text) // 2
    while half > 1 and font.getlength(f"{text[:half]}...{text[-half:]}") > width:
        half -= 1
    return f"{text[:half]}...{text[-half:]}"


def contact_sheet(query, text, words, maps, found, scores):
    """Left the query: image, text, and for each of its L tokens the nearest word, what it owns and what it looks at. Right the
    photos at the paths `found`, with rank, score and name. -> PIL image.
    """
    small, middle = ImageFont.load_default(12), ImageFont.load_default(15)
    rows = [(label, m) for label, m in (("owns (Eq. 1)", maps[0]), ("looks at (Eq. 4)", maps[1])) if m is not None]
    step, row = TILE + 6, TILE + 22
    per_line = min(len(words), 6)
    left = max(per_line * step, 2 * SIDE) + 2 * MARGIN
    text_lines = textwrap.wrap(f"that {text}", 24) if text.strip() else ["(no text)"]
    top = max(SIDE, 20 * len(text_lines)) + 2 * MARGIN
    bottom = top + -(-len(words) // per_line) * (len(rows) * row + 30)
    cell = PHOTO + 44
    across = min(ACROSS, len(found))
    size = left + MARGIN + across * (PHOTO + MARGIN), max(bottom, MARGIN + -(-len(found) // across) * cell)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)

    paste(sheet, query, MARGIN, MARGIN, SIDE)
    pen.multiline_text((MARGIN * 2 + SIDE, MARGIN), "\n".join(text_lines), fill="black", font=middle, spacing=5)
    query = scaled(query, TILE)
    for i, word in enumerate(words):
        x, y = MARGIN + i % per_line * step, top + i // per_line * (len(rows) * row + 30)
        pen.text((x, y), shortened(f"u{i + 1} {word}", small, TILE + 4), fill="black", font=small)
        for n, (label, weights) in enumerate(rows):
            if x == MARGIN:
                pen.text((x, y + 17 + n * row), label, fill=GREY, font=small)
            paste(sheet, overlay(query, weights[i]), x, y + 34 + n * row, TILE)

    for i, (path, score) in enumerate(zip(found, scores, strict=True)):
        x, y = left + MARGIN + i % across * (PHOTO + MARGIN), MARGIN + i // across * cell
        paste(sheet, blip_lite.to_rgb(open_image(path)), x, y, PHOTO)
        pen.text((x, y + PHOTO + 3), f"{i + 1}.  {score:.3f}", fill="black", font=small)
        name = os.fsencode(os.path.basename(path)).decode(errors="replace")
        pen.text((x, y + PHOTO + 18), shortened(name, small, PHOTO), fill=GREY, font=small)
    return sheet
