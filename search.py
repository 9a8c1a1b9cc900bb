"""Composed search in your own photos: an image, and in words what should be different about it.

    python search.py --serve                    # a page in your browser, on the pocket world
    python search.py --gallery photos/ --image beach.jpg --text "at night" --out found.png
    python search.py --gallery photos/ --image beach.jpg --text "at night" --json - \\
        --blip weights/model_base.pth --image-size 224 --checkpoint runs/cc3m/isa.pt

The default models know only the pocket world's drawings (README). Each photo is encoded once.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from time import perf_counter

import torch

import benchmarks
import blip_lite
import isa
import query_side
from baselines.page import Page
from plumbing import page
from plumbing.command import run_command
from plumbing.files import check_folder, check_output, write_json
from plumbing.images import list_images, open_image, walk
from plumbing.options import RERANK, SHARED, add_shared_options, check_lengths, check_options
from plumbing.photos import index
from plumbing.pictures import check_picture, contact_sheet, nearest_words, save_picture
from plumbing.precision import autocast, open_blip
from pocket import suggestions, world


@torch.no_grad()
def speak(model, image, precision):
    """The phone's half: a PIL image -> U [1, L, d_w], two maps [L, H, W] or None, milliseconds.

    maps as in isa; the time is without them.
    """
    began = perf_counter()
    pixels = query_side.preprocess(model.encoder, image)[None].to(next(model.parameters()).device)
    with autocast(pixels.device, precision):
        feature_map = model.encoder(pixels)
        U = model.mapper(feature_map).float()
        U.sum().item()  # waits for a GPU
        spent = 1000 * (perf_counter() - began)
        attend = getattr(model.mapper, "attention_maps", lambda _: (None, None))
        maps = [None if m is None else m[0].float().cpu() for m in attend(feature_map)]
    return U, maps, spent


@torch.no_grad()
def listen(blip, U, texts, prompt, precision):
    """The server's half: U [1, L, d_w], B texts -> their sentences (words, mask), q [B, E]."""
    with autocast(blip.temp.device, precision):
        sentences = isa.compose_query(blip, U.expand(len(texts), -1, -1), texts, prompt)
        return sentences, blip.encode_text(*sentences).float().cpu()


def find(blip, q, sentence, v, paths, args, exclude=-1):
    """Photos with v [N, E] -> rows of the best --top, their scores, matching probabilities or None.

    The first --rerank photos are read against the sentence, if any, and ordered anew. exclude: a
    row to leave out.
    """
    k = args.rerank if sentence else None
    best = benchmarks.top_k(q, v, max(args.top, k or 0), [exclude])[0]
    scores, chances = v[best] @ q[0], torch.full((len(best),), torch.nan)
    if k:
        words, mask = sentence
        chances[:k] = benchmarks.matching_probabilities(
            blip, list_images([paths[i] for i in best[:k].tolist()]),
            lambda rows: (words.expand(len(rows), -1, -1), mask.expand(len(rows), -1)),
            torch.zeros(k, dtype=torch.int64), torch.arange(k), args.precision, args.workers)
        order, scores[:k] = benchmarks.reorder(scores[:k], chances[:k], args.rerank_weight)
        best[:k], chances[:k] = best[order], chances[order]
    best, scores, chances = (x[: args.top].tolist() for x in (best, scores, chances))
    return best, scores, [None if c != c else round(c, 4) for c in chances]  # NaN is not itself


def open_gallery(args):
    """--gallery -> its real path and the paths of its photos."""
    if not os.path.isdir(args.gallery):
        raise ValueError(f"{args.gallery}: there is no such folder; give another with --gallery")
    root = os.path.realpath(args.gallery)  # one index, whichever way the folder is reached
    paths = [path for path in walk(root) if not path.endswith(".tar")]
    if not paths:
        raise ValueError(f"{args.gallery}: holds no photos; give another folder with --gallery")
    return root, paths


def open_models(args):
    """-> the frozen BLIP, the query model and its settings; resolves --precision."""
    blip, args.precision = open_blip(vars(args))
    model, trained = query_side.load_query_model(args.checkpoint, blip)
    if trained["gallery"] == "query":
        raise ValueError(f"{args.checkpoint}: was trained for its own gallery; give another model")
    return blip, model, trained


