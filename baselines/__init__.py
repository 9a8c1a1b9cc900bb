"""What the paper compares ISA with, on the same frozen BLIP.

    simple.py                 image only, text only, image + text: no training; read it first
    text_regularization.py    "LLM TR", a loss that Table 8 puts in LAR's place
    searle.py                 SEARLE, a command of its own, about ten minutes

    python train.py --encoder blip-v --mapper mlp --tokens 1 --loss gcd --name pic2word  # Pic2Word
    python -m baselines.searle
    python evaluate.py table --pic2word runs/pic2word/isa.pt --searle runs/searle/isa.pt

Like the sums, Pic2Word and SEARLE need BLIP's own image feature v of the query, so nothing runs on
a phone. Both were made for CLIP; like the paper, we put them on BLIP. Numbers called theirs are the
defaults of their published code (google-research/composed_image_retrieval, miccunifi/SEARLE).
"""

from .simple import image_only, image_plus_text, text_only
from .text_regularization import TextRegularization, read_sentences
