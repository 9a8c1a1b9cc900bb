"""A training step in pieces: its losses see the whole batch, its memory holds one piece.

Gradient caching (Gao et al. 2021): all pieces run without storing anything but their features; the
losses of the whole batch give each feature's gradient; then each piece runs again, with its own.
torch.utils.checkpoint does the second half within backward(), and draws the same random numbers.
"""

import re
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import isa
from plumbing.precision import autocast
from plumbing.processes import process


def in_pieces(model, blip, size):
    """-> the model, run on `size` images at a time; from now on BLIP reads so, too. None: whole."""
    if size:
        read_in_pieces(blip, size)
    return InPieces(model, size) if size else model


class InPieces(nn.Module):
    """A model of pixels [b, 3, S, S] -> a tensor or a tuple of them, `size` images at a time.

    Batch norm sees the statistics of a piece, as it sees those of a process's share under DDP.
    """

    def __init__(self, model, size):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, pixels):
        parts = [run_twice(self.model, piece, again=keep_statistics(self.model))
                 for piece in pixels.split(self.size)]
        if isinstance(parts[0], tuple):
            return tuple(map(torch.cat, zip(*parts, strict=True)))
        return torch.cat(parts)


def read_in_pieces(blip, size):
    """From now on BLIP reads the sentences, and LAR's three pairs, of `size` images at a time."""
    whole_encode_text, whole_match = blip.encode_text, blip.match

    def encode_text(words, mask):
        pieces = zip(words.split(size), mask.split(size), strict=True)
        return torch.cat([run_twice(whole_encode_text, *piece) for piece in pieces])

    def match(words, mask, F_v, rows):
        by_image = rows.argsort()  # the pairs of an image side by side: it is projected once
        logits = [run_twice(match_pairs, words, mask, F_v, rows, pairs)
                  for pairs in by_image.split(3 * size)]
        return torch.cat(logits)[by_image.argsort()]

    def match_pairs(words, mask, F_v, rows, pairs):
        images, place = rows[pairs].unique(return_inverse=True)
        words, F_v = words.index_select(0, pairs), F_v.index_select(0, images)
        return whole_match(words, mask[pairs], F_v, place)

    blip.encode_text, blip.match = encode_text, match


def run_twice(function, *inputs, again=None):
    """function(*inputs), which stores nothing and runs again, within `again`, for its gradients."""
    return checkpoint(function, *inputs, use_reentrant=False,
                      context_fn=lambda: (nullcontext(), again or nullcontext()))


@contextmanager
def keep_statistics(model):
    """Batch norms do not add what they see to their running statistics."""
    norms = [m for m in model.modules() if hasattr(m, "running_mean")]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


# ---- how much memory a step needs
def warn_of_memory(settings, blip, query_model, batch):
    """One line on stderr if a step of `batch` images a process seems to need more than is free."""
    free, piece = free_memory(blip.temp.device), settings["micro_batch"] or batch
    if free is None or process()[0] > 0:  # the first process speaks for all
        return
    two, four = (stored_bytes(settings, blip, query_model, images) for images in (2, 4))
    stored, held = (four - two) / 2, held_bytes(settings, blip, query_model)  # of an image
    here = 1 if blip.temp.is_cuda else process()[1]  # processes that share this memory

    def need(piece):
        return here * (batch * held + min(piece, batch) * stored)

    if need(piece) > free:
        fits = next((n for n in (80, 40, 20, 10) if n < piece and need(n) < free / 2), None)
        advice = (f"--micro-batch {fits} would need {need(fits) / 1e9:.0f} GB" if fits else
                  "lower --batch or --query-size")
        print(f"train.py: a step needs about {need(piece) / 1e9:.0f} GB of memory, but only "
              f"{free / 1e9:.0f} GB are free, so it may be killed; {advice}", file=sys.stderr)


def held_bytes(settings, blip, query_model):
    """Bytes of an image during the whole step: its pixels, also in batches to come, and F^v."""
    pixels = query_model.encoder.image_size ** 2
    pixels += blip.image_size ** 2 if settings["cache"] == "none" else 0
    F_v = blip.visual_encoder.pos_embed.numel() if "lar" in settings["loss"].split("+") else 0
    return 4 * (3 * pixels * (1 + 2 * settings["workers"]) + F_v)


def stored_bytes(settings, blip, query_model, images):
    """Bytes that the networks store of some (black) images for the backward pass."""
    device, side, stored = blip.temp.device, query_model.encoder.image_size, {}

    def store(x):
        stored[x.untyped_storage().data_ptr()] = x  # kept, so that no other gets its address
        return x

    pixels = torch.zeros(images, 3, side, side, device=device)
    F_v = torch.zeros(images, *blip.visual_encoder.pos_embed.shape[1:], device=device)
    with (torch.random.fork_rng([device] if pixels.is_cuda else []), keep_statistics(query_model),
          torch.autograd.graph.saved_tensors_hooks(store, lambda x: x),
          autocast(device, settings["precision"])):
        U = query_model(pixels)
        if settings["gallery"] == "query":
            U, _, F_v = U
        words, mask = isa.compose_query(blip, U, prompt=settings["prompt"])
        blip.encode_text(words, mask)
        if "lar" in settings["loss"].split("+"):  # three pairs an image
            rows = torch.arange(images, device=device).repeat(3)
            blip.match(words.repeat(3, 1, 1), mask.repeat(3, 1), F_v, rows)
    return sum(x.untyped_storage().nbytes() for x in stored.values())


def free_memory(device):
    """Bytes that can still be had on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")  # of a container
    if not info.exists():
        return None
    free = 1024 * int(re.search(r"MemAvailable: *(\d+)", info.read_text())[1])
    most = limit.read_text().strip() if limit.exists() else "max"
    return free if most == "max" else min(free, int(most))
