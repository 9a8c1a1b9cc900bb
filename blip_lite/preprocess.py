"""From a photo to BLIP's input: upright, RGB, a square of bicubic pixels, BLIP's mean and standard deviation."""

import numpy as np
import torch
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)  # BLIP's image statistics (CLIP's), RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(pil):
    """A PIL image of any mode -> the same image upright (its EXIF orientation applied) and in RGB.

    Transparency is dropped, not blended, as the official code's convert("RGB") does. 16-bit grey is scaled to 8 bits,
    where convert("RGB") of some versions of PIL clips it to white.
    """
    pil.load()  # a truncated file has to fail here: the EXIF reader would swallow it
    try:
        turn = UPRIGHT.get(pil.getexif().get(0x0112))
    except Exception:  # a damaged EXIF block, which PIL reports in many ways, says nothing about the pixels
        turn = None
    if pil.mode.startswith("I"):  # "I;16", and "I", in which some versions of PIL open a 16-bit file
        grey = np.asarray(pil)
        if pil.mode != "I" or grey.max() > 255:
            grey = grey.clip(0, 65535) >> 8
        pil = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if turn is not None:
        pil = pil.transpose(turn)
    if pil.mode == "RGB":
        return pil
    if "transparency" in pil.info:  # of which PIL warns; through alpha it fails where a damaged file names no colour
        pil = pil.copy()
        del pil.info["transparency"]
    if pil.mode == "La":  # PIL wants it to go through alpha
        pil = pil.convert("LA")
    return pil.convert("RGB")


def to_pixels(pil, image_size, mean, std):
    """A PIL image of any mode and size -> float32 [3, S, S]: upright, RGB, bicubic S x S, (x / 255 - mean) / std.

    image_size: S. mean, std: three numbers each, for values in 0..1. The aspect ratio is not kept, as in BLIP's own
    evaluation.
    """
    pil = to_rgb(pil)
    if pil.size != (image_size, image_size):
        pil = pil.resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(pil).transpose(2, 0, 1).astype(np.float32, order="C"))  # [3, S, S]
    return pixels.div_(255).sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))
