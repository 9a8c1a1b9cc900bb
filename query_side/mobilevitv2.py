"""MobileViTV2-1.0 (Mehta & Rastegari, 2022); modules are named as in timm's `mobilevitv2_100`."""

import torch.nn.functional as F
from torch import nn

from .layers import conv_norm, named


class MobileViTV2(nn.Module):
    """Pixels [B, 3, 256, 256], RGB in 0..1 as it is -> F^LE [B, 512, 8, 8], 4.39 M parameters.

    224 px give 8 x 8 too, not 7 x 7: see MobileViTBlock.
    """

    out_channels, normalization = 512, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self, image_size=256):
        super().__init__()
        self.image_size = image_size
        self.stem = conv_norm(3, 32, 3, stride=2, act=nn.SiLU)  # [B, 32, 128, 128]
        self.stages = nn.Sequential(
            nn.Sequential(InvertedResidual(32, 64)),  # [B, 64, 128, 128]
            nn.Sequential(InvertedResidual(64, 128, 2), InvertedResidual(128, 128)),  # 64 x 64
            nn.Sequential(InvertedResidual(128, 256, 2), MobileViTBlock(256, depth=2)),  # 32 x 32
            nn.Sequential(InvertedResidual(256, 384, 2), MobileViTBlock(384, depth=4)),  # 16 x 16
            nn.Sequential(InvertedResidual(384, 512, 2), MobileViTBlock(512, depth=3)),  # 8 x 8
        )

    def forward(self, pixels):
        return self.stages(self.stem(pixels))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: a depthwise convolution at twice the width, residual if it can be."""

    def __init__(self, width, out_width, stride=1):
        super().__init__()
        hidden = 2 * width
        self.conv1_1x1 = conv_norm(width, hidden, act=nn.SiLU)
        self.conv2_kxk = conv_norm(hidden, hidden, 3, stride, depthwise=True, act=nn.SiLU)
        self.conv3_1x1 = conv_norm(hidden, out_width)
        self.residual = stride == 1 and width == out_width

    def forward(self, x):
        y = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)))
        return x + y if self.residual else y


class MobileViTBlock(nn.Module):
    """A convolution, then attention among the pixels with the same place in their 2 x 2 patches.

    [B, C, H, W] -> the same, but odd maps are stretched to even ones: 7 x 7 becomes 8 x 8.
    """

    def __init__(self, width, depth):
        super().__init__()
        self.conv_kxk = conv_norm(width, width, 3, depthwise=True, act=nn.SiLU)
        self.conv_1x1 = nn.Conv2d(width, width // 2, kernel_size=1, bias=False)
        layers = (LinearTransformerLayer(width // 2) for _ in range(depth))
        self.transformer = nn.Sequential(*layers)
        self.norm = nn.GroupNorm(1, width // 2)
        self.conv_proj = conv_norm(width // 2, width)

    def forward(self, x):
        H, W = (side + side % 2 for side in x.shape[2:])
        if x.shape[2:] != (H, W):
            x = F.interpolate(x, (H, W), mode="bilinear", align_corners=True)
        x = self.conv_1x1(self.conv_kxk(x))  # [B, d, H, W] with d = C/2
        x = F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).flatten(3)  # [B, d, P=4, N=H*W/4]
        x = self.norm(self.transformer(x))
        x = F.pixel_shuffle(x.unflatten(3, (H // 2, W // 2)).flatten(1, 2), 2)  # [B, d, H, W]
        return self.conv_proj(x)


class LinearTransformerLayer(nn.Module):
    """Attention and feed-forward, pre-norm and residual. [B, d, P, N] -> the same."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.attn = nn.GroupNorm(1, width), SeparableSelfAttention(width)
        self.norm2 = nn.GroupNorm(1, width)
        self.mlp = named(fc1=nn.Conv2d(width, 2 * width, 1), act=nn.SiLU(),
                         fc2=nn.Conv2d(2 * width, width, 1))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SeparableSelfAttention(nn.Module):
    """Linear in N (Sec. 3.2): scores weigh the keys into one context vector for each place P."""

    def __init__(self, width):
        super().__init__()
        self.qkv_proj = nn.Conv2d(width, 1 + 2 * width, kernel_size=1)
        self.out_proj = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, x):
        d = x.shape[1]
        scores, keys, values = self.qkv_proj(x).split((1, d, d), dim=1)  # [B, 1 | d | d, P, N]
        context = (scores.softmax(dim=3) * keys).sum(dim=3, keepdim=True)  # [B, d, P, 1]
        return self.out_proj(context * values.relu())
