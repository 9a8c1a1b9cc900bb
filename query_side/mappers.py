"""Mapping networks and query sides that ISA is compared with."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import isa
import query_side


class MLP(nn.Module):
    """A feature map [B, C, H, W] -> its mean over H x W -> three linear layers -> one word [B, 1, d_w].

    Pic2Word's mapping network (its section 3): 512 hidden units, ReLU, dropout 0.1. On a light encoder it is "MLP (single token)"
    of Tables 5, 11 and 18-20, on v as a map of one pixel (the encoder "blip-v") Pic2Word itself.
    """

    def __init__(self, in_channels, word_dim, hidden=512, dropout=0.1, activation=nn.ReLU):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_channels, hidden), activation(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), activation(), nn.Dropout(dropout),
            nn.Linear(hidden, word_dim),
        )  # fmt: skip

    def forward(self, feature_map):
        """feature_map [B, C, H, W] -> U [B, 1, d_w]."""
        return self.layers(feature_map.mean(dim=(2, 3)))[:, None]


class Phi(MLP):
    """SEARLE's textual inversion network (its section 3): the same with GELU, 4 C hidden units and dropout 0.5."""

    def __init__(self, in_channels, word_dim, dropout=0.5):
        super().__init__(in_channels, word_dim, 4 * in_channels, dropout, nn.GELU)


class TwoSidedModel(isa.QueryModel):
    """Both sides trained (Tables 7, 13): one encoder gives the query's feature map and the gallery's features.

    encoder: a light encoder, whose map gets linear layers of its own in place of BLIP's v and F^v, or a TunedBlipEncoder, which
    has them. The text side stays the frozen BLIP's. forward: pixels [B, 3, S, S] -> U [B, L, d_w], v [B, E] of unit norm, F^v
    [B, 1+N, D], the latter for matching (the light encoder's first row is the mean of its pixels).
    """

    def __init__(self, encoder, mapper, blip):
        super().__init__(encoder, mapper)
        self.to_tokens = nn.Linear(encoder.out_channels, blip.vision_proj.in_features)  # C -> D
        self.vision_proj = copy.deepcopy(blip.vision_proj).float().requires_grad_(True)  # D -> E
        if isinstance(encoder, query_side.TunedBlipEncoder):
            self.to_tokens = nn.Identity()

    def forward(self, pixels):
        if isinstance(self.encoder, query_side.TunedBlipEncoder):
            F_v = self.encoder.visual_encoder(pixels)  # [B, 1+N, D]
            feature_map = query_side.as_map(F_v)
        else:
            feature_map = self.encoder(pixels)  # [B, C, H, W]
            tokens = self.to_tokens(feature_map.flatten(2).transpose(1, 2))  # [B, N, D]
            F_v = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        v = F.normalize(self.vision_proj(F_v[:, 0]).float(), dim=-1)
        return self.mapper(feature_map), v, F_v