def serve(args):
    """--serve: the same search as a page, until Ctrl-C."""
    check_folder(args.cache_dir)
    server, specs = page.open_server(args.port), {}
    if not args.gallery:
        world.ensure()
        args.gallery, specs = f"data/pocket/{suggestions.PHOTOS}", suggestions.read_gallery()
    root, paths = open_gallery(args)
    opened = open_models(args)
    if args.rerank:
        benchmarks.check_reranking(opened[0], args.rerank, {args.gallery: len(paths) - 1})
    photos, v = index(opened[0], paths, root, args.precision, args.cache_dir, args.workers)
    if len(photos) <= max(1, args.rerank or 0):
        raise ValueError(f"{args.gallery}: {len(photos)} photos can be read, too few for a page; "
                         "give another folder")
    page.serve(server, Page(args, speak, listen, find, *opened, photos, v, specs))


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--gallery", help="folder of photos, searched with its sub-folders")
    add("--image", help="the query image; left out of the result")
    add("--text", default="", help='what should be different: "(that) has a red car"; without it, '
        "photos like the image are found")
    add("--top", type=int, default=10, help="how many photos to find")
    add("--out", help="write a contact sheet to this file (.png, .jpg)")
    add("--json", help='write the result to this file; "-" = print it, in place of the list')
    add("--serve", action="store_true", help="search on a page in your browser; with neither "
        "--gallery nor --blip in the pocket world, which is drawn if it is missing")
    add("--port", type=int, help="of the page, on this machine only; 0 = any free one (8000)")
    add("--keep-query", action="store_true", help="do not leave the query image out")
    pocket = str(Path(__file__).resolve().parent / "pocket" / "isa.pt")
    add("--checkpoint", default=pocket, help="isa.pt of train.py")
    add_shared_options(p, *SHARED, *RERANK)
    args = p.parse_args(argv)
    check_options(p, args, top=1, rerank=1, rerank_weight=0, port=0)
    if not args.serve:
        if args.port is not None:
            p.error("--port is the page's: give --serve, too")
        if missing := [f"--{name}" for name in ("gallery", "image") if not getattr(args, name)]:
            p.error(f"{' and '.join(missing)} must be given, or --serve")
        return args
    for name in ("image", "text", "out", "json", "keep_query"):
        if getattr(args, name):
            p.error(f"--{name.replace('_', '-')} has no place beside --serve: the page asks for "
                    "picture and text and shows what is found")
    if not args.gallery and (args.clip or args.blip) != "pocket":
        p.error("--serve needs --gallery, except with the pocket world's --blip or --clip")
    args.port = 8000 if args.port is None else args.port
    return args


def main(args):
    if args.serve:
        return serve(args)
    if args.out:
        check_picture(args.out)
    if args.json and args.json != "-":
        check_output(args.json)
    check_folder(args.cache_dir)
    if not os.path.exists(args.image):
        raise ValueError(f"{args.image}: there is no such image; give the query image with --image")
    image = blip_lite.to_rgb(open_image(args.image))
    root, paths = open_gallery(args)
    blip, model, trained = open_models(args)
    prompt = trained["prompt"]
    check_lengths(blip, prompt, trained["tokens"], [("--text", isa.continuation(args.text))])
    if unknown := blip.tokenizer.unknown_words(args.text):
        print(f"not in the model's vocabulary: {', '.join(unknown)}", file=sys.stderr)

    if args.rerank:
        benchmarks.check_reranking(blip, args.rerank, {args.gallery: len(paths)})
    U, maps, _ = speak(model, image, args.precision)
    sentence, q = listen(blip, U, [args.text], prompt, args.precision)
    photos, v = index(blip, paths, root, args.precision, args.cache_dir, args.workers)
    print(f"{len(paths)} photos in {args.gallery}, {len(photos)} of them readable", file=sys.stderr)
    kept = [i for i, path in enumerate(photos) if args.keep_query or not os.path.exists(path)
            or not os.path.samefile(path, args.image)]
    if not kept:
        raise ValueError(f"{args.gallery}: no other photo can be read; give another folder")
    if args.rerank:
        benchmarks.check_reranking(blip, args.rerank, {args.gallery: len(kept)})
    photos = [photos[i] for i in kept]
    best, scores, chances = find(blip, q, sentence, v[kept], photos, args)
    found = [os.path.join(args.gallery, os.path.relpath(photos[i], root)) for i in best]
    results = [{"rank": rank, "score": round(score, 4), "path": path}
               for rank, (path, score) in enumerate(zip(found, scores, strict=True), start=1)]
    if args.rerank:
        results = [row | {"match": chance} for row, chance in zip(results, chances, strict=True)]
    (words,), _ = nearest_words(blip, U)
    document = {"settings": vars(args), "nearest_words": words, "results": results}
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
    run_command("search.py", main, parse_args(), lambda args: "the page is closed" if args.serve
                else "interrupted; the next search resumes the index")
