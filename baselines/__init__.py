"""What the paper compares ISA with: the simple sums, Pic2Word, SEARLE, and LLM text regularization."""

from .simple import image_only, image_plus_text, text_only
from .text_regularization import (
    TextRegularization,
    assign_concepts,
    encode_texts,
    find_concept,
    read_sentences,
    with_article,
)
