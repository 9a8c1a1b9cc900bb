"""Composed search in a folder of your own photos: an image, and in words what should be different about it.

    python search.py --gallery photos/ --image holiday.jpg --text "at night" --out found.png
    python search.py --gallery photos/ --image holiday.jpg --text "at night" --json -            # for another program
    python search.py --gallery photos/ --image a.jpg --blip weights/model_base.pth --image-size 224 --checkpoint runs/cc3m/isa.pt

The default models are the pocket world's, which know nothing but its drawings: photographs want the real ones (README). BLIP looks
at every photo once. What it saw is kept in --cache-dir, so the next search encodes only photos that are new or have changed, and
an indexing that was stopped goes on where it was.
"""

import argparse
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import benchmarks
import blip_lite
import isa
import light_encoders
from blip_lite.checks import check_lengths, check_options, check_output
from blip_lite.features import autocast
from blip_lite.files import explained, locked, replacing
from blip_lite.images import identity, list_images, load_images, open_image, walk
from blip_lite.signals import exit_interrupted, interrupt_on_signals
from evaluate import add_model_options, nearest_words, open_blip, overlay, wrapped, write_json
from train import load_query_model

BATCH = 64  # photos between two writes of the index: what a kill can lose


# ---------------------------------------------------------------------------------------------- the index of a folder
def photos_below(folder):
    """Paths of the photos in a folder and its sub-folders, in a fixed order. Raises ValueError where there are none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder; give a folder of photos with --gallery")
    paths = [path for path in walk(folder) if not path.endswith(".tar")]
    if not paths:
        raise ValueError(f"{folder}: holds no photos; give a folder of photos with --gallery")
    return paths


def index(blip, paths, folder, precision, cache, workers=1):
    """Features of photos, each computed once -> v float32 [N, E], unit norm; NaN for what cannot be read as an image.

    The index is one file of records (what identifies a photo: path, size, time of change; its v), to which new ones are appended;
    a half-written last one is cut off. Photos that are gone are forgotten when they are more than those that are there.
    """
    kind = np.dtype([("id", "S32"), ("v", np.float32, (blip.embed_dim,))])
    key = f"{os.path.realpath(folder)}\0{blip.fingerprint}\0{precision}"
    place = Path(cache) / f"photos-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}"
    wanted = [hashlib.sha256(identity(os.path.abspath(path))).hexdigest()[:32].encode() for path in paths]
    with locked(place):  # one search at a time writes; the next finds it done
        file = place / "records"
        file.touch()
        os.truncate(file, file.stat().st_size // kind.itemsize * kind.itemsize)
        known = set(np.fromfile(file, kind)["id"].tolist())
        new = [i for i, name in enumerate(wanted) if name not in known]
        with file.open("ab") as records:
            for rows, v in encode(blip, [paths[i] for i in new], precision, workers):
                batch = np.empty(len(rows), kind)
                batch["id"], batch["v"] = [wanted[new[i]] for i in rows], v
                with explained(file):
                    records.write(batch.tobytes())
                    records.flush()
        stored = np.fromfile(file, kind)
        row = {name: i for i, name in enumerate(stored["id"].tolist())}
        stored = stored[[row[name] for name in wanted]]
        if len(row) > 2 * len(wanted):
            with replacing(file) as records:
                records.write(stored.tobytes())
    return torch.from_numpy(stored["v"].copy())


@torch.no_grad()
def encode(blip, paths, precision, workers):
    """Batches of (row numbers, v [M, E] as an array): of what cannot be read, NaN, with a line on stderr."""
    preprocess = partial(blip_lite.to_pixels, image_size=blip.image_size, mean=blip_lite.MEAN, std=blip_lite.STD)
    device = blip.temp.device
    with tqdm(total=len(paths), desc="indexing photos", unit="photo", disable=None if paths else True) as bar:
        for rows, pixels, bad in load_images(list_images(paths), preprocess, BATCH, workers) if paths else ():
            for why in bad.values():
                print(f"left out: {why}", file=sys.stderr)
            v = np.full((len(rows) + len(bad), blip.embed_dim), np.nan, np.float32)
            if rows:
                with autocast(device, precision):
                    v[: len(rows)] = blip.encode_image(pixels.to(device), cls_only=True)[0].float().cpu()
            yield [*rows, *bad], v
            bar.update(len(v))


# ---------------------------------------------------------------------------------------------- the query
@torch.no_grad()
def compose(blip, model, image, text, prompt, precision):
    """A PIL image and a text -> q [1, E], U [1, L, d_w], and (grouping, cross) maps [L, H, W], None where the mapper has none."""
    device = blip.temp.device
    with autocast(device, precision):
        feature_map = model.encoder(light_encoders.preprocess(model.encoder, image)[None].to(device))
        U = model.mapper(feature_map)
        q = blip.encode_text(*isa.compose_query(blip, U, [text], prompt))
        maps = model.mapper.attention_maps(feature_map) if hasattr(model.mapper, "attention_maps") else (None, None)
    return q.float().cpu(), U.float(), [None if m is None else m[0].float().cpu() for m in maps]


def search(args):
    """-> (paths best first, their scores), and what the contact sheet shows of the query."""
    paths = photos_below(args.gallery)
    image = blip_lite.to_rgb(open_image(args.image))
    blip, precision = open_blip(args)
    model, trained = load_query_model(args.checkpoint, blip)
    if trained["gallery"] == "query":
        raise ValueError(f"{args.checkpoint}: was trained for a gallery of its own; search.py has BLIP's: give another checkpoint")
    check_lengths(blip, trained["prompt"], trained["tokens"], [("--text", args.text)])
    q, U, maps = compose(blip, model, image, args.text, trained["prompt"], precision)
    v = index(blip, paths, args.gallery, precision, args.cache_dir, args.workers)

    itself = os.path.realpath(args.image)
    good = v.isfinite().all(dim=1)
    kept = [i for i in good.nonzero()[:, 0].tolist() if args.keep_query or os.path.realpath(paths[i]) != itself]
    print(f"{len(paths)} photos in {args.gallery}, {int((~good).sum())} of them cannot be read and are left out", file=sys.stderr)
    if not kept:
        raise ValueError(f"{args.gallery}: holds no photo that can be read besides the query; give another folder with --gallery")
    best = benchmarks.top_k(q, v[kept], args.top)[0].tolist()
    scores = (v[kept][best] @ q[0]).tolist()
    return [paths[kept[i]] for i in best], scores, image, nearest_words(blip, U)[0][0], maps


# ---------------------------------------------------------------------------------------------- the contact sheet
TILE, SIDE, PHOTO, MARGIN, ACROSS = 72, 220, 150, 16, 5  # pixels: a map, the query, a photo found, what is left empty; photos a row
GREY = (110, 110, 110)


def fitted(image, side):
    """The image within a white square, its proportions kept."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    if max(image.size) < side:  # a drawing of 64 pixels
        small = image.resize([round(x * side / max(image.size)) for x in image.size], Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), "white")
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


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
    per_line = min(len(words), 6)
    left = max(per_line * (TILE + 6), 2 * SIDE) + 2 * MARGIN
    lines = -(-len(words) // per_line)
    text_lines = wrapped(f"that {text}" if text else "(no text)", 24).split("\n")
    top = max(SIDE, 20 * len(text_lines)) + 2 * MARGIN
    height = top + lines * (len(rows) * (TILE + 22) + 30)
    cell = PHOTO + 44
    across = min(ACROSS, len(found))
    size = left + MARGIN + across * (PHOTO + MARGIN), max(height, MARGIN + -(-len(found) // across) * cell)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)

    sheet.paste(fitted(query, SIDE), (MARGIN, MARGIN))
    pen.multiline_text((MARGIN * 2 + SIDE, MARGIN), "\n".join(text_lines), fill="black", font=middle, spacing=5)
    for line in range(lines):
        some = range(line * per_line, min(len(words), (line + 1) * per_line))
        y = top + line * (len(rows) * (TILE + 22) + 30)
        for i in some:
            word = shortened(f"u{i + 1} {words[i]}", small, TILE + 4)
            pen.text((MARGIN + (i - some[0]) * (TILE + 6), y), word, fill="black", font=small)
        for n, (label, weights) in enumerate(rows):
            for i in some:
                seen = fitted(overlay(query, weights[i]), TILE)
                sheet.paste(seen, (MARGIN + (i - some[0]) * (TILE + 6), y + 18 + n * (TILE + 22)))
            pen.text((MARGIN, y + 19 + n * (TILE + 22) + TILE), label, fill=GREY, font=small)

    for i, (path, score) in enumerate(zip(found, scores, strict=True)):
        x, y = left + MARGIN + i % across * (PHOTO + MARGIN), MARGIN + i // across * cell
        sheet.paste(fitted(blip_lite.to_rgb(open_image(path)), PHOTO), (x, y))
        pen.text((x, y + PHOTO + 3), f"{i + 1}.  {score:.3f}", fill="black", font=small)
        name = os.fsencode(os.path.basename(path)).decode(errors="replace")
        pen.text((x, y + PHOTO + 18), shortened(name, small, PHOTO), fill=GREY, font=small)
    return sheet


# ---------------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--gallery", required=True, help="folder of photos, searched with its sub-folders")
    p.add_argument("--image", required=True, help="the query image; left out of the result if it lies in the gallery")
    p.add_argument("--text", default="", help='what should be different, to follow "that": "has a red car", "is at night"; '
                   "without it, photos like the image are found")
    p.add_argument("--top", type=int, default=10, help="how many photos to find")
    p.add_argument("--out", help="write a contact sheet to this file (.png, .jpg)")
    p.add_argument("--json", help='write the result to this file; "-" = print it, instead of the list')
    p.add_argument("--keep-query", action="store_true", help="do not leave the query image out")
    p.add_argument("--checkpoint", default=str(Path(__file__).resolve().parent / "pocket" / "isa.pt"), help="isa.pt of train.py")
    add_model_options(p)
    args = p.parse_args(argv)
    check_options(p, args, top=1, workers=0, threads=0)
    if args.out and Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        p.error(f"--out has to be a .png or .jpg file, not {args.out}")
    return args


def main(args):
    for path in (args.out, args.json if args.json != "-" else None):
        if path:
            check_output(path)
    found, scores, image, words, maps = search(args)
    names = [os.fsencode(path).decode(errors="replace") for path in found]  # which need not be UTF-8
    ranked = enumerate(zip(scores, names, strict=True), start=1)
    results = [{"rank": rank, "score": round(score, 4), "path": name} for rank, (score, name) in ranked]
    document = {"image": args.image, "text": args.text, "gallery": args.gallery, "blip": args.blip, "checkpoint": args.checkpoint,
                "nearest_words": words, "results": results}  # fmt: skip
    if args.json == "-":
        print(json.dumps(document, indent=1))
    else:
        for row in results:
            print(f"{row['rank']:3d}  {row['score']:.4f}  {row['path']}")
        if args.json:
            write_json(args.json, document)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.out) as file:  # whose name tells PIL the format
            contact_sheet(image, args.text, words, maps, found, scores).save(file, quality=90)
        print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    interrupt_on_signals()
    arguments = parse_args()
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"search.py: {error}")
    except KeyboardInterrupt as interrupt:
        exit_interrupted(interrupt, "search.py: interrupted; what was indexed is kept, the next search goes on from there")
