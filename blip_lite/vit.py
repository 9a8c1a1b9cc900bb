"""BLIP's visual encoder: a plain vision transformer (ViT) with pre-norm blocks.

Parameters have the names of the official checkpoints. B images, N patches, D width.
"""

import torch
import torch.nn.functional as F
from torch import nn

HEAD_WIDTH = 64  # in every published BLIP: base has 12 heads (768 = 12 x 64), large 16


def split_heads(x, width=HEAD_WIDTH):
    return x.unflatten(-1, (-1, width)).transpose(1, 2)  # [B, T, D] -> [B, heads, T, 64]


def attention_weights(q, k, mask=None):
    """q [B, heads, T, 64], k [B, heads, S, 64] -> softmax over the keys, [B, heads, T, S].

    mask: bool, broadcast to that shape, True = may be attended to.
    """
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # [B, heads, T, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


def attention(q, k, v, mask=None, rows=None, head_width=HEAD_WIDTH):
    """Scaled dot-product attention with several heads.

    q [B, T, D], k and v [M, S, D] -> [B, T, D]. mask: bool [B, S], or as above.
    rows: int64 [B], whose keys and values each q attends to; by default its own (M = B).
    """
    q, k, v = (split_heads(x, head_width) for x in (q, k, v))
    mask = mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask
    if rows is not None:  # [M, heads, S, 64] -> [B, heads, S, 64], contiguous for what follows
        k, v = (x.contiguous().index_select(0, rows) for x in (k, v))
    if torch.is_grad_enabled() and q.requires_grad and not q.is_cuda:
        out = attention_weights(q, k, mask) @ v  # faster than the fused kernel if backward follows
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask)
    return out.transpose(1, 2).flatten(2)  # [B, heads, T, 64] -> [B, T, D]


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, n=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # 3 x [B, 1+N, D]
        return self.proj(attention(q[:, :n], k, v))  # for the first n tokens; None = all


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # the exact GELU (erf), not its tanh approximation


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

    A stem (pocket BLIP only, 8 px patches) is three small convolutions instead of a large one: a
    small ViT learns shapes sooner from them (Xiao et al., NeurIPS 2021).
    """

    def __init__(self, patch_size, width, stem=False):
        super().__init__()
        if stem:
            edges = nn.Conv2d(3, 32, 3, stride=2, padding=1)
            corners = nn.Conv2d(32, 64, 3, stride=2, padding=1)
            patches = nn.Conv2d(64, width, 2, stride=2)
            self.proj = nn.Sequential(edges, nn.GELU(), corners, nn.GELU(), patches)
        else:
            self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels):
        return self.proj(pixels).flatten(2).transpose(1, 2)  # [B, D, S/P, S/P] -> [B, N, D]


class VisionTransformer(nn.Module):
    """pixels [B, 3, S, S], S = image_size -> F^v [B, 1+N, D]: the tokens after the final LayerNorm.

    CLS comes first. cls_only: it alone, [B, 1, D], as nothing reads what the last block makes of
    the other tokens. Raises ValueError for pixels of another shape.
    """

    def __init__(self, image_size, patch_size, width, depth, stem=False):
        super().__init__()
        self.image_size = image_size
        self.patch_embed = PatchEmbed(patch_size, width, stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, width))
        self.norm_pre = nn.Identity()  # CLIP has a LayerNorm here
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels, cls_only=False):
        S = self.image_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, S, S):
            raise ValueError(f"pixels should be [B, 3, {S}, {S}], not {list(pixels.shape)}")
        x = self.patch_embed(pixels)  # [B, N, D]
        cls = self.cls_token.expand(len(x), -1, -1).to(x.dtype)
        x = self.norm_pre(torch.cat([cls, x], dim=1) + self.pos_embed)  # [B, 1+N, D]
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return self.norm(last(x, 1 if cls_only else None))


def resize_position_embedding(pos_embed, image_size, patch_size):
    """Position embeddings [1, 1+N, D] -> [1, 1+N', D] for another image size; CLS keeps its own.

    Bicubic without antialiasing, align_corners False, as in the official code.
    """
    side = image_size // patch_size
    old_side = round((pos_embed.shape[1] - 1) ** 0.5)
    if side == old_side:
        return pos_embed
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    grid = grid.transpose(1, 2).unflatten(2, (old_side, old_side)).float()  # [1, D, old, old]
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)  # [1, 1+N', D]
