"""BLIP (Li et al., ICML 2022) as ISA uses it: two encoders into one space, and a matching head.

B images or texts, E width of the joint space (256), D image width, d_w word width, T tokens.
`load` returns it frozen; pocket/pretrain.py trains the same class from scratch.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .bert import TextEncoder
from .preprocess import MEAN, STD, to_pixels, to_square
from .vit import VisionTransformer


class Blip(nn.Module):
    """sizes: the dict that checkpoint.infer_sizes returns; stem may be left out."""

    def __init__(self, sizes, tokenizer):
        super().__init__()
        s, D, d_w, E = sizes, sizes["image_width"], sizes["word_dim"], sizes["embed_dim"]
        self.image_size, self.word_dim, self.embed_dim = s["image_size"], d_w, E
        self.max_positions = s["max_positions"]
        # A PIL image of any mode and size -> [3, S, S]. Workers get it without the weights
        self.square, self.normalization = to_square, (MEAN, STD)
        self.preprocess = partial(to_pixels, image_size=s["image_size"], mean=MEAN, std=STD)
        self.tokenizer = tokenizer
        self.fingerprint = ""  # set by checkpoint.load: which weights, at which image size
        self.visual_encoder = VisionTransformer(s["image_size"], s["patch_size"], D,
                                                s["image_depth"], s.get("stem", False))
        self.text_encoder = TextEncoder(s["vocab_size"], s["max_positions"], d_w,
                                        s["text_depth"], D)
        self.vision_proj = nn.Linear(D, E)
        self.text_proj = nn.Linear(d_w, E)
        self.itm_head = nn.Linear(d_w, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    @property
    def temperature(self):
        """tau of the contrastive loss, a float, from BLIP's pre-training."""
        return self.temp.item()

    def encode_image(self, pixels, cls_only=False):
        """pixels [B, 3, S, S] -> v [B, E] unit norm, F_v [B, 1+N, D]: final LayerNorm, CLS first.

        cls_only: F_v is [B, 1, D], for 7 % less work at 12 layers; galleries need v alone.
        """
        F_v = self.visual_encoder(pixels, cls_only)
        return F.normalize(self.vision_proj(F_v[:, 0]).float(), dim=-1), F_v

    def tokenize(self, texts):
        """A list of B strings -> ids, mask [B, T] int64: [CLS] ... [SEP], padded to the longest."""
        ids, mask = self.tokenizer(texts)
        return ids.to(self.temp.device), mask.to(self.temp.device)

    def embed_words(self, ids):
        """ids [B, T] -> words [B, T, d_w]: word embeddings, before position and LayerNorm."""
        return self.text_encoder.embeddings.word_embeddings(ids)

    def encode_text(self, words, mask):
        """words [B, T, d_w], mask [B, T] -> t [B, E] unit norm. Text mode: no cross-attention."""
        return F.normalize(self.text_proj(self.text_encoder(words, mask)).float(), dim=-1)

    def match(self, words, mask, F_v, rows=None):
        """words [B, T, d_w], mask [B, T], F_v [M, 1+N, D] -> logits [B, 2], index 1 = they match.

        Text i looks at image rows[i] (int64 [B]); by default at its own (M = B). Position 0 becomes
        [ENC], which replaces [CLS] in matching mode.
        """
        enc = self.embed_words(torch.tensor(self.tokenizer.enc_id, device=words.device))  # [d_w]
        enc = enc.to(words.dtype).expand(len(words), 1, -1)  # [B, 1, d_w]
        words = torch.cat([enc, words[:, 1:]], dim=1)
        return self.itm_head(self.text_encoder(words, mask, F_v, rows)).float()
