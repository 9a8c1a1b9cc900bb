"""In which precision BLIP and the query side run, and how BLIP is opened for a command."""

import ctypes
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

import blip_lite


def cpu_flags():
    """What the processor says it can do, as Linux lists it ("avx2", "amx_bf16", ...); empty
    elsewhere."""
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def pick_precision(device):
    """"bf16" where this device multiplies bfloat16 matrices in hardware, else "fp32"; never
    timed."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} else "fp32"


def autocast(device, precision):
    """The context in which networks run: bfloat16 autocast for "bf16", nothing for "fp32"."""
    if precision == "bf16":
        return torch.autocast(torch.device(device).type, torch.bfloat16)
    return nullcontext()


def open_blip(settings, round_weights=True):
    """The frozen BLIP that a dict of options names -> blip, precision ("bf16" or "fp32") to run it
    in.

    Reads blip, vocab, image_size, device, precision and threads. round_weights=False leaves its
    weights in float32, for a caller that copies some of them first and then rounds the rest itself.
    """
    keep_freed_memory()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device, precision = settings["device"], settings["precision"]
    blip = blip_lite.load(settings["blip"], settings["vocab"], settings["image_size"], device)
    precision = pick_precision(device) if precision == "auto" else precision
    if round_weights:
        round_frozen_weights(blip, precision)
    return blip, precision


def round_frozen_weights(blip, precision):
    """Round a frozen BLIP's matrices to bfloat16 once; autocast would do so at every call.

    The values are the same. Afterwards BLIP only runs under `autocast`.
    """
    if precision == "bf16":
        for module in blip.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.to(torch.bfloat16)


def keep_freed_memory():
    """Ask glibc to keep freed memory for the next allocation.

    By default it returns large blocks to the kernel, which zeroes them again at every step: on a
    CPU a sixth of a full-size training step (tests/speed.py step). Does nothing except on Linux.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never) and M_TOP_PAD
        for option, value in ((-4, 0), (-1, -1), (-2, 2**28)):
            libc.mallopt(option, value)
