"""Frozen features of many images, computed once and kept on disk: v for galleries, v and F^v for training.

    features = image_features(blip, images, "cache", maps=True)
    features.v      Rows float16 [M, E], unit norm       features.F_v    Rows float16 [M, 1+N, D], or None

A cache belongs to one BLIP (its fingerprint holds the image size), one precision and one list of files (name, size, time of
change): where any of them differs another one is made, so a stale one is never read. What a process had stored when it was stopped
or killed is kept, and gone on with to the same bits.
"""

import hashlib
import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from blip_lite.preprocess import MEAN, STD, to_pixels
from plumbing.files import (
    check_folder,
    clear,
    complete,
    explained,
    flush,
    locked,
    remove_abandoned,
    replacing,
)
from plumbing.images import Rows, load_images
from plumbing.precision import autocast
from plumbing.processes import from_the_first, process, wait_for_all

KEPT_EVERY = 10  # batches; what came since then is lost when the process is killed


class Features:
    """What `image_features` stored in a folder. bad: {row: why that image could not be read}; its features are zero."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.v = Rows(self.folder / "v.npy")  # [M, E]
        self.F_v = Rows(self.folder / "F_v.npy") if (self.folder / "F_v.npy").exists() else None  # [M, 1+N, D]
        try:
            self.bad = {int(i): why for i, why in json.loads((self.folder / "done.json").read_text())["bad"].items()}
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{self.folder}/done.json: is damaged; delete its folder, it is then computed again") from None


def bytes_per_image(blip, dtype=np.float16):
    """(v, F^v): what each takes on disk; 512 B and 0.30 MB for BLIP ViT-B at 224 px, in float16."""
    tokens, width = blip.visual_encoder.pos_embed.shape[1:]
    return np.dtype(dtype).itemsize * blip.embed_dim, 2 * tokens * width


def image_features(blip, images, cache, maps=False, skip_bad=False, precision="fp32", batch_size=128, workers=1, what="images",
                   dtype=np.float16):  # fmt: skip
    """v, and with maps=True F^v, of every image of an ImageList, from `cache` or computed into it -> Features.

    Announces its size before it starts and refuses when the disk is too small. An unreadable image is an error, or, with
    skip_bad=True, a row of zeros that `bad` names. Raises ValueError. dtype: that of v; F^v is float16. Under torchrun every
    process computes its share; they have to see the same disk.
    """
    key = f"{blip.fingerprint} {maps} {precision} {np.dtype(dtype)} {images.key}"
    folder = Path(cache) / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    check_folder(cache)
    if not from_the_first((folder / "done.json").exists()):
        _compute(blip, images, folder, maps, skip_bad, precision, batch_size, workers, what, dtype)
    features = Features(folder)
    if features.bad and not skip_bad:
        raise ValueError(next(iter(features.bad.values())))
    return features


def _compute(blip, images, folder, maps, skip_bad, precision, batch_size, workers, what, dtype):
    rank, processes = process()
    count = len(images)
    shapes = {"v": (dtype, (blip.embed_dim,)), "F_v": (np.float16, tuple(blip.visual_encoder.pos_embed.shape[1:]))}
    shapes = shapes if maps else {"v": shapes["v"]}
    draft = folder.with_name(f"{folder.name}.tmp")
    with locked(draft) if rank == 0 else nullcontext():
        if from_the_first((folder / "done.json").exists()):  # another process stored it while this one waited
            return
        if rank == 0:
            size = count * sum(bytes_per_image(blip, dtype)[: len(shapes)])
            _begin(draft, folder, shapes, count, size, f"{'v and F^v' if maps else 'v'} of {count} {what}")
        wait_for_all()
        shares = [range(count * r // processes, count * (r + 1) // processes) for r in range(processes)]
        files = {name: Rows(draft / f"{name}.npy") for name in shapes}
        try:
            _encode(blip, images, files, shares[rank], skip_bad, precision, batch_size, workers, what)
        except BaseException:
            if rank == 0 and not any(draft.glob("rows-*.json")):  # nothing to go on with
                clear(draft)
            raise
        wait_for_all()
        if rank == 0:
            bad = {i: why for share in shares for i, why in _progress(draft, share)[1].items()}
            with replacing(draft / "done.json") as file:
                file.write(json.dumps({"blip": blip.fingerprint, "precision": precision, "bad": bad}).encode())
            for path in draft.glob("rows-*.json"):
                path.unlink()
            complete(draft, folder)
        wait_for_all()


def _begin(draft, folder, shapes, count, size, what):
    """Files for all rows, unless a stopped process has left them. Raises ValueError where the disk is too small."""
    remove_abandoned(folder.parent)
    left = size - sum(512 * getattr(path.stat(), "st_blocks", 0) for path in draft.iterdir())
    free = shutil.disk_usage(folder.parent).free
    if left > 0.95 * free:
        raise ValueError(
            f"{what} take {left / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free; "
            "choose another --cache-dir, store less or take fewer images"
        )
    begun = any(draft.glob("rows-*.json"))
    print(f"storing {'the rest of ' * begun}{what}: {size / 1e9:.2f} GB in {folder}", flush=True)
    if not begun:
        clear(draft)
        try:
            with explained(draft):
                for name, (kind, shape) in shapes.items():
                    np.lib.format.open_memmap(draft / f"{name}.npy", "w+", kind, (count, *shape))  # zeros that take no room yet
        except BaseException:
            clear(draft)
            raise


def _encode(blip, images, files, share, skip_bad, precision, batch_size, workers, what):
    """Store the rows of one process's share that are not stored yet."""
    device, draft = blip.temp.device, files["v"].path.parent
    begin, bad = _progress(draft, share)
    with tqdm(total=len(share), initial=begin - share.start, desc=f"encoding {what}", unit="img",
              disable=True if process()[0] else None) as bar:  # fmt: skip
        preprocess = partial(to_pixels, image_size=blip.image_size, mean=MEAN, std=STD)  # blip.preprocess without blip:
        todo = range(begin, share.stop)  # workers need no weights
        batches = load_images(images, preprocess, batch_size, workers, todo, device.type == "cuda")
        for number, (rows, pixels, damaged) in enumerate(batches, start=1):
            bad.update(damaged)
            if bad and not skip_bad:
                clear(draft)  # with the image mended it is another list
                raise ValueError(next(iter(bad.values())))
            if rows:
                with torch.no_grad(), autocast(device, precision):
                    v, F_v = blip.encode_image(pixels.to(device, non_blocking=True), cls_only=len(files) == 1)
            with explained(draft):
                for name, x in zip(files, (v, F_v) if rows else (), strict=False):
                    files[name].write(rows, x.cpu().float().numpy())
            bar.update(len(rows) + len(damaged))
            begin = max([*rows, *damaged]) + 1
            if number % KEPT_EVERY == 0:
                _keep(files, draft, share, begin, bad)
        _keep(files, draft, share, begin, bad)


def _progress(draft, share):
    """How far a share of the rows is stored: the first row that is not, and {row: why it is bad} of those before."""
    note = draft / f"rows-{share.start}-{share.stop}.json"
    kept = json.loads(note.read_text()) if note.exists() else {"next": share.start, "bad": {}}
    return kept["next"], {int(i): why for i, why in kept["bad"].items()}


def _keep(files, draft, share, begin, bad):
    """Note how far it is, when all that is on the disk."""
    with explained(draft):
        for rows in files.values():
            flush(rows.path)
    with replacing(draft / f"rows-{share.start}-{share.stop}.json") as file:
        file.write(json.dumps({"next": begin, "bad": bad}).encode())
