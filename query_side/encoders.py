"""The networks of the query side, which turn pixels [B, 3, S, S] into F^LE [B, C, H, W] (Table 1).

Each has out_channels C, image_size S and normalization (mean, std; RGB in 0..1); all but BLIP's,
which preprocess as BLIP does, take pixels of other sizes. EfficientNet and MobileNetV2 are
torchvision's.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from blip_lite import MEAN, STD, to_pixels, to_square
from blip_lite.checkpoint import MOST_PIXELS

from .efficientvit import EfficientViT
from .layers import DepthwiseConv2d, MeanPool, conv_norm
from .mobilevitv2 import MobileViTV2
from .weights import IMAGENET_STATISTICS, POCKET, imagenet_weights, load_weights, read_weights


class PocketNet(nn.Module):
    """For the pocket world: pixels [B, 3, 64, 64] -> F^LE [B, 96, 8, 8], 0.28 M parameters.

    Full convolutions: on a CPU in PyTorch depthwise ones take nearly twice as long. BLIP's
    normalization, so that both sides share one preprocessing.
    """

    out_channels, normalization = 96, (MEAN, STD)

    def __init__(self, image_size=64):
        super().__init__()
        self.image_size = image_size
        self.stem = conv_bn(3, 48, 7, stride=4)  # [B, 48, 16, 16]
        self.down = conv_bn(48, 96, 3, stride=2)  # [B, 96, 8, 8]
        self.block1 = nn.Sequential(conv_bn(96, 96, 3), nn.GELU(), conv_bn(96, 96, 3))
        self.block2 = nn.Sequential(conv_bn(96, 72, 3), nn.GELU(), conv_bn(72, 96, 1))

    def forward(self, pixels):
        x = F.gelu(self.down(F.gelu(self.stem(pixels))))
        x = F.gelu(x + self.block1(x))
        return F.gelu(x + self.block2(x))


def conv_bn(*shape, **options):
    """conv_norm, its layers numbered in the state dict."""
    return nn.Sequential(*conv_norm(*shape, **options))


def look_as(blip, encoder):
    """The encoder sees images as the frozen model does."""
    encoder.image_size, encoder.normalization = blip.image_size, blip.normalization
    encoder.square = blip.square


class BlipEncoder(nn.Module):
    """The paper's "Sym": BLIP's own visual encoder, frozen. -> patch tokens [B, D, h, w].

    A tuple hides it from PyTorch: parameters(), state_dict(), train() and to() of a query model
    skip it, so it is neither trained nor saved, and stays in eval mode on BLIP's device.
    """

    def __init__(self, blip):
        super().__init__()
        self.visual_encoder = (blip.visual_encoder.eval().requires_grad_(False),)
        self.out_channels = blip.vision_proj.in_features  # D
        look_as(blip, self)

    @torch.no_grad()
    def forward(self, pixels):
        return as_map(self.visual_encoder[0](pixels))


class TunedBlipEncoder(nn.Module):
    """A trained copy of BLIP's visual encoder, "BLIP VE†" (Table 7). -> [B, D, h, w]."""

    def __init__(self, blip):
        super().__init__()
        self.visual_encoder = copy.deepcopy(blip.visual_encoder).float().requires_grad_(True)
        self.out_channels = blip.vision_proj.in_features  # D
        look_as(blip, self)

    def forward(self, pixels):
        return as_map(self.visual_encoder(pixels))


class BlipFeature(nn.Module):
    """The frozen BLIP's v as a map [B, E, 1, 1], for Pic2Word and SEARLE.

    unit_norm False: before it is scaled to length 1, as SEARLE's published networks take it.
    """

    unit_norm = True

    def __init__(self, blip):
        super().__init__()
        self.blip = (blip,)  # hidden as in BlipEncoder
        self.out_channels = blip.embed_dim  # E
        look_as(blip, self)

    @torch.no_grad()
    def forward(self, pixels):
        v, F_v = self.blip[0].encode_image(pixels, cls_only=True)
        v = v if self.unit_norm else self.blip[0].vision_proj(F_v[:, 0]).float()
        return v[..., None, None]


