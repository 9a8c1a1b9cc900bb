"""The visual encoder of BLIP: a plain pre-norm vision transformer (ViT).

Parameter names are those of the official checkpoints, so a state dict loads without renaming. B images, N patches,
D width.
"""

import torch
import torch.nn.functional as F
from torch import nn

HEAD_WIDTH = 64  # every published BLIP has heads of 64 channels: base 768 = 12 x 64, large 1024 = 16 x 64


def attention(q, k, v, mask=None, rows=None):
    """Scaled dot-product attention over several heads, softmax over the keys.

    q [B, T, D], k and v [M, S, D], mask bool [B, S] (True = may be attended to) or None. Returns [B, T, D].
    rows int64 [B]: whose keys and values each q looks at; by default M = B and its own.
    Where a CPU will have to run backward through it, the form that the papers print is faster at these lengths (in
    bfloat16 by far) than PyTorch's fused kernel, which is used everywhere else.
    """
    q, k, v = (x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for x in (q, k, v))  # [B or M, heads, T or S, 64]
    if rows is not None:
        k, v = k.contiguous()[rows], v.contiguous()[rows]  # [B, heads, S, 64] in memory, as the products below want them
    if q.is_cuda or not (torch.is_grad_enabled() and q.requires_grad):
        fused = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None, :])
        return fused.transpose(1, 2).flatten(2)  # [B, T, D]
    scores = q @ k.transpose(-2, -1) * HEAD_WIDTH**-0.5  # [B, heads, T, S]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)  # [B, T, D]


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, n=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # 3 x [B, 1+N, D]
        return self.proj(attention(q[:, :n], k, v))  # of the first n tokens, None = all


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # the exact (erf) GELU, not the tanh approximation


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x, n=None):
        x = x[:, :n] + self.attn(self.norm1(x), n)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """pixels [B, 3, S, S] -> patches [B, N, D].

    With a stem (pocket BLIP only, patches of 8 px) three small convolutions stand in for the large one: a small ViT
    learns shapes sooner from them (Xiao et al., NeurIPS 2021).
    """

    def __init__(self, patch_size, width, stem=False):
        super().__init__()
        if not stem:
            self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        else:
            edges, corners = nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.Conv2d(32, 64, 3, stride=2, padding=1)
            self.proj = nn.Sequential(edges, nn.GELU(), corners, nn.GELU(), nn.Conv2d(64, width, 2, stride=2))

    def forward(self, pixels):
        return self.proj(pixels).flatten(2).transpose(1, 2)  # [B, N, D]


class VisionTransformer(nn.Module):
    """pixels [B, 3, S, S], S = image_size -> F^v [B, 1+N, D]: the tokens after the last LayerNorm, CLS first.

    With cls_only [B, 1, D], its first row: in the last block CLS asks all tokens, but nobody asks what they become.
    Raises ValueError where the pixels have another shape.
    """

    def __init__(self, image_size, patch_size, width, depth, stem=False):
        super().__init__()
        self.image_size = image_size
        self.patch_embed = PatchEmbed(patch_size, width, stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels, cls_only=False):
        if pixels.dim() != 4 or pixels.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"pixels should be [B, 3, {self.image_size}, {self.image_size}], not {list(pixels.shape)}")
        x = self.patch_embed(pixels)  # [B, N, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1) + self.pos_embed  # [B, 1+N, D]
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return self.norm(last(x, 1 if cls_only else None))


def resize_position_embedding(pos_embed, image_size, patch_size):
    """Position embeddings [1, 1+N, D] -> [1, 1+N', D] for another image size: the grid is resized, CLS is kept.

    Bicubic, align_corners False, no antialiasing: the official code's interpolation, so its features are reproduced.
    """
    side = image_size // patch_size
    old_side = round((pos_embed.shape[1] - 1) ** 0.5)
    if side == old_side:
        return pos_embed
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    grid = grid.transpose(1, 2).unflatten(2, (old_side, old_side)).float()  # [1, D, old, old]
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)  # [1, 1+side*side, D]
