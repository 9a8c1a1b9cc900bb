"""The simple baselines: query features q [B, E] of unit norm, without training.

blip is the frozen BLIP, v [B, E] its features of the reference images, modifiers a list of B texts.
"""

import torch.nn.functional as F


def image_only(blip, v, modifiers):
    """q = v: retrieves what looks like the reference image."""
    return v


def text_only(blip, v, modifiers):
    """q = t: retrieves what the modifier says; v may be None."""
    ids, mask = blip.tokenize(list(modifiers))  # [B, T], [B, T]
    return blip.encode_text(blip.embed_words(ids), mask)


def image_plus_text(blip, v, modifiers, image_weight=1.0):
    """q = normalize(w v + t). The paper's sum has w = 1; w = 0.5 is a stronger baseline."""
    return F.normalize(image_weight * v + text_only(blip, v, modifiers), dim=-1)
