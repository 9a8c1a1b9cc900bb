"""Options that several commands share, and what each command checks before it starts work."""

import math
import os
import re
import sys
from pathlib import PurePath

import torch

from clip_lite import NO_MATCHING

SHARED = {
    "--blip": dict(default="pocket", help='"pocket", a Salesforce .pth, or Hugging Face\'s files'),
    "--clip": dict(help='a CLIP in place of BLIP: "pocket", OpenAI\'s .pt, open_clip\'s or Hugging '
                        "Face's files"),
    "--vocab": dict(help="BERT's vocab.txt or CLIP's merges, if not beside the checkpoint"),
    "--image-size": dict(type=int, help="pixels a side that BLIP sees; default: the checkpoint's"),
    "--cache-dir": dict(default="cache", help="folder for stored features"),
    "--device": dict(default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"),
    "--precision": dict(choices=("auto", "bf16", "fp32"), default="auto",
                        help="auto: bf16 where the processor or GPU supports it"),
    "--workers": dict(type=int, default=min((os.cpu_count() or 1) // 4, 8), help="processes that "
                      "decode images for the main one; default: a quarter of the cores, up to 8"),
    "--threads": dict(type=int, default=0, help="CPU threads, 0 = all; 1 where runs share a CPU"),
}
RERANK = {  # of evaluate.py and search.py
    "--rerank": dict(type=int, metavar="K", help="let BLIP's matching head read the sentence "
                     "against the K best images and order these anew (not in the paper)"),
    "--rerank-weight": dict(type=float, default=0.05, metavar="W", help="score = similarity + W x "
                            "matching probability"),
}
LEAST = {"seed": 0, "threads": 0, "workers": 0}
# PyTorch overflows or crashes above these, and RandAugment has no such strength
MOST = {"seed": 2**32 - 1, "threads": 1024, "workers": 256, "randaugment": 30, "port": 65535}


def add_shared_options(parser, *names):
    """Add these options, by default all of SHARED, to a parser or a group -> its add_argument."""
    for name in names or SHARED:
        parser.add_argument(name, **(SHARED | RERANK)[name])
    return parser.add_argument


def check_options(parser, args, most=MOST, **least):
    """Usage errors for what argparse accepts but no command can use. least: option=number."""
    least = LEAST | least
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"{option} has to be a finite number, not {value}")
        if value is not None and name in least and value < least[name]:
            parser.error(f"{option} has to be at least {least[name]}, not {value}")
        if value is not None and name in most and value > most[name]:
            parser.error(f"{option} has to be at most {most[name]}, not {value}")
    if getattr(args, "clip", None) and hasattr(args, "blip"):
        if args.blip not in (None, "pocket"):
            parser.error(f"give --blip {args.blip} or --clip {args.clip}, not both")
        if "lar" in getattr(args, "loss", "").split("+"):
            parser.error(f"--loss {args.loss} is not possible: {NO_MATCHING}")
    device = getattr(args, "device", "cpu")
    if device == "mps" or (sys.platform == "darwin" and device != "cpu"):
        parser.error(f"--device {device} is not supported; a Mac computes on its CPU (--device "
                     "cpu), where two cores train on the pocket world in about ten minutes")
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", device):
        parser.error(f"--device has to be cpu or cuda, not {device}")
    run = PurePath(getattr(args, "name", "run"))
    if run.is_absolute() or ".." in run.parts or not run.parts:
        parser.error(f"--name has to be a folder below runs/, not {args.name!r}")


def check_lengths(blip, prompt, tokens, texts):
    """ValueError if a query, [CLS] prompt u1 .. uL text [SEP], has more tokens than BLIP positions.

    tokens: L. texts: pairs (what to call the text, the text as isa.continuation returns it).
    """
    places = blip.max_positions
    room = places - 2 - len(blip.tokenizer.tokenize(prompt)) - tokens
    for what, text in texts:
        excess = len(blip.tokenizer.tokenize(text)) - room
        if excess > 0:
            raise ValueError(f"{what}: makes a sentence of {places + excess} tokens, longer than "
                             f"the {places} positions of {type(blip).__name__.upper()}; shorten it")
