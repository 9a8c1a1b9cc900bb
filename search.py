"""Composed search in your own photos: an image, and in words what should be different about it.

    python search.py --gallery photos/ --image beach.jpg --text "at night" --out found.png
    python search.py --gallery photos/ --image beach.jpg --text "at night" --json - \\
        --blip weights/model_base.pth --image-size 224 --checkpoint runs/cc3m/isa.pt

The default models know only the pocket world's drawings (README). Each photo is encoded once.
"""

import argparse
import hashlib
import json
import os
import sys
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
from plumbing.images import identity, list_images, load_images, open_image, walk
from plumbing.options import add_shared_options, check_lengths, check_options
from plumbing.pictures import check_picture, contact_sheet, nearest_words, save_picture
from plumbing.precision import autocast, open_blip


def index(blip, paths, root, precision, cache, workers=1):
    """Paths of photos below the folder `root` -> those that can be read, v [N, E] of unit norm.

    The index is a file of records: an id (hash of path, size and time of change) and v, float32. A
    half-written last one is cut off; those of lost photos are dropped once they are the majority.
    """
    key = hashlib.sha256(os.fsencode(f"{root}\0{blip.fingerprint}\0{precision}")).hexdigest()[:16]
    ids = [hashlib.sha256(identity(path)).hexdigest()[:32].encode() for path in paths]
    kind = np.dtype([("id", "S32"), ("v", np.float32, (blip.embed_dim,))])
    file = Path(cache) / f"photos-{key}" / "records"
    with locked(file.parent):  # one search at a time writes; the next finds its work done
        file.touch()
        os.truncate(file, file.stat().st_size // kind.itemsize * kind.itemsize)
        known = set(np.fromfile(file, kind)["id"].tolist())
        new = [i for i, name in enumerate(ids) if name not in known]
        for rows, v in encode(blip, [paths[i] for i in new], precision, workers) if new else ():
            batch = [(ids[new[row]], feature) for row, feature in zip(rows, v, strict=True)]
            with explained(file), open(file, "ab") as records:
                records.write(np.array(batch, kind).tobytes())
        stored = np.fromfile(file, kind)
        row = {name: i for i, name in enumerate(stored["id"].tolist())}
        there = [i for i, name in enumerate(ids) if name in row]
        stored = stored[[row[ids[i]] for i in there]]
        if len(row) > 2 * len(ids):
            with replacing(file) as records:
                records.write(stored.tobytes())
    return [paths[i] for i in there], torch.from_numpy(stored["v"].copy())


@torch.no_grad()
def encode(blip, paths, precision, workers):
    """Yields (row numbers, their v [M, E] as an array); names on stderr what cannot be read."""
    batches = load_images(list_images(paths), blip.preprocess, 64, workers)  # a kill loses 64
    for rows, pixels, bad in tqdm(batches, "indexing photos", unit="batch", disable=None):
        for why in bad.values():
            tqdm.write(f"left out: {why}", file=sys.stderr)
        if rows:
            with autocast(blip.temp.device, precision):
                v, _ = blip.encode_image(pixels.to(blip.temp.device), cls_only=True)
            yield rows, v.float().cpu().numpy()


@torch.no_grad()
def compose(blip, model, prompt, image, text, precision):
    """A PIL image and a text -> q [1, E], U [1, L, d_w], two maps [L, H, W] as in isa, or None."""
    pixels = query_side.preprocess(model.encoder, image)[None].to(blip.temp.device)
    with autocast(pixels.device, precision):
        feature_map = model.encoder(pixels)
        U = model.mapper(feature_map)
        q = blip.encode_text(*isa.compose_query(blip, U, [text], prompt))
        attend = getattr(model.mapper, "attention_maps", lambda _: (None, None))
        maps = [None if m is None else m[0].float().cpu() for m in attend(feature_map)]
    return q.float().cpu(), U.float(), maps


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--gallery", required=True, help="folder of photos, searched with its sub-folders")
    add("--image", required=True, help="the query image; left out of the result")
    add("--text", default="", help='what should be different: "(that) has a red car"; without it, '
        "photos like the image are found")
    add("--top", type=int, default=10, help="how many photos to find")
    add("--out", help="write a contact sheet to this file (.png, .jpg)")
    add("--json", help='write the result to this file; "-" = print it, in place of the list')
    add("--keep-query", action="store_true", help="do not leave the query image out")
    pocket = str(Path(__file__).resolve().parent / "pocket" / "isa.pt")
    add("--checkpoint", default=pocket, help="isa.pt of train.py")
    add_shared_options(p)
    args = p.parse_args(argv)
    check_options(p, args, top=1)
    return args


def main(args):
    if args.out:
        check_picture(args.out)
    if args.json and args.json != "-":
        check_output(args.json)
    check_folder(args.cache_dir)
    if not os.path.exists(args.image):
        raise ValueError(f"{args.image}: there is no such image; give the query image with --image")
    image = blip_lite.to_rgb(open_image(args.image))
    if not os.path.isdir(args.gallery):
        raise ValueError(f"{args.gallery}: there is no such folder; give another with --gallery")
    root = os.path.realpath(args.gallery)  # one index, whichever way the folder is reached
    paths = [path for path in walk(root) if not path.endswith(".tar")]
    if not paths:
        raise ValueError(f"{args.gallery}: holds no photos; give another folder with --gallery")
    blip, args.precision = open_blip(vars(args))
    model, trained = query_side.load_query_model(args.checkpoint, blip)
    if trained["gallery"] == "query":
        raise ValueError(f"{args.checkpoint}: was trained for its own gallery; give another model")
    prompt = trained["prompt"]
    check_lengths(blip, prompt, trained["tokens"], [("--text", isa.continuation(args.text))])
    if unknown := blip.tokenizer.unknown_words(args.text):
        print(f"not in BLIP's vocabulary: {', '.join(unknown)}", file=sys.stderr)

    q, U, maps = compose(blip, model, prompt, image, args.text, args.precision)
    photos, v = index(blip, paths, root, args.precision, args.cache_dir, args.workers)
    print(f"{len(paths)} photos in {args.gallery}, {len(photos)} of them readable", file=sys.stderr)
    kept = [i for i, path in enumerate(photos) if args.keep_query or not os.path.exists(path)
            or not os.path.samefile(path, args.image)]
    if not kept:
        raise ValueError(f"{args.gallery}: no other photo can be read; give another folder")
    best = [kept[i] for i in benchmarks.top_k(q, v[kept], args.top)[0].tolist()]
    scores = (v[best] @ q[0]).tolist()
    found = [os.path.join(args.gallery, os.path.relpath(photos[i], root)) for i in best]
    results = [{"rank": rank, "score": round(score, 4), "path": path}
               for rank, (path, score) in enumerate(zip(found, scores, strict=True), start=1)]
    (words,), _ = nearest_words(blip, U)
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
        save_picture(contact_sheet(image, args.text, words, maps, found, scores), args.out)
        print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    run_command("search.py", main, parse_args(), "interrupted; the next search resumes the index")
