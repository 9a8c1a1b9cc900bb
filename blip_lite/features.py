"""Frozen features of many image files, computed once and kept on disk: v for galleries, v and F^v for training.

    features = blip_lite.image_features(blip, paths, "cache", maps=True)
    features.v      float32 [M, E], unit norm            features.F_v    float16 [M, 1+N, D], memory-mapped, or None

A cache belongs to one BLIP (its fingerprint holds the image size), one precision and one list of files (name, size, time of
change): where any of them differs another one is made, so a stale one is never read.
"""

import hashlib
import json
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .preprocess import MEAN, STD, to_pixels


@dataclass
class Features:
    v: np.ndarray  # [M, E] float32
    F_v: np.ndarray | None  # [M, 1+N, D] float16
    bad: dict[int, str]  # row -> why that image could not be read; its features are zero


def open_image(path):
    """Path -> a fully decoded PIL image. Raises ValueError, one sentence, for anything that is not a readable image."""
    try:
        image = Image.open(path)
        image.load()
        return image
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such image; check the data set with `python evaluate.py check`") from None
    except Exception as error:  # PIL's decoders raise nearly anything on damaged data
        reason = "is empty" if Path(path).stat().st_size == 0 else f"cannot be read as an image ({error})"
        raise ValueError(f"{path}: {reason}; replace or remove the file") from None


def pick_precision(device):
    """"bf16" where bfloat16 matrix products are clearly the faster ones on this device, else "fp32"."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(768, 768, dtype=dtype)
        for _ in range(6):
            began = time.perf_counter()
            a @ a
            best[dtype] = min(best.get(dtype, 1.0), time.perf_counter() - began)
    return "bf16" if best[torch.float32] > 1.3 * best[torch.bfloat16] else "fp32"


def autocast(device, precision):
    """The context in which networks run: bfloat16 autocast for "bf16", nothing for "fp32"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if precision == "bf16" else nullcontext()


class ImageFiles(torch.utils.data.Dataset):
    """Row i -> (i, pixels) or, for a damaged image, (i, the reason)."""

    def __init__(self, paths, preprocess):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return i, self.preprocess(open_image(self.paths[i]))
        except ValueError as error:
            return i, str(error)


def load_images(paths, preprocess, batch_size, workers):
    """Batches of lists of (row, pixels [3, S, S] or the reason why not), in order."""
    files = ImageFiles(paths, preprocess)
    return torch.utils.data.DataLoader(files, batch_size, num_workers=workers, collate_fn=list)


def image_features(blip, paths, cache, maps=False, skip_bad=False, precision="fp32", batch_size=128, workers=1, what="images"):
    """v (and with maps=True F^v) of every file of `paths`, from `cache` or computed into it -> Features.

    Announces its size before it starts and refuses when the disk is too small. An unreadable image is an error, or, with
    skip_bad=True, a row of zeros that `bad` names. Raises ValueError.
    """
    folder = Path(cache) / f"features-{_key(blip, paths, maps, precision)}"
    if not (folder / "done.json").exists():
        _compute(blip, paths, folder, maps, skip_bad, precision, batch_size, workers, what)
    bad = {int(i): why for i, why in json.loads((folder / "done.json").read_text())["bad"].items()}
    if bad and not skip_bad:
        raise ValueError(next(iter(bad.values())))
    return Features(np.load(folder / "v.npy"), np.load(folder / "F_v.npy", mmap_mode="r") if maps else None, bad)


def _key(blip, paths, maps, precision):
    digest = hashlib.sha256(f"{blip.fingerprint} {maps} {precision}".encode())
    for path in paths:
        try:
            stat = os.stat(path)
            line = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        except OSError:
            line = f"{path}\0missing\n"
        digest.update(line.encode(errors="surrogateescape"))  # a file's name may be any bytes
    return digest.hexdigest()[:16]


def _compute(blip, paths, folder, maps, skip_bad, precision, batch_size, workers, what):
    with torch.no_grad():
        tokens = blip.encode_image(torch.zeros(1, 3, blip.image_size, blip.image_size, device=blip.temp.device))[1].shape[1:]
    shape = (len(paths), *tokens)
    size = len(paths) * (4 * blip.embed_dim + (2 * tokens.numel() if maps else 0))
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    kept = "v and F^v" if maps else "v"
    if size > 0.95 * free:
        raise ValueError(
            f"{kept} of {len(paths)} {what} take {size / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free; "
            "choose another --cache folder or fewer images"
        )
    print(f"storing {kept} of {len(paths)} {what}: {size / 1e9:.2f} GB in {folder}", flush=True)
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        v = np.lib.format.open_memmap(draft / "v.npy", "w+", np.float32, (len(paths), blip.embed_dim))
        F_v = np.lib.format.open_memmap(draft / "F_v.npy", "w+", np.float16, shape) if maps else None
        bad = {}
        with tqdm(total=len(paths), desc=f"encoding {what}", unit="img", disable=None) as bar:
            preprocess = partial(to_pixels, image_size=blip.image_size, mean=MEAN, std=STD)  # blip.preprocess without blip:
            for rows in load_images(paths, preprocess, batch_size, workers):  # workers need no copy of the weights
                bad.update({i: why for i, why in rows if isinstance(why, str)})
                if bad and not skip_bad:
                    raise ValueError(next(iter(bad.values())))
                good = [(i, pixels) for i, pixels in rows if not isinstance(pixels, str)]
                if good:
                    indices, pixels = [i for i, _ in good], torch.stack([p for _, p in good])
                    with torch.no_grad(), autocast(blip.temp.device, precision):
                        v_rows, F_rows = blip.encode_image(pixels.to(blip.temp.device))
                    v[indices] = v_rows.float().cpu().numpy()
                    if maps:
                        F_v[indices] = F_rows.half().cpu().numpy()
                bar.update(len(rows))
        v.flush()
        if maps:
            F_v.flush()
        (draft / "done.json").write_text(json.dumps({"blip": blip.fingerprint, "precision": precision, "bad": bad}))
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
