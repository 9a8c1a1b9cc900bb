"""The query side as a whole: built from settings, saved, resumed and loaded.

A checkpoint is a dict: query_model (state dict), settings (train.py's options), blip (the
fingerprint of its BLIP), images, step; runs/NAME/last.pt also holds the optimizer.
"""

from functools import partial

import torch

import isa
from blip_lite import check_finite
from plumbing.files import replacing

from .encoders import build
from .mappers import MLP, Phi, TwoSidedModel

NETWORKS = {  # mapper -> what makes it of C, d_w and L; the first five are those of Tables 18-20
    "atl": isa.AdaptiveTokenLearner,
    "st": partial(isa.AdaptiveTokenLearner, self_attention=False, cross_attention=False),
    "atl-no-ca": partial(isa.AdaptiveTokenLearner, cross_attention=False),
    "atl-no-sa": partial(isa.AdaptiveTokenLearner, self_attention=False),
    "mlp": MLP,
    "phi": Phi,
}
MAPPERS = tuple(name for name in NETWORKS if name != "phi")  # SEARLE's has a training of its own
PUBLISHED = {  # the settings of SEARLE's networks, which are bare state dicts
    "encoder": "blip-v", "query_size": None, "mapper": "phi", "tokens": 1, "gallery": "blip",
    "prompt": "a photo of",
}
MAY_CHANGE = {  # settings that a resumed run may have otherwise
    "name", "images", "cache", "cache_dir", "workers", "threads", "resume", "overwrite", "device",
    "save_every", "blip", "clip", "vocab", "compile", "skip_bad_images",
}
OTHER_VERSION = ("was written by another version of this program; train again, with --overwrite "
                 "or another --name")


def build_query_model(settings, blip, pretrained=None):
    """A dict of train.py's options -> the encoder and mapper that it names, or ValueError."""
    encoder = build(settings["encoder"], pretrained, blip, settings["query_size"])
    network = NETWORKS[settings["mapper"]]
    mapper = network(encoder.out_channels, blip.word_dim, settings["tokens"])
    if settings["gallery"] == "query":
        return TwoSidedModel(encoder, mapper, blip)
    return isa.QueryModel(encoder, mapper)


def read_checkpoint(path):
    """isa.pt or last.pt -> dict. Only tensors and plain data are unpickled. Raises ValueError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        phi = checkpoint.get("Phi", checkpoint)  # as SEARLE's authors store it
        if phi.keys() == {f"layers.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")}:
            weights = {f"mapper.{name}": x for name, x in phi.items()}
            checkpoint = {"query_model": weights, "settings": PUBLISHED, "blip": None}
        if not {"query_model", "settings", "blip"} <= checkpoint.keys():
            raise ValueError
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; `python train.py` writes it") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; name the isa.pt in it") from None
    except PermissionError:
        raise ValueError(f"{path}: cannot be read; change its permissions, or name another "
                         "checkpoint") from None
    except Exception:  # torch.load reports damaged files in many ways
        raise ValueError(f"{path}: is damaged or was not written by train.py; train again or name "
                         "another checkpoint (BLIP's weights go to --blip)") from None
    check_finite(checkpoint["query_model"], f"{path}:", "train again, with a lower --lr")
    return checkpoint


def load_query_model(path, blip):
    """isa.pt -> the QueryModel, in eval mode, on BLIP's device, and its settings.

    Raises ValueError for a damaged file and for one trained against another BLIP.
    """
    checkpoint = read_checkpoint(path)
    published, weights = checkpoint["settings"] is PUBLISHED, checkpoint["query_model"]
    if published:
        sizes = weights["mapper.layers.0.weight"].shape[-1], len(weights["mapper.layers.6.weight"])
        if sizes != (blip.embed_dim, blip.word_dim):
            raise ValueError(f"{path}: SEARLE's network for features and words of {sizes[0]} and "
                             f"{sizes[1]} numbers, not {blip.embed_dim} and {blip.word_dim}; give "
                             "its CLIP with --clip (768 and 768: ViT-L/14)")
    elif checkpoint["blip"] != blip.fingerprint:
        raise ValueError(f"{path}: was trained against BLIP {checkpoint['blip']}, this one is "
                         f"{blip.fingerprint}; their word spaces differ: give the same --blip (or "
                         "--clip) and --image-size as in training")
    try:
        model = build_query_model(checkpoint["settings"], blip)
    except (KeyError, ValueError):
        raise ValueError(f"{path}: {OTHER_VERSION}") from None
    load_state(model, weights, path)
    if published:
        model.encoder.unit_norm = False
    return model.to(blip.temp.device).eval(), checkpoint["settings"]


def load_state(model, state, path):
    """Load a state dict of the checkpoint `path` into a model or an optimizer, or ValueError."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path}: {OTHER_VERSION}") from None


def save_run(run, step, settings, blip, images, query_model, optimizer):
    """Write last.pt and isa.pt into the folder `run`; images: how many it trains on.

    Raises ValueError for weights that are not finite, and keeps the older files.
    """
    weights = query_model.state_dict()
    if not all(x.isfinite().all() for x in weights.values()):
        raise ValueError(f"weights are not finite after step {step} and are not saved; "
                         "lower --lr and start again with --overwrite")
    state = {"query_model": weights, "settings": settings, "blip": blip.fingerprint,
             "images": images, "step": step}
    with replacing(run / "last.pt") as file:
        torch.save({**state, "optimizer": optimizer.state_dict()}, file)
    with replacing(run / "isa.pt") as file:
        torch.save(state, file)


def resume_run(run, settings, blip, images, query_model, optimizer):
    """Load last.pt of the folder `run` into the model and the optimizer -> the next step.

    Raises ValueError if other settings than MAY_CHANGE, the BLIP or the number of images differ.
    """
    path = run / "last.pt"
    checkpoint = read_checkpoint(path)
    was, fixed = checkpoint["settings"], sorted(settings.keys() - MAY_CHANGE)
    if not {"optimizer", "images", "step"} <= checkpoint.keys() or set(fixed) - was.keys():
        raise ValueError(f"{path}: {OTHER_VERSION}")
    same = "resume with the same settings, or give another --name"
    facts = [(was[name], settings[name], f"with --{name.replace('_', '-')} {{}}, not {{}}; {same}")
             for name in fixed]
    facts += [
        (checkpoint["blip"], blip.fingerprint, "against BLIP {}, not {}; give the same --blip"),
        (checkpoint["images"], images, "on {} images, not {}; give the same --images and --cache"),
    ]
    for before, now, how in facts:
        if before != now:
            raise ValueError(f"{path} was trained {how.format(before, now)}")
    load_state(query_model, checkpoint["query_model"], path)
    load_state(optimizer, checkpoint["optimizer"], path)
    return checkpoint["step"]
