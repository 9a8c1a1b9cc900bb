"""CLIP (Radford et al., ICML 2021): two encoders into one space, and no matching head.

B images or texts, T tokens, E width of the joint space, D image width, d_w word width.
`load` returns it frozen; pocket/pretrain.py trains the same class from scratch.
"""

from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import blip_lite
from blip_lite.vit import VisionTransformer, attention

NO_MATCHING = ("CLIP has no matching encoder that shares the word space of its text encoder "
               "(section 4.2); give a BLIP, or train with --loss gcd")


def to_square(pil, image_size):
    """A PIL image of any mode and size -> uint8 [3, S, S].

    Upright, RGB; the shorter side becomes S = image_size, bicubic; then the square in the middle.
    """
    pil, S = blip_lite.to_rgb(pil), image_size
    short = min(pil.size)
    pil = middle(pil, *(min(side, 8 * short) for side in pil.size))  # a strip can be endless
    size = [int(S * side / short) for side in pil.size]
    pil = middle(pil.resize(size, Image.Resampling.BICUBIC), S, S)
    return blip_lite.to_square(pil, S)


def middle(pil, width, height):
    left, top = round((pil.width - width) / 2), round((pil.height - height) / 2)
    return pil.crop((left, top, left + width, top + height))


class Block(nn.Module):
    """A pre-norm layer. quick: x * sigmoid(1.702 x) in place of GELU, as in OpenAI's weights."""

    def __init__(self, width, hidden, heads, quick):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a width of {width} cannot be shared among {heads} heads")
        self.head_width, self.quick = width // heads, quick
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x, n=None, mask=None):
        """x [B, T, D] -> its first n tokens; None = all. mask: as in blip_lite.vit.attention."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)  # 3 x [B, T, D]
        seen = attention(q[:, :n], k, v, mask, head_width=self.head_width)
        x = x[:, :n] + self.proj(seen)
        h = self.fc1(self.norm2(x))
        return x + self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class TextEncoder(nn.Module):
    """Words [B, T, d_w], mask [B, T] -> the last hidden state of each text's last token, [B, d_w].

    That is the end token, which has seen all others. ValueError if T exceeds the positions.
    """

    def __init__(self, s):
        super().__init__()
        width, hidden = s["word_dim"], s["text_hidden"]
        self.word_embeddings = nn.Embedding(s["vocab_size"], width)
        self.pos_embed = nn.Parameter(torch.zeros(s["max_positions"], width))
        self.blocks = nn.ModuleList(Block(width, hidden, s["text_heads"], s["quick"])
                                    for _ in range(s["text_depth"]))
        self.norm = nn.LayerNorm(width)

    def forward(self, words, mask):
        length, most = words.shape[1], len(self.pos_embed)
        if length > most:
            raise ValueError(f"a text of {length} tokens is longer than CLIP's {most} positions; "
                             "shorten it")
        x = words + self.pos_embed[:length]
        causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=x.device).tril()
        for block in self.blocks:
            x = block(x, mask=causal)  # no token sees those after it
        return self.norm(x[torch.arange(len(x), device=x.device), mask.sum(1) - 1])


class Clip(nn.Module):
    """sizes: the dict that checkpoint.infer_sizes returns, and what read_config adds."""

    def __init__(self, sizes, tokenizer):
        super().__init__()
        s, S, D, d_w, E = sizes, *(sizes[name] for name in (
            "image_size", "image_width", "word_dim", "embed_dim"))
        self.image_size, self.word_dim, self.embed_dim = S, d_w, E
        self.max_positions = s["max_positions"]
        mean, std = s.get("mean", blip_lite.MEAN), s.get("std", blip_lite.STD)
        self.square = blip_lite.to_square if s.get("whole") else to_square
        self.normalization = mean, std
        self.preprocess = partial(blip_lite.to_pixels, image_size=S, mean=mean, std=std,
                                  square=self.square)
        self.tokenizer, self.fingerprint = tokenizer, ""
        self.visual_encoder = VisionTransformer(S, s["patch_size"], D, 0, s["stem"])
        self.visual_encoder.norm_pre = nn.LayerNorm(D)
        self.visual_encoder.norm = nn.LayerNorm(D)  # the epsilon of BLIP's is smaller
        self.visual_encoder.blocks.extend(
            Block(D, s["image_hidden"], s["image_heads"], s["quick"])
            for _ in range(s["image_depth"]))
        self.text_encoder = TextEncoder(s)
        self.vision_proj = nn.Linear(D, E, bias=False)
        self.text_proj = nn.Linear(d_w, E, bias=False)
        self.temp = nn.Parameter(torch.tensor(0.07))

    # the same as BLIP's, in shapes, types and code
    temperature, tokenize = blip_lite.Blip.temperature, blip_lite.Blip.tokenize
    encode_image, encode_text = blip_lite.Blip.encode_image, blip_lite.Blip.encode_text

    def embed_words(self, ids):
        """ids [B, T] -> words [B, T, d_w]: word embeddings, before position."""
        return self.text_encoder.word_embeddings(ids)

    def match(self, *_):
        raise ValueError(NO_MATCHING)
