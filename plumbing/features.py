"""Frozen features of images, computed once and stored: v for galleries, v and F^v for training.

    features = image_features(blip, images, "cache", maps=True)
    features.v    Rows float16 [M, E], unit norm    features.F_v    Rows float16 [M, 1+N, D] or None

Stored features belong to one BLIP (its fingerprint holds the image size), one precision and one
list of files (name, size, time of change). Where any of them differs they are computed again, so
stale ones are never used. A process that is stopped or killed leaves a draft, which the next one
resumes to the same bits.
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

from blip_lite import MEAN, STD, to_pixels
from plumbing.files import check_folder, drafted, explained, flush, replacing
from plumbing.images import DELETE, Rows, load_images
from plumbing.precision import autocast
from plumbing.processes import from_the_first, process, wait_for_all

KEPT_EVERY = 10  # batches between two notes of progress: what a kill can lose
NOTES = "rows-*.json"  # a draft's notes: {"next": first row not stored, "bad": {row: reason}}


class Features:
    """What `image_features` stored in a folder.

    bad: {row: why that image cannot be read}; its features are zeros.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.v = Rows(self.folder / "v.npy")  # [M, E]
        F_v = self.folder / "F_v.npy"
        self.F_v = Rows(F_v) if F_v.exists() else None  # [M, 1+N, D]
        try:
            bad = json.loads((self.folder / "done.json").read_text())["bad"]
            self.bad = {int(i): why for i, why in bad.items()}
        except (OSError, ValueError, KeyError, AttributeError):
            raise ValueError(f"{self.folder}/done.json: is damaged; {DELETE}") from None


def bytes_per_image(blip, dtype=np.float16):
    """(v, F^v): bytes of each on disk; 512 and 0.30 M for BLIP ViT-B at 224 px, in float16."""
    tokens, width = blip.visual_encoder.pos_embed.shape[1:]
    return np.dtype(dtype).itemsize * blip.embed_dim, 2 * tokens * width


def image_features(blip, images, cache, maps=False, skip_bad=False, precision="fp32",
                   batch_size=128, workers=1, what="images", dtype=np.float16):
    """v, and with maps=True F^v, of every image of an ImageList, stored below `cache` -> Features.

    dtype: that of v; F^v is float16. Prints the size of what it is about to store. An unreadable
    image is an error, or with skip_bad=True a row of zeros, named in `bad`. Under torchrun each
    process computes its share; all have to see the same disk. Raises ValueError, also where the
    disk is too small.
    """
    key = f"{blip.fingerprint} {maps} {precision} {np.dtype(dtype)} {images.key}"
    folder = Path(cache) / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    check_folder(cache)
    if not from_the_first(folder.is_dir()):
        shapes = {"v": (dtype, (blip.embed_dim,))}
        if maps:
            shapes["F_v"] = (np.float16, tuple(blip.visual_encoder.pos_embed.shape[1:]))
        with drafted(folder, NOTES) if process()[0] == 0 else nullcontext() as draft:
            draft = from_the_first(draft)
            if draft:
                _fill(draft, shapes, blip, images, skip_bad, precision, batch_size, workers, what)
        wait_for_all()
    features = Features(folder)
    if features.bad and not skip_bad:
        raise ValueError(next(iter(features.bad.values())))
    return features


