"""Teach a light encoder to name what drawings show: the pocket world's ImageNet.

    python -m pocket.classify --out pocket/pocketnet.pth       # the shipped weights
    python -m pocket.classify --encoder efficientnet_b2 --query-size 96 --out b2.pth
    python train.py --encoder efficientnet_b2 --query-size 96 --pretrained b2.pth

Every step draws new scenes and garments of the pretrain set, which shares no spec with what ISA
trains on or is tested on. There are labels, but no captions and no triplets. A linear layer on the
mean of the feature map names each attribute; it is thrown away, as ImageNet's classifier is.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import query_side
from blip_lite import check_finite
from plumbing.command import run_command
from plumbing.files import check_output, replacing
from plumbing.options import add_shared_options, check_options
from plumbing.precision import autocast, keep_freed_memory, pick_precision

from .drawing import draw
from .specs import BACKGROUNDS, GARMENT, KINDS, MAKERS, PLACES, THING, Rng, Scene, sample

# Attribute -> its values. Of a place without a thing the kind is "none" and the rest is absent, as
# a garment's attributes are from a scene.
ATTRIBUTES = {"background": BACKGROUNDS, **GARMENT} | {
    f"{place} {name}": values for place in PLACES
    for name, values in {**THING, "kind": ("none", *KINDS)}.items() if name != "place"}
SIZES = [len(values) for values in ATTRIBUTES.values()]
ABSENT = -100  # the label that F.cross_entropy leaves out


def attributes(spec):
    """A scene or a garment -> {name of ATTRIBUTES: value}, those that it has."""
    named = dict(vars(spec))
    if isinstance(spec, Scene):
        named |= {f"{place} kind": "none" for place in PLACES}
        for thing in spec.things:
            named |= {f"{thing.place} {name}": value for name, value in vars(thing).items()}
    return {name: named[name] for name in ATTRIBUTES if name in named}


def labels(specs):
    """int64 [B, A]: the number of each attribute's value among its values, or ABSENT."""
    rows = [attributes(spec) for spec in specs]
    return torch.tensor([[list(values).index(row[name]) if name in row else ABSENT
                          for name, values in ATTRIBUTES.items()] for row in rows])


def draw_batch(encoder, rng, count, split):
    """-> pixels [count, 3, S, S] of scenes and garments in turn, labels [count, A]."""
    specs = [sample(rng, split, MAKERS[i % len(MAKERS)]) for i in range(count)]
    pixels = [query_side.preprocess(encoder, draw(spec)) for spec in specs]
    return torch.stack(pixels), labels(specs)


def scores(encoder, head, pixels, precision):
    """-> for each attribute its logits, float32 [B, number of values]."""
    with autocast("cpu", precision):
        logits = head(encoder(pixels).mean((2, 3)))
    return logits.float().split(SIZES, 1)


def cross_entropy(logits, truth):
    """The mean over all labels that are present. logits: as of `scores`; truth: [B, A]."""
    parts = [F.cross_entropy(x, y, reduction="sum") for x, y in zip(logits, truth.T, strict=True)]
    return sum(parts) / (truth != ABSENT).sum()


def train(encoder, head, args, precision):
    """-> the loss of each step."""
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], weight_decay=0.05)
    rng, losses = Rng(f"classify {args.seed}"), []
    for step in tqdm(range(args.steps), disable=None):
        for group in optimizer.param_groups:  # a tenth of the steps is warm-up
            fall = 0.5 * (1 + math.cos(math.pi * step / args.steps))
            group["lr"] = args.lr * min(1, 10 * (step + 1) / args.steps) * fall
        pixels, truth = draw_batch(encoder, rng, args.batch, "pretrain")
        loss = cross_entropy(scores(encoder.train(), head, pixels, precision), truth)
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} at step {step}; lower --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def validate(encoder, head, count, precision):
    """{attribute: percent of `count` drawings of the validation set that have it named right}."""
    rng, right = Rng("classify"), []
    for start in range(0, count, 250):
        pixels, truth = draw_batch(encoder, rng, min(250, count - start), "val")
        said = [x.argmax(1) for x in scores(encoder.eval(), head, pixels, precision)]
        hits = (torch.stack(said, 1) == truth).float()
        right.append(hits.where(truth != ABSENT, math.nan))
    return dict(zip(ATTRIBUTES, (100 * torch.cat(right).nanmean(0)).tolist(), strict=True))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m pocket.classify", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = add_shared_options(parser, "--precision", "--threads")
    names = [name for name in query_side.NAMES if name not in query_side.encoders.BLIPS]
    add("--encoder", choices=names, default="pocketnet", help="the light network")
    add("--query-size", type=int, help="side in pixels that it sees (default: its own)")
    add("--out", required=True, help="its weights in half precision, for train.py --pretrained")
    add("--steps", type=int, default=750, help="more name more attributes right")
    add("--batch", type=int, default=128, help="drawings a step")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    add("--seed", type=int, default=0, help="weights and drawings")
    add("--held-out", type=int, default=2000, help="drawings that the printed percentages rest on")
    args = parser.parse_args(argv)
    check_options(parser, args, steps=1, batch=2, held_out=1, query_size=1)
    if args.lr <= 0:
        parser.error(f"--lr has to be positive, not {args.lr}")
    return args


def main(args):
    check_output(args.out)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    precision = pick_precision("cpu") if args.precision == "auto" else args.precision
    encoder = query_side.build(args.encoder, image_size=args.query_size)
    head = nn.Linear(encoder.out_channels, sum(SIZES))
    losses = train(encoder, head, args, precision)
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; named right, percent:")
    for name, percent in validate(encoder, head, args.held_out, precision).items():
        print(f"  {name:14} {percent:5.1f}")
    state = {k: x.half() if x.is_floating_point() else x for k, x in encoder.state_dict().items()}
    check_finite(state, f"what {args.encoder} learnt", "lower --lr")
    with replacing(args.out) as file:
        torch.save(state, file)
    print(f"wrote {args.out}; now: python train.py --encoder {args.encoder} "
          f"--query-size {encoder.image_size} --pretrained {args.out}")


if __name__ == "__main__":
    run_command("pocket.classify", main, parse_args())
