"""The attention maps that figures and searches draw over an image."""

import warnings

import numpy as np
import torch
from PIL import Image

from plumbing.pictures import overlay


def test_overlay_is_red_where_the_token_looks():
    weights = torch.zeros(8, 8)
    weights[1, 6] = 0.3
    sheet = np.asarray(overlay(Image.new("RGB", (64, 64), "white"), weights), int)
    redness = sheet[..., 0] - sheet[..., 1]
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert y in range(8, 16) and x in range(48, 56) and redness[40:].max() == 0
    with warnings.catch_warnings(action="error"):  # a token that looks nowhere: no division by 0
        assert np.asarray(overlay(Image.new("RGB", (64, 64)), torch.zeros(8, 8))).std() == 0