def as_map(tokens):
    """BLIP's image tokens [B, 1+h*w, D] -> a map [B, D, h, w], without CLS."""
    patches = tokens[:, 1:].transpose(1, 2)  # [B, D, h*w]
    return patches.unflatten(2, (math.isqrt(patches.shape[2]), -1))


TORCHVISION = ("efficientnet_b0", "efficientnet_b2", "mobilenet_v2")
FILE = "timm's {} or of the authors' file ({} repository)"
OURS = {  # name -> class, and which file holds its weights: torchvision has none
    "efficientvit_m2": (EfficientViT, FILE.format("efficientvit_m2", "Microsoft's Cream")),
    "mobilevitv2_100": (MobileViTV2, FILE.format("mobilevitv2_100", "Apple's ml-cvnets")),
    "pocketnet": (PocketNet, "a state dict"),
}
BLIPS = {"blip": BlipEncoder, "blip-tuned": TunedBlipEncoder, "blip-v": BlipFeature}
NAMES = (*TORCHVISION, *OURS, *BLIPS)


def build(name, pretrained=None, blip=None, image_size=None):
    """The encoder called `name`, one of NAMES.

    pretrained: None (random weights, * in Table 6), "imagenet" (torchvision's, downloaded on first
        use), "pocket" (PocketNet's, shipped), or the path of a state dict, with or without the
        classifier's last layers, as written by pocket.classify, by torchvision, by timm or by the
        authors of EfficientViT and MobileViTV2.
    blip: the loaded BLIP whose visual encoder "blip", "blip-tuned" and "blip-v" use.
    image_size: S in pixels; by default the network's own.

    Raises ValueError for impossible choices and for weights that do not fit.
    """
    if name not in NAMES:
        raise ValueError(f'there is no light encoder "{name}"; choose from {", ".join(NAMES)}')
    if image_size is not None and not (isinstance(image_size, int)
                                       and 32 <= image_size <= MOST_PIXELS):
        raise ValueError(f"image_size {image_size} is not possible; give a whole number of pixels, "
                         f"32 or more and at most {MOST_PIXELS}")
    if name in BLIPS:
        if blip is None or pretrained is not None:
            raise ValueError(f'"{name}" is part of a loaded BLIP: give blip=, and no pretrained= '
                             "(train.py: --no-pretrained)")
        if image_size not in (None, blip.image_size):
            raise ValueError(f'image_size {image_size} is not possible for "{name}": '
                             f"the loaded BLIP sees {blip.image_size} px")
        return BLIPS[name](blip)
    if pretrained == "pocket" and name != "pocketnet":
        raise ValueError(f"only pocketnet's pocket weights are shipped; make those of {name} with "
                         f"`python -m pocket.classify --encoder {name} --out FILE`, and give the "
                         "path of FILE as pretrained")
    if name in OURS:
        network, source = OURS[name]
        if pretrained == "imagenet":
            raise ValueError(f"{name} has no ImageNet weights in torchvision; give the path of "
                             f"{source}, or no pretrained")
        encoder = network(image_size) if image_size else network()
    else:
        from torchvision import models  # here: its import takes a second, and PocketNet needs none

        encoder = models.get_model(name).features.to(memory_format=torch.channels_last)
        encoder.out_channels = encoder[-1].out_channels
        # One size for all, that of the paper's BLIP; B2's weights saw 288 px
        encoder.image_size, encoder.normalization = image_size or 224, IMAGENET_STATISTICS
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and (
                module.kernel_size > (3, 3) or module.stride > (1, 1)):
            module.__class__ = DepthwiseConv2d  # the same weights under the same name
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            module.__class__ = MeanPool
        elif isinstance(module, nn.SiLU):
            module.inplace = False  # in place, autograd first copies what it overwrites
    if pretrained == "imagenet":
        load_weights(encoder, imagenet_weights(name), f"torchvision's {name}")
    elif pretrained is not None:
        path = POCKET if pretrained == "pocket" else pretrained
        load_weights(encoder, read_weights(path), path)
    return encoder


def preprocess(encoder, pil):
    """A PIL image of any mode and size -> float32 [3, S, S] for the encoder."""
    square = getattr(encoder, "square", to_square)
    return to_pixels(pil, encoder.image_size, *encoder.normalization, square)
