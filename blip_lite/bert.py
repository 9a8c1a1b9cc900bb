"""BLIP's text encoder: a BERT with post-norm layers that can also look at an image.

Two modes share all weights: *text mode* skips cross-attention, *matching mode* runs it in every
layer, on the image's tokens. The encoder starts from word vectors, not ids: here ISA's sentence
tokens enter. Parameters have the official names. B texts, T tokens, d width, S image tokens of
width D.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .vit import attention, attention_weights, split_heads

EPS = 1e-12  # of BERT's LayerNorms; the ViT's have 1e-6


class Embeddings(nn.Module):
    """Word vectors + position embedding -> LayerNorm. BLIP's BERT has no token types."""

    def __init__(self, vocab_size, max_positions, width):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(max_positions, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)

    def forward(self, words):
        length, most = words.shape[1], self.position_embeddings.num_embeddings
        if length > most:
            raise ValueError(f"a text of {length} tokens is longer than BLIP's {most} positions; "
                             "shorten it")
        return self.LayerNorm(words + self.position_embeddings.weight[:length])  # [B, T, d]


class Projections(nn.Module):
    """To queries, keys and values, the latter two perhaps from an image, of another width."""

    def __init__(self, width, source_width):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)


class Residual(nn.Module):
    """Linear -> add the residual -> LayerNorm (post-norm)."""

    def __init__(self, in_width, width):
        super().__init__()
        self.dense = nn.Linear(in_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x, residual):
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nn.Module):
    def __init__(self, width, source_width):
        super().__init__()
        self.self = Projections(width, source_width)
        self.output = Residual(width, width)

    def forward(self, x, source, mask=None, rows=None):
        q, k, v = self.self.query(x), self.self.key(source), self.self.value(source)
        return self.output(attention(q, k, v, mask, rows), x)


class Intermediate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, 4 * width)

    def forward(self, x):
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    def __init__(self, width, image_width):
        super().__init__()
        self.attention = Attention(width, width)
        self.crossattention = Attention(width, image_width)
        self.intermediate = Intermediate(width)
        self.output = Residual(4 * width, width)

    def forward(self, x, mask, image_tokens=None, rows=None, n=None):
        x = self.attention(x[:, :n], x, mask)  # only the first n tokens continue; None = all
        if image_tokens is not None:
            x = self.crossattention(x, image_tokens, rows=rows)  # no mask: an image has no padding
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    def __init__(self, width, depth, image_width):
        super().__init__()
        self.layer = nn.ModuleList(Layer(width, image_width) for _ in range(depth))


class TextEncoder(nn.Module):
    """Words [B, T, d] and mask [B, T], 0 at padding -> last hidden state of position 0, [B, d].

    With image_tokens [M, S, D], matching mode: text i looks at image rows[i] (int64 [B]; by default
    at its own, M = B). Raises ValueError if T exceeds the number of positions.

    Two savings change no value: keys and values of an image are computed once for all its texts,
    and the last layer computes only position 0, which alone is read.
    """

    def __init__(self, vocab_size, max_positions, width, depth, image_width):
        super().__init__()
        self.embeddings = Embeddings(vocab_size, max_positions, width)
        self.encoder = Encoder(width, depth, image_width)

    def forward(self, words, mask, image_tokens=None, rows=None):
        x, mask = self.embeddings(words), mask.bool()
        *layers, last = self.encoder.layer
        for layer in layers:
            x = layer(x, mask, image_tokens, rows)
        return last(x, mask, image_tokens, rows, n=1)[:, 0]  # [B, 1, d] -> [B, d]

    def attention_maps(self, words, mask):
        """Text mode: how much each token attends to each. -> [B, layers, heads, T, T]."""
        x, mask = self.embeddings(words), mask.bool()
        maps = []
        for layer in self.encoder.layer:
            project = layer.attention.self
            q, k = split_heads(project.query(x)), split_heads(project.key(x))  # [B, heads, T, 64]
            maps.append(attention_weights(q, k, mask[:, None, None, :]))
            x = layer(x, mask)
        return torch.stack(maps, dim=1)
