"""The simple baselines: query features q [B, E] of unit norm."""

import torch.nn.functional as F


def image_only(blip, v, modifiers):
    """v [B, E] as it is; the modifiers are not read."""
    return v


def text_only(blip, v, modifiers):
    """B modifiers -> BLIP's text features [B, E]; the images are not looked at."""
    ids, mask = blip.tokenize(list(modifiers))
    return blip.encode_text(blip.embed_words(ids), mask)


def image_plus_text(blip, v, modifiers, image_weight=1.0):
    """normalize(w v + t) [B, E]: the paper's sum for w = 1; less weight on the image (0.5) makes a stronger baseline."""
    return F.normalize(image_weight * v + text_only(blip, v, modifiers), dim=-1)
