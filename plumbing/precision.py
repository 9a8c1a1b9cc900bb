"""In which precision networks run, and how a command opens BLIP."""

import copy
import ctypes
import sys
import time
from pathlib import Path

import torch

import blip_lite
import clip_lite


def cpu_flags():
    """What the processor can do, as Linux lists it: "avx2", "amx_bf16", ..."""
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def pick_precision(device):
    """"bf16" where this device multiplies bfloat16 matrices in hardware, else "fp32"."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    return "bf16" if cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} else "fp32"


def autocast(device, precision):
    """The context in which networks run."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, precision == "bf16")


def open_blip(settings, round_weights=True):
    """A command's frozen BLIP or CLIP, and the precision to run it in, "bf16" or "fp32".

    round_weights=False is for a caller that first copies some of the float32 weights.
    """
    keep_freed_memory()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device, precision = settings["device"], settings["precision"]
    kind, source = (clip_lite, settings["clip"]) if settings.get("clip") else (
        blip_lite, settings["blip"])
    blip = kind.load(source, settings["vocab"], settings["image_size"], device)
    precision = pick_precision(device) if precision == "auto" else precision
    if round_weights:
        round_frozen_weights(blip, precision)
    return blip, precision


def round_frozen_weights(blip, precision):
    """Round matrices to bfloat16 once, not at every call; from now on BLIP needs autocast.

    Where it pays, those of the visual encoder are packed, too: fp32 stays the same to 1e-6.
    """
    if precision == "bf16":
        for module in blip.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.to(torch.bfloat16)
    if blip.temp.device.type == "cpu" and packing_pays():
        for module in list(blip.visual_encoder.modules()):
            for name, child in module.named_children():
                if type(child) is torch.nn.Linear:
                    setattr(module, name, PackedLinear(child))


def packing_pays():
    """On an AMD processor with AVX-512 PyTorch's float32 product runs at half its speed (MKL)."""
    return ({"AuthenticAMD", "avx512f"} <= cpu_flags() and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


class PackedLinear(torch.nn.Module):
    """A frozen nn.Linear, its matrix also stored in the order in which oneDNN reads it.

    A copy is the plain nn.Linear again: it may be trained.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.plain = [linear]  # in a list: no submodule
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())

    def forward(self, x):
        if torch.is_grad_enabled() and x.requires_grad:  # oneDNN's product has no backward
            return self.plain[0](x)
        x = x.to(self.weight.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.plain[0], memo)


def compiled(model, device):
    """torch.compile(model), or the model itself, and a line on stderr, where nothing compiles."""
    new = time.time_ns()  # a constant that no cache of compiled code holds
    try:
        torch.compile(lambda x: x + new)(torch.zeros(8, device=device))
    except Exception as error:  # which one depends on what is missing: a compiler, Triton, headers
        why = str(error).split("\n")[0]
        print("the run continues uncompiled: --compile needs a C++ compiler in PATH, and on CUDA "
              f"Triton ({why})", file=sys.stderr)
        return model
    return torch.compile(model)


def keep_freed_memory():
    """Ask glibc, where there is one, to keep freed memory for the next allocation.

    The kernel zeroes what is returned to it: a sixth of a full-size step on a CPU (tests/speed.py).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for option, value in ((-4, 0), (-1, -1), (-2, 2**28)):
            libc.mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never), M_TOP_PAD
