"""Weights for the light networks: torchvision's for ImageNet, and state dicts from files."""

import math
from http.client import HTTPException
from pathlib import Path

import torch.nn.functional as F

from blip_lite.checkpoint import check_finite, read_files

POCKET = Path(__file__).parents[1] / "pocket" / "pocketnet.pth"  # pocket.classify wrote it
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std; RGB in 0..1
LEFT_OUT = ("classifier.", "head.", "head_dist.")  # a classifier's last layers, by their names
CONSTANTS = ("num_batches_tracked", "attention_bias_idxs")  # follow from the network's shape
OF_THE_AUTHORS = ("blocks1.", "layer_1.")  # EfficientViT's and MobileViTV2's own files


def imagenet_weights(name):
    """The state dict of torchvision's classifier `name`, downloaded once. Raises ValueError."""
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).IMAGENET1K_V1
    try:
        return weights.get_state_dict(check_hash=True)
    except (OSError, HTTPException, RuntimeError) as error:  # no network, cut off, a wrong hash
        raise ValueError(f"{weights.url} could not be downloaded ({error}); fetch it elsewhere "
                         "and give its path as pretrained") from None


def read_weights(path):
    """The state dict in a file of torch.save or .safetensors. ValueError for any other."""
    try:
        return read_files([Path(path)], "light encoder")
    except OSError as error:
        raise ValueError(f"the weights {path} cannot be read ({error.strerror}); "
                         "give a file's path") from None


def load_weights(encoder, state, source):
    """Copy a classifier's state dict into the encoder, which has no classifier.

    Raises ValueError that names `source` and lists what is missing, unexpected or mis-shaped, and
    for NaN and infinity.
    """
    state = {name.removeprefix("features."): x for name, x in state.items()
             if not name.startswith(LEFT_OUT) and not name.endswith(CONSTANTS)}
    expected = {k: x for k, x in encoder.state_dict().items() if not k.endswith(CONSTANTS)}
    if len(state) == len(expected) and any(name.startswith(OF_THE_AUTHORS) for name in state):
        state = dict(zip(expected, state.values(), strict=True))  # other names in timm's order
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
        raise ValueError(f"the weights {source} do not fit this encoder: "
                         f"{'; '.join(problems[:10])}{more}; give its own")
    check_finite(state, f"the file {source}", "download it again")
    encoder.load_state_dict(state, strict=False)


def resize_biases(biases, like):
    """EfficientViT's biases [heads, r*r] in the shape of `like`, [heads, s*s], as in timm."""
    r, s = math.isqrt(biases.numel() // len(like)), math.isqrt(like.shape[1])
    if r in (0, s) or biases.shape != (len(like), r * r):  # nothing to do, or a misfit to report
        return biases
    square = biases.float().unflatten(1, (r, r))[None]  # [1, heads, r, r]
    return F.interpolate(square, (s, s), mode="bicubic", antialias=True)[0].flatten(1)
