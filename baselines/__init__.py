"""What the paper compares ISA with, on the same frozen BLIP.

Read simple.py first. SEARLE takes about ten minutes.

    python train.py --encoder blip-v --mapper mlp --tokens 1 --loss gcd --name pic2word  # Pic2Word
    python -m baselines.searle
    python evaluate.py table --pic2word runs/pic2word/isa.pt --searle runs/searle/isa.pt

All need BLIP's v of the query image, so nothing runs on a phone. Numbers called theirs are the
defaults of their code (google-research/composed_image_retrieval, miccunifi/SEARLE).
"""

from .simple import image_only, image_plus_text, product, slerp, text_only, text_words
from .text_regularization import TextRegularization, read_sentences
