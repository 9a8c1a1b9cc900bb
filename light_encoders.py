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
from collections import OrderedDict
from http.client import HTTPException

import torch
import torch.nn.functional as F
from torch import nn

from blip_lite import MEAN, STD, to_pixels
from blip_lite.checks import MOST_PIXELS, check_finite

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
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


# ------------------------------------------------------------------------------------------------ EfficientViT


class EfficientViT(nn.Module):
    """EfficientViT-M2 (Liu et al., CVPR 2023): pixels [B, 3, 224, 224] -> F^LE [B, 224, 4, 4], 3.96 M parameters.

    Modules are named as in timm's `efficientvit_m2`, so that its state dict fits. image_size settles the sides of the
    windows of attention, and with them the number of attention biases; the network then takes pixels of other sizes too.
    """

    out_channels, normalization = 224, IMAGENET

    def __init__(self, image_size=224):
        super().__init__()
        self.image_size = image_size
        self.patch_embed = named(  # "overlapping": kernels of 3 with strides of 2
            conv1=conv_norm(3, 16, kernel_size=3, stride=2, act=nn.ReLU),
            conv2=conv_norm(16, 32, kernel_size=3, stride=2, act=nn.ReLU),
            conv3=conv_norm(32, 64, kernel_size=3, stride=2, act=nn.ReLU),
            conv4=conv_norm(64, 128, kernel_size=3, stride=2),
        )
        side = image_size // 16
        stage1 = named(blocks=sandwiches(128, depth=1, heads=4, side=side))
        side = (side + 1) // 2
        stage2 = named(downsample=subsample(128, 192), blocks=sandwiches(192, depth=2, heads=3, side=side))
        side = (side + 1) // 2
        stage3 = named(downsample=subsample(192, 224), blocks=sandwiches(224, depth=3, heads=2, side=side))
        self.stages = nn.Sequential(stage1, stage2, stage3)

    def forward(self, pixels):
        x = self.patch_embed(pixels)  # [B, 128, 14, 14]
        return self.stages(x)  # [B, 128, 14, 14], then [B, 192, 7, 7], then [B, 224, 4, 4]


def sandwiches(width, depth, heads, side):
    """`depth` blocks of the sandwich layout (Eq. 1): FFN, attention, FFN, each FFN after a depthwise token interaction."""
    return nn.Sequential(*(
        named(
            dw0=Residual(conv_norm(width, width, kernel_size=3, depthwise=True)),
            ffn0=Residual(feed_forward(width)),
            mixer=Residual(WindowAttention(width, heads, side)),
            dw1=Residual(conv_norm(width, width, kernel_size=3, depthwise=True)),
            ffn1=Residual(feed_forward(width)),
        )
        for _ in range(depth)
    ))  # fmt: skip


def subsample(width, out_width):
    """[B, width, H, W] -> [B, out_width, H/2, W/2]: an inverted residual with squeeze-and-excitation in a sandwich of FFNs."""
    hidden = 4 * width
    return named(
        res1=nn.Sequential(
            Residual(conv_norm(width, width, kernel_size=3, depthwise=True)),
            Residual(feed_forward(width)),
        ),
        patchmerge=named(
            conv1=conv_norm(width, hidden, act=nn.ReLU),
            conv2=conv_norm(hidden, hidden, kernel_size=3, stride=2, depthwise=True, act=nn.ReLU),
            se=SqueezeExcite(hidden),
            conv3=conv_norm(hidden, out_width),
        ),
        res2=nn.Sequential(
            Residual(conv_norm(out_width, out_width, kernel_size=3, depthwise=True)),
            Residual(feed_forward(out_width)),
        ),
    )


def feed_forward(width):
    return named(pw1=conv_norm(width, 2 * width, act=nn.ReLU), pw2=conv_norm(2 * width, width))


class Residual(nn.Module):
    """x + m(x), where m is silent at first: its last BatchNorm starts at zero."""

    def __init__(self, m):
        super().__init__()
        self.m = m
        nn.init.zeros_([x for x in m.modules() if isinstance(x, nn.BatchNorm2d)][-1].weight)

    def forward(self, x):
        return x + self.m(x)


