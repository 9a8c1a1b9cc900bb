"""Frozen CLIP as a gallery, with the interface of blip_lite but for `match`.

    import clip_lite
    clip = clip_lite.load("pocket")   # the small one in pocket/
    clip = clip_lite.load("ViT-L-14.pt", vocab="bpe_simple_vocab_16e6.txt.gz", device="cuda")

clip.py has both encoders and cuts the square that they see; tokenizer.py reads text; checkpoint.py
reads the weights of OpenAI, open_clip and Hugging Face.
"""

from blip_lite import save

from .checkpoint import load
from .clip import NO_MATCHING, Clip
from .tokenizer import Tokenizer
