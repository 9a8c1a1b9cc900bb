"""What a training step sees: images in the order of an epoch, and what BLIP sees in them.

    data = TrainingData(settings, blip, encoder)
    for pixels, v, F_v in data.from_step(0):        # the steps of a whole run

Order and augmentation depend on seed and epoch alone, not on the number of processes and workers;
any step is reached at once. Memory does not grow with the images beyond KEPT.
"""

import sys

import numpy as np
import torch
from torch.utils.data import DataLoader

import blip_lite
from plumbing.command import ignore_signals
from plumbing.features import bytes_per_image, image_features
from plumbing.images import SKIP, find_images
from plumbing.precision import autocast
from plumbing.processes import process, wait_for_all

KEPT = 5e8  # bytes; all images are decoded once and kept, if no augmentation changes them, up to it
RUN = 1000  # neighbours on disk that an epoch's shuffle keeps within one buffer


def encode_training_images(blip, images, settings, maps=False):
    """image_features that names damaged images; ValueError for over 1 % unless they are skipped."""
    s = {"workers": 1, "skip_bad_images": False} | settings
    features = image_features(blip, images, s["cache_dir"], maps, skip_bad=True, what="training "
                              "images", precision=s["precision"], workers=s["workers"])
    bad, found = features.bad, f"{len(features.bad)} of {len(images)} images"
    if bad and process()[0] == 0:
        for why in [*list(bad.values())[:10], f"{found} are damaged"]:
            print(f"skipped: {why}", file=sys.stderr)
    if len(bad) > 0.01 * len(images) and not s["skip_bad_images"]:
        raise ValueError(f"{found} in {s['images']} are damaged, which is more than 1 %; {SKIP}")
    return features


