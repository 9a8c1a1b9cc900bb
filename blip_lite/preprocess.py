"""From a photo to BLIP's input: upright, RGB, square, bicubic, with BLIP's mean and deviation."""

import numpy as np
import torch
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)  # BLIP's image statistics (CLIP's), RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
UPRIGHT = {  # EXIF orientation -> the operation that turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(pil):
    """A PIL image of any mode -> the same, upright (EXIF orientation applied) and in RGB.

    Transparency is dropped, not blended, as in the official code: what is black on a transparent
    ground becomes black on what the file holds there, often black. Grey of 16 bits, or of floats
    up to 1, is scaled to 8 bits.
    """
    pil.load()  # a truncated file has to fail here: reading EXIF would hide it
    try:
        turn = UPRIGHT.get(pil.getexif().get(0x0112))
    except Exception:  # PIL reports damaged EXIF in many ways; the pixels may be sound
        turn = None
    if pil.mode[0] in "IF":  # 16-bit "I;16", with some versions of PIL "I"; floats are "F"
        grey = np.nan_to_num(np.asarray(pil), posinf=0).astype(np.float64)
        if pil.mode not in "IF" or grey.max() > 255:
            grey = grey.clip(0, 65535) // 256
        elif pil.mode == "F" and grey.max() <= 1:
            grey = grey * 255
        pil = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if turn is not None:
        pil = pil.transpose(turn)
        pil.info = {}  # its EXIF as well: whoever comes next would turn it again
    if pil.mode == "RGB":
        return pil
    if "transparency" in pil.info:  # PIL would warn, and fail if it names no colour of the palette
        pil = pil.copy()
        del pil.info["transparency"]
    if pil.mode == "La":  # PIL converts it to LA only
        pil = pil.convert("LA")
    return pil.convert("RGB")


def to_square(pil, image_size):
    """A PIL image of any mode and size -> uint8 [3, S, S], S = image_size.

    Upright, RGB, bicubic, squeezed to a square, as in BLIP's own evaluation.
    """
    pil = to_rgb(pil)
    if pil.size != (image_size, image_size):
        pil = pil.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pil)).permute(2, 0, 1).contiguous()


def normalize(pixels, mean, std):
    """uint8 [..., 3, S, S] -> float32 of the same shape: (x / 255 - mean) / std."""
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)


def to_pixels(pil, image_size, mean, std, square=to_square):
    """A PIL image of any mode and size -> float32 [3, S, S]: made `square`, then normalized."""
    return normalize(square(pil, image_size), mean, std)
