"""EfficientViT-M2 (Liu et al., CVPR 2023), with the names of timm."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from query_side.weights import IMAGENET, conv_norm, named


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