class SqueezeExcite(nn.Module):
    """Each channel times a number in 0..1 that depends on the mean of all channels (Hu et al., CVPR 2018)."""

    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=True)  # [B, C, 1, 1]
        return x * self.fc2(F.relu(self.fc1(mean))).sigmoid()


class WindowAttention(nn.Module):
    """Attention within windows of at most 7 x 7 pixels, the map padded with zeros to whole ones. [B, C, H, W] -> the same."""

    def __init__(self, width, heads, side):
        super().__init__()
        self.side = min(side, 7)
        self.attn = CascadedGroupAttention(width, heads, self.side)

    def forward(self, x):
        H, W, s = *x.shape[2:], self.side
        x = F.pad(x, (0, -W % s, 0, -H % s))
        x = x.unflatten(3, (-1, s)).unflatten(2, (-1, s)).permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, C, s, s]
        x = self.attn(x.flatten(0, 2)).view(x.shape)
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, C, rows*s, columns*s]
        return x[:, :, :H, :W]


class CascadedGroupAttention(nn.Module):
    """Each head sees its share of the channels and what the head before it found (Eq. 2-3). [B, C, s, s] -> the same."""

    def __init__(self, width, heads, side):
        super().__init__()
        self.key_width, self.value_width = 16, width // heads
        self.qkvs = nn.ModuleList(conv_norm(width // heads, 2 * 16 + width // heads) for _ in range(heads))
        self.dws = nn.ModuleList(conv_norm(16, 16, kernel, depthwise=True) for kernel in (7, 5, 3, 3)[:heads])
        self.proj = nn.Sequential(nn.ReLU(), conv_norm(width, width))
        # A learnt number for each distance |dy|, |dx| between two pixels of a window, row by row: [heads, s*s]
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))
        apart = (torch.arange(side)[:, None] - torch.arange(side)).abs()  # [s, s]
        index = apart[:, None, :, None] * side + apart[:, None, :]  # [s, s, s, s]: y, x of the query, y, x of the key
        self.register_buffer("index", index.flatten(2).flatten(0, 1), persistent=False)  # [N, N] with N = s*s

    def forward(self, x):
        biases = self.attention_biases[:, self.index]  # [heads, N, N]
        found, outputs = 0, []
        for share, bias, qkv, dw in zip(x.chunk(len(self.qkvs), dim=1), biases, self.qkvs, self.dws, strict=True):
            qkv = qkv(share + found)  # Eq. 3; [B, 16+16+C/heads, s, s]
            q, k, v = qkv.split((self.key_width, self.key_width, self.value_width), dim=1)
            q, k, v = dw(q).flatten(2), k.flatten(2), v.flatten(2)  # [B, ., N]; token interaction for the queries only
            weights = (q.transpose(1, 2) @ k / math.sqrt(self.key_width) + bias).softmax(dim=2)  # [B, N, N]
            found = (v @ weights.transpose(1, 2)).view(share.shape)  # [B, C/heads, s, s]
            outputs.append(found)
        return self.proj(torch.cat(outputs, dim=1))  # Eq. 2


# ------------------------------------------------------------------------------------------------ MobileViTV2


