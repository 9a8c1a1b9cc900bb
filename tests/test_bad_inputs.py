"""What students do wrong, through the real command lines: every wrong input costs a minute and one clear sentence.

CASES is one table. A case runs in this process (as `runpy` does it, which spares the import of torch), and as a process of its
own: by default each third one and seven, with `-m "slow or not slow"` all of them twice. Whatever goes wrong, the exit status
is 1 (2 for the command line itself), one line on stderr names the file or the value and what to do, no output file is there and
nothing that was there has changed.
"""

import ctypes
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
from conftest import DATA, ROOT, Finished
from PIL import Image

import blip_lite
import isa
from plumbing.features import Features
from plumbing.images import find_images

MESSAGE = 700  # letters; a sentence that is longer is not read


# ------------------------------------------------------------------------------------------------------ what is spoilt
class Evil:
    """A pickle of this makes a folder when it is read by what executes pickles."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def evil(name):
    return lambda here: torch.save({"model": {"x": Evil()}, "query_model": Evil(), "settings": {}, "blip": ""}, here.make(name))


def plain_pickle(name):
    return lambda here: here.make(name).write_bytes(pickle.dumps(Evil(), protocol=2))


def content(name, text):
    """A file of these bytes or this text; None: a folder."""
    def prepare(here):
        path = here.make(name)
        path.mkdir() if text is None else path.write_bytes(text.encode() if isinstance(text, str) else text)

    return prepare


def several(*parts):
    def prepare(here):
        for part in parts:
            part(here)

    return prepare


def truncated(source, name, share=0.5):
    def prepare(here):
        data = Path(str(source).format(**here.places)).read_bytes()
        here.make(name).write_bytes(data[: int(len(data) * share)])

    return prepare


def blip_weights(change, name="blip.pth"):
    """Pocket BLIP's state dict after change(state), with its vocabulary beside it."""
    def prepare(here):
        state = torch.load(ROOT / "pocket" / "blip.pth", weights_only=True)["model"]
        change(state)
        torch.save({"model": state}, here.make(name))
        shutil.copy(ROOT / "pocket" / "vocab.txt", here.cwd / "vocab.txt")

    return prepare


def checkpoint(change, name="isa.pt", source="isa"):
    """The trained isa.pt (or last.pt) after change(checkpoint)."""
    def prepare(here):
        made = torch.load(here.places[source], weights_only=True)
        change(made)
        torch.save(made, here.make(name))

    return prepare


def safetensors(name, header, data=b"\0" * 64, length=None):
    """A .safetensors file: the header's length (by default the true one), the header, the data."""
    def prepare(here):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        here.make(name).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    return prepare