def _fill(draft, shapes, blip, images, skip_bad, precision, batch_size, workers, what):
    """Store what is missing in a draft, each process its share of the rows."""
    rank, processes = process()
    count = len(images)
    if rank == 0:
        _begin(draft, shapes, count, what)
    wait_for_all()
    files = {name: Rows(draft / f"{name}.npy") for name in shapes}
    shares = [range(count * r // processes, count * (r + 1) // processes) for r in range(processes)]
    share = shares[rank]
    _encode(draft, files, share, blip, images, skip_bad, precision, batch_size, workers, what)
    wait_for_all()
    if rank == 0:
        bad = {i: why for share in shares for i, why in _progress(draft, share)[2].items()}
        with replacing(draft / "done.json") as file:
            done = {"blip": blip.fingerprint, "precision": precision, "bad": bad}
            file.write(json.dumps(done).encode())
        for note in draft.glob(NOTES):
            note.unlink()


def _begin(draft, shapes, count, what):
    """Make files for all rows, or find some to resume. ValueError if the disk is too small."""
    size = count * sum(np.dtype(kind_and_shape).itemsize for kind_and_shape in shapes.values())
    left = size - sum(512 * getattr(path.stat(), "st_blocks", 0) for path in draft.iterdir())
    free = shutil.disk_usage(draft).free
    what = f"{' and '.join(shapes).replace('_', '^')} of {count} {what}"
    if left > 0.95 * free:
        raise ValueError(
            f"{what} take {left / 1e9:.1f} GB, but {draft.parent} has {free / 1e9:.1f} GB free; "
            "choose another --cache-dir, store less or take fewer images"
        )
    resumed = any(draft.glob(NOTES))
    folder = draft.with_suffix("")
    print(f"storing {'the rest of ' * resumed}{what}: {size / 1e9:.2f} GB in {folder}", flush=True)
    if not resumed:
        with explained(draft):
            for name, (kind, shape) in shapes.items():  # zeros, which take no room on the disk yet
                np.lib.format.open_memmap(draft / f"{name}.npy", "w+", kind, (count, *shape))


def _encode(draft, files, share, blip, images, skip_bad, precision, batch_size, workers, what):
    """Store the rows of one process's share that are not stored yet."""
    device = blip.temp.device
    note, begin, bad = _progress(draft, share)
    todo = range(begin, share.stop)
    # blip.preprocess does the same, but would send BLIP's weights to the workers
    preprocess = partial(to_pixels, image_size=blip.image_size, mean=MEAN, std=STD)
    batches = load_images(images, preprocess, batch_size, workers, todo, device.type == "cuda")
    with tqdm(total=len(share), initial=begin - share.start, desc=f"encoding {what}", unit="img",
              disable=True if process()[0] else None) as bar:
        for number, (rows, pixels, damaged) in enumerate(batches, start=1):
            bad |= damaged
            if bad and not skip_bad:
                for path in draft.glob(NOTES):  # once the image is replaced, the list is another
                    path.unlink()
                raise ValueError(next(iter(bad.values())))
            if rows:
                with torch.no_grad(), autocast(device, precision):
                    pixels = pixels.to(device, non_blocking=True)
                    v_and_F_v = blip.encode_image(pixels, cls_only=len(files) == 1)
                with explained(draft):
                    for file, x in zip(files.values(), v_and_F_v, strict=False):  # v alone, or both
                        _write(file, rows, x.cpu().float().numpy())
            bar.update(len(rows) + len(damaged))
            begin += len(rows) + len(damaged)
            if number % KEPT_EVERY == 0 or begin == share.stop:
                with explained(draft):
                    for file in files.values():
                        flush(file.path)
                with replacing(note) as file:
                    file.write(json.dumps({"next": begin, "bad": bad}).encode())


def _write(rows, index, values):
    """Write values [M, ...] to M rows of Rows; through a memory map, a full disk would crash."""
    with open(rows.path, "r+b") as file:
        for i, row in zip(index, values.astype(rows.dtype), strict=True):
            file.seek(rows.offset + i * row.nbytes)
            file.write(row.tobytes())


def _progress(draft, share):
    """-> the note on a share of the rows, the first row not yet stored, {row: why it is bad}."""
    note = draft / f"rows-{share.start}-{share.stop}.json"
    kept = json.loads(note.read_text()) if note.exists() else {"next": share.start, "bad": {}}
    return note, kept["next"], {int(i): why for i, why in kept["bad"].items()}