class TrainingData:
    """The images of a run, and BLIP's v and F^v of each, stored or computed at every step.

    settings: train.py's options. count: readable images; batch: images a step over all processes;
    steps: of the run. ValueError for too many damaged images, fewer than two a process, and a batch
    that cannot be split among the processes.
    """

    def __init__(self, settings, blip, encoder):
        self.settings, self.blip = settings, blip
        rank, processes = process()
        if settings["batch"] % processes:
            raise ValueError(f"--batch {settings['batch']} cannot be split among {processes} "
                             f"processes; give a multiple of {processes}")
        if rank > 0:
            wait_for_all()
        images = find_images(settings["images"], settings["cache_dir"])
        if rank == 0:
            wait_for_all()  # the first process writes the list of images, the others read it
            v, F_v = (size * len(images) / 1e9 for size in bytes_per_image(blip))
            sizes = f"v {v:.3g} GB, F^v {F_v:.3g} GB"
            print(f"{len(images)} images: {sizes}; --cache {settings['cache']}")
        self.needs_maps, features = "lar" in settings["loss"].split("+"), None
        if settings["cache"] != "none" and settings["gallery"] == "blip":
            maps = self.needs_maps and settings["cache"] == "full"
            features = encode_training_images(blip, images, settings, maps)
        self.bad = sorted(features.bad) if features else []
        self.count = len(images) - len(self.bad)
        self.batch = min(settings["batch"], self.count // processes * processes)
        if self.batch < 2 * processes:
            raise ValueError(f"{settings['images']}: holds {self.count} readable images, training "
                             "needs at least two for each process")
        self.steps = settings["epochs"] * (self.count // self.batch)
        stored = features is not None and (features.F_v is not None or not self.needs_maps)
        to_blip = blip.preprocess if settings["gallery"] == "blip" and not stored else None
        self.samples = TrainingImages(images, encoder, settings, features, to_blip)

    def from_step(self, first):
        """Yield pixels [b, 3, S, S], v [b, E], F_v [b, 1+N, D] for each step from `first` on.

        b = batch / processes. All float32, on BLIP's device; F_v is None if LAR does not need it, v
        if the query side encodes the gallery. Neighbours stand in for images that are damaged
        meanwhile; ValueError for more than 1 %.
        """
        s, device, (rank, processes) = self.settings, self.blip.temp.device, process()
        order = batches(self.count, self.bad, self.batch, s["seed"], first, self.steps,
                        s["shuffle_buffer"], rank, processes)
        loader = DataLoader(self.samples, batch_sampler=order, collate_fn=self.samples.collate,
                            num_workers=s["workers"], pin_memory=device.type == "cuda",
                            worker_init_fn=ignore_signals)
        damaged = set()
        for step, (pixels, blip_pixels, v, F_v, bad) in enumerate(loader, start=first):
            if pixels is None:
                raise ValueError("a hundred damaged images in a row, the first: "
                                 f"{next(iter(bad.values()))}")
            for why in bad.values():
                print(f"skipped: {why}", file=sys.stderr)
            damaged |= bad.keys()
            seen = (step + 1 - first) * self.batch / processes
            if len(damaged) > max(10, 0.01 * seen) and not s["skip_bad_images"]:
                raise ValueError(f"{len(damaged)} images, more than 1 %, were damaged or missing "
                                 f"up to step {step + 1}; {SKIP}")
            pixels, blip_pixels, v, F_v = (x if x is None else x.to(device, non_blocking=True)
                                           for x in (pixels, blip_pixels, v, F_v))
            if blip_pixels is not None:
                with torch.no_grad(), autocast(device, s["precision"]):
                    parts = [self.blip.encode_image(part, cls_only=not self.needs_maps)
                             for part in blip_pixels.split(s["micro_batch"] or self.batch)]
                v, F_v = map(torch.cat, zip(*parts, strict=True))
                F_v = F_v if self.needs_maps else None
            yield pixels, *(x if x is None else x.float() for x in (v, F_v))


class TrainingImages:
    """(epoch, i) -> image i as the query model sees it in that epoch, a function of the seed."""

    def __init__(self, images, encoder, settings, features=None, to_blip=None):
        self.images, self.features, self.to_blip = images, features, to_blip
        self.size, self.normalization = encoder.image_size, encoder.normalization
        self.square = getattr(encoder, "square", blip_lite.to_square)
        self.seed, self.augment, self.kept = settings["seed"], None, {}
        crop, flip, randaugment = (settings[name] for name in ("crop", "flip", "randaugment"))
        if crop < 1 or flip or randaugment:
            from plumbing.augment import augmentation

            self.augment = augmentation(self.size, crop, flip, randaugment)
        size = 3 * self.size**2 * len(images) * max(1, settings["workers"])  # each keeps its own
        self.keep = size <= KEPT and not (self.augment or to_blip)

    def __getitem__(self, epoch_and_row):
        """-> i, uint8 pixels [3, S, S], BLIP's pixels or None, {row: why it is damaged}.

        The next image stands in for a damaged one; after a hundred i is None.
        """
        epoch, row = epoch_and_row
        if row in self.kept:
            return row, self.kept[row], None, {}
        damaged = {}
        for i in ((row + step) % len(self.images) for step in range(100)):
            try:
                image = blip_lite.to_rgb(self.images.open(i))
            except ValueError as error:
                damaged[i] = str(error)
                continue
            seen = image
            if self.augment:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(hash((self.seed, epoch, i)))
                    seen = self.augment(image)
            pixels = self.square(seen, self.size)
            if self.keep:
                self.kept[i] = pixels
            return i, pixels, self.to_blip(image) if self.to_blip else None, damaged
        return None, None, None, damaged  # an error here would end as a worker's traceback

    def collate(self, samples):
        """Samples -> pixels [b, 3, S, S], BLIP's pixels, v [b, E], F_v [b, 1+N, D], damaged."""
        rows, pixels, blip_pixels, damaged = zip(*samples, strict=True)
        if None in rows:  # a hundred damaged images in a row
            return None, None, None, None, damaged[rows.index(None)]
        stored = (self.features.v, self.features.F_v) if self.features else (None, None)
        v, F_v = (x if x is None else torch.from_numpy(x[rows]) for x in stored)
        blip_pixels = torch.stack(blip_pixels) if self.to_blip else None
        damaged = {i: why for reasons in damaged for i, why in reasons.items()}
        pixels = blip_lite.normalize(torch.stack(pixels), *self.normalization)
        return pixels, blip_pixels, v, F_v, damaged


def epoch_order(n, seed, epoch, buffer, start=0):
    """Yield 0 .. n-1 in the order of one epoch from place `start` on, at most `buffer` at a time.

    Runs of neighbours on disk are shuffled, then each `buffer`.
    """
    random = np.random.default_rng((seed, epoch))
    shift, runs = random.integers(n), random.permutation(n // RUN)  # the incomplete run moves
    runs = np.append(runs, n // RUN)
    for block in range(start // buffer, -(-n // buffer)):
        place = np.arange(block * buffer, min(n, (block + 1) * buffer))
        rows = (runs[place // RUN] * RUN + place % RUN + shift) % n
        rows = np.random.default_rng((seed, epoch, block)).permutation(rows)
        yield rows[max(0, start - block * buffer) :]


def batches(n, bad, batch, seed, first_step, steps, buffer, rank=0, processes=1):
    """Yield lists of (epoch, row): this process's share of each step's batch.

    An epoch's last incomplete batch is dropped. n counts the rows that are not in `bad` (sorted).
    """
    per_epoch, share = n // batch, batch // processes
    bad = np.asarray(bad) - np.arange(len(bad))
    for epoch in range(first_step // per_epoch, steps // per_epoch):
        start = first_step % per_epoch if epoch == first_step // per_epoch else 0
        waiting = np.empty(0, np.int64)
        for rows in epoch_order(n, seed, epoch, buffer, start * batch):
            waiting = np.append(waiting, rows)
            while len(waiting) >= batch:
                mine, waiting = waiting[rank * share : (rank + 1) * share], waiting[batch:]
                mine = mine + np.searchsorted(bad, mine, side="right")  # the m-th sound row
                yield [(epoch, row) for row in mine.tolist()]
