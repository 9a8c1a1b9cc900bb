"""The networks on the query side, which turn pixels into the feature map F^LE that isa.py reads (paper Tables 1, 6).

    encoder = light_encoders.build("efficientnet_b2", pretrained="imagenet")
    feature_map = encoder(light_encoders.preprocess(encoder, pil)[None])             # [1, 1408, 7, 7]
    learner = isa.AdaptiveTokenLearner(encoder.out_channels, blip.word_dim)
    query_model = isa.QueryModel(encoder, learner)

Each maps pixels [B, 3, S, S] to [B, C, H, W] and carries image_size S, normalization (mean, std; RGB in 0..1) and
out_channels C. The convolutional ones take other sizes as well.
"""

import math
from http.client import HTTPException

import torch
import torch.nn.functional as F
from torch import nn

from blip_lite import MEAN, STD, to_pixels

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NAMES = ("efficientnet_b0", "efficientnet_b2", "mobilenet_v2", "pocketnet", "blip")


def build(name, pretrained=None, blip=None):
    """The encoder called `name`, one of NAMES; pixels [B, 3, S, S] -> F^LE [B, C, H, W].

    pretrained: None (random weights, the rows marked * of Table 6), "imagenet" (torchvision's, downloaded on first use)
        or the path of a state dict: for torchvision's networks that of the whole classifier, or of its features alone.
    blip: for "blip", the loaded BLIP whose visual encoder it shares; the others do not look at it.

    Raises ValueError for an unknown name, for "blip" without blip, and for weights that cannot be read or do not fit.
    """
    if name not in NAMES:
        raise ValueError(f'there is no light encoder "{name}"; choose from {", ".join(NAMES)}')
    if name == "blip":
        if blip is None or pretrained is not None:
            raise ValueError('the encoder "blip" is that of a loaded BLIP: give blip=, and no pretrained=')
        return BlipEncoder(blip)
    if name == "pocketnet":
        if pretrained == "imagenet":
            raise ValueError("pocketnet has no ImageNet weights; give no pretrained, or the path of a state dict")
        encoder = PocketNet()
    else:
        from torchvision import models  # here, because its import takes a second that the pocket world can do without

        encoder = models.get_model(name).features.to(memory_format=torch.channels_last)
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1 and (module.kernel_size > (3, 3) or module.stride > (1, 1)):
                module.__class__ = DepthwiseConv2d  # the same weights under the same name
        encoder.out_channels = encoder[-1].out_channels
        # For B2 too, whose weights saw 288 px: the paper's BLIP runs at 224 px, and one resolution serves all
        encoder.image_size, encoder.normalization = 224, IMAGENET
    if pretrained == "imagenet":
        load_weights(encoder, download(models.get_model_weights(name).IMAGENET1K_V1), f"torchvision's {name}")
    elif pretrained is not None:
        load_weights(encoder, read(pretrained), pretrained)
    return encoder


def preprocess(encoder, pil):
    """A PIL image of any mode and size -> float32 [3, S, S], at the encoder's own size and normalization."""
    return to_pixels(pil, encoder.image_size, *encoder.normalization)


class DepthwiseConv2d(nn.Conv2d):
    """On a CPU trained in float32 also under autocast: with kernels of 5 or strides of 2 its backward in bfloat16 takes two
    to three times as long there (tests/speed.py, step: a quarter of EfficientNet-B2's time)."""

    def forward(self, x):
        if x.is_cuda or not torch.is_grad_enabled():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class PocketNet(nn.Module):
    """A small network for the pocket world: pixels [B, 3, 64, 64] -> F^LE [B, 96, 8, 8], 0.29 M parameters.

    Full convolutions: the depthwise ones of the phone networks save products but no time on a CPU in PyTorch, where
    they were nearly twice as slow. BLIP's normalization, so that one preprocessing serves the pocket world.
    """

    out_channels, image_size, normalization = 96, 64, (MEAN, STD)

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 48, kernel_size=7, stride=4)  # [B, 48, 16, 16]
        self.down = conv_bn(48, 96, kernel_size=3, stride=2)  # [B, 96, 8, 8]
        self.block1 = nn.Sequential(conv_bn(96, 96, kernel_size=3), nn.GELU(), conv_bn(96, 96, kernel_size=3))
        self.block2 = nn.Sequential(conv_bn(96, 72, kernel_size=3), nn.GELU(), conv_bn(72, 96, kernel_size=1))

    def forward(self, pixels):
        x = F.gelu(self.down(F.gelu(self.stem(pixels))))
        x = F.gelu(x + self.block1(x))
        return F.gelu(x + self.block2(x))


def conv_bn(in_channels, out_channels, kernel_size, stride=1):
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


class BlipEncoder(nn.Module):
    """The paper's "Sym": BLIP's own visual encoder, frozen. pixels [B, 3, S, S] -> patch tokens [B, D, h, w].

    The encoder stays BLIP's. A tuple hides it from PyTorch, so parameters(), state_dict(), train() and to() of a query
    model pass it by: it is neither trained nor saved twice, and stays in eval mode, on BLIP's device. A count of
    parameters (Table 1) has to add it.
    """

    def __init__(self, blip):
        super().__init__()
        self.visual_encoder = (blip.visual_encoder.eval().requires_grad_(False),)
        self.out_channels = blip.vision_proj.in_features  # D
        self.image_size, self.normalization = blip.image_size, (MEAN, STD)

    @torch.no_grad()
    def forward(self, pixels):
        patches = self.visual_encoder[0](pixels)[:, 1:]  # [B, h*w, D], without CLS, which has no place on a map
        return patches.transpose(1, 2).unflatten(2, (math.isqrt(patches.shape[1]), -1))  # [B, D, h, w]


# ------------------------------------------------------------------------------------------------ weights


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
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(
            f"the weights {path} are damaged, or more than a plain state dict, which is refused; "
            "write them with torch.save(model.state_dict(), path)"
        )
    return state


def load_weights(encoder, state, source):
    """Copy `state` into the encoder; one ValueError lists what is missing, unexpected and mis-shaped.

    "features." before a name may be there or not (torchvision's classifiers have it); "classifier." is left out.
    """
    state = {name.removeprefix("features."): x for name, x in state.items() if not name.startswith("classifier.")}
    expected = encoder.state_dict()
    problems = [f"{name} is unexpected" for name in state if name not in expected]
    for name, x in expected.items():
        if name in state and state[name].shape != x.shape:
            problems.append(f"{name} is {list(state[name].shape)} instead of {list(x.shape)}")
        elif name not in state and not name.endswith("num_batches_tracked"):  # of no use; old files lack it
            problems.append(f"{name} is missing")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"the weights {source} do not fit this encoder: {'; '.join(problems[:10])}{more}")
    encoder.load_state_dict(state, strict=False)
