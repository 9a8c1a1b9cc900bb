"""Wrong inputs through the real command lines: each costs a minute and one clear sentence.

CASES is one table. A case runs in this process, which spares the import of torch, and as a process
of its own: by default every third one and a few, with `-m "slow or not slow"` all of them twice.
Whatever goes wrong, the exit status is 1 (2 for the command line itself), one line on stderr names
the file or the value and the remedy, nothing is executed, and no file is new or changed.
"""

import ctypes
import io
import json
import os
import pickle
import resource
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Finished
from PIL import Image

import blip_lite
import isa
from plumbing.features import Features
from plumbing.images import find_images

LONGEST = 700  # characters; nobody reads a longer sentence


# ---- wrong files
# A case's `wrong` is a dict, file -> content: bytes or text, a path to copy, None for no such file,
# a function (here, path) -> one of these; for a name that ends in "/" how many sound images the
# folder holds. A file in cirr/, fashioniq/ or circo/ lies in a copy of that benchmark.
def spoil(here, wrong):
    for name, content in (wrong or {}).items():
        path, root = here.cwd / name, name.split("/")[0]
        if root in BENCHMARKS and not (here.cwd / root).exists():
            shutil.copytree(here.world / root, here.cwd / root)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
            count = content(here, path) if callable(content) else content
            for image in sorted((here.world / "train").iterdir())[:count]:
                shutil.copy(image, path)
            continue
        content = content(here, path) if callable(content) else content
        content = content.read_bytes() if isinstance(content, Path) else content
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def saved(value):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Evil:
    """Makes a folder when it is unpickled by what executes pickles."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


BENCHMARKS = ("cirr", "fashioniq", "circo")
BLIP, VOCAB = ROOT / "pocket/blip.pth", ROOT / "pocket/vocab.txt"
CLIP = ROOT / "pocket/clip.pth"
EVIL = saved({"model": {"x": Evil()}, "query_model": Evil(), "settings": {}, "blip": ""})
HTML = "<!DOCTYPE html><html><body>Sign in to download</body></html>"


def half(source):
    """The first half of a file, or of one of the places in `here`."""
    def content(here, path):
        data = Path(here.places.get(source, source)).read_bytes()
        return data[: len(data) // 2]

    return content


def blip_weights(change):
    """Pocket BLIP's file after change(its state dict)."""
    def content(here, path):
        state = torch.load(BLIP, weights_only=True)["model"]
        change(state)
        return saved({"model": state})

    return content


def checkpoint(change, source="isa"):
    """The trained isa.pt (or last.pt) after change(checkpoint)."""
    def content(here, path):
        made = torch.load(here.places[source], weights_only=True)
        change(made)
        return saved(made)

    return content


def nan(made):
    made["query_model"]["mapper.W_p.bias"].fill_(torch.nan)


def weights(make):
    """make(the query model's weights)."""
    return lambda here, path: saved(make(torch.load(here.places["isa"])["query_model"]))


def entry(number=0, **fields):
    """JSON with other fields in one entry of its list; None removes a field."""
    def content(here, path):
        entries = json.loads(path.read_text())
        changed = {k: v for k, v in {**entries[number], **fields}.items() if v is not None}
        return json.dumps([*entries[:number], changed, *entries[number + 1 :]])

    return content


def image_paths(relative):
    """CIRR's list of images, in which each is at the path `relative`."""
    return lambda here, path: json.dumps(dict.fromkeys(json.loads(path.read_text()), relative))


def predictions(change):
    """A sound prediction file for CIRR val after change(document)."""
    def content(here, path):
        root = here.world / "cirr"
        names = list(json.loads((root / "image_splits/split.rc2.val.json").read_text()))
        document = {"version": "rc2", "metric": "recall"}
        for query in json.loads((root / "captions/cap.rc2.val.json").read_text()):
            document[str(query["pairid"])] = [x for x in names if x != query["reference"]]
        change(document)
        return json.dumps(document)

    return content


def shard(mode="w", share=1.0):
    """A .tar file of four images; mode "w:gz" is what tar -z makes; share < 1 cuts it off."""
    def content(here, path):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode) as out:
            for image in sorted((here.world / "train").iterdir())[:4]:
                out.add(image, image.name)
        return file.getvalue()[: int(share * len(file.getvalue()))]

    return content


def features(name):
    """The trained run's cache, in which the files `name` of the stored features are cut off."""
    def content(here, path):
        shutil.copytree(here.places["cache"], path, dirs_exist_ok=True)
        for file in path.glob(f"features-*/{name}"):
            file.write_bytes(file.read_bytes()[:20])
        return 0

    return content


