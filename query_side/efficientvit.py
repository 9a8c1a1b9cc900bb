"""EfficientViT-M2 (Liu et al., CVPR 2023); modules are named as in timm's `efficientvit_m2`."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .layers import conv_norm, named
from .weights import IMAGENET_STATISTICS

KEY_WIDTH = 16  # channels of a head's queries and keys


class EfficientViT(nn.Module):
    """Pixels [B, 3, 224, 224] -> F^LE [B, 224, 4, 4], 3.96 M parameters.

    image_size sets the sides of the attention windows, and so the number of attention biases.
    """

    out_channels, normalization = 224, IMAGENET_STATISTICS

    def __init__(self, image_size=224):
        super().__init__()
        self.image_size = image_size
        self.patch_embed = named(  # "overlapping": kernels of 3 with strides of 2
            conv1=conv_norm(3, 16, 3, stride=2, act=nn.ReLU),
            conv2=conv_norm(16, 32, 3, stride=2, act=nn.ReLU),
            conv3=conv_norm(32, 64, 3, stride=2, act=nn.ReLU),
            conv4=conv_norm(64, 128, 3, stride=2),
        )
        sides = [math.ceil(image_size // 16 / stride) for stride in (1, 2, 4)]  # of the maps
        self.stages = nn.Sequential(
            named(blocks=sandwiches(128, depth=1, heads=4, side=sides[0])),
            named(downsample=subsample(128, 192), blocks=sandwiches(192, 2, 3, sides[1])),
            named(downsample=subsample(192, 224), blocks=sandwiches(224, 3, 2, sides[2])),
        )

    def forward(self, pixels):
        # [B, 128, 14, 14], then the stages' [B, 128, 14, 14], [B, 192, 7, 7], [B, 224, 4, 4]
        return self.stages(self.patch_embed(pixels))


def sandwiches(width, depth, heads, side):
    """`depth` blocks (Eq. 1): attention between FFNs, each after a token interaction."""
    return nn.Sequential(*(
        named(dw0=interaction(width), ffn0=feed_forward(width),
              mixer=Residual(WindowAttention(width, heads, side)),
              dw1=interaction(width), ffn1=feed_forward(width))
        for _ in range(depth)
    ))


def subsample(width, out_width):
    """[B, width, H, W] -> [B, out_width, H/2, W/2]: an inverted residual between two FFNs."""
    hidden = 4 * width
    return named(
        res1=nn.Sequential(interaction(width), feed_forward(width)),
        patchmerge=named(
            conv1=conv_norm(width, hidden, act=nn.ReLU),
            conv2=conv_norm(hidden, hidden, 3, stride=2, depthwise=True, act=nn.ReLU),
            se=SqueezeExcite(hidden),
            conv3=conv_norm(hidden, out_width),
        ),
        res2=nn.Sequential(interaction(out_width), feed_forward(out_width)),
    )


def interaction(width):
    return Residual(conv_norm(width, width, 3, depthwise=True))


def feed_forward(width):
    return Residual(named(pw1=conv_norm(width, 2 * width, act=nn.ReLU),
                          pw2=conv_norm(2 * width, width)))


class Residual(nn.Module):
    """x + m(x), where m(x) = 0 at first: its last BatchNorm starts with scale zero."""

    def __init__(self, m):
        super().__init__()
        self.m = m
        nn.init.zeros_([x for x in m.modules() if isinstance(x, nn.BatchNorm2d)][-1].weight)

    def forward(self, x):
        return x + self.m(x)


class SqueezeExcite(nn.Module):
    """Scales each channel by 0..1, depending on all channels' means (Hu et al.)."""

    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=True)  # [B, C, 1, 1]
        return x * self.fc2(F.relu(self.fc1(mean))).sigmoid()


class WindowAttention(nn.Module):
    """Attention within windows of at most 7 x 7 pixels, zero-padded. [B, C, H, W] -> the same."""

    def __init__(self, width, heads, side):
        super().__init__()
        self.side = min(side, 7)
        self.attn = CascadedGroupAttention(width, heads, self.side)

    def forward(self, x):
        H, W, s = *x.shape[2:], self.side
        x = F.pad(x, (0, -W % s, 0, -H % s))
        x = x.unflatten(3, (-1, s)).unflatten(2, (-1, s))  # [B, C, rows, s, columns, s]
        x = x.permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, C, s, s]
        x = self.attn(x.flatten(0, 2)).unflatten(0, (-1, *x.shape[1:3]))
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, C, rows*s, columns*s]
        return x[:, :, :H, :W]


class CascadedGroupAttention(nn.Module):
    """Each head adds the output of the one before to its channels (Eq. 2-3). On [B, C, s, s]."""

    def __init__(self, width, heads, side):
        super().__init__()
        share = width // heads
        self.widths = (KEY_WIDTH, KEY_WIDTH, share)  # of a head's queries, keys and values
        self.qkvs = nn.ModuleList(conv_norm(share, sum(self.widths)) for _ in range(heads))
        self.dws = nn.ModuleList(conv_norm(KEY_WIDTH, KEY_WIDTH, kernel, depthwise=True)
                                 for kernel in (7, 5, 3, 3)[:heads])
        self.proj = nn.Sequential(nn.ReLU(), conv_norm(width, width))
        # One bias for each distance |dy|, |dx| between two pixels of a window
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))
        apart = (torch.arange(side)[:, None] - torch.arange(side)).abs()  # [s, s]
        index = apart[:, None, :, None] * side + apart[:, None, :]  # [s, s, s, s]: y, x; y, x
        self.register_buffer("index", index.flatten(2).flatten(0, 1), persistent=False)  # [N, N]

    def forward(self, x):
        biases = self.attention_biases[:, self.index]  # [heads, N, N] with N = s*s
        shares, found, outputs = x.chunk(len(self.qkvs), dim=1), 0, []
        for share, bias, qkv, dw in zip(shares, biases, self.qkvs, self.dws, strict=True):
            q, k, v = qkv(share + found).split(self.widths, dim=1)  # Eq. 3
            q, k, v = dw(q).flatten(2), k.flatten(2), v.flatten(2)  # [B, ., N]
            weights = q.transpose(1, 2) @ k / math.sqrt(KEY_WIDTH) + bias  # [B, N, N]
            found = v @ weights.softmax(dim=2).transpose(1, 2)  # [B, C/heads, N]
            found = found.unflatten(2, share.shape[2:])  # [B, C/heads, s, s]
            outputs.append(found)
        return self.proj(torch.cat(outputs, dim=1))  # Eq. 2
