"""Layers that the light networks share."""

import itertools
from collections import OrderedDict

import torch
import torch.nn.functional as F
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
    """A depthwise convolution without bias that trains faster under bfloat16 on a CPU.

    PyTorch's backward pass is up to thirty times slower there with strides of 2 or kernels of 5
    than with 1 and 3: half of EfficientNet-B2's time (tests/speed.py step).
    """

    def forward(self, x):
        if x.is_cuda or not torch.is_grad_enabled():
            return super().forward(x)
        if torch.is_autocast_enabled("cpu") and x.is_contiguous(memory_format=torch.channels_last):
            weight = self.weight.bfloat16()
            return _Depthwise.apply(x.bfloat16(), weight, self.stride[0], self.padding[0])
        with torch.autocast("cpu", enabled=False):  # in float32: faster in the other layout
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class _Depthwise(torch.autograd.Function):
    """x [B, C, H, W], weight [C, 1, k, k] -> [B, C, H', W']."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (stride, padding) = ctx.saved_tensors, ctx.options
        dtype = torch.float32 if stride > 1 else grad.dtype  # of the faster kernel
        dx = gradient("x", grad.to(dtype), torch.empty_like(x, dtype=dtype), weight.to(dtype),
                      stride, padding).to(grad.dtype)
        k = weight.shape[-1]
        if k == 3:
            return dx, gradient("weight", grad, x, weight, stride, padding), None, None
        # Fast for 3 x 3 weights at most: in pieces, each from its own part of x and with stride 1
        x, dw = F.pad(x, [padding] * 4), torch.empty_like(weight)
        starts, end = (range(0, k, 3), 3) if stride == 1 else (range(stride), k)
        for i, j in itertools.product(starts, starts):
            piece = dw[..., i:i + end:stride, j:j + end:stride]
            height, width = (grad.shape[d] + piece.shape[d] - 1 for d in (2, 3))
            part = x[..., i::stride, j::stride][..., :height, :width]
            part = part.contiguous(memory_format=torch.channels_last)
            piece.copy_(gradient("weight", grad, part, piece.contiguous(), 1, 0))
        return dx, dw, None, None


def gradient(of, grad, x, weight, stride, padding):
    """A depthwise convolution's, "x" or "weight"; of that one only the shape is read."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight),
        [of == "x", of == "weight", False])[of == "weight"]


class MeanPool(nn.AdaptiveAvgPool2d):
    """The mean of each channel. Its gradient stays channels-last, which PyTorch's does not."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[..., None, None]
