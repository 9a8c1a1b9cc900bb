"""The text encoder of BLIP: a post-norm BERT that can also look at an image.

Two modes share all weights: *text mode* skips cross-attention, *matching mode* runs it in every layer on the image
tokens. The encoder starts from word vectors, not ids: that is where ISA's sentence tokens enter. Parameter names are
those of the official checkpoints. B texts, T tokens, d width, S image tokens of width D.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .vit import HEAD_WIDTH, attention

EPS = 1e-12  # BERT's LayerNorm epsilon; the ViT's is 1e-6


class Embeddings(nn.Module):
    """Word vectors + position embedding -> LayerNorm. BLIP's BERT has no token types."""

    def __init__(self, vocab_size, max_positions, width):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(max_positions, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)

    def forward(self, words):
        if words.shape[1] > self.position_embeddings.num_embeddings:
            raise ValueError(
                f"a text of {words.shape[1]} tokens is longer than BLIP's {self.position_embeddings.num_embeddings} "
                "positions; shorten it"
            )
        return self.LayerNorm(words + self.position_embeddings.weight[: words.shape[1]])  # [B, T, d]


class Projections(nn.Module):
    """The query, key and value projections; keys and values may come from an image of another width."""

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
        x = self.attention(x[:, :n], x, mask)  # the first n tokens go on, None = all
        if image_tokens is not None:
            x = self.crossattention(x, image_tokens, rows=rows)  # every image token may be attended to
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    def __init__(self, width, depth, image_width):
        super().__init__()
        self.layer = nn.ModuleList(Layer(width, image_width) for _ in range(depth))


class TextEncoder(nn.Module):
    """Word vectors [B, T, d] and mask [B, T] (1 = a token, 0 = padding) -> the last hidden state of position 0, [B, d].

    With image_tokens [M, S, D] the encoder runs in matching mode, text i looking at image rows[i] (int64 [B]; by default
    at its own, M = B); without them in text mode. Raises ValueError where T exceeds the number of positions.

    Two savings that change no value: the keys and values of an image are computed once, however many texts look at it,
    and in the last layer position 0 alone goes on, since BLIP reads no other.
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
        return last(x, mask, image_tokens, rows, n=1)[:, 0]

    def attention_maps(self, words, mask):
        """Text mode, for figures: how much each token attends to each other. -> [B, layers, heads, T, T], rows sum to 1."""
        x, mask = self.embeddings(words), mask.bool()
        maps = []
        for layer in self.encoder.layer:
            asked = layer.attention.self
            q, k = (f(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for f in (asked.query, asked.key))  # [B, heads, T, 64]
            scores = q @ k.transpose(-2, -1) * HEAD_WIDTH**-0.5  # [B, heads, T, T]
            maps.append(scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min).softmax(dim=-1))
            x = layer(x, mask)
        return torch.stack(maps, dim=1)