class MobileViTV2(nn.Module):
    """MobileViTV2-1.0 (Mehta & Rastegari, 2022): pixels [B, 3, 256, 256] -> F^LE [B, 512, 8, 8], 4.39 M parameters.

    Modules are named as in timm's `mobilevitv2_100`. It takes RGB in 0..1 as it is. 224 px give 8 x 8 pixels too, not 7 x 7:
    see MobileViTBlock.
    """

    out_channels, image_size, normalization = 512, 256, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3, 32, kernel_size=3, stride=2, act=nn.SiLU)  # [B, 32, 128, 128]
        self.stages = nn.Sequential(
            nn.Sequential(InvertedResidual(32, 64)),  # [B, 64, 128, 128]
            nn.Sequential(InvertedResidual(64, 128, stride=2), InvertedResidual(128, 128)),  # [B, 128, 64, 64]
            nn.Sequential(InvertedResidual(128, 256, stride=2), MobileViTBlock(256, depth=2)),  # [B, 256, 32, 32]
            nn.Sequential(InvertedResidual(256, 384, stride=2), MobileViTBlock(384, depth=4)),  # [B, 384, 16, 16]
            nn.Sequential(InvertedResidual(384, 512, stride=2), MobileViTBlock(512, depth=3)),  # [B, 512, 8, 8]
        )

    def forward(self, pixels):
        return self.stages(self.stem(pixels))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: twice as wide in between, where the depthwise convolution is; residual where shapes allow."""

    def __init__(self, width, out_width, stride=1):
        super().__init__()
        self.conv1_1x1 = conv_norm(width, 2 * width, act=nn.SiLU)
        self.conv2_kxk = conv_norm(2 * width, 2 * width, kernel_size=3, stride=stride, depthwise=True, act=nn.SiLU)
        self.conv3_1x1 = conv_norm(2 * width, out_width)
        self.residual = stride == 1 and width == out_width

    def forward(self, x):
        y = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)))
        return x + y if self.residual else y


class MobileViTBlock(nn.Module):
    """Local by convolution, then global by attention among pixels with the same place in their 2 x 2 patches.

    [B, C, H, W] -> the same. Odd maps are stretched to even ones first and stay so: 7 x 7 pixels become 8 x 8.
    """

    def __init__(self, width, depth):
        super().__init__()
        self.conv_kxk = conv_norm(width, width, kernel_size=3, depthwise=True, act=nn.SiLU)
        self.conv_1x1 = nn.Conv2d(width, width // 2, kernel_size=1, bias=False)
        self.transformer = nn.Sequential(*(LinearTransformerLayer(width // 2) for _ in range(depth)))
        self.norm = nn.GroupNorm(1, width // 2)
        self.conv_proj = conv_norm(width // 2, width)

    def forward(self, x):
        H, W = x.shape[2] + x.shape[2] % 2, x.shape[3] + x.shape[3] % 2
        if x.shape[2:] != (H, W):
            x = F.interpolate(x, (H, W), mode="bilinear", align_corners=True)
        x = self.conv_1x1(self.conv_kxk(x))  # [B, d, H, W] with d = C/2
        x = F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).flatten(3)  # [B, d, P, N]: P = 4 places, N = H*W/4 patches
        x = self.norm(self.transformer(x))
        x = F.pixel_shuffle(x.unflatten(3, (H // 2, W // 2)).flatten(1, 2), 2)  # [B, d, H, W]
        return self.conv_proj(x)


class LinearTransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward, both residual. [B, d, P, N] -> the same. Norms are over d, P and N together."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.attn = nn.GroupNorm(1, width), SeparableSelfAttention(width)
        self.norm2 = nn.GroupNorm(1, width)
        self.mlp = named(fc1=nn.Conv2d(width, 2 * width, 1), act=nn.SiLU(), fc2=nn.Conv2d(2 * width, width, 1))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SeparableSelfAttention(nn.Module):
    """Attention in time linear in N (Sec. 3.2): one score a token weighs the keys into one context vector for all.

    [B, d, P, N] -> the same, each of the P places by itself.
    """

    def __init__(self, width):
        super().__init__()
        self.qkv_proj = nn.Conv2d(width, 1 + 2 * width, kernel_size=1)
        self.out_proj = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, x):
        scores, keys, values = self.qkv_proj(x).split((1, x.shape[1], x.shape[1]), dim=1)  # [B, 1 | d | d, P, N]
        context = (scores.softmax(dim=3) * keys).sum(dim=3, keepdim=True)  # [B, d, P, 1]
        return self.out_proj(context * values.relu())


def conv_norm(in_channels, out_channels, kernel_size=1, stride=1, depthwise=False, act=None):
    """Convolution, BatchNorm and activation under the names that timm's two networks give them."""
    groups = in_channels if depthwise else 1
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return named(conv=conv, bn=nn.BatchNorm2d(out_channels), **({"act": act()} if act else {}))


def named(**layers):
    """Layers one after the other, each under its name in a state dict."""
    return nn.Sequential(OrderedDict(layers))


# ------------------------------------------------------------------------------------------------ BLIP's own


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
