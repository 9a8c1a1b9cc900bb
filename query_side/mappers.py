"""Alternatives that the paper tries: mappers to a single word, and one encoder for both sides."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import isa

from .encoders import TunedBlipEncoder, as_map


class MLP(nn.Module):
    """Pic2Word's mapping network (its section 3): a feature map's mean -> U [B, 1, d_w].

    On a light encoder it is "MLP (single token)" of Tables 5, 11 and 18-20, on the encoder "blip-v"
    Pic2Word itself. Raises ValueError for more than one token.
    """

    def __init__(self, in_channels, word_dim, tokens=1, hidden=512, dropout=0.1,
                 activation=nn.ReLU):
        super().__init__()
        if tokens != 1:
            raise ValueError(f"the mapper makes one word, not {tokens}: give --tokens 1")
        self.layers = nn.Sequential(
            nn.Linear(in_channels, hidden), activation(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), activation(), nn.Dropout(dropout),
            nn.Linear(hidden, word_dim),
        )

    def forward(self, feature_map):
        return self.layers(feature_map.mean(dim=(2, 3)))[:, None]


class Phi(MLP):
    """SEARLE's inversion network (its section 3): GELU, 4 C hidden units, dropout 0.5.

    On CLIP ViT-L/14 768 -> 3072 -> 3072 -> 768, as its authors publish it.
    """

    def __init__(self, in_channels, word_dim, tokens=1, dropout=0.5):
        super().__init__(in_channels, word_dim, tokens, 4 * in_channels, dropout, nn.GELU)


class TwoSidedModel(isa.QueryModel):
    """One encoder for both sides (Tables 7, 13): it gives U to queries, v and F^v to the gallery.

    Linear layers make v and F^v of a light encoder's map. The text side stays the frozen BLIP's.
    """

    def __init__(self, encoder, mapper, blip):
        super().__init__(encoder, mapper)
        self.to_tokens = nn.Linear(encoder.out_channels, blip.vision_proj.in_features)  # C -> D
        self.vision_proj = copy.deepcopy(blip.vision_proj).float().requires_grad_(True)  # D -> E
        if isinstance(encoder, TunedBlipEncoder):
            self.to_tokens = nn.Identity()

    def forward(self, pixels):
        """pixels [B, 3, S, S] -> U [B, L, d_w], v [B, E] of unit norm, F_v [B, 1+N, D]."""
        if isinstance(self.encoder, TunedBlipEncoder):
            F_v = self.encoder.visual_encoder(pixels)  # [B, 1+N, D]
            feature_map = as_map(F_v)
        else:
            feature_map = self.encoder(pixels)  # [B, C, H, W]
            tokens = self.to_tokens(feature_map.flatten(2).transpose(1, 2))  # [B, N, D]
            F_v = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # the mean for CLS
        v = F.normalize(self.vision_proj(F_v[:, 0]).float(), dim=-1)
        return self.mapper(feature_map), v, F_v
