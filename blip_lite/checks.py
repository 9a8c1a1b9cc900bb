"""What every command line asks before it starts, so that a slip of the pen costs a second and not the work of a night."""

import math
import os
from pathlib import Path, PurePath

import torch

MOST_PIXELS = 1024  # a side of an image; BLIP was made for 224 and 384
MOST = {"seed": 2**32 - 1, "threads": 1024, "workers": 256}  # beyond, PyTorch overflows, crashes, or starts that many processes


def check_options(parser, args, **least):
    """Usage errors for what argparse lets pass: numbers below `least` (option=number) or beyond MOST, NaN and infinity, a device
    other than cpu and cuda, a run's name that leads out of runs/."""
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"{option} has to be a finite number, not {value}")
        if value is not None and name in least and value < least[name]:
            parser.error(f"{option} has to be at least {least[name]}, not {value}")
        if name in MOST and value > MOST[name]:
            parser.error(f"{option} has to be at most {MOST[name]}, not {value}")
    try:
        known = torch.device(getattr(args, "device", "cpu")).type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    if not known:
        parser.error(f"--device has to be cpu or cuda, not {args.device}")
    run = PurePath(getattr(args, "name", None) or ".")
    if hasattr(args, "name") and (run.is_absolute() or ".." in run.parts or not run.parts):
        parser.error(f"--name has to be that of a folder below runs/, not {args.name!r}")


def check_folder(folder):
    """ValueError where `folder`, which may not be there yet, could not be made or written to."""
    for place in (Path(folder), *Path(folder).parents):
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                raise ValueError(f"{place}: cannot be written to; change its permissions, or name another place")
            return
        if os.path.lexists(place):
            raise ValueError(f"{place}: is a file, where a folder is needed; move it, or name another place")


def check_output(path):
    """ValueError where the file `path` could not be written; its folder may have to be made."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a file to write")
    check_folder(Path(path).parent)


def check_finite(state, path, remedy):
    """ValueError that names the tensors of a state dict which hold NaN or infinity."""
    odd = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if odd:
        raise ValueError(f"{path} holds NaN or infinity in {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}; {remedy}")


def check_lengths(blip, prompt, tokens, texts):
    """ValueError for a composed query, [CLS] prompt u1 .. uL text [SEP], that is longer than BLIP's positions.

    tokens: L; texts: pairs of what a text is called and the text (isa.continuation of a modifier), which may be empty.
    """
    places = blip.text_encoder.embeddings.position_embeddings.num_embeddings
    room = places - 2 - len(blip.tokenizer.tokenize(prompt)) - tokens
    for what, text in texts:
        excess = len(blip.tokenizer.tokenize(text)) - room
        if excess > 0:
            found = f"makes a sentence of {places + excess} tokens"
            raise ValueError(f"{what}: {found}, longer than BLIP's {places} positions; shorten it")
