"""The query side as a whole: built from settings, saved, resumed, loaded."""

import torch

import isa
import query_side
from blip_lite.checkpoint import check_finite
from plumbing.files import replacing

MAY_CHANGE = {"name", "images", "cache", "cache_dir", "workers", "threads", "resume", "overwrite", "device", "save_every", "blip",
              "vocab", "compile"}  # fmt: skip


OTHER_VERSION = "was written by another version of this program; train again, with --overwrite or another --name"


MAPPERS = ("atl", "st", "atl-no-ca", "atl-no-sa", "mlp")


def build_query_model(settings, blip, pretrained=None):
    """The light encoder and the mapper that the settings (a dict of the options) describe."""
    encoder = query_side.build(settings["encoder"], pretrained, blip, settings["query_size"])
    if settings["mapper"] in MAPPERS[:4]:
        parts = {"self_attention": settings["mapper"] in ("atl", "atl-no-ca"),
                 "cross_attention": settings["mapper"] in ("atl", "atl-no-sa")}  # fmt: skip
        mapper = isa.AdaptiveTokenLearner(encoder.out_channels, blip.word_dim, settings["tokens"], **parts)
    else:
        mapper = {"mlp": query_side.MLP, "phi": query_side.Phi}[settings["mapper"]](encoder.out_channels, blip.word_dim)
    if settings["gallery"] == "query":
        return query_side.TwoSidedModel(encoder, mapper, blip)
    return isa.QueryModel(encoder, mapper)


def read_checkpoint(path):
    """isa.pt or last.pt -> dict; tensors and plain data only, nothing is executed. Raises ValueError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not {"query_model", "settings", "blip"} <= checkpoint.keys():
            raise ValueError
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; `python train.py` writes it") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; name the isa.pt in it") from None
    except PermissionError:
        raise ValueError(f"{path}: may not be read; change its permissions, or name another checkpoint") from None
    except Exception:  # torch.load reports damaged files in many ways
        what = "is damaged or was not written by train.py"
        raise ValueError(f"{path}: {what}; train again or name another checkpoint (BLIP's weights go to --blip)") from None
    check_finite(checkpoint["query_model"], f"{path}:", "train again, with a lower --lr")
    return checkpoint


def fill(model, state, path):
    """Load a state dict of the checkpoint `path` into a model or an optimizer. Raises ValueError where it is another one's."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path}: {OTHER_VERSION}") from None


def load_query_model(path, blip):
    """runs/NAME/isa.pt -> the QueryModel, in eval mode, on BLIP's device, and its settings.

    Raises ValueError for a file that is no such checkpoint and for one that was trained against another BLIP.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint["blip"] != blip.fingerprint:
        raise ValueError(
            f"{path}: was trained against BLIP {checkpoint['blip']}, this one is {blip.fingerprint}; their word spaces differ: "
            "give the same --blip and --image-size as in training"
        )
    try:
        model = build_query_model(checkpoint["settings"], blip)
    except (KeyError, ValueError):
        raise ValueError(f"{path}: {OTHER_VERSION}") from None
    fill(model, checkpoint["query_model"], path)
    return model.to(blip.temp.device).eval(), checkpoint["settings"]


def save(run, step, settings, fingerprint, images, query_model, optimizer):
    """Write runs/NAME/last.pt and isa.pt. Raises ValueError for weights that are not finite: the older files then stay."""
    weights = query_model.state_dict()
    if not all(x.isfinite().all() for x in weights.values()):
        raise ValueError(f"weights are not finite after step {step} and are not saved; lower --lr and start anew with --overwrite")
    state = {"query_model": weights, "settings": settings, "blip": fingerprint, "images": images, "step": step}
    with replacing(run / "last.pt") as file:
        torch.save({**state, "optimizer": optimizer.state_dict()}, file)
    with replacing(run / "isa.pt") as file:
        torch.save(state, file)


def resume(run, settings, fingerprint, images, query_model, optimizer):
    """Load runs/NAME/last.pt into the model and the optimizer -> the next step. Raises ValueError where settings differ."""
    checkpoint = read_checkpoint(run / "last.pt")
    if not {"optimizer", "images", "step"} <= checkpoint.keys() or (settings.keys() - MAY_CHANGE) - checkpoint["settings"].keys():
        raise ValueError(f"{run}/last.pt: {OTHER_VERSION}")
    for name in sorted(settings.keys() - MAY_CHANGE):  # of several the same one each time
        if checkpoint["settings"].get(name) != settings[name]:
            raise ValueError(
                f"{run}/last.pt was trained with --{name.replace('_', '-')} {checkpoint['settings'].get(name)}, not "
                f"{settings[name]}; resume with the same settings, or give another --name"
            )
    if checkpoint["blip"] != fingerprint:
        raise ValueError(f"{run}/last.pt was trained against BLIP {checkpoint['blip']}, not {fingerprint}; give the same --blip")
    if checkpoint["images"] != images:
        raise ValueError(f"{run}/last.pt was trained on {checkpoint['images']} images, not {images}; give the same --images")
    fill(query_model, checkpoint["query_model"], run / "last.pt")
    fill(optimizer, checkpoint["optimizer"], run / "last.pt")
    return checkpoint["step"]


def step_of(path):
    """The step of a checkpoint; None where there is none or it is damaged."""
    try:
        return read_checkpoint(path).get("step")
    except ValueError:
        return None
