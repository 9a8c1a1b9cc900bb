"""Weights for the light encoders: ImageNet's from torchvision, state dicts from timm or the authors."""

import math
from collections import OrderedDict
from http.client import HTTPException

import torch
import torch.nn.functional as F
from torch import nn

from blip_lite.checkpoint import check_finite

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def download(weights):
    """torchvision's weights -> a state dict, kept in torch.hub's cache. ValueError where they cannot be had."""
    try:
        return weights.get_state_dict(check_hash=True)
    except (OSError, HTTPException, RuntimeError) as error:  # no network, cut off, other bytes than those published
        raise ValueError(
            f"{weights.url} could not be downloaded ({error}); fetch it elsewhere and give its path as pretrained"
        ) from None


def read(path):
    """A state dict written by torch.save. Only tensors are unpickled, no code runs. ValueError for anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"the weights {path} cannot be read ({error.strerror}); give a file's path") from None
    except Exception:  # torch.load tells damage in many ways: EOFError, RuntimeError, UnpicklingError, ...
        state = None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # as the authors of EfficientViT write it
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(
            f"the weights {path} are damaged, or more than a plain state dict, which is refused; "
            "write them with torch.save(model.state_dict(), path)"
        )
    return state


def load_weights(encoder, state, source):
    """Copy `state` into the encoder; one ValueError lists what is missing, unexpected and mis-shaped.

    "features." before a name may be there or not (torchvision's classifiers have it); the classifier's last layers and
    what follows from the network's shape are left out.
    """
    unused = ("num_batches_tracked", "attention_bias_idxs")
    state = {name.removeprefix("features."): x for name, x in state.items()
             if not name.startswith(("classifier.", "head.", "head_dist.")) and not name.endswith(unused)}  # fmt: skip
    expected = {name: x for name, x in encoder.state_dict().items() if not name.endswith(unused)}
    if len(state) == len(expected) and any(name.startswith(("blocks1.", "layer_1.")) for name in state):
        # The files of the authors of EfficientViT and MobileViTV2: their names differ from timm's, the order does not
        state = dict(zip(expected, state.values(), strict=True))
    problems = [f"{name} is unexpected" for name in state if name not in expected]
    for name, x in expected.items():
        if name not in state:
            problems.append(f"{name} is missing")
            continue
        if name.endswith("attention_biases"):
            state[name] = resize_biases(state[name], x)
        if state[name].shape != x.shape:
            problems.append(f"{name} is {list(state[name].shape)} instead of {list(x.shape)}")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"the weights {source} do not fit this encoder: {'; '.join(problems[:10])}{more}; give its own")
    check_finite(state, f"the file {source}", "download it again")
    encoder.load_state_dict(state, strict=False)


def resize_biases(biases, like):
    """EfficientViT's biases [heads, r*r], a square of distances, for windows of another side s, as timm resizes them."""
    r, s = math.isqrt(biases.numel() // len(like)), math.isqrt(like.shape[1])
    if r in (0, s) or biases.shape != (len(like), r * r):  # nothing to do, or a misfit to report
        return biases
    square = biases.float().unflatten(1, (r, r))[None]  # [1, heads, r, r]
    return F.interpolate(square, (s, s), mode="bicubic", antialias=True)[0].flatten(1)  # [heads, s*s]


def conv_norm(in_channels, out_channels, kernel_size=1, stride=1, depthwise=False, act=None):
    """Convolution, BatchNorm and activation under the names that timm's two networks give them."""
    groups = in_channels if depthwise else 1
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return named(conv=conv, bn=nn.BatchNorm2d(out_channels), **({"act": act()} if act else {}))


def named(**layers):
    """Layers one after the other, each under its name in a state dict."""
    return nn.Sequential(OrderedDict(layers))
