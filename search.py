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
from tqdm import tqdm

import benchmarks
import blip_lite
import isa
import query_side
from plumbing.command import run_command
from plumbing.files import check_folder, check_output, explained, locked, replacing, write_json
from plumbing.images import SUFFIXES, identity, list_images, load_images, open_image, walk
from plumbing.options import add_shared_options, check_lengths, check_options
from plumbing.pictures import contact_sheet, nearest_words
from plumbing.precision import autocast, open_blip
from query_side.query_model import load_query_model

BATCH = 64  # photos between two writes of the index: what a kill can lose


def photos_below(folder):
    """Paths of the photos in a folder and its sub-folders, in a fixed order. Raises ValueError where there are none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder; give a folder of photos with --gallery")
    paths = [path for path in walk(folder) if not path.endswith(".tar")]
    if not paths:
        raise ValueError(f"{folder}: holds no photos; give a folder of photos with --gallery")
    return paths


def place_of_index(blip, folder, precision, cache):
    """An index belongs to one folder of photos, however it is reached, one BLIP and one precision."""
    key = f"{os.path.realpath(folder)}\0{blip.fingerprint}\0{precision}"
    return Path(cache) / f"photos-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}"


def index(blip, paths, folder, precision, cache, workers=1):
    """Features of the photos below a folder, each computed once -> v float32 [N, E], unit norm; NaN for what cannot be read.

    The index is one file of records (what identifies a photo: path, size, time of change; its v), to which new ones are appended;
    a half-written last one is cut off. Photos that are gone are forgotten when they are more than those that are there. What cannot
    be read has no record: it is tried again next time, since the fault may be the disk's.
    """
    kind = np.dtype([("id", "S32"), ("v", np.float32, (blip.embed_dim,))])
    place, root = place_of_index(blip, folder, precision, cache), os.path.realpath(folder)
    names = (os.path.join(root, path[len(os.fspath(folder)) :].lstrip(os.sep)) for path in paths)  # relpath, ten times as fast
    wanted = [hashlib.sha256(identity(name)).hexdigest()[:32].encode() for name in names]
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
        there = [i for i, name in enumerate(wanted) if name in row]
        stored = stored[[row[wanted[i]] for i in there]]
        if len(row) > 2 * len(wanted):
            with replacing(file) as records:
                records.write(stored.tobytes())
    v = torch.full((len(paths), blip.embed_dim), torch.nan)
    v[there] = torch.from_numpy(stored["v"])
    return v


@torch.no_grad()
def encode(blip, paths, precision, workers):
    """Batches of (row numbers, v [M, E] as an array); what cannot be read is named on stderr and left out."""
    preprocess = partial(blip_lite.to_pixels, image_size=blip.image_size, mean=blip_lite.MEAN, std=blip_lite.STD)
    device = blip.temp.device
    with tqdm(total=len(paths), desc="indexing photos", unit="photo", disable=None if paths else True) as bar:
        for rows, pixels, bad in load_images(list_images(paths), preprocess, BATCH, workers) if paths else ():
            for why in bad.values():
                tqdm.write(f"left out: {why}", file=sys.stderr)
            if rows:
                with autocast(device, precision):
                    v = blip.encode_image(pixels.to(device), cls_only=True)[0]
                yield rows, v.float().cpu().numpy()
            bar.update(len(rows) + len(bad))


@torch.no_grad()
def compose(blip, model, image, text, prompt, precision):
    """A PIL image and a text -> q [1, E], U [1, L, d_w], and (grouping, cross) maps [L, H, W], None where the mapper has none."""
    device = blip.temp.device
    with autocast(device, precision):
        feature_map = model.encoder(query_side.preprocess(model.encoder, image)[None].to(device))
        U = model.mapper(feature_map)
        q = blip.encode_text(*isa.compose_query(blip, U, [text], prompt))
        maps = model.mapper.attention_maps(feature_map) if hasattr(model.mapper, "attention_maps") else (None, None)
    return q.float().cpu(), U.float(), [None if m is None else m[0].float().cpu() for m in maps]


def is_same_file(path, other):
    """Under whatever name; False where one has gone."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def search(args):
    """-> (paths best first, their scores), and what the contact sheet shows of the query."""
    if not os.path.exists(args.image):
        raise ValueError(f"{args.image}: there is no such image; give the query image with --image")
    image = blip_lite.to_rgb(open_image(args.image))
    paths = photos_below(args.gallery)
    blip, precision = open_blip(vars(args))
    indexed = [p for p in ("fp32", "bf16") if place_of_index(blip, args.gallery, p, args.cache_dir).exists()]
    if args.precision == "auto" and indexed and precision not in indexed:  # auto is timed: a busy moment must not cost an index
        args.precision = indexed[0]
        blip, precision = open_blip(vars(args))
    args.precision = precision  # for the settings in --json
    model, trained = load_query_model(args.checkpoint, blip)
    if trained["gallery"] == "query":
        raise ValueError(f"{args.checkpoint}: was trained for a gallery of its own; search.py has BLIP's: give another checkpoint")
    check_lengths(blip, trained["prompt"], trained["tokens"], [("--text", isa.continuation(args.text))])
    q, U, maps = compose(blip, model, image, args.text, trained["prompt"], precision)
    v = index(blip, paths, args.gallery, precision, args.cache_dir, args.workers)

    good = v.isfinite().all(dim=1)
    bad = len(paths) - int(good.sum())
    told = f", {bad} of them cannot be read and are left out" if bad else ""
    print(f"{len(paths)} photos in {args.gallery}{told}", file=sys.stderr)
    kept = [i for i in good.nonzero()[:, 0].tolist() if args.keep_query or not is_same_file(paths[i], args.image)]
    if not kept:
        raise ValueError(f"{args.gallery}: holds no photo that can be read besides the query; give another folder with --gallery")
    best = benchmarks.top_k(q, v[kept], args.top)[0].tolist()
    scores = (v[kept][best] @ q[0]).tolist()
    return [paths[kept[i]] for i in best], scores, image, nearest_words(blip, U)[0][0], maps


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--gallery", required=True, help=f"folder of photos ({' '.join(SUFFIXES)}), searched with its sub-folders")
    p.add_argument("--image", required=True, help="the query image; left out of the result if it lies in the gallery")
    p.add_argument("--text", default="", help='what should be different, to follow "that": "has a red car", "is at night"; '
                   "without it, photos like the image are found")
    p.add_argument("--top", type=int, default=10, help="how many photos to find")
    p.add_argument("--out", help="write a contact sheet to this file (.png, .jpg)")
    p.add_argument("--json", help='write the result to this file; "-" = print it, instead of the list')
    p.add_argument("--keep-query", action="store_true", help="do not leave the query image out")
    p.add_argument("--checkpoint", default=str(Path(__file__).resolve().parent / "pocket" / "isa.pt"), help="isa.pt of train.py")
    add_shared_options(p)
    args = p.parse_args(argv)
    check_options(p, args, top=1, workers=0, threads=0)
    if args.out and Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        p.error(f"--out has to be a .png or .jpg file, not {args.out}")
    return args


def main(args):
    for path in (args.out, args.json if args.json != "-" else None):
        if path:
            check_output(path)
    check_folder(args.cache_dir)
    found, scores, image, words, maps = search(args)
    ranked = enumerate(zip(scores, found, strict=True), start=1)
    results = [{"rank": rank, "score": round(score, 4), "path": path} for rank, (score, path) in ranked]
    document = {"settings": vars(args), "nearest_words": words, "results": results}
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
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
    run_command("search.py", main, parse_args(), "interrupted; indexed photos are kept, the next search continues from there")
