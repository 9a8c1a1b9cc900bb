"""The networks on the query side, which turn pixels into the feature map F^LE that isa.py reads (paper Tables 1, 6).

    encoder = light_encoders.build("efficientnet_b2", pretrained="imagenet")
    feature_map = encoder(light_encoders.preprocess(encoder, pil)[None])             # [1, 1408, 7, 7]
    learner = isa.AdaptiveTokenLearner(encoder.out_channels, blip.word_dim)
    query_model = isa.QueryModel(encoder, learner)

Each maps pixels [B, 3, S, S] to [B, C, H, W] and carries image_size S, normalization (mean, std; RGB in 0..1) and
out_channels C. All but BLIP's take other sizes as well. EfficientNet and MobileNetV2 are torchvision's; EfficientViT and
MobileViTV2, which it lacks, are written out below with timm's names, so that timm's weights fit and the authors' do too.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from blip_lite import MEAN, STD, to_pixels
from blip_lite.checkpoint import MOST_PIXELS
from query_side.efficientvit import EfficientViT
from query_side.mobilevitv2 import MobileViTV2
from query_side.weights import IMAGENET, download, load_weights, read

NAMES = ("efficientnet_b0", "efficientnet_b2", "mobilenet_v2", "efficientvit_m2", "mobilevitv2_100", "pocketnet",
         "blip", "blip-tuned", "blip-v")  # fmt: skip


NOT_IN_TORCHVISION = {
    "efficientvit_m2": "the path of timm's efficientvit_m2 or of the authors' file (Microsoft's Cream repository)",
    "mobilevitv2_100": "the path of timm's mobilevitv2_100 or of the authors' file (Apple's ml-cvnets repository)",
    "pocketnet": "the path of a state dict",
}


def build(name, pretrained=None, blip=None, image_size=None):
    """The encoder called `name`, one of NAMES; pixels [B, 3, S, S] -> F^LE [B, C, H, W].

    pretrained: None (random weights, the rows marked * of Table 6), "imagenet" (torchvision's, downloaded on first use)
        or the path of a state dict: that of the whole classifier or without its last layers, as torchvision, timm (for
        efficientvit_m2 and mobilevitv2_100) or the authors of these two write it.
    blip: for "blip", the loaded BLIP whose visual encoder it shares; the others do not look at it.
    image_size: S, the side in pixels that it is to see; its own if None. BLIP's encoder has only that of its BLIP.

    Raises ValueError for an unknown name, for "blip" without blip, for an image_size that is not possible, and for weights
    that cannot be read or do not fit.
    """
    if name not in NAMES:
        raise ValueError(f'there is no light encoder "{name}"; choose from {", ".join(NAMES)}')
    if image_size is not None and (not isinstance(image_size, int) or image_size < 32):
        raise ValueError(f"image_size {image_size} is not possible; give a whole number of pixels, 32 or more")
    if image_size is not None and image_size > MOST_PIXELS:
        raise ValueError(f"image_size {image_size} would take more memory than there is; give at most {MOST_PIXELS}")
    if name in BLIPS:
        if blip is None or pretrained is not None:
            raise ValueError(f'the encoder "{name}" is that of a loaded BLIP: give blip=, and no pretrained=')
        if image_size not in (None, blip.image_size):
            raise ValueError(f'image_size {image_size} is not possible for "{name}": the loaded BLIP sees {blip.image_size} px')
        return BLIPS[name](blip)
    if pretrained == "imagenet" and name in NOT_IN_TORCHVISION:
        raise ValueError(f"{name} has no ImageNet weights in torchvision; give {NOT_IN_TORCHVISION[name]}, or no pretrained")
    if name == "efficientvit_m2":
        encoder = EfficientViT(image_size or 224)
    elif name == "mobilevitv2_100":
        encoder = MobileViTV2()
    elif name == "pocketnet":
        encoder = PocketNet()
    else:
        from torchvision import models  # here, because its import takes a second that the pocket world can do without

        encoder = models.get_model(name).features.to(memory_format=torch.channels_last)
        encoder.out_channels = encoder[-1].out_channels
        # For B2 too, whose weights saw 288 px: the paper's BLIP runs at 224 px, and one resolution serves all
        encoder.image_size, encoder.normalization = 224, IMAGENET
    encoder.image_size = image_size or encoder.image_size
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and (module.kernel_size > (3, 3) or module.stride > (1, 1)):
            module.__class__ = DepthwiseConv2d  # the same weights under the same name
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
        return as_map(self.visual_encoder[0](pixels))


class TunedBlipEncoder(nn.Module):
    """A copy of BLIP's visual encoder that is trained and saved, the query side of "BLIP VE†" (Table 7); the frozen one stays as
    it is for the gallery. pixels [B, 3, S, S] -> patch tokens [B, D, h, w]."""

    def __init__(self, blip):
        super().__init__()
        self.visual_encoder = copy.deepcopy(blip.visual_encoder).float().requires_grad_(True)
        self.out_channels = blip.vision_proj.in_features  # D
        self.image_size, self.normalization = blip.image_size, (MEAN, STD)

    def forward(self, pixels):
        return as_map(self.visual_encoder(pixels))


class BlipFeature(nn.Module):
    """What Pic2Word and SEARLE start from: the frozen BLIP's v. pixels [B, 3, S, S] -> a map of one pixel [B, E, 1, 1].

    BLIP is hidden as in BlipEncoder.
    """

    def __init__(self, blip):
        super().__init__()
        self.blip = (blip,)
        self.out_channels, self.image_size, self.normalization = blip.embed_dim, blip.image_size, (MEAN, STD)

    @torch.no_grad()
    def forward(self, pixels):
        return self.blip[0].encode_image(pixels, cls_only=True)[0][..., None, None]


def as_map(tokens):
    """BLIP's image tokens [B, 1+h*w, D] -> [B, D, h, w], without CLS, which has no place on a map."""
    patches = tokens[:, 1:].transpose(1, 2)  # [B, D, h*w]
    return patches.unflatten(2, (math.isqrt(patches.shape[2]), -1))


BLIPS = {"blip": BlipEncoder, "blip-tuned": TunedBlipEncoder, "blip-v": BlipFeature}
