"""Frozen features of images, computed once and stored: v for galleries, v and F^v for training.

    features = image_features(blip, images, "cache", maps=True)
    features.v    Rows float16 [M, E], unit norm    features.F_v    Rows float16 [M, 1+N, D] or None

A folder belongs to one BLIP and image size, one precision and one list of files (name, size, time
of change): stale features are never used. A draft that a kill leaves is resumed to the same bits.
"""

import hashlib
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.files import check_folder, drafted, explained, flush, replacing
from plumbing.images import DELETE, Rows, load_images
from plumbing.precision import autocast
from plumbing.processes import from_the_first, process, wait_for_all

KEPT_EVERY = 10  # batches between two notes: what a kill loses at most
NOTES = "rows-*.json"  # of a draft: {"next": first row not stored, "bad": {row: reason}}


class Features:
    """What `image_features` stored. bad: {row of zeros: why its image cannot be read}."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.v = Rows(self.folder / "v.npy")  # [M, E]
        F_v = self.folder / "F_v.npy"
        self.F_v = Rows(F_v) if F_v.exists() else None  # [M, 1+N, D]
        try:
            self.bad = _bad(json.loads((self.folder / "done.json").read_text()))
        except (OSError, ValueError, KeyError, AttributeError):
            raise ValueError(f"{self.folder}/done.json: is damaged; {DELETE}") from None


def _bad(note):
    return {int(i): why for i, why in note["bad"].items()}


def bytes_per_image(blip):
    """(v, F^v): bytes of each in float16; 512 and 0.30 M for BLIP ViT-B at 224 px."""
    return 2 * blip.embed_dim, 2 * blip.visual_encoder.pos_embed[0].numel()


def image_features(blip, images, cache, maps=False, skip_bad=False, precision="fp32",
                   batch_size=128, workers=1, what="images", dtype=np.float16):
    """v, and with maps F^v, of every image of an ImageList, stored below `cache` -> Features.

    dtype: of v; F^v is float16. Raises ValueError for a disk that is too small, and unless skip_bad
    for an unreadable image.
    """
    key = f"{blip.fingerprint} {maps} {precision} {np.dtype(dtype)} {images.key}"
    folder = Path(cache) / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    check_folder(cache)
    if not from_the_first(folder.is_dir()):
        rows = {"v": (dtype, (blip.embed_dim,))}
        if maps:
            rows["F_v"] = np.float16, tuple(blip.visual_encoder.pos_embed.shape[1:])
        with drafted(folder, NOTES) if process()[0] == 0 else nullcontext() as draft:
            draft = from_the_first(draft)
            if draft:
                _fill(draft, rows, blip, images, skip_bad, precision, batch_size, workers, what)
        wait_for_all()
    features = Features(folder)
    if features.bad and not skip_bad:
        raise ValueError(next(iter(features.bad.values())))
    return features


def _fill(draft, rows, blip, images, skip_bad, precision, batch_size, workers, what):
    """Store what is missing in a draft, each process its share. rows: {file: (dtype, shape)}."""
    count, (rank, processes) = len(images), process()
    if rank == 0:
        size = count * sum(np.dtype(row).itemsize for row in rows.values())
        left = size - sum(512 * getattr(path.stat(), "st_blocks", 0) for path in draft.iterdir())
        free = shutil.disk_usage(draft).free
        resumed, folder = any(draft.glob(NOTES)), draft.with_suffix("")
        names = " and ".join(rows).replace("_", "^")
        which = f"{'the rest of ' * resumed}{names} of {count} {what}"
        if left > 0.95 * free:
            raise ValueError(f"{which} take {left / 1e9:.1f} GB, but {draft.parent} has "
                             f"{free / 1e9:.1f} GB free; choose another --cache-dir or store less")
        print(f"storing {which}: {size / 1e9:.2f} GB in {folder}", flush=True)
        with explained(draft):
            for name, (kind, shape) in rows.items() if not resumed else ():
                np.lib.format.open_memmap(draft / f"{name}.npy", "w+", kind, (count, *shape))
    wait_for_all()
    files = {name: Rows(draft / f"{name}.npy") for name in rows}
    shares = [range(count * r // processes, count * (r + 1) // processes) for r in range(processes)]
    share = shares[rank]
    _encode(draft, files, share, blip, images, skip_bad, precision, batch_size, workers, what)
    wait_for_all()
    if rank == 0:
        bad = {i: why for share in shares for i, why in _progress(draft, share)[2].items()}
        done = {"blip": blip.fingerprint, "precision": precision, "bad": bad}
        with replacing(draft / "done.json") as file:
            file.write(json.dumps(done).encode())
        for note in draft.glob(NOTES):
            note.unlink()


def _encode(draft, files, share, blip, images, skip_bad, precision, batch_size, workers, what):
    """Store what is missing of one process's share."""
    device = blip.temp.device
    note, begin, bad = _progress(draft, share)
    todo, pin = range(begin, share.stop), device.type == "cuda"
    batches = load_images(images, blip.preprocess, batch_size, workers, todo, pin)
    with tqdm(total=len(share), initial=begin - share.start, desc=f"encoding {what}", unit="img",
              disable=True if process()[0] else None) as bar:
        for number, (rows, pixels, damaged) in enumerate(batches, start=1):
            bad |= damaged
            if bad and not skip_bad:
                for path in draft.glob(NOTES):  # with the image replaced, the list is another
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
    """Write values [M, ...] to M of the Rows; through a memory map, a full disk would crash."""
    with open(rows.path, "r+b") as file:
        for i, row in zip(index, values.astype(rows.dtype), strict=True):
            file.seek(rows.offset + i * row.nbytes)
            file.write(row.tobytes())


def _progress(draft, share):
    """-> the note on a share of the rows, the first row not stored, {row: why it is bad}."""
    note = draft / f"rows-{share.start}-{share.stop}.json"
    kept = json.loads(note.read_text()) if note.exists() else {"next": share.start, "bad": {}}
    return note, kept["next"], _bad(kept)
