"""The index of search.py: v of every photo below a folder, each encoded once."""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.files import explained, locked, replacing
from plumbing.images import identity, list_images, load_images
from plumbing.precision import autocast


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