def huge_png(side=30_000):
    """A valid grey PNG of zeros: 900 million pixels in less than a megabyte."""
    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    size = side * (1 + side)  # a row is a byte for its filter, then its pixels
    packer = zlib.compressobj(9, wbits=-15)
    part = packer.compress(bytes(size // 1000)) + packer.flush(zlib.Z_FULL_FLUSH)  # may be repeated
    adler = struct.pack(">HH", size % 65521, 1)  # of zeros
    rows = b"\x78\xda" + 1000 * part + b"\3\0" + adler
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        map(chunk, (b"IHDR", b"IDAT", b"IEND"), (header, rows, b"")))


# ---- the table
@dataclass
class Case:
    name: str
    command: str  # as typed; {isa} and so on: see `here`
    says: tuple  # parts of the one line
    wrong: dict | None = None  # see `spoil`
    leaves: tuple = ()  # files that may be new afterwards, beside cache/
    status: int = 1
    real: bool = False  # also as a process of its own in the default suite


def cases(command, *rows, **fields):
    """A row: what follows the command, parts of the line with "|" between them, what is wrong."""
    script, *_, last = command.removeprefix("-m ").split() * 2
    start = f"{script} {last}" if last.startswith("--") else script
    return [Case(f"{start} {end}: {says}", f"{command} {end}", says.split("|"), *more, **fields)
            for end, says, *more in rows]


def usage(command, *rows, **fields):
    return cases(command, *rows, status=2, **fields)


TRAIN = ("train.py --images {images} --precision fp32 --workers 0 --batch 8 --epochs 1 --name new "
         "--cache-dir cache")
RESUME = f"{TRAIN} --name old --images {{trained_images}} --cache-dir {{cache}} --batch 40 --resume"
ENCODING = "--precision fp32 --workers 0 --cache-dir {cache}"
TABLE = f"evaluate.py table {ENCODING} --checkpoint {{isa}} --benchmark cirr --data"
CIRR = f"{TABLE} {{world}}/cirr"
FASHION = f"{TABLE.replace('cirr', 'fashioniq')} fashioniq"
CIRCO = f"{TABLE.replace('cirr', 'circo')} circo"
SUBMIT = (f"evaluate.py submit {ENCODING} --checkpoint {{isa}} --benchmark cirr "
          "--data {world}/cirr")
SCORE = "evaluate.py score --benchmark cirr --data {world}/cirr"
SEARCH = f"search.py {ENCODING}"
SEARLE = ("-m baselines.searle --images {images} --sentences {sentences} --precision fp32 "
          "--name new --cache-dir {cache} --steps 1 --epochs 1")
WORLD = "-m pocket.world"
PRETRAIN = "-m pocket.pretrain --steps 1 --batch 8 --held-out 10 --out b.pth"
DOWNLOAD = "-m plumbing.download"
PAPER = "-m paper"
CAPTIONS, SPLIT = "cirr/captions/cap.rc2.test1.json", "cirr/image_splits/split.rc2.test1.json"
DRESS, TRUTHS = "fashioniq/captions/cap.dress.test.json", "circo/annotations/test.json"
PHOTO = "cirr/img_raw/test1/test1-1-0-img0.png"
DAMAGED = {f"photos/a{i:03d}.png": "text" for i in range(120)}
LAST, LOG = "runs/old/last.pt", ("runs/new/log.jsonl",)

CASES = [
    # ---- weights of BLIP
    *cases(f"{TRAIN} --blip", ("x.pth", "x.pth|run code|mkdir|trust", {"x.pth": EVIL}), real=True),
    *cases(
        f"{TRAIN} --blip",
        ("x.bin", "x.bin|run code|trust", {"x.bin": pickle.dumps(Evil(), protocol=2)}),
        ("weights/base.pth", "weights/base.pth: there is no such file|plumbing.download"),
        ("x.pth", "x.pth|damaged|download", {"x.pth": half(BLIP)}),
        ("x.pth", "x.pth|empty|download", {"x.pth": ""}),
        ("x.pth", "x.pth|web page|download", {"x.pth": HTML}),
        ("{isa}", "isa.pt|train.py|--checkpoint"),
        ("{images}", "a few images|model.safetensors|path"),
        ("x.pth", "x.pth|not a BLIP", {"x.pth": weights(lambda w: w)}),
        ("x.pth", "x.pth|1 missing: text_proj.bias|vision_proj.bias [7] instead of [64]",
         {"x.pth": blip_weights(lambda state: (
             state.pop("text_proj.bias"), state.update({"vision_proj.bias": torch.zeros(7)})))}),
        ("x.pth", "x.pth|NaN|itm_head.bias|download",
         {"x.pth": blip_weights(lambda state: state["itm_head.bias"].fill_(torch.nan))}),
        ("x.safetensors", "x.safetensors|damaged|download",
         {"x.safetensors": struct.pack("<Q", 2**62) + b"{}"}),
        ("x.pth", "x.pth holds a CLIP|not a BLIP|--clip", {"x.pth": CLIP}),
        ("x.pth", "vocab.txt|x.pth|--vocab", {"x.pth": BLIP})),
    *cases(f"{TRAIN} --loss gcd --clip", ("{blip}", "blip.pth holds a BLIP|not a CLIP|--blip"),
           ("x.pt", "x.pt|damaged|download", {"x.pt": half(CLIP)}),
           ("x.pth", "merges.txt|beside x.pth|--vocab|plumbing.download", {"x.pth": CLIP}),
           ("pocket --vocab v.txt", "v.txt|not a list of pairs|merges.txt", {"v.txt": VOCAB}),
           ("pocket --vocab v.txt", "v.txt makes 515 tokens|know 711", {"v.txt": "r e\n"}),
           ("none.pt", "none.pt: there is no such file|plumbing.download")),
    *cases(
        f"{TRAIN} --vocab",
        ("v.txt", "v.txt|5 tokens|belongs", {"v.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n"}),
        ("none.txt", "none.txt|cannot be read|vocab.txt"), ("{blip}", "blip.pth|UTF-8|vocab.txt")),
    *cases(f"{TRAIN} --mapper", ("mlp", "one word, not 6|--tokens 1")),
    *cases(f"{CIRR} --image-size", ("-64", "image size -64|8 is near")),
    *cases(f"{TRAIN} --image-size", ("60", "image size 60|64 is near"),
           ("80000", "image size 80000|at most 1024")),

    # ---- checkpoints
    *cases(
        f"{CIRR} --checkpoint",
        ("x.pt", "x.pt|damaged|train.py", {"x.pt": EVIL}),
        ("x.pt", "x.pt|damaged|train", {"x.pt": half("isa")}),
        ("x.pt", "x.pt|damaged|another", {"x.pt": HTML}),
        ("{run}", "is a folder|isa.pt"),
        ("{blip} --blip {isa}", "blip.pth|train.py|--blip"),
        ("{isa} --image-size 96", "@64|@96|--image-size"),
        ("{isa} --clip pocket", "trained against BLIP|--clip"),
        ("{isa} --blip x.pth", "trained against BLIP|same --blip",
         {"vocab.txt": VOCAB, "x.pth": blip_weights(lambda state: state["itm_head.bias"].add_(1))}),
        ("x.pt", "x.pt|another|train again",
         {"x.pt": checkpoint(lambda made: made["query_model"].pop("mapper.W_p.bias"))}),
        ("x.pt", "x.pt|another|train again",
         {"x.pt": checkpoint(lambda made: made["settings"].pop("encoder"))}),
        ("x.pt", "x.pt|another|train again",
         {"x.pt": checkpoint(lambda made: made["settings"].update(encoder="resnet"))}),
        ("x.pt", "x.pt|NaN|mapper.W_p.bias|train again", {"x.pt": checkpoint(nan)})),
    *cases("evaluate.py table", ("", "runs/pocket/isa.pt: there is no such file|python train.py"),
           ("--methods image pic2word", "runs/pic2word/isa.pt: there is no such file|train.py")),
    *cases(
        RESUME,
        ("", f"{LAST}|damaged", {LAST: EVIL}), ("", f"{LAST}|damaged", {LAST: half("last")}),
        ("", f"{LAST}|NaN|train again", {LAST: checkpoint(nan, "last")}),
        ("", f"{LAST}|--overwrite",
         {LAST: checkpoint(lambda made: made["optimizer"].update(param_groups=[]), "last")}),
        ("--tokens 3", f"{LAST}|--tokens 6, not 3", {LAST: checkpoint(lambda made: None, "last")})),
    *cases(TRAIN, ("", "runs/new|already|--overwrite", {"runs/new/last.pt": ""})),
    *cases(
        f"{TRAIN} --pretrained",
        ("x.pth", "x.pth|run code|refused|trust", {"x.pth": EVIL}),
        ("none.pth", "none.pth|cannot be read|path"), ("{isa}", "isa.pt|light encoder weights"),
        ("{blip}", "blip.pth|do not fit this encoder"),
        ("pocket --encoder mobilenet_v2", "pocket.classify --encoder mobilenet_v2 --out FILE"),
        ("x.pth", "x.pth|NaN|download", {"x.pth": weights(lambda w: {
            k.removeprefix("encoder."): v * torch.nan if v.is_floating_point() else v
            for k, v in w.items() if k.startswith("encoder.")})})),

    # ---- training images
    *cases(
        f"{TRAIN} --images",
        ("nowhere", "nowhere: there is no such folder|--images"), ("{isa}", "isa.pt|file|folder"),
        ("texts", "texts|0 images|--images", {"texts/1.txt": "text", "texts/2.txt": "text"}),
        ("photos", "photos|1 image|two", {"photos/": 1}),
        ("photos", "120 of 120 images in photos|damaged|--skip-bad-images", DAMAGED),
        ("photos --skip-bad-images", "photos|0 readable images", DAMAGED),
        ("photos", "2 of 14 images in photos|damaged|--skip-bad-images",
         {"photos/": 12, "photos/a.png": "", "photos/b.png": b"\x89PNG\r\n\x1a\n"}),
        ("photos --cache none", "damaged images|photos/a", {"photos/": 12, **DAMAGED}, LOG),
        ("shards", "shards/0.tar|uncompressed|again", {"shards/0.tar": shard("w:gz")}),
        ("shards", "shards/0.tar|whole|again", {"shards/0.tar": shard(share=0.3)})),
    *cases(f"{TRAIN} --images photos --cache none --workers 1",
           ("", "damaged images|photos/a", {"photos/": 12, **DAMAGED}, LOG), real=True),
    *cases("train.py --precision fp32",
           ("", "data/pocket|other|move", {"data/pocket/thesis.txt": "years of work"}),
           ("", "data/pocket/world.json|delete", {"data/pocket/world.json": "{"})),

    # ---- options of train.py
    *usage(
        TRAIN, ("--clip pocket", "--loss gcd+lar|no matching encoder|section 4.2|--loss gcd"),
        ("--clip pocket --loss gcd --blip x.pth", "--blip x.pth or --clip pocket|not both"),
        ("--batchsize 8", "--batchsize"), ("--lr -1", "--lr|-1"), ("--lr nan", "--lr|nan"),
        ("--weight-decay inf", "--weight-decay|inf"), ("--tokens 0", "--tokens|at least 1"),
        ("--batch 1", "--batch|at least 2|1"), ("--encoder resnet50", "resnet50|pocketnet"),
        ("--seed lucky", "--seed|lucky"), ("--seed -1", "--seed|-1"),
        ("--seed 99999999999999999999", "--seed|99999999999999999999|at most"),
        ("--threads 100000", "--threads|100000|at most"),
        ("--workers 100000", "--workers|100000|at most"),
        ("--device abacus", "--device|cpu|abacus"), ("--device meta", "--device|cpu|meta"),
        ("--name ../new", "--name|../new"), ("--name ''", "--name"),
        ("--preset paper", "--preset paper|--blip")),
    *cases(
        TRAIN, ("--lr 1e30 --epochs 4", "loss is|--lr", None, LOG),
        ("--tokens 100", "--tokens|105 tokens|64 positions|shorten"),
        (f"--prompt '{'a ' * 80}'", "--prompt|64 positions|shorten"),
        ("--query-size 8", "image_size 8|32 or more"),
        ("--query-size 100000", "image_size 100000|at most 1024"),
        ("", "runs|is a file|move", {"runs": "text"}),
        ("--cache-dir x", "x|is a file", {"x": "text"}),
        ("--images {trained_images} --cache-dir x", "x/features-|v.npy|damaged|delete",
         {"x/": features("v.npy")}),
        ("--images {trained_images} --cache-dir x", "x/features-|done.json|damaged|delete",
         {"x/": features("done.json")}),
        ("--loss gcd+llm --sentences no.json", "no.json|cannot be read|path"),
        ("--loss gcd+llm --sentences s.json", "s.json|JSON|{concept", {"s.json": "{"}),
        ("--loss gcd+llm --sentences s.json", 's.json|"cat"|list', {"s.json": '{"cat": "a"}'})),

    # ---- annotations
    *cases(
        f"{TABLE} cirr",
        ("", "cap.rc2.test1.json is missing|evaluate.py check", {CAPTIONS: None}),
        ("", "cap.rc2.test1.json|JSON|download", {CAPTIONS: '[{"pairid": 1,'}),
        ("", "cap.rc2.test1.json|expected list", {CAPTIONS: "{}"}),
        ("", "cap.rc2.test1.json|empty", {CAPTIONS: "[]"}),
        ("", "entry 0|'reference' is missing|download", {CAPTIONS: entry(reference=None)}),
        ("", "entry 2|'dev-9' is not in the list", {CAPTIONS: entry(2, reference="dev-9")}),
        ("", "'..' is not a plain file name|official", {SPLIT: image_paths("../../x.png")}),
        ("", "'/' is not a plain file name", {SPLIT: image_paths("/etc/passwd")}),
        ("", "query 10003|64 positions|shorten", {CAPTIONS: entry(3, caption="red " * 600)})),
    *cases(
        FASHION, ("", "cap.dress.test.json is missing", {DRESS: None}),
        ("", "cap.dress.test.json|JSON", {DRESS: b'["\xff"]'}),
        ("", "entry 0, 'captions'|expected list", {DRESS: entry(captions="is red")}),
        ("", "'/etc/passwd' is not a plain file name", {DRESS: entry(candidate="/etc/passwd")})),
    *cases(
        CIRCO, ("", "annotations/test.json is missing", {TRUTHS: None}),
        ("", "annotations/test.json|JSON", {TRUTHS: ""}),
        ("", "entry 1|'relative_caption' is missing", {TRUTHS: entry(1, relative_caption=None)}),
        ("", "'../1' is not a COCO image id|whole numbers", {TRUTHS: entry(gt_img_ids=["../1"])})),
    *cases(
        TABLE, ("nowhere", "nowhere|is missing|evaluate.py check"),
        ("{world}/cirr --split ../val", "'../val' is not a plain file name"),
        ("{world}/fashioniq", "split.rc2.test1.json is missing|split.dress.test.json")),
    *cases(
        "evaluate.py", ("score --benchmark circo --data {world}/circo --split train p.json",
                        "annotations/train.json is missing|test.json, val.json"),
        ("check --benchmark circo --data nowhere", "nowhere is not complete"),
        ("check --benchmark circo --data {world}/circo --splits ../val", "plain file name")),

    # ---- gallery images
    *cases(
        f"{TABLE} cirr", ("", "1 of 48 images of cirr|missing|evaluate.py check", {PHOTO: None}),
        ("", f"1 of 48 images of cirr|empty|{Path(PHOTO).name}", {PHOTO: ""}),
        ("", f"{PHOTO}|cannot be read as an image|replace", {PHOTO: "a text"}),
        ("", f"{PHOTO}|cannot be read as an image|replace",
         {PHOTO: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0@"})),

    # ---- options of evaluate.py
    *usage(
        "evaluate.py", ("", "command"), ("tabel", "tabel|table"),
        ("table --methods clip", "clip|isa"), ("check --benchmark coco --data x", "coco|circo"),
        ("table --workers -1", "--workers|-1"), ("table --device abacus", "--device|abacus")),
    *cases(
        CIRR, ("--device cuda:77", 'cuda:77|CUDA GPU|cpu'),
        ("--json out", "out|is a folder", {"out/": 0}),
        ("--json x/t.json", "x|is a file", {"x": "text"}),
        ("--picture x.jpeg2", "x.jpeg2|.png"),
        ("--methods searle-oti --sentences none.json", "none.json|cannot be read|path"),
        ("--weights none.json", "none.json: there is no such file|baselines.weights"),
        ("--weights w.json", "w.json|write it again", {"w.json": '{"chosen": {"slerp": 1}}'}),
        ("--rerank 48", "--rerank 48: cirr has 47 images to rank|at most"),
        ("--rerank 9 --methods image slerp", "--rerank: image, slerp have no sentence|add isa")),
    *usage(CIRR, ("--rerank 0", "--rerank|at least 1"), ("--rerank many", "--rerank|many"),
           ("--rerank 5 --rerank-weight -1", "--rerank-weight|at least 0"),
           ("--rerank 5 --rerank-weight nan", "--rerank-weight|finite")),
    *cases(
        f"{SUBMIT} --out", ("x/s.json --split test1", "x|is a file", {"x": "text"}),
        ("s.json --split tset", "split.rc2.tset.json is missing|split.rc2.test1.json")),

    # ---- prediction files
    *cases(
        f"{SCORE} p.json", ("", "p.json is missing"), ("", "p.json|JSON", {"p.json": ""}),
        ("", "1 queries are missing (first: 10000)",
         {"p.json": predictions(lambda d: d.pop("10000"))}),
        ("", "not in this split (first: 77)",
         {"p.json": predictions(lambda d: d.update({"77": ["x"]}))}),
        ("", "query 10000|repeats a name",
         {"p.json": predictions(lambda d: d["10000"].append(d["10000"][0]))}),
        ("", "query 10000|'cat.jpg' is not among the images",
         {"p.json": predictions(lambda d: d["10000"].append("cat.jpg"))}),
        ("", "query 10000|is empty", {"p.json": predictions(lambda d: d.update({"10000": []}))}),
        ("", '"metric" should be "recall"',
         {"p.json": predictions(lambda d: d.update(metric="recall_subset"))})),
    *cases(SCORE.replace("cirr", "fashioniq"), ("p.json", "'dress' is missing", {"p.json": "{}"})),

    # ---- search.py
    *cases(f"{SEARCH} --gallery {{images}} --image", ("none.png", "none.png|no such image|--image"),
           real=True),
    *cases(
        SEARCH, ("--gallery none --image {photo}", "none|no such folder|--gallery"),
        ("--gallery {images} --image x.png", "x.png|cannot be read as an image", {"x.png": "text"}),
        ("--gallery {images} --image {photo} --out x/s.png", "x|is a file", {"x": "text"}),
        ("--gallery {images} --image {photo} --out s.txt", "s.txt|.png"),
        ("--gallery {images} --image {photo} --rerank 13", "--rerank 13|has 12 images|at most")),
    *usage(f"{SEARCH} --gallery x --image x", ("--top 0", "--top|at least 1"),
           ("--rerank 0", "--rerank|at least 1")),

    # ---- baselines.searle
    *cases(
        SEARLE, ("--images nowhere", "nowhere: there is no such folder|--images"),
        ("--sentences no.json", "no.json|cannot be read"), ("", "runs|is a file", {"runs": "text"}),
        ("", "runs/new|already|--overwrite", {"runs/new/isa.pt": ""})),
    *usage(
        SEARLE, ("--count 1", "--count|at least 2"), ("--device abacus", "--device|cpu|abacus"),
        ("--seed 99999999999999999999", "--seed|at most"), ("--name ../new", "--name|../new"),
        ("--lr nan", "--lr|nan")),

    # ---- the pocket world
    *cases(f"{WORLD} --out", ("thesis", "thesis|--out", {"thesis": "years of work"}), real=True),
    *cases(
        f"{WORLD} --out", ("thesis", "thesis|other|--out", {"thesis/main.tex": "years of work"}),
        ("thesis/world", "thesis|is a file", {"thesis": "years of work"})),
    *usage(
        WORLD, ("--scale nan", "--scale|nan"), ("--scale -1", "--scale|-1"),
        ("--seed lucky", "--seed|lucky"), ("--scal 0.02", "--scal")),
    *cases(
        PRETRAIN, ("--out x/b.pth", "x: is a file|another place", {"x": "text"}),
        ("--out out", "out|is a folder", {"out/": 0}),
        ("", "b.pth.state|damaged|delete", {"b.pth.state": "text"}),
        ("", "b.pth.state|delete", {"b.pth.state": EVIL}),
        ("--steps 5601 --matching-of none.pth", "none.pth: there is no such file"),
        ("--validate none.pth", "none.pth: there is no such file")),
    *usage(
        PRETRAIN, ("--steps 0", "--steps|0"), ("--batch 1", "--batch|1"),
        ("--clip --steps 9000", "--clip has no matching|5600"),
        ("--threads 0", "--threads|0"), ("--lr nan", "--lr|nan"),
        ("--matching-of pocket", "--steps|more than 5600")),

    # ---- downloads, tables
    *cases(f"{DOWNLOAD} vocab.txt --base-url",
           ("http://127.0.0.1:9", "http://127.0.0.1:9/vocab.txt|network"), real=True),
    *cases(f"{DOWNLOAD} vocab.txt", ("--base-url nonsense", "nonsense/vocab.txt|check"),
           ("--base-url http://127.0.0.1:9 --to x", "x|is a file", {"x": "text"})),
    *usage(DOWNLOAD, ("model_huge.pth", "model_huge.pth|model_base.pth")),
    *usage(PAPER, ("21", "21|choose from"), real=True),
    *usage(PAPER, ("", "NAME"), ("growth --images 9", "--images|at least 10000")),
    *cases(
        f"{PAPER} 5 --seeds 0", ("--out x/t.md", "x: is a file", {"x": "text"}),
        ("", "runs/tables/isa-0/isa.pt|damaged|train", {"runs/tables/isa-0/isa.pt": "text"}),
        ("--as-is", "runs/tables/isa-0/table.json|damaged|delete",
         {"runs/tables/isa-0/table.json": '{"results":'})),
]


# ---- running
@pytest.fixture
def here(tmp_path, small_world, trained, tmp_path_factory):
    """An empty current folder, and what the commands of the table are filled in with."""
    images = tmp_path_factory.getbasetemp() / "a few images"  # with blanks in its path
    if not images.exists():
        images.mkdir()
        for path in sorted((small_world / "train").iterdir())[:12]:
            shutil.copy2(path, images)
    places = {"world": small_world, "isa": trained.isa, "last": trained.last, "run": trained.run,
              "blip": BLIP, "images": images, "photo": next(images.iterdir()),
              "trained_images": trained.cwd / "images", "cache": trained.cwd / "features",
              "sentences": ROOT / "pocket/sentences.json"}
    return SimpleNamespace(cwd=tmp_path, world=small_world, places=places)


def words(here, command):
    places = {name: shlex.quote(str(path)) for name, path in here.places.items()}
    return shlex.split(command.format(**places))


def spawn(here, command, **more):
    """The command in a process of its own, as a user runs it."""
    script, *rest = words(here, command)
    line = [sys.executable, *([script] if script == "-m" else [str(ROOT / script)]), *rest]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("env", {})}
    done = subprocess.run(line, cwd=here.cwd, env=env, capture_output=True, text=True, timeout=300,
                          **more)
    return Finished(done.returncode, done.stdout, done.stderr)


def files(folder):
    """Everything below a folder but the cache: path -> what changes when somebody writes there."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: (path.lstat().st_size, path.lstat().st_mtime_ns) for name, path in found.items()
            if not name.startswith("cache/") or ".tmp" in name}


def check(case, done, before, cwd):
    """One line, the right status, nothing executed, nothing left behind, nothing changed."""
    assert "Traceback" not in done.err, done.err
    assert done.status == case.status, (done.status, done.err, done.out[-300:])
    lines = [line for line in done.err.splitlines()
             if not line.startswith(("skipped: ", "left out: "))]
    if case.status == 2:
        *help, line = lines
        assert help and help[0].startswith("usage: ") and " error: " in line, done.err
        assert all(row.startswith(" ") for row in help[1:]), done.err
    else:
        (line,) = lines
        assert line.startswith(f"{case.command.removeprefix('-m ').split()[0]}: "), line
    assert len(line) < LONGEST and all(part in line for part in case.says), line
    assert not (cwd / "executed").exists()
    after = files(cwd)
    assert {name: after.get(name) for name in before} == before
    assert sorted(after.keys() - before.keys()) == sorted(case.leaves)


RUNS = [pytest.param(case, alone, id=case.name + " (process)" * alone,
                     marks=() if chosen else pytest.mark.slow)
        for i, case in enumerate(CASES)
        for alone, chosen in ((False, i % 3 == 0), (True, case.real))]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("case, alone", RUNS)
def test_bad_input(case, alone, here, call_script):
    spoil(here, case.wrong)
    before = files(here.cwd)
    done = spawn(here, case.command) if alone else call_script(*words(here, case.command))
    check(case, done, before, here.cwd)


PEAK = """import os, runpy, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory as Linux has it")
def test_a_huge_image_takes_no_memory(here):
    """Decoded, it would take 900 MB, and 2.7 GB as RGB."""
    (huge,) = cases(f"{TABLE} cirr", ("", f"{PHOTO}|limit of 178956970 pixels|replace"))
    spoil(here, {PHOTO: huge_png()})
    before = files(here.cwd)
    line = [sys.executable, "-c", PEAK, ROOT / "evaluate.py", *words(here, huge.command)[1:]]
    done = subprocess.run(line, cwd=here.cwd, capture_output=True, text=True)
    check(huge, Finished(done.returncode, "", done.stderr), before, here.cwd)
    assert int(done.stdout.split()[-1]) < (1 << 20)  # KiB


# ---- disks that are full or not ours
def limited(size):
    """No file of this process may grow beyond `size` bytes: to a writer, that is a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FULL = "cannot be written|make room"
FULL_DISKS = {  # the size of the disk in bytes -> what fills it
    4000: cases(f"{SUBMIT} --split test1 --out", ("out.json", f"out.json|{FULL}"))
    + cases(CIRR, ("", f"runs/table.json|{FULL}")),
    1_000_000: cases(TRAIN, ("--cache none", f"runs/new/last.pt|{FULL}", None, LOG))
    + cases(PRETRAIN, ("", f"b.pth|{FULL}", None, ("b.pth.log",))),
    50_000: cases(TRAIN, ("", f"cache/features-|{FULL}")),
    300: cases(TRAIN, ("", f"cache/images-|{FULL}")),
    1500: cases(WORLD, ("--scale 0.02 --out w", f"w|{FULL}")),
}


def slow_but_one(values):
    return [pytest.param(*v, marks=pytest.mark.slow if i else ()) for i, v in enumerate(values)]


@pytest.mark.parametrize("size, case", slow_but_one(
    (size, case) for size, several in FULL_DISKS.items() for case in several))
def test_full_disk(size, case, here, call_script):
    if case.command.startswith("evaluate.py"):  # the gallery's features are stored already
        call_script(*words(here, f"{CIRR} --json first.json --picture '' --methods image"))
    before = files(here.cwd)
    done = spawn(here, case.command, preexec_fn=limited(size))
    check(case, done, before, here.cwd)
    assert not list(here.cwd.rglob("*.tmp*"))


def no_privileges():
    """Root reads and writes everything: drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; not root: no effect


READ_ONLY = "cannot be written to|permissions"
FORBIDDEN = [  # a path, its mode, the case
    *(("photos", 0, case) for case in cases(TRAIN, (
        "--images photos", "photos|cannot be searched|Permission denied", {"photos/": 12}))),
    *(("runs", 0o555, case) for case in cases(TRAIN, ("", f"runs|{READ_ONLY}", {"runs/": 0}))),
    *(("x", 0o555, case) for case in
      cases(TRAIN, ("--cache-dir x", f"x|{READ_ONLY}", {"x/": 0}))
      + cases(CIRR, ("--json x/t.json", f"x|{READ_ONLY}", {"x/": 0}))),
    *((name, 0, case) for name, case in zip(("x.pt", PHOTO, CAPTIONS), [
        *cases(CIRR, ("--checkpoint x.pt", "x.pt|read|permissions",
                      {"x.pt": checkpoint(lambda made: None)})),
        *cases(f"{TABLE} cirr", ("", f"{PHOTO}|cannot be read|Permission denied", {"cirr/": 0}),
               ("", f"{CAPTIONS}|Permission denied", {"cirr/": 0}))], strict=True)),
]


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize("name, mode, case", slow_but_one(FORBIDDEN))
def test_what_may_not_be_read_or_written(name, mode, case, here):
    spoil(here, case.wrong)
    (here.cwd / name).chmod(mode)
    before = files(here.cwd)
    done = spawn(here, case.command, preexec_fn=no_privileges)
    (here.cwd / name).chmod(0o755)
    check(case, done, before, here.cwd)


@pytest.mark.slow
def test_a_read_only_disk(here):
    (case,) = cases(TRAIN, ("--cache-dir ../cache", "cannot be written to|another place"))
    disk = here.cwd / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    here.cwd = disk
    try:
        check(case, spawn(here, case.command), {}, disk)
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- several processes
def test_a_port_that_is_taken(here):
    """As the first process of any launcher; torchrun itself asks for the port before it starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        group = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port)}
        done = spawn(here, TRAIN, env=group)
    (wrong,) = cases(TRAIN, ("", f"127.0.0.1:{port}|EADDRINUSE|torchrun --standalone"))
    lines = done.err.splitlines()
    done.err = "\n".join(line for line in lines if not line.startswith("[W"))  # PyTorch's warnings
    check(wrong, done, {}, here.cwd)


@pytest.mark.slow
@pytest.mark.parametrize("options, says", [
    ("--batch 7", "--batch 7 cannot be split among 2 processes; give a multiple of 2"),
    ("--images nowhere", "nowhere: there is no such folder"),
    ("--blip x.pth", "x.pth is a pickle that wants to run code")])
def test_under_torchrun_the_sentence_stands_above_its_report(here, options, says):
    """Its report, which names train.py's processes and exit status, cannot be turned off."""
    spoil(here, {"x.pth": EVIL})
    run = "-m torch.distributed.run --standalone --nproc_per_node 2"
    script = shlex.quote(str(ROOT / "train.py"))
    done = spawn(here, f"{run} {script} {TRAIN.removeprefix('train.py')} {options}")
    ours = [line for line in done.err.splitlines() if line.startswith("train.py: ")]
    assert done.status != 0 and any(says in line for line in ours) and len(ours) <= 2, done.err
    report = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"
    assert says in done.err.partition(report)[0] and 'train.py", line' not in done.err
    assert not (here.cwd / "executed").exists() and not (here.cwd / "runs").exists()


def test_a_gpu_that_is_too_small(here, call_script, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee")

    monkeypatch.setattr(isa, "global_contrastive_distillation", full)
    (case,) = cases(TRAIN, ("", "GPU|memory|--micro-batch", None, LOG))
    check(case, call_script(*words(here, case.command)), {}, here.cwd)


# ---- what has to work
BLOCKS = np.random.default_rng(5).integers(0, 256, (3, 5, 3))
BLOCK = np.kron(BLOCKS, np.ones((16, 16, 1))).astype(np.uint8)  # [48, 80, 3]


def unusual_images(folder):
    """Files that people have -> {name: the pixels [H, W, 3] that they show, without PIL}."""
    folder.mkdir()
    shown, random = {}, np.random.default_rng(6)

    def save(name, image, pixels, **options):
        image.save(folder / name, **options)
        shown[name] = pixels

    palette, frames = random.integers(0, 256, (8, 3)), random.integers(0, 8, (3, 40, 56))
    indexed = [Image.fromarray(frame.astype(np.uint8)) for frame in frames]
    for image in indexed:
        image.putpalette(palette.astype(np.uint8).tobytes())
    save("animated.gif", indexed[0], palette[frames[0]], save_all=True, append_images=indexed[1:])
    save("palette.png", indexed[1], palette[frames[1]], transparency=bytes([0, 128, 255, 0]))
    ink = np.kron(random.integers(0, 256, (3, 4, 4)), np.ones((16, 16, 1)))
    save("cmyk.jpg", Image.fromarray(ink.astype(np.uint8), "CMYK"),
         (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255, quality=100, subsampling=0)
    deep = random.integers(0, 65536, (30, 20)).astype(np.uint16)
    save("sixteen bits.png", Image.fromarray(deep), np.repeat(deep[..., None] // 256, 3, axis=2))
    grey = random.integers(0, 256, (20, 30, 2)).astype(np.uint8)
    save("grey and alpha.png", Image.fromarray(grey, "LA"), np.repeat(grey[..., :1], 3, axis=2))
    save("one pixel.png", Image.new("RGB", (1, 1), (9, 99, 199)), np.array([[[9, 99, 199]]]))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(BLOCK)))
    save("turned.jpg", turned, BLOCK, quality=100, subsampling=0, exif=exif)
    return shown


def test_unusual_images_are_seen_as_they_are(here, pocket_blip, call_script):
    """Pixel by pixel; and train.py stores the features of the pixels worked out by hand."""
    shown = unusual_images(here.cwd / "photos")
    images = find_images(here.cwd / "photos", here.cwd / "list")
    assert [Path(images.name(i)).name for i in range(len(images))] == sorted(shown)
    for i, name in enumerate(sorted(shown)):
        found = np.asarray(blip_lite.to_rgb(images.open(i)), float)
        assert found.shape == shown[name].shape, name
        close = 1 if name == "cmyk.jpg" else 5 if name.endswith(".jpg") else 0
        assert np.abs(found - shown[name]).max() <= close, name
    line = f"{TRAIN} --images photos --batch 7 --loss gcd --cache global"
    done = call_script(*words(here, line))
    assert (done.status, done.err) == (0, "")
    stored = Features(next((here.cwd / "cache").glob("features-*"))).v
    by_hand = [pocket_blip.preprocess(Image.fromarray(np.rint(shown[name]).astype(np.uint8)))
               for name in sorted(shown)]
    v, _ = pocket_blip.encode_image(torch.stack(by_hand))
    assert (torch.from_numpy(np.asarray(stored, np.float32)) * v).sum(1).min() > 0.999


@pytest.mark.slow
def test_no_warnings_about_files_that_pil_can_still_read(here):
    """A hundred million pixels, more than half of PIL's limit; a JPEG with damaged EXIF."""
    spoil(here, {"photos/": 12, "photos/large.png": huge_png(10_000)})
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + bytes(range(40))
    Image.fromarray(BLOCK).save(here.cwd / "photos/damaged exif.jpg", exif=exif)
    done = spawn(here, f"{TRAIN} --images photos --cache none")
    assert (done.status, done.err) == (0, "") and "14 images, steps 0..1" in done.out


LANGUAGES = ["\N{CAT FACE}\N{ZERO WIDTH JOINER}\N{HEAVY BLACK HEART} at night",
             "\u05d1\u05dc\u05d9\u05dc\u05d4 \u202eRTL", "a cafe\u0301 a\u0328\u0301", "", " ",
             "\u5728\u591c\u665a", "NUL \0 and \ud800", "[SEP] [MASK] [ENC]", "red " * 40]


def test_queries_in_any_script_about_unusual_images(here, call_script):
    """Emoji, right to left, combining characters, nothing at all."""
    spoil(here, {"cirr/": 0})
    unusual_images(here.cwd / "unusual")
    gallery = sorted((here.cwd / PHOTO).parent.iterdir())
    for path, source in zip(gallery, sorted((here.cwd / "unusual").iterdir()), strict=False):
        shutil.copy(source, path)  # a .png that holds a GIF or a JPEG is not unusual either
    path = here.cwd / CAPTIONS
    entries = json.loads(path.read_text())
    for one, text in zip(entries, LANGUAGES, strict=False):
        one["caption"] = text
    path.write_text(json.dumps(entries), encoding="utf-8-sig")  # as Windows writes it
    line = f"{TABLE} cirr --cache-dir cache --methods text image+text isa"
    done = call_script(*words(here, line))
    assert (done.status, done.err) == (0, "") and "\nisa " in done.out and "nan" not in done.out
    assert (here.cwd / "runs/retrieved.png").exists()


def test_fashioniq_with_empty_captions(here, call_script):
    spoil(here, {DRESS: entry(captions=[" . ", ""])})
    done = call_script(*words(here, f"{FASHION} --methods text isa"))
    assert (done.status, done.err) == (0, "") and "\nisa " in done.out


def test_a_gallery_smaller_than_k(here, call_script):
    """All eleven images are ranked, the target among them. Paths have blanks and accents."""
    root = here.cwd / "donn\u00e9es de No\u00ebl \N{CAT FACE}/cirr"
    shutil.copytree(here.world / "cirr", root)
    captions, split = (root.parent / name for name in (CAPTIONS, SPLIT))
    split.write_text(json.dumps(dict(list(json.loads(split.read_text()).items())[:12])))
    queries = [q for q in json.loads(captions.read_text()) if q["img_set"]["id"] < 2]
    captions.write_text(json.dumps(queries))
    table = here.cwd / "\u0442\u0430\u0431\u043b\u0438\u0446\u0430 1.json"
    line = f"{TABLE} {shlex.quote(str(root))} --json '{table}' --picture '' --methods isa"
    done = call_script(*words(here, line))
    assert (done.status, done.err) == (0, "")
    found = json.loads(table.read_text())["results"]["cirr"]["isa"]["all"]
    assert found["R@50"][0] == 100 and 0 <= found["R@1"][0] <= 100


def test_last_pt_is_a_checkpoint_too(here, call_script):
    done = call_script(*words(here, f"{CIRR} --checkpoint {{last}} --methods isa"))
    assert (done.status, done.err) == (0, "") and "\nisa " in done.out


def test_resume_without_a_checkpoint_starts_and_says_so(here, call_script):
    """It is no error: paper/ always passes --resume."""
    done = call_script(*words(here, f"{TRAIN} --resume"))
    assert (done.status, done.err) == (0, "")
    assert "runs/new/last.pt is missing: nothing to resume" in done.out


def test_short_lists_are_scored_and_reported(here, call_script):
    for change, reported in ((lambda d: d.update({"10000": d["10000"][:2]}), True),
                             (lambda d: None, False)):
        spoil(here, {"p.json": predictions(change)})
        done = call_script(*words(here, f"{SCORE} p.json"))
        assert (done.status, done.err) == (0, "")
        assert ("1 of 32 lists hold fewer than 50 names" in done.out) == reported
