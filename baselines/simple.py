"""The simple baselines: query features q [B, E] of unit norm, without training.

blip is the frozen BLIP, v [B, E] its features of the reference images, modifiers a list of B texts.
slerp and product are not in the paper.
"""

import torch
import torch.nn.functional as F


def image_only(blip, v, modifiers):
    """q = v: retrieves what looks like the reference image."""
    return v


def text_only(blip, v, modifiers):
    """q = t: retrieves what the modifier says; v may be None."""
    return blip.encode_text(*text_words(blip, modifiers))


def text_words(blip, texts):
    """B texts -> words [B, T, d_w], mask [B, T]: sentences of words alone."""
    ids, mask = blip.tokenize(list(texts))
    return blip.embed_words(ids), mask


def image_plus_text(blip, v, modifiers, image_weight=1.0):
    """q = normalize(w v + t). The paper's sum has w = 1; w = 0.5 is a stronger baseline."""
    return F.normalize(image_weight * v + text_only(blip, v, modifiers), dim=-1)


def slerp(blip, v, modifiers, image_share=0.5):
    """q on the great circle from t to v, after `image_share` of the angle (arXiv 2405.00571).

    Weighted sums are on the same arc; here the share of the angle is the same for every query.
    """
    t = text_only(blip, v, modifiers)
    angle = (v * t).sum(dim=1, keepdim=True).clamp(-0.9999, 0.9999).acos()  # 0 has no arc
    return F.normalize((image_share * angle).sin() * v + ((1 - image_share) * angle).sin() * t,
                       dim=-1)


def product(blip, v, modifiers):
    """q [B, 2, E], v and t: an image g scores (1 + v g)(1 + t g), which no single vector does.

    1 is added because a cosine may be negative: two wrong ones must not make a right one.
    """
    return torch.stack([v, text_only(blip, v, modifiers)], dim=1)