def tensor(begin, end, dtype="F32", shape=(8,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def benchmark(name, change=None, file=None):
    """A copy of the small world's benchmark; change(content) on the JSON `file` below it may return another content."""
    def prepare(here):
        shutil.copytree(here.world / name, here.cwd / name)
        if file:
            path = here.cwd / name / file
            path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return prepare


def entry(number=0, **fields):
    """For `benchmark`: other fields in one caption entry; None takes a field away."""
    def change(entries):
        entries[number] = {k: v for k, v in {**entries[number], **fields}.items() if v is not None}
        return entries

    return change


def replaced(name, file, text):
    """A copy of a benchmark with one file replaced (None: removed)."""
    def prepare(here):
        benchmark(name)(here)
        path = here.cwd / name / file
        path.unlink()
        if text is not None:
            path.write_bytes(text.encode() if isinstance(text, str) else text)

    return prepare


def bomb(side=30_000):
    """A valid grey PNG of side x side zeros: 900 million pixels in less than a megabyte."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side)) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    )


@pytest.fixture(scope="session")
def huge(tmp_path_factory):
    path = tmp_path_factory.mktemp("huge") / "huge.png"
    path.write_bytes(bomb())
    return path


def photos(*bad, good=12, folder="photos"):
    """A folder of sound images and of bad ones, given as (name, bytes)."""
    def prepare(here):
        (here.cwd / folder).mkdir()
        for path in sorted((here.world / "train").iterdir())[:good]:
            shutil.copy(path, here.cwd / folder)
        for name, data in bad:
            (here.cwd / folder / name).write_bytes(data)

    return prepare


def tar(name, packed="", share=1.0):
    """A shard of four images; packed="gz" is what tar -z makes; share < 1 cuts it off."""
    def prepare(here):
        path = here.make(name)
        with tarfile.open(path, f"w:{packed}") as out:
            for image in sorted((here.world / "train").iterdir())[:4]:
                out.add(image, image.name)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return prepare


def stored(file):
    """The trained run's features as the cache x/, with file(folder) cut off after 20 bytes."""
    def prepare(here):
        shutil.copytree(here.places["cache"], here.cwd / "x")
        for folder in (here.cwd / "x").glob("features-*"):
            file(folder).write_bytes(file(folder).read_bytes()[:20])

    return prepare


def predictions(change, file="p.json"):
    """A sound prediction file for CIRR val after change(document)."""
    def prepare(here):
        root = here.world / "cirr"
        names = list(json.loads((root / "image_splits" / "split.rc2.val.json").read_text()))
        document = {"version": "rc2", "metric": "recall"}
        for query in json.loads((root / "captions" / "cap.rc2.val.json").read_text()):
            document[str(query["pairid"])] = [name for name in names if name != query["reference"]]
        change(document)
        (here.cwd / file).write_text(json.dumps(document))

    return prepare


# ---------------------------------------------------------------------------------------------------------- the table
@dataclass
class Case:
    name: str
    command: str  # as typed; {isa} and so on: see `here`
    says: tuple  # parts of the one line
    prepare: object = None  # prepare(here) makes what is wrong
    status: int = 1
    real: bool = False  # also as a process of its own in the default suite
    leaves: tuple = ()  # files that may be new afterwards, beside cache/


LOG = ("runs/new/log.jsonl",)
HTML = "<!DOCTYPE html><html><body>Sign in to download</body></html>"
TRAIN = "train.py --images {images} --precision fp32 --workers 0 --batch 8 --epochs 1 --name new"
FROM_LAST = f"{TRAIN} --name old --cache-dir {{cache}} --resume"
TABLE = "evaluate.py table --precision fp32 --workers 0 --cache-dir {cache} --checkpoint {isa} --benchmark cirr --data"
SUBMIT = "evaluate.py submit --precision fp32 --workers 0 --cache-dir {cache} --out out.json --benchmark cirr --data {world}/cirr"
SCORE = "evaluate.py score --benchmark cirr --data {world}/cirr"
SEARLE = "baselines.py searle --images {images} --precision fp32 --name new --cache-dir {cache} --steps 1 --epochs 1"
WORLD = "-m pocket.world"
PRETRAIN = "-m pocket.pretrain --steps 1 --batch 8 --held-out 10"
DOWNLOAD = "-m blip_lite.download vocab.txt --base-url http://127.0.0.1:9"
CIRR_TEST, CIRR_SPLIT = "captions/cap.rc2.test1.json", "image_splits/split.rc2.test1.json"
DRESS, DRESS_SPLIT, CIRCO_TEST = "captions/cap.dress.test.json", "image_splits/split.dress.test.json", "annotations/test.json"
FASHION = f"{TABLE.replace('cirr', 'fashioniq')} fashioniq"
CIRCO = f"{TABLE.replace('cirr', 'circo')} circo"


def case(*arguments, **more):
    name, command, *says = arguments
    return Case(name, command, tuple(says), **more)


CASES = [
    # ---- weights of BLIP
    case("blip executes code", f"{TRAIN} --blip x.pth", "x.pth is a pickle that wants to run code", "mkdir", "trust",
         prepare=evil("x.pth"), real=True),
    case("blip executes code, plain pickle", f"{TRAIN} --blip x.bin", "x.bin", "run code", "trust", prepare=plain_pickle("x.bin")),
    case("blip missing", f"{TRAIN} --blip weights/model_base.pth", "weights/model_base.pth: there is no such file",
         "plumbing.download"),
    case("blip truncated", f"{TRAIN} --blip x.pth", "x.pth is damaged", "download it again",
         prepare=truncated(ROOT / "pocket" / "blip.pth", "x.pth")),
    case("blip empty", f"{TRAIN} --blip x.pth", "x.pth is empty", "download it again", prepare=content("x.pth", "")),
    case("blip is a web page", f"{TABLE} {{world}}/cirr --blip x.pth", "x.pth is a web page, not weights", "download it again",
         prepare=content("x.pth", HTML)),
    case("blip is isa.pt", f"{TABLE} {{world}}/cirr --blip {{isa}}", "isa.pt", "train.py", "--checkpoint"),
    case("blip and checkpoint swapped", "evaluate.py table --benchmark cirr --data {world}/cirr --blip {isa} --checkpoint "
         "{blip}", "blip.pth", "--blip"),
    case("blip is a folder of images", f"{TRAIN} --blip {{images}}", "holds none of model.safetensors", "give the path"),
    case("blip is a query model's state dict", f"{TRAIN} --blip x.pth", "x.pth: not a BLIP", "use a",
         prepare=lambda here: torch.save(torch.load(here.places["isa"])["query_model"], here.make("x.pth"))),
    case("blip without a key", f"{TRAIN} --blip blip.pth", "blip.pth: keys do not fit", "1 missing: text_proj.bias",
         prepare=blip_weights(lambda state: state.pop("text_proj.bias"))),
    case("blip of another shape", f"{TRAIN} --blip blip.pth", "text_proj.bias [7] instead of [64]",
         prepare=blip_weights(lambda state: state.update({"text_proj.bias": torch.zeros(7)}))),
    case("blip with NaN", f"{TRAIN} --blip blip.pth", "blip.pth", "NaN", "itm_head.bias", "download",
         prepare=blip_weights(lambda state: state["itm_head.bias"].fill_(torch.nan))),
    case("safetensors: a huge header", f"{TRAIN} --blip x.safetensors", "x.safetensors is damaged", "download it again",
         prepare=safetensors("x.safetensors", {"x": tensor(0, 32)}, length=2**62)),
    case("safetensors: offsets outside", f"{TRAIN} --blip x.safetensors", "x.safetensors is damaged", "download it again",
         prepare=safetensors("x.safetensors", {"x": tensor(48, 80)})),
    case("safetensors: overlapping", f"{TRAIN} --blip x.safetensors", "x.safetensors is damaged", "download it again",
         prepare=safetensors("x.safetensors", {"x": tensor(0, 32), "y": tensor(16, 48)})),
    case("safetensors: wrong dtype", f"{TRAIN} --blip x.safetensors", "x.safetensors is damaged", "download it again",
         prepare=safetensors("x.safetensors", {"x": tensor(0, 32, "F31")})),
    case("safetensors: shape and size differ", f"{TRAIN} --blip x.safetensors", "x.safetensors is damaged", "download it again",
         prepare=safetensors("x.safetensors", {"x": tensor(0, 32, shape=(9,))})),
    case("safetensors: negative shape", f"{TRAIN} --blip x.safetensors", "x.safetensors is damaged", "download it again",
         prepare=safetensors("x.safetensors", {"x": tensor(0, 32, shape=(-2, -4))})),
    case("safetensors: header is no JSON", f"{TRAIN} --blip x.safetensors", "x.safetensors is damaged", "download it again",
         prepare=safetensors("x.safetensors", b"{]")),
    case("vocabulary of another BLIP", f"{TRAIN} --vocab vocab.txt", "vocab.txt has 5 tokens", "belongs to it",
         prepare=content("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n")),
    case("vocabulary missing", f"{TRAIN} --blip blip.pth", "no vocab.txt beside blip.pth", "--vocab",
         prepare=several(blip_weights(lambda state: None), lambda here: (here.cwd / "vocab.txt").unlink())),
    case("vocabulary named but missing", f"{TRAIN} --vocab none.txt", "none.txt cannot be read", "give the vocab.txt"),
    case("vocabulary is a folder", f"{TRAIN} --vocab {{images}}", "images cannot be read (Is a directory)", "give the vocab.txt"),
    case("vocabulary is weights", f"{TRAIN} --vocab {{blip}}", "blip.pth is not UTF-8 text", "give the vocab.txt"),
    case("image size off the patches", f"{TRAIN} --image-size 60", "image size 60", "64 is near"),
    case("image size nought", f"{TRAIN} --image-size 0", "image size 0", "8 is near"),
    case("image size negative", f"{TABLE} {{world}}/cirr --image-size -64", "image size -64", "8 is near"),

    # ---- checkpoints of train.py
    case("checkpoint executes code", f"{TABLE} {{world}}/cirr --checkpoint x.pt", "x.pt", "damaged or was not written by train.py",
         prepare=evil("x.pt")),
    case("last.pt executes code", FROM_LAST, "runs/old/last.pt", "was not written by train.py", prepare=evil("runs/old/last.pt")),
    case("pretrained executes code", f"{TRAIN} --pretrained x.pth", "x.pth", "refused", "torch.save", prepare=evil("x.pth")),
    case("pretrained missing", f"{TRAIN} --pretrained none.pth", "none.pth cannot be read", "give a file's path"),
    case("pretrained of another network", f"{TRAIN} --pretrained {{blip}}", "blip.pth", "do not fit this encoder"),
    case("pretrained is isa.pt", f"{TRAIN} --pretrained {{isa}}", "isa.pt", "plain state dict"),
    case("pretrained with NaN", f"{TRAIN} --pretrained x.pth", "x.pth", "NaN", prepare=lambda here: torch.save(
        {k.removeprefix("encoder."): v * torch.nan if v.is_floating_point() else v for k, v in
         torch.load(here.places["isa"])["query_model"].items() if k.startswith("encoder.")}, here.make("x.pth"))),
    case("checkpoint missing", f"{TABLE} {{world}}/cirr --checkpoint none.pt", "none.pt: there is no such file", "train.py"),
    case("no training yet", "evaluate.py table", "runs/pocket/isa.pt: there is no such file", "python train.py", real=True),
    case("method without its checkpoint", f"{TABLE} {{world}}/cirr --methods image pic2word",
         "runs/pic2word/isa.pt: there is no such file", "train.py"),
    case("checkpoint is a folder", f"{TABLE} {{world}}/cirr --checkpoint {{run}}", "is a folder", "isa.pt"),
    case("checkpoint truncated", f"{TABLE} {{world}}/cirr --checkpoint x.pt", "x.pt: is damaged",
         prepare=truncated("{isa}", "x.pt")),
    case("checkpoint empty", f"{TABLE} {{world}}/cirr --checkpoint x.pt", "x.pt: is damaged", prepare=content("x.pt", "")),
    case("checkpoint is a web page", f"{TABLE} {{world}}/cirr --checkpoint x.pt", "x.pt: is damaged", "name another",
         prepare=content("x.pt", HTML)),
    case("checkpoint is BLIP's", f"{TABLE} {{world}}/cirr --checkpoint {{blip}}", "blip.pth", "not written by train.py"),
    case("checkpoint for another BLIP", f"{TABLE} {{world}}/cirr --blip blip.pth", "was trained against BLIP", "same --blip",
         prepare=blip_weights(lambda state: state["itm_head.bias"].add_(1))),
    case("checkpoint for another image size", f"{TABLE} {{world}}/cirr --image-size 96", "@64", "@96", "--image-size"),
    case("checkpoint without a key", f"{TABLE} {{world}}/cirr --checkpoint isa.pt", "isa.pt: was written by another",
         "train again",
         prepare=checkpoint(lambda c: c["query_model"].pop("mapper.W_p.bias"))),
    case("checkpoint of another shape", f"{TABLE} {{world}}/cirr --checkpoint isa.pt", "isa.pt: was written by another",
         "train again",
         prepare=checkpoint(lambda c: c["query_model"].update({"mapper.W_p.bias": torch.zeros(3)}))),
    case("checkpoint without settings", f"{TABLE} {{world}}/cirr --checkpoint isa.pt", "isa.pt", "train again",
         prepare=checkpoint(lambda c: c["settings"].pop("encoder"))),
    case("checkpoint with an unknown encoder", f"{TABLE} {{world}}/cirr --checkpoint isa.pt", "isa.pt: was written by another",
         "train again",
         prepare=checkpoint(lambda c: c["settings"].update(encoder="resnet"))),
    case("checkpoint with NaN", f"{TABLE} {{world}}/cirr --checkpoint isa.pt", "isa.pt", "NaN", "mapper.W_p.bias", "train again",
         prepare=checkpoint(lambda c: c["query_model"]["mapper.W_p.bias"].fill_(torch.nan))),
    case("resume from NaN", FROM_LAST, "last.pt", "NaN", "train again",
         prepare=checkpoint(lambda c: c["query_model"]["mapper.W_p.bias"].fill_(torch.nan), "runs/old/last.pt", "last")),
    case("resume with other settings", f"{FROM_LAST} --batch 40 --tokens 3", "runs/old/last.pt", "--tokens 6, not 3",
         prepare=checkpoint(lambda c: None, "runs/old/last.pt", "last")),
    case("resume from a cut-off file", FROM_LAST, "runs/old/last.pt: is damaged",
         prepare=truncated("{last}", "runs/old/last.pt")),
    case("resume from a damaged optimizer", FROM_LAST + " --batch 40 --images {trained_images}", "runs/old/last.pt", "--overwrite",
         prepare=checkpoint(lambda c: c["optimizer"].update(param_groups=[]), "runs/old/last.pt", "last")),
    case("an older training is in the way", f"{TRAIN} --name old", "runs/old already holds a training", "--overwrite",
         prepare=checkpoint(lambda c: None, "runs/old/last.pt", "last")),

    # ---- training images
    case("no folder of images", f"{TRAIN} --images nowhere", "nowhere: there is no such folder", "--images"),
    case("a file for a folder", f"{TRAIN} --images {{isa}}", "isa.pt: is a file", "folder"),
    case("no images in the folder", f"{TRAIN} --images texts", "texts: holds 0 images", "--images",
         prepare=lambda here: [content(f"texts/{i}.txt", "text")(here) for i in range(3)]),
    case("one image", f"{TRAIN} --images photos", "photos: holds 1 images", "two", prepare=photos(good=1)),
    case("texts called .jpg", f"{TRAIN} --images photos", "3 of 3 images in photos are damaged", "--skip-bad-images",
         prepare=photos(*((f"{i}.jpg", b"text") for i in range(3)), good=0)),
    case("texts called .jpg, skipped", f"{TRAIN} --images photos --skip-bad-images", "photos: holds 0 readable images",
         prepare=photos(*((f"{i}.jpg", b"text") for i in range(3)), good=0)),
    case("damaged images", f"{TRAIN} --images photos", "2 of 14 images in photos are damaged", "--skip-bad-images",
         prepare=photos(("a.png", b""), ("b.png", b"\x89PNG\r\n\x1a\n"))),
    case("a hundred damaged images in a row", f"{TRAIN} --images photos --cache none", "damaged images follow each other",
         "photos/a", leaves=LOG, prepare=photos(*((f"a{i:03d}.png", b"text") for i in range(120)))),
    case("a hundred damaged images in a row, in a worker", f"{TRAIN} --images photos --cache none --workers 1",
         "damaged images follow each other", prepare=photos(*((f"a{i:03d}.png", b"text") for i in range(120))), real=True,
         leaves=LOG),
    case("a shard is a .tar.gz", f"{TRAIN} --images shards", "shards/0.tar: is not a whole, uncompressed tar file",
         "fetch it again",
         prepare=tar("shards/0.tar", "gz")),
    case("a shard is cut off", f"{TRAIN} --images shards", "shards/0.tar: is not a whole", prepare=tar("shards/0.tar", share=0.3)),
    case("a shard is empty", f"{TRAIN} --images shards", "shards/0.tar: is not a whole", prepare=content("shards/0.tar", "")),
    case("a shard is a web page", f"{TRAIN} --images shards", "shards/0.tar", prepare=content("shards/0.tar", HTML * 30)),
    case("the pocket world's folder holds other things", "train.py --precision fp32", "data/pocket", "other things", "move",
         prepare=content("data/pocket/thesis.txt", "years of work")),
    case("the pocket world's mark is damaged", "train.py --precision fp32", "data/pocket/world.json", "delete",
         prepare=content("data/pocket/world.json", "{")),

    # ---- options of train.py
    case("unknown option", f"{TRAIN} --batchsize 8", "--batchsize", status=2, real=True),
    case("negative learning rate", f"{TRAIN} --lr -1", "--lr", "-1", status=2),
    case("learning rate NaN", f"{TRAIN} --lr nan", "--lr", "nan", status=2),
    case("learning rate beyond all bounds", f"{TRAIN} --lr 1e30 --epochs 4", "the loss is", "--lr", leaves=LOG),
    case("weight decay NaN", f"{TRAIN} --weight-decay nan", "--weight-decay", "nan", status=2),
    case("weight decay infinite", f"{TRAIN} --weight-decay inf", "--weight-decay", "inf", status=2),
    case("no tokens", f"{TRAIN} --tokens 0", "--tokens has to be at least 1", status=2),
    case("more tokens than BLIP has positions", f"{TRAIN} --tokens 100", "--tokens", "105 tokens", "64 positions", "shorten"),
    case("a batch of one", f"{TRAIN} --batch 1", "--batch has to be at least 2, not 1", status=2),
    case("an encoder that is none", f"{TRAIN} --encoder resnet50", "resnet50", "pocketnet", status=2),
    case("query size too small", f"{TRAIN} --query-size 8", "image_size 8", "32 or more"),
    case("query size beyond all memory", f"{TRAIN} --query-size 100000", "image_size 100000", "at most 1024"),
    case("image size beyond all memory", f"{TRAIN} --image-size 80000", "image size 80000", "at most 1024"),
    case("seed is a word", f"{TRAIN} --seed lucky", "--seed", "lucky", status=2),
    case("seed too large", f"{TRAIN} --seed 99999999999999999999", "--seed", "99999999999999999999", "at most", status=2),
    case("seed negative", f"{TRAIN} --seed -1", "--seed", "-1", status=2),
    case("threads nonsense", f"{TRAIN} --threads 100000", "--threads", "100000", "at most", status=2),
    case("workers nonsense", f"{TRAIN} --workers 100000", "--workers", "100000", "at most", status=2),
    case("device nonsense", f"{TRAIN} --device abacus", "--device has to be cpu or cuda, not abacus", status=2),
    case("device that torch knows but we do not", f"{TRAIN} --device meta", "--device has to be cpu or cuda, not meta", status=2),
    case("name climbs out", f"{TRAIN} --name ../new", "--name", "../new", status=2),
    case("name empty", f"{TRAIN} --name ''", "--name", status=2),
    case("paper without its BLIP", "train.py --preset paper", "--preset paper needs --blip", status=2),
    case("prompt too long", f"{TRAIN} --prompt '{'a ' * 80}'", "--prompt", "64 positions", "shorten"),
    case("runs is a file", TRAIN, "runs", "is a file", "move", prepare=content("runs", "text")),
    case("stored features cut off", f"{TRAIN} --images {{trained_images}} --cache-dir x", "x/features-", "v.npy: is damaged",
         "delete", prepare=stored(lambda path: path / "v.npy")),
    case("stored features without their note", f"{TRAIN} --images {{trained_images}} --cache-dir x", "done.json: is damaged",
         "delete", prepare=stored(lambda path: path / "done.json")),
    case("cache folder is a file", f"{TRAIN} --cache-dir x", "x", "is a file", prepare=content("x", "text")),
    case("sentences missing", f"{TRAIN} --loss gcd+llm --sentences none.json", "none.json: cannot be read", "give the path"),
    case("sentences malformed", f"{TRAIN} --loss gcd+llm --sentences s.json", "s.json: is not JSON", "write {concept",
         prepare=content("s.json", "{")),
    case("sentences of another kind", f"{TRAIN} --loss gcd+llm --sentences s.json", "s.json", '"cat" needs a list',
         prepare=content("s.json", '{"cat": "a cat"}')),

    # ---- annotations
    case("CIRR captions missing", f"{TABLE} cirr", "cap.rc2.test1.json is missing", "evaluate.py check",
         prepare=replaced("cirr", CIRR_TEST, None)),
    case("CIRR captions empty", f"{TABLE} cirr", "cap.rc2.test1.json is not usable JSON", "download it again",
         prepare=replaced("cirr", CIRR_TEST, "")),
    case("CIRR captions malformed", f"{TABLE} cirr", "cap.rc2.test1.json is not usable JSON",
         prepare=replaced("cirr", CIRR_TEST, '[{"pairid": 1,')),
    case("CIRR captions of another schema", f"{TABLE} cirr", "cap.rc2.test1.json", "'reference' is missing", "download",
         prepare=benchmark("cirr", entry(reference=None), CIRR_TEST)),
    case("CIRR captions a dict", f"{TABLE} cirr", "cap.rc2.test1.json: expected list", prepare=replaced("cirr", CIRR_TEST, "{}")),
    case("CIRR without queries", f"{TABLE} cirr", "cap.rc2.test1.json is empty", prepare=replaced("cirr", CIRR_TEST, "[]")),
    case("CIRR id is a word", f"{TABLE} cirr", "entry 0, 'pairid'", "expected int",
         prepare=benchmark("cirr", entry(pairid="one"), CIRR_TEST)),
    case("CIRR reference unknown", f"{TABLE} cirr", "entry 2", "'dev-9' is not in the list",
         prepare=benchmark("cirr", entry(2, reference="dev-9"), CIRR_TEST)),
    case("FashionIQ captions missing", FASHION, "cap.dress.test.json is missing", prepare=replaced("fashioniq", DRESS, None)),
    case("FashionIQ captions empty", FASHION, "cap.dress.test.json is not usable JSON", prepare=replaced("fashioniq", DRESS, "")),
    case("FashionIQ captions not UTF-8", FASHION, "cap.dress.test.json is not usable JSON",
         prepare=replaced("fashioniq", DRESS, b'["\xff"]')),
    case("FashionIQ captions of another schema", FASHION, "entry 0, 'captions'", "expected list",
         prepare=benchmark("fashioniq", entry(captions="is red"), DRESS)),
    case("FashionIQ split a dict", FASHION, "split.dress.test.json: expected list",
         prepare=replaced("fashioniq", DRESS_SPLIT, "{}")),
    case("CIRCO annotations missing", CIRCO, "annotations/test.json is missing", prepare=replaced("circo", CIRCO_TEST, None)),
    case("CIRCO annotations empty", CIRCO, "annotations/test.json is not usable JSON", prepare=replaced("circo", CIRCO_TEST, "")),
    case("CIRCO annotations of another schema", CIRCO, "entry 1", "'relative_caption' is missing",
         prepare=benchmark("circo", entry(1, relative_caption=None), CIRCO_TEST)),
    case("CIRCO id is no id", CIRCO, "is not a COCO image id", "whole numbers",
         prepare=benchmark("circo", entry(gt_img_ids=["x.jpg"]), CIRCO_TEST)),
    case("CIRR name climbs", f"{TABLE} cirr", "'..' is not a plain file name", "official source",
         prepare=benchmark("cirr", lambda paths: {name: f"../../{name}.png" for name in paths}, CIRR_SPLIT)),
    case("CIRR name absolute", f"{TABLE} cirr", "'/' is not a plain file name",
         prepare=benchmark("cirr", lambda paths: {name: "/etc/passwd" for name in paths}, CIRR_SPLIT)),
    case("CIRR name with a NUL", f"{TABLE} cirr", "is not a plain file name",
         prepare=benchmark("cirr", lambda paths: {name: "a\0.png" for name in paths}, CIRR_SPLIT)),
    case("FashionIQ name climbs", FASHION, "'../secret' is not a plain file name",
         prepare=benchmark("fashioniq", lambda names: ["../secret", *names], DRESS_SPLIT)),
    case("FashionIQ reference absolute", FASHION, "'/etc/passwd' is not a plain file name",
         prepare=benchmark("fashioniq", entry(candidate="/etc/passwd"), DRESS)),
    case("CIRCO id climbs", CIRCO, "'reference_img_id'", "expected int, found '../1'",
         prepare=benchmark("circo", entry(reference_img_id="../1"), CIRCO_TEST)),
    case("CIRCO truth climbs", CIRCO, "'../1' is not a COCO image id",
         prepare=benchmark("circo", entry(gt_img_ids=["../1"]), CIRCO_TEST)),
    case("FashionIQ's folder for CIRR's", f"{TABLE} {{world}}/fashioniq", "fashioniq/image_splits/split.rc2.test1.json is missing",
         "split.dress.test.json"),
    case("CIRR has test1, not tset", f"{SUBMIT} --split tset --checkpoint {{isa}}", "split.rc2.tset.json is missing",
         "split.rc2.test1.json"),
    case("CIRCO has no train", "evaluate.py score --benchmark circo --data {world}/circo --split train p.json",
         "annotations/train.json is missing (there is test.json, val.json)"),
    case("split climbs", f"{TABLE} {{world}}/cirr --split ../val", "'../val' is not a plain file name"),
    case("no folder of data", f"{TABLE} nowhere", "nowhere", "is missing", "evaluate.py check"),
    case("a modifier of 600 words", f"{TABLE} cirr", "query 10003", "64 positions", "shorten",
         prepare=benchmark("cirr", entry(3, caption="red " * 600), CIRR_TEST)),
    case("check finds nothing", "evaluate.py check --benchmark circo --data nowhere", "nowhere is not complete", "list above"),
    case("check of a climbing split", "evaluate.py check --benchmark circo --data {world}/circo --splits ../val",
         "plain file name"),

    # ---- gallery images
    *(case(f"gallery image {what}", f"{TABLE} cirr", "test1-1-0-img0.png", *says, prepare=replaced("cirr",
           "img_raw/test1/test1-1-0-img0.png", text)) for what, text, *says in (
        ("missing", None, "1 of 48 images of cirr are missing", "evaluate.py check"),
        ("of zero bytes", "", "1 of 48 images of cirr are missing or empty", "evaluate.py check"),
        ("a text", "a text", "cannot be read as an image", "replace"),
        ("truncated", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0@", "cannot be read as an image", "replace"))),
    case("gallery image of 900 million pixels", f"{TABLE} cirr", "test1-1-0-img0.png", "limit of 178956970 pixels", "replace",
         prepare=several(benchmark("cirr"),
                         lambda here: shutil.copy(here.huge, here.cwd / "cirr/img_raw/test1/test1-1-0-img0.png"))),

    # ---- options of evaluate.py
    case("no sub-command", "evaluate.py", "command", status=2),
    case("misspelt sub-command", "evaluate.py tabel", "tabel", "table", status=2),
    case("unknown method", "evaluate.py table --methods clip", "clip", "isa", status=2),
    case("unknown benchmark", "evaluate.py check --benchmark coco --data x", "coco", "circo", status=2),
    case("CUDA without CUDA", f"{TABLE} {{world}}/cirr --device cuda", 'device "cuda"', "no CUDA GPU", "cpu"),
    case("workers of evaluate", f"{TABLE} {{world}}/cirr --workers -1", "--workers", "-1", status=2),
    case("table to a folder", f"{TABLE} {{world}}/cirr --json out", "out", "is a folder", prepare=content("out", None)),
    case("table below a file", f"{TABLE} {{world}}/cirr --json x/t.json", "x", "is a file", prepare=content("x", "text")),
    case("picture without a format", f"{TABLE} {{world}}/cirr --picture x.jpeg2", "x.jpeg2", ".png"),
    case("submission to a folder", f"{SUBMIT} --split test1 --checkpoint {{isa}} --out sub", "sub", "is a folder",
         prepare=content("sub", None)),
    case("submission below a file", f"{SUBMIT} --split test1 --checkpoint {{isa}} --out x/s.json", "x", "is a file",
         prepare=content("x", "text")),
    case("inversion without sentences", f"{TABLE} {{world}}/cirr --methods searle-oti --sentences none.json",
         "none.json: cannot be read", "give the path"),

    # ---- prediction files
    case("predictions missing", f"{SCORE} p.json", "p.json is missing"),
    case("predictions empty", f"{SCORE} p.json", "p.json is not usable JSON", prepare=content("p.json", "")),
    case("predictions without a query", f"{SCORE} p.json", "1 queries are missing (first: 10000)",
         prepare=predictions(lambda d: d.pop("10000"))),
    case("predictions of another split", f"{SCORE} p.json", "not in this split (first: 77)",
         prepare=predictions(lambda d: d.update({"77": ["x"]}))),
    case("predictions repeat a name", f"{SCORE} p.json", "query 10000", "repeats a name",
         prepare=predictions(lambda d: d["10000"].append(d["10000"][0]))),
    case("predictions of an unknown image", f"{SCORE} p.json", "query 10000", "'cat.jpg' is not among the images",
         prepare=predictions(lambda d: d["10000"].append("cat.jpg"))),
    case("predictions are numbers", f"{SCORE} p.json", "query 10000", "expected str",
         prepare=predictions(lambda d: d.update({"10000": [1, 2]}))),
    case("predictions with an empty list", f"{SCORE} p.json", "query 10000", "is empty",
         prepare=predictions(lambda d: d.update({"10000": []}))),
    case("predictions: the subset's file", f"{SCORE} p.json", '"metric" should be "recall"',
         prepare=predictions(lambda d: d.update(metric="recall_subset"))),
    case("FashionIQ predictions without a category", f"{SCORE.replace('cirr', 'fashioniq')} p.json", "'dress' is missing",
         prepare=content("p.json", "{}")),

    # ---- baselines.py
    case("searle without images", f"{SEARLE} --sentences {{sentences}} --images nowhere", "nowhere: there is no such folder",
         "--images"),
    case("searle without sentences", f"{SEARLE} --sentences none.json", "none.json: cannot be read"),
    case("searle's BLIP executes code", f"{SEARLE} --sentences {{sentences}} --blip x.pth", "run code", prepare=evil("x.pth")),
    case("searle of one image", f"{SEARLE} --count 1", "--count", status=2),
    case("searle misspelt", "baselines.py seale", "seale", "searle", status=2),
    case("searle device", f"{SEARLE} --device abacus", "--device has to be cpu or cuda", status=2),
    case("searle seed", f"{SEARLE} --seed 99999999999999999999", "--seed", "at most", status=2),
    case("searle's name climbs", f"{SEARLE} --name ../new", "--name", status=2),
    case("searle with a learning rate of NaN", f"{SEARLE} --lr nan", "--lr", "nan", status=2),
    case("searle, runs is a file", f"{SEARLE} --sentences {{sentences}}", "runs", "is a file", prepare=content("runs", "text")),

    # ---- pocket.world
    case("world over other things", f"{WORLD} --out thesis", "thesis: holds other things", "--out",
         prepare=content("thesis/main.tex", "years of work")),
    case("world over a file", f"{WORLD} --out thesis", "thesis", "--out", prepare=content("thesis", "years of work"), real=True),
    case("world below a file", f"{WORLD} --out thesis/world", "thesis", "is a file", prepare=content("thesis", "years of work")),
    case("world of no size", f"{WORLD} --out w --scale nan", "--scale", "nan", status=2),
    case("world of negative size", f"{WORLD} --out w --scale -1", "--scale", "-1", status=2),
    case("world of infinite size", f"{WORLD} --out w --scale inf", "--scale", "inf", status=2),
    case("world's seed is a word", f"{WORLD} --out w --seed lucky", "--seed", "lucky", status=2),
    case("world's option shortened", f"{WORLD} --out w --scal 0.02", "--scal", status=2),

    # ---- pocket.pretrain
    case("pretrain below a file", f"{PRETRAIN} --out x/blip.pth", "x: is a file", "name another place",
         prepare=content("x", "text")),
    case("pretrain onto a folder", f"{PRETRAIN} --out out", "out", "is a folder", prepare=content("out", None)),
    case("pretrain no steps", f"{PRETRAIN} --out b.pth --steps 0", "--steps", "0", status=2),
    case("pretrain a batch of one", f"{PRETRAIN} --out b.pth --batch 1", "--batch", "1", status=2),
    case("pretrain no threads", f"{PRETRAIN} --out b.pth --threads 0", "--threads", "0", status=2),
    case("pretrain learning rate", f"{PRETRAIN} --out b.pth --lr nan", "--lr", "nan", status=2),
    case("pretrain goes on from a damaged state", f"{PRETRAIN} --out b.pth", "b.pth.state", "damaged", "delete",
         prepare=content("b.pth.state", "text")),
    case("pretrain's state executes code", f"{PRETRAIN} --out b.pth", "b.pth.state", "delete", prepare=evil("b.pth.state")),
    case("pretrain's matching before its start", f"{PRETRAIN} --out b.pth --matching-of pocket", "--steps",
         "more than 5600", status=2),
    case("pretrain's matching of nothing", f"{PRETRAIN} --out b.pth --steps 5601 --matching-of none.pth",
         "none.pth: there is no such file"),
    case("pretrain validates nothing", f"{PRETRAIN} --validate none.pth", "none.pth: there is no such file"),

    # ---- blip_lite.download
    case("download from nowhere", DOWNLOAD, "http://127.0.0.1:9/vocab.txt cannot be reached", "check the network", real=True),
    case("download from no address", "-m blip_lite.download vocab.txt --base-url nonsense", "nonsense/vocab.txt", "check"),
    case("download to a file", f"{DOWNLOAD} --to x", "x", "is a file", prepare=content("x", "text")),
    case("download of an unknown name", "-m blip_lite.download model_huge.pth", "model_huge.pth", "model_base.pth", status=2),

    # ---- tables.py
    case("no such table", "tables.py 21", "21", "choose from", status=2, real=True),
    case("tables of nothing", "-m", "paper", "NAME", status=2),
    case("tables below a file", "tables.py 5 --seeds 0 --out x/t.md", "x: is a file", prepare=content("x", "text")),
    case("tables from a damaged training", "tables.py 5 --seeds 0", "runs/tables/isa-0/isa.pt: is damaged", "train again",
         prepare=content("runs/tables/isa-0/isa.pt", "text")),
    case("tables from a damaged result", "tables.py 5 --seeds 0 --as-is", "runs/tables/isa-0/table.json: is damaged", "delete it",
         prepare=content("runs/tables/isa-0/table.json", '{"results":')),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ running
@pytest.fixture
def here(tmp_path, small_world, trained, huge, tmp_path_factory):
    """An empty current folder, and what the commands of the table are filled in with."""
    images = tmp_path_factory.getbasetemp() / "a few images"  # with a blank in its path
    if not images.exists():
        images.mkdir()
        for path in sorted((small_world / "train").iterdir())[:12]:
            shutil.copy2(path, images)
    places = {"world": small_world, "isa": trained.isa, "last": trained.last, "run": trained.run, "blip": ROOT / "pocket/blip.pth",
              "images": images, "trained_images": trained.cwd / "images", "sentences": ROOT / "pocket/sentences.json",
              "cache": trained.cwd / "features"}  # fmt: skip

    def make(name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        return tmp_path / name

    return SimpleNamespace(cwd=tmp_path, world=small_world, huge=huge, places=places, make=make)


def words(here, command):
    return shlex.split(command.format(**{name: shlex.quote(str(path)) for name, path in here.places.items()}))


def spawn(here, command, **more):
    """The command in a process of its own, as a user runs it."""
    script, *rest = words(here, command)
    line = [sys.executable, *([script] if script == "-m" else [str(ROOT / script)]), *rest]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("env", {})}
    done = subprocess.run(line, cwd=here.cwd, env=environment, capture_output=True, text=True, timeout=300, **more)
    return Finished(done.returncode, done.stdout, done.stderr)


def files(folder):
    """Everything below a folder but the cache: path -> what changes when somebody writes there."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: (path.lstat().st_size, path.lstat().st_mtime_ns) for name, path in found.items() if path.is_file()
            and not (name.startswith("cache/") and ".tmp" not in name)}  # fmt: skip


def check(case, done, before, cwd):
    """One line, the right status, nothing executed, nothing left behind, nothing changed."""
    assert "Traceback" not in done.err, done.err
    assert done.status == case.status, (done.status, done.err, done.out[-300:])
    lines = [line for line in done.err.splitlines() if not line.startswith(("skipped: ", "left out: "))]
    script = case.command.split()[0]
    program = case.command.split()[1] if script == "-m" else script
    if case.status == 2:
        usage, lines = lines[:-1], lines[-1:]
        assert usage and usage[0].startswith("usage: ") and all(line.startswith(" ") for line in usage[1:]), done.err
        assert " error: " in lines[0]
    else:
        assert len(lines) == 1 and lines[0].startswith(f"{program}: "), done.err
    assert len(lines[0]) < MESSAGE and all(part in lines[0] for part in case.says), lines[0]
    assert not (cwd / "executed").exists()
    after = files(cwd)
    assert {name: after.get(name) for name in before} == before
    assert sorted(after.keys() - before.keys()) == sorted(case.leaves)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if i % 3 else (), id=case.name)
                                  for i, case in enumerate(CASES)])  # fmt: skip
def test_bad_input(case, here, call_script):
    if case.prepare:
        case.prepare(here)
    before = files(here.cwd)
    check(case, call_script(*words(here, case.command)), before, here.cwd)


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case.real else pytest.mark.slow, id=case.name) for case in CASES])
def test_bad_input_as_a_process(case, here):
    if case.prepare:
        case.prepare(here)
    before = files(here.cwd)
    check(case, spawn(here, case.command), before, here.cwd)


def test_names_of_cases_are_unique():
    assert len({case.name for case in CASES}) == len(CASES) >= 55


# ------------------------------------------------------------------------------------ disks that are full, or not ours
def limited(size):
    """No file of this process may grow beyond `size` bytes: what a full disk looks like to whoever writes, on any machine."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FULL = [
    (case("checkpoint on a full disk", f"{TRAIN} --cache none", "runs/new/last.pt: cannot be written", "make room", leaves=LOG),
     1_000_000),
    (case("features on a full disk", f"{TRAIN} --cache-dir cache", "cache/features-", "cannot be written", "make room"), 50_000),
    (case("list of images on a full disk", f"{TRAIN} --cache-dir cache", "cache/images-", "cannot be written", "make room"), 300),
    (case("table on a full disk", f"{TABLE} {{world}}/cirr", "runs/table.json: cannot be written", "make room"), 4000),
    (case("submission on a full disk", f"{SUBMIT} --split test1 --checkpoint {{isa}}", "out.json: cannot be written", "make room"),
     4000),
    (case("world on a full disk", f"{WORLD} --scale 0.02 --out w", "w: cannot be written", "make room"), 1500),
    (case("pretraining on a full disk", f"{PRETRAIN} --out b.pth", "b.pth: cannot be written", "make room",
          leaves=("b.pth.log",)), 1_000_000),
]  # fmt: skip


@pytest.mark.parametrize("case, size", [pytest.param(*pair, marks=pytest.mark.slow if i else (), id=pair[0].name)
                                        for i, pair in enumerate(FULL)])  # fmt: skip
def test_full_disk(case, size, here):
    if case.command.startswith("evaluate.py"):  # the gallery's features are there already
        spawn(here, f"{TABLE} {{world}}/cirr --json first.json --methods image")
    before = files(here.cwd)
    done = spawn(here, case.command, preexec_fn=limited(size))
    check(case, done, before, here.cwd)
    assert not list(here.cwd.rglob("*.tmp*"))


def no_privileges():
    """Root reads and writes everything: give that up (Linux: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH)."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; another user has nothing to give up


def forbidden(name, mode, make):
    def prepare(here):
        make(here)
        (here.cwd / name).chmod(mode)

    return prepare


FORBIDDEN = [
    case("a folder of images that may not be read", f"{TRAIN} --images photos", "photos: cannot be searched", "Permission denied",
         prepare=forbidden("photos", 0, photos())),
    case("runs may not be written to", TRAIN, "runs: cannot be written to", "permissions",
         prepare=forbidden("runs", 0o555, content("runs", None))),
    case("a cache that may not be written to", f"{TRAIN} --cache-dir x", "x: cannot be written to", "permissions",
         prepare=forbidden("x", 0o555, content("x", None))),
    case("a folder for tables that may not be written to", f"{TABLE} {{world}}/cirr --json x/t.json", "x: cannot be written to",
         prepare=forbidden("x", 0o555, content("x", None))),
    case("a checkpoint that may not be read", f"{TABLE} {{world}}/cirr --checkpoint isa.pt", "isa.pt: may not be read",
         "permissions", prepare=forbidden("isa.pt", 0, checkpoint(lambda c: None))),
    case("an image that may not be read", f"{TABLE} cirr", "test1-1-0-img0.png: cannot be read", "Permission denied",
         prepare=forbidden("cirr/img_raw/test1/test1-1-0-img0.png", 0, benchmark("cirr"))),
    case("annotations that may not be read", f"{TABLE} cirr", "cap.rc2.test1.json", "Permission denied",
         prepare=forbidden(f"cirr/{CIRR_TEST}", 0, benchmark("cirr"))),
]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="how root gives up its privileges is Linux's")
@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if i else (), id=case.name)
                                  for i, case in enumerate(FORBIDDEN)])  # fmt: skip
def test_what_may_not_be_read_or_written(case, here):
    case.prepare(here)
    before = files(here.cwd)
    done = spawn(here, case.command, preexec_fn=no_privileges)
    for path in here.cwd.iterdir():
        path.chmod(0o755)
    check(case, done, before, here.cwd)


@pytest.fixture
def tmpfs(here):
    """A file system of a megabyte as the current folder, which only root can make."""
    folder = here.make("small/x").parent
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    here.cwd = folder
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_and_one_that_is_read_only(here, tmpfs):
    full = case("", f"{TRAIN} --cache none --cache-dir ../cache", "runs/new/last.pt: cannot be written (No space left on device)",
                leaves=LOG)
    check(full, spawn(here, full.command), {}, here.cwd)
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    readonly = case("", f"{TRAIN} --cache-dir ../cache", "cannot be written to", "name another place")
    check(readonly, spawn(here, readonly.command), files(here.cwd), here.cwd)


def test_a_huge_image_takes_no_memory(here):
    """Opened, it would take 900 MB, and 2.7 GB as RGB."""
    huge = next(case for case in CASES if case.name == "gallery image of 900 million pixels")
    huge.prepare(here)
    before, line = files(here.cwd), [sys.executable, str(ROOT / "evaluate.py"), *words(here, huge.command)[1:]]
    with subprocess.Popen(line, cwd=here.cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        err = child.stderr.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    check(huge, Finished(child.returncode, "", err), before, here.cwd)
    assert used.ru_maxrss < (1 << 20)  # KiB


# ------------------------------------------------------------------------------------------------- several processes
def test_a_port_that_is_taken(here):
    """As the first process of any launcher; torchrun itself asks for the port before it starts train.py."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        group = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = spawn(here, TRAIN, env=group)
    wrong = case("", TRAIN, f"the processes cannot meet at 127.0.0.1:{port}", "EADDRINUSE", "torchrun --standalone")
    done.err = "\n".join(line for line in done.err.splitlines() if not line.startswith("[W"))  # a warning of PyTorch's own
    check(wrong, done, {}, here.cwd)


@pytest.mark.slow
@pytest.mark.parametrize("options, says", [
    ("--batch 7", "--batch 7 cannot be shared out among 2 processes; give a multiple of 2"),
    ("--images nowhere", "nowhere: there is no such folder"), ("--images one", "one: holds 1 images"),
    ("--blip x.pth", "x.pth is a pickle that wants to run code"),
])  # fmt: skip
def test_under_torchrun_the_sentence_stands_above_its_report(here, options, says):
    """Its report, which names train.py's processes and exit status, cannot be turned off."""
    evil("x.pth")(here)
    photos(good=1, folder="one")(here)
    run = f"-m torch.distributed.run --standalone --nproc_per_node 2 {shlex.quote(str(ROOT / 'train.py'))} "
    done = spawn(here, run + TRAIN.removeprefix("train.py ") + " " + options)
    ours = [line for line in done.err.splitlines() if line.startswith("train.py: ")]
    assert done.status != 0 and any(says in line for line in ours) and len(ours) <= 2, done.err
    before_report = done.err[: done.err.index("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")]
    assert says in before_report and 'train.py", line' not in done.err and not (here.cwd / "executed").exists()
    assert not (here.cwd / "runs").exists()


# -------------------------------------------------------------------------------------------------- what has to work
BLOCK = np.kron(np.random.default_rng(5).integers(0, 256, (3, 5, 3)), np.ones((16, 16, 1))).astype(np.uint8)  # [48, 80, 3]
STORED = {  # EXIF orientation -> how a camera that is held so stores an upright image
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x), 7: lambda x: x.swapaxes(0, 1)[::-1, ::-1], 8: lambda x: np.rot90(x, -1),
}  # fmt: skip


def unusual_images(folder):
    """Files that people have -> {name: the pixels [H, W, 3] that they show, worked out without PIL}."""
    folder.mkdir(parents=True, exist_ok=True)
    shown, random = {}, np.random.default_rng(6)
    palette = random.integers(0, 256, (8, 3))
    frames = random.integers(0, 8, (3, 40, 56))
    indexed = [Image.fromarray(frame.astype(np.uint8)) for frame in frames]
    for image in indexed:
        image.putpalette(palette.astype(np.uint8).tobytes())
    indexed[0].save(folder / "animated.gif", save_all=True, append_images=indexed[1:], duration=50)
    shown["animated.gif"] = palette[frames[0]]
    indexed[1].save(folder / "palette.png", transparency=bytes([0, 128, 255, 0]))
    shown["palette.png"] = palette[frames[1]]
    ink = np.kron(random.integers(0, 256, (3, 4, 4)), np.ones((16, 16, 1)))
    Image.fromarray(ink.astype(np.uint8), "CMYK").save(folder / "cmyk.jpg", quality=100, subsampling=0)
    shown["cmyk.jpg"] = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    deep = random.integers(0, 65536, (30, 20)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "sixteen bits.png")
    shown["sixteen bits.png"] = np.repeat(deep[..., None] // 256, 3, axis=2)
    grey = random.integers(0, 256, (20, 30, 2)).astype(np.uint8)
    Image.fromarray(grey, "LA").save(folder / "grey and alpha.png")
    shown["grey and alpha.png"] = np.repeat(grey[..., :1], 3, axis=2)
    Image.new("RGB", (1, 1), (9, 99, 199)).save(folder / "one pixel.png")
    shown["one pixel.png"] = np.array([[[9, 99, 199]]])
    for orientation, store in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        name = f"orientation {orientation}.jpg"
        Image.fromarray(np.ascontiguousarray(store(BLOCK))).save(folder / name, quality=100, subsampling=0, exif=exif)
        shown[name] = BLOCK
    return shown


def test_unusual_images_are_seen_as_they_are(here, pocket_blip, call_script):
    """Pixel by pixel; and through train.py, whose stored features are those of the pixels worked out by hand."""
    shown = unusual_images(here.cwd / "photos")
    images = find_images(here.cwd / "photos", here.cwd / "list")
    assert [Path(images.name(i)).name for i in range(len(images))] == sorted(shown)
    for i, name in enumerate(sorted(shown)):
        found = np.asarray(blip_lite.to_rgb(images.open(i)), float)
        assert found.shape == shown[name].shape, name
        assert np.abs(found - shown[name]).max() <= (5 if name.endswith(".jpg") else 1 if name == "cmyk.jpg" else 0), name
    done = call_script(*words(here, f"{TRAIN} --images photos --loss gcd --cache global"))
    assert (done.status, done.err) == (0, "")
    v = torch.from_numpy(np.asarray(Features(next((here.cwd / "cache").glob("features-*"))).v, np.float32))
    by_hand = [pocket_blip.preprocess(Image.fromarray(np.rint(shown[name]).astype(np.uint8))) for name in sorted(shown)]
    assert (v * pocket_blip.encode_image(torch.stack(by_hand))[0]).sum(1).min() > 0.999


@pytest.mark.slow
def test_what_pil_reads_all_the_same_is_not_talked_of(here):
    """A hundred million pixels, below PIL's limit but above half of it; a JPEG whose EXIF block is damaged."""
    photos(("large.png", bomb(10_000)))(here)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + bytes(range(40))
    Image.fromarray(BLOCK).save(here.cwd / "photos" / "damaged exif.jpg", exif=exif)
    done = spawn(here, f"{TRAIN} --images photos --cache none")
    assert (done.status, done.err) == (0, "") and "14 images, steps 0..1" in done.out


LANGUAGES = ["\N{CAT FACE}\N{ZERO WIDTH JOINER}\N{HEAVY BLACK HEART} at night", "\u05d1\u05dc\u05d9\u05dc\u05d4 \u202eRTL",
             "a cafe\u0301 a\u0328\u0301", "", " ", "\u5728\u591c\u665a", "NUL \0 and \ud800", "[SEP] [MASK] [ENC]",
             "red " * 40]  # fmt: skip


def test_queries_in_any_writing_of_unusual_images(here, call_script):
    """Emoji, right to left, combining characters, nothing at all; the gallery holds all of the files above: a table comes out."""
    benchmark("cirr")(here)
    unusual_images(here.cwd / "unusual")
    gallery = sorted((here.cwd / "cirr/img_raw/test1").iterdir())
    for path, source in zip(gallery, sorted((here.cwd / "unusual").iterdir()), strict=False):
        shutil.copy(source, path)  # a .png that holds a GIF or a JPEG is not unusual either
    path = here.cwd / "cirr" / CIRR_TEST
    entries = json.loads(path.read_text())
    for i, text in enumerate(LANGUAGES):
        entries[i]["caption"] = text
    path.write_text(json.dumps(entries), encoding="utf-8-sig")  # as Windows writes it
    done = call_script(*words(here, f"{TABLE.replace('{cache}', 'cache')} cirr --methods text image+text isa"))
    assert (done.status, done.err) == (0, "") and "\nisa " in done.out and "nan" not in done.out
    assert (here.cwd / "runs/retrieved.png").exists()


def test_fashioniq_with_empty_captions(here, call_script):
    benchmark("fashioniq", entry(captions=[" . ", ""]), DRESS)(here)
    done = call_script(*words(here, f"{FASHION} --methods text isa"))
    assert (done.status, done.err) == (0, "") and "\nisa " in done.out


def test_a_gallery_smaller_than_k(here, call_script):
    """Eleven images besides the reference: all are ranked, and the target is among 50 of them. Paths have blanks and accents."""
    root = here.cwd / "donn\u00e9es de No\u00ebl \N{CAT FACE}" / "cirr"
    shutil.copytree(here.world / "cirr", root)
    paths = json.loads((root / CIRR_SPLIT).read_text())
    (root / CIRR_SPLIT).write_text(json.dumps(dict(list(paths.items())[:12])))
    queries = [q for q in json.loads((root / CIRR_TEST).read_text()) if q["img_set"]["id"] < 2]
    (root / CIRR_TEST).write_text(json.dumps(queries))
    line = f"{TABLE} {shlex.quote(str(root))} --json '\u0442\u0430\u0431\u043b\u0438\u0446\u0430 1.json' --picture '' --methods isa"
    done = call_script(*words(here, line))
    assert (done.status, done.err) == (0, "")
    found = json.loads((here.cwd / "\u0442\u0430\u0431\u043b\u0438\u0446\u0430 1.json").read_text())["results"]["cirr"]["isa"]
    found = found["all"]
    assert found["R@50"][0] == 100 and 0 <= found["R@1"][0] <= 100


def test_last_pt_is_a_checkpoint_too(here, call_script):
    done = call_script(*words(here, f"{TABLE} {{world}}/cirr --checkpoint {{last}} --methods isa"))
    assert (done.status, done.err) == (0, "") and "\nisa " in done.out


def test_resume_without_a_checkpoint_says_that_it_starts(here, call_script):
    """It is no error: tables.py always says --resume."""
    done = call_script(*words(here, f"{TRAIN} --resume"))
    assert (done.status, done.err) == (0, "")
    assert "runs/new/last.pt is not there: nothing to resume, training starts at step 0" in done.out


def test_short_lists_are_scored_and_told(here, call_script):
    predictions(lambda d: d.update({"10000": d["10000"][:2]}))(here)
    done = call_script(*words(here, f"{SCORE} p.json"))
    assert (done.status, done.err) == (0, "") and "1 of 32 lists hold fewer than 50 names" in done.out
    predictions(lambda d: None)(here)
    assert "fewer" not in call_script(*words(here, f"{SCORE} p.json")).out


def test_a_gpu_that_is_too_small(here, call_script, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    monkeypatch.setattr(isa, "global_contrastive_distillation", full)
    check(case("", TRAIN, "too little memory for --batch 8", "give a smaller one", leaves=LOG),
          call_script(*words(here, TRAIN)), {}, here.cwd)  # fmt: skip


@pytest.mark.skipif(not (DATA / "cirr").is_dir(), reason="needs the real annotations (ISA_SHARED)")
def test_the_real_cirr_has_test1(here, call_script):
    for command, split in ((f"{SUBMIT} --checkpoint {{isa}} --split tset", "tset"), (f"{SCORE} p.json --split tset", "tset")):
        wrong = case("", command, f"split.rc2.{split}.json is missing (there is split.rc2.test1.json, split.rc2.val.json)")
        predictions(lambda d: None)(here)
        done = call_script(*words(here, command.replace("{world}", shlex.quote(str(DATA)))))
        check(wrong, done, files(here.cwd), here.cwd)
