"""Layers that the light networks share."""

from collections import OrderedDict

import torch
from torch import nn


def conv_norm(in_channels, out_channels, kernel_size=1, stride=1, depthwise=False, act=None):
    """Convolution, BatchNorm and activation (a class, or None) under timm's names."""
    groups = in_channels if depthwise else 1
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2,
                     groups=groups, bias=False)
    activation = {"act": act()} if act else {}
    return named(conv=conv, bn=nn.BatchNorm2d(out_channels), **activation)


def named(**layers):
    """Layers in sequence, each with its name in a state dict."""
    return nn.Sequential(OrderedDict(layers))


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that trains in float32 on a CPU, even under autocast.

    With kernels of 5 or strides of 2 its backward pass in bfloat16 takes two to three times as long
    there: a quarter of EfficientNet-B2's time (tests/speed.py step).
    """

    def forward(self, x):
        if x.is_cuda or not torch.is_grad_enabled():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)
