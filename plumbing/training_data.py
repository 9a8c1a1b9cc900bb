"""What a training step sees: the order of images, augmentation, damaged files, v and F^v stored or computed."""

import sys

import numpy as np
import torch

import blip_lite
from plumbing.features import bytes_per_image, image_features
from plumbing.images import find_images
from plumbing.processes import process, wait_for_all

RUN = 1000  # images that follow each other on disk and stay together when an epoch is shuffled, up to --shuffle-buffer


class TrainingImages(torch.utils.data.Dataset):
    """(epoch, i) -> image i as the query model sees it in that epoch, a pure function of seed, epoch and i; and what else a step
    needs of it: BLIP's pixels where BLIP has to look at it now, or what is stored. `batch` puts samples together.
    """

    def __init__(self, images, encoder, args, features=None, blip_pixels=None):
        self.images, self.features, self.blip_pixels, self.seed = images, features, blip_pixels, args.seed
        self.size, self.normalization = encoder.image_size, encoder.normalization
        self.augment = None
        if args.crop < 1 or args.flip or args.randaugment:
            from plumbing.augment import augmentation  # here, because importing torchvision takes as long as torch

            self.augment = augmentation(self.size, args.crop, args.flip, args.randaugment)

    def __getitem__(self, epoch_and_row):
        """-> i, pixels [3, S, S], BLIP's pixels or None, {row: why it is damaged}; the next image stands in for a damaged one.

        After a hundred damaged images i is None.
        """
        epoch, row = epoch_and_row
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
            pixels = blip_lite.to_pixels(seen, self.size, *self.normalization)
            return i, pixels, self.blip_pixels(image) if self.blip_pixels else None, damaged
        return None, None, None, damaged  # an error in a worker would reach the user as its whole stack

    def batch(self, samples):
        """Samples -> dict: pixels [B, 3, S, S], blip_pixels, v [B, E], F_v [B, 1+N, D] (float16; these may be None), damaged;
        or hopeless: why the first of a hundred damaged images is."""
        rows, pixels, blip_pixels, damaged = zip(*samples, strict=True)
        if None in rows:
            return {"hopeless": next(iter(damaged[rows.index(None)].values()))}
        stored = lambda x: None if x is None else torch.from_numpy(x[rows])  # noqa: E731
        return {
            "pixels": torch.stack(pixels),
            "blip_pixels": torch.stack(blip_pixels) if self.blip_pixels else None,
            "v": stored(self.features and self.features.v),
            "F_v": stored(self.features and self.features.F_v),
            "damaged": {i: why for reasons in damaged for i, why in reasons.items()},
        }


def epoch_order(n, seed, epoch, buffer, start=0):
    """The numbers 0 .. n-1, each once, in the order of one epoch, from its place `start` on: arrays of at most `buffer`.

    Runs of images that lie together on disk are shuffled, then the images of every `buffer` that follow each other. Any place is
    reached at once, and memory holds the buffer and a number for each run.
    """
    random = np.random.default_rng((seed, epoch))
    shift, runs = random.integers(n), random.permutation(n // RUN)  # shifted: the rest that fills no run is another each time
    runs = np.append(runs, n // RUN)
    for block in range(start // buffer, -(-n // buffer)):
        place = np.arange(block * buffer, min(n, (block + 1) * buffer))
        rows = (runs[place // RUN] * RUN + place % RUN + shift) % n
        yield np.random.default_rng((seed, epoch, block)).permutation(rows)[max(0, start - block * buffer) :]


def batches(n, bad, batch, seed, first_step, steps, buffer, rank=0, processes=1):
    """Lists of (epoch, row), this process's share of each step's batch: each epoch a new order, its last incomplete batch dropped.

    n rows without the bad ones (sorted). What a step sees is the same for any number of processes and any first step.
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
                mine = mine + np.searchsorted(bad, mine, side="right")  # the m-th row that is not bad
                yield [(epoch, row) for row in mine.tolist()]


def open_images(args, blip, precision):
    """-> ImageList, its stored features (None with --cache none) and its damaged rows, sorted. Raises ValueError for too many."""
    rank, _ = process()
    if rank > 0:
        wait_for_all()
    images = find_images(args.images, args.cache_dir)
    if rank == 0:
        wait_for_all()  # the first process makes the list, the others find it
        sizes = [size * len(images) / 1e9 for size in bytes_per_image(blip)]
        print(f"{len(images)} images: v {sizes[0]:.3g} GB, F^v {sizes[1]:.3g} GB; --cache {args.cache}")
    if args.cache == "none" or args.gallery == "query":
        return images, None, []
    maps = args.cache == "full" and "lar" in args.loss
    features = image_features(blip, images, args.cache_dir, maps, skip_bad=True, precision=precision, workers=args.workers,
                              what="training images")  # fmt: skip
    if rank == 0:
        for why in list(features.bad.values())[:10]:
            print(f"skipped: {why}", file=sys.stderr)
    if len(features.bad) > 0.01 * len(images) and not args.skip_bad_images:
        counts = f"{len(features.bad)} of {len(images)} images in {args.images} are damaged"
        raise ValueError(f"{counts}, which is more than 1 %; mend them, or train without them by --skip-bad-images")
    if features.bad and rank == 0:
        print(f"skipped: {len(features.bad)} of {len(images)} images, which are damaged", file=sys.stderr)
    return images, features, sorted(features.bad)
