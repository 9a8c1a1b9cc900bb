"""MobileViTV2-1.0 (Mehta & Rastegari, 2022), with the names of timm."""

import torch.nn.functional as F
from torch import nn

from query_side.weights import conv_norm, named


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
