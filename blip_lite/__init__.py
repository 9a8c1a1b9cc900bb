"""Frozen BLIP in six short files.

    import blip_lite
    blip = blip_lite.load("pocket")   # the small one in pocket/: no download, 64 px
    blip = blip_lite.load("model_base.pth", vocab="vocab.txt", image_size=224, device="cuda")

    v, F_v = blip.encode_image(blip.preprocess(pil)[None])           # [1, E] unit norm, [1, 1+N, D]
    ids, mask = blip.tokenize(["a red car", "a dog on the beach"])   # [2, T], [2, T]
    t = blip.encode_text(blip.embed_words(ids), mask)                # [2, E] unit norm
    v @ t.T                                                          # [1, 2] similarities

vit.py and bert.py are the encoders and blip.py joins them; preprocess.py and tokenizer.py prepare
their input; checkpoint.py reads weights, and `python -m plumbing.download` fetches official ones.
"""

from .blip import Blip
from .checkpoint import MOST_PIXELS, check_finite, infer_sizes, load, save
from .preprocess import MEAN, STD, normalize, to_pixels, to_rgb, to_square
from .tokenizer import Tokenizer
