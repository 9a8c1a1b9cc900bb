"""Made-up weights and inputs of real shapes, for tests and speed.py: nothing is downloaded."""

import re

import pytest
import torch


def hugging_face(image_size, depth, vocab_size):
    """transformers' BLIP on the meta device, with Salesforce's settings, not all its defaults."""
    pytest.importorskip("transformers")
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipTextConfig, BlipVisionConfig

    text = BlipTextConfig(vocab_size=vocab_size, num_attention_heads=12, num_hidden_layers=depth,
                          layer_norm_eps=1e-12, hidden_act="gelu")
    vision = BlipVisionConfig(image_size=image_size, patch_size=16, num_hidden_layers=depth,
                              layer_norm_eps=1e-6, hidden_act="gelu")
    both = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    with torch.device("meta"):
        return BlipForImageTextRetrieval(BlipConfig(**both, image_text_hidden_size=256)).eval()


def weights(shapes, seed=0):
    """{name: shape} -> a state dict that no error hides in.

    Biases are not 0, LayerNorms not 1, and matrices large enough for peaked softmaxes. All matrices
    are windows into one buffer, so a model of the real size is small in memory and on disk.
    """
    random = torch.Generator().manual_seed(seed)
    largest = max(shape.numel() for shape in shapes.values())
    buffer = torch.randn(largest + 65536, generator=random) * 0.05
    state = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if len(shape) > 1:
            state[name] = buffer[997 * i % 65536 :][: shape.numel()].view(shape)
        else:
            norm = re.search(r"norm\w*\.weight$", name, re.IGNORECASE)
            state[name] = (1 if norm else 0) + 0.2 * torch.randn(shape, generator=random)
    return state


def filled(model, seed=0):
    """A model on the meta device -> the same with made-up weights."""
    state = weights({name: tensor.shape for name, tensor in model.state_dict().items()}, seed)
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    for module in model.modules():  # constants that are in no state dict
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return model


def inputs(blip, batch=3, seed=1):
    """-> pixels, ids, and a mask with padding in it, of up to four images and texts."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, blip.image_size, blip.image_size, generator=random)
    ids = torch.randint(4, blip.tokenizer.vocab_size - 2, (batch, 9), generator=random)
    mask = torch.arange(9)[None] < torch.tensor([9, 5, 7, 2])[:batch, None]
    ids[:, 0] = blip.tokenizer.cls_id
    return pixels, ids.where(mask, blip.tokenizer.pad_id), mask.long()
