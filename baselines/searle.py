"""SEARLE (Baldrati et al., ICCV 2023) on BLIP, in its two stages.

    python -m baselines.searle            # the pocket world; writes runs/searle/isa.pt

Inversion: for each of some images an optimizer seeks the word that BLIP takes for the image.
Distillation: a network phi learns to give such words at once, from the image's feature v.
"""

import hashlib
import json
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import isa
import query_side
from plumbing.command import run_command
from plumbing.files import check_folder, replacing
from plumbing.images import find_images
from plumbing.options import add_shared_options, check_options
from plumbing.precision import autocast, open_blip
from plumbing.training_data import encode_training_images
from pocket import world

from .text_regularization import TextRegularization, read_sentences

POCKET_IMAGES = "data/pocket/train"
INVERTED_TOGETHER = 250  # images; also how many words a cached file holds


def invert(blip, v, regularize, steps=150, lr=2e-2, precision="fp32", numbers=None, seed=0):
    """Optimization-based textual inversion, OTI (SEARLE, section 3): one word for each image.

    v [M, E], unit norm -> words [M, 1, d_w]. AdamW moves each word from N(0, 0.02^2) to lower
    (1 - cosine(text feature of "a photo of [word]", v)) + 0.5 * regularize; the result is the
    word's exponential moving average; paper/runs.md compares the settings with SEARLE's.

    Image i draws from its own generator, seeded by (seed, numbers[i]): batching changes no more
    than rounding.
    """
    numbers = range(len(v)) if numbers is None else numbers
    drawn = draw_for_images(numbers, steps, blip.word_dim, seed)
    words, random = (x.to(v.device) for x in drawn)  # [M, 1, d_w], [M, steps, 2]
    average = words.clone()
    optimizer = torch.optim.AdamW([words.requires_grad_()], lr=lr, weight_decay=0.01)
    for step in range(steps):
        with autocast(v.device, precision):
            t = blip.encode_text(*isa.compose_query(blip, words))  # [M, E]
            other = regularize(words, v, random[:, step])
        # a sum over images: the gradient of one does not depend on M
        loss = (1 - (t * v).sum(dim=1)).sum() + 0.5 * len(v) * other
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.lerp_(words.detach(), min(1.0, 3.5 / steps))  # SEARLE: 0.01 at 350 steps
    return average


def draw_for_images(numbers, steps, word_dim, seed):
    """First words [M, 1, d_w], and random numbers [M, steps, 2] for concepts and sentences."""
    words, random = [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(hash((seed, int(number))))
        words.append(0.02 * torch.randn(1, word_dim, generator=generator))
        random.append(torch.rand(steps, 2, generator=generator))
    return torch.stack(words), torch.stack(random)


def distillation_loss(words, predicted, temperature=0.25):
    """SEARLE's L_distil (section 3): words and predicted [B, d_w] -> scalar.

    Each of the 2B vectors has to find its partner among the 2B - 1 others.
    """
    both = F.normalize(torch.cat([words, predicted]).float(), dim=1)  # [2B, d_w]
    logits = (both @ both.T / temperature).fill_diagonal_(-math.inf)  # [2B, 2B]
    partner = torch.arange(len(both), device=both.device).roll(len(words))
    return F.cross_entropy(logits, partner)


def distill(phi, v, words, regularize, epochs=100, batch=256, lr=1e-4, weight=0.75,
            precision="fp32"):
    """Train phi in place to map v [M, E] to words [M, 1, d_w]: L_distil + weight * regularize.

    The defaults are SEARLE's (paper/runs.md). Returns each epoch's mean loss, leaves phi in eval
    mode. Raises ValueError if a loss is not finite.
    """
    optimizer = torch.optim.AdamW(phi.parameters(), lr=lr, weight_decay=0.01)
    phi.train()
    losses = []
    for _ in (bar := tqdm(range(epochs), "distilling", unit="epoch", disable=None)):
        parts = torch.randperm(len(v)).to(v.device).split(batch)
        parts = [rows for rows in parts if len(rows) == batch] or parts  # a rest has few negatives
        total = 0.0
        for rows in parts:
            with autocast(v.device, precision):
                U = phi(v[rows, :, None, None])  # [B, 1, d_w]
                other = regularize(U, v[rows])
            loss = distillation_loss(words[rows, 0], U[:, 0]) + weight * other
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(parts)
        if not math.isfinite(total):
            raise ValueError(f"the loss is {total}; lower --lr")
        losses.append(total)
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    phi.eval()
    return losses


def invert_in_parts(blip, v, numbers, regularize, folder, **options):
    """invert, some images at a time; each part is kept in `folder`."""
    words, size = [], INVERTED_TOGETHER
    for start in tqdm(range(0, len(v), size), "inverting", unit=f"x{size} img", disable=None):
        path, part = folder / f"{start:08d}.pt", slice(start, start + size)
        if not path.exists():
            found = invert(blip, v[part], regularize, numbers=numbers[part], **options).cpu()
            with replacing(path) as file:
                torch.save(found, file)
        try:
            words.append(torch.load(path, weights_only=True))
        except Exception:  # torch.load reports damaged files in many ways
            raise ValueError(f"{path}: is damaged; delete it, it is then computed again") from None
    return torch.cat(words).to(v.device)  # [M, 1, d_w]


def choose_images(settings, blip):
    """Draw --count of the images -> their numbers in the folder [M], their features v [M, E]."""
    if settings["images"] == POCKET_IMAGES:
        world.ensure(Path(POCKET_IMAGES).parent)
    images = find_images(settings["images"], settings["cache_dir"])
    features = encode_training_images(blip, images, settings)
    sound = np.setdiff1d(np.arange(len(images)), list(features.bad))
    rng = np.random.default_rng(settings["seed"])
    numbers = np.sort(rng.permutation(sound)[: settings["count"]])
    return numbers, torch.from_numpy(features.v[numbers]).float().to(settings["device"])


def searle(args):
    """Invert --count images, train phi on their words, write runs/NAME/isa.pt."""
    path, seed = Path("runs") / args.name / "isa.pt", args.seed
    if path.exists() and not args.overwrite:
        raise ValueError(f"{path.parent} already holds a run; replace it with --overwrite or "
                         "give another --name")
    check_folder(path.parent)
    by_concept = read_sentences(args.sentences)  # now: an error should not wait for the features
    blip, precision = open_blip(vars(args))
    settings = {**vars(args), "precision": precision, "encoder": "blip-v", "mapper": "phi",
                "tokens": 1, "prompt": "a photo of", "gallery": "blip", "query_size": None}
    print(" ".join(f"{k}={v}" for k, v in settings.items()))

    numbers, v = choose_images(settings, blip)
    regularize = TextRegularization(blip, by_concept, args.concepts, precision)
    # Everything that a word depends on
    key = json.dumps([blip.fingerprint, precision, seed, args.steps, args.concepts, by_concept,
                      numbers.tolist()])
    key = hashlib.sha256(key.encode() + v.cpu().numpy().tobytes()).hexdigest()[:16]
    words = invert_in_parts(blip, v, numbers, regularize, Path(args.cache_dir) / f"words-{key}",
                            steps=args.steps, precision=precision, seed=seed)

    torch.manual_seed(seed)
    model = query_side.build_query_model(settings, blip).to(args.device)
    losses = distill(model.mapper, v, words, regularize, args.epochs, lr=args.lr,
                     precision=precision)
    print(f"loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last")
    with replacing(path) as file:
        torch.save({"query_model": model.state_dict(), "settings": settings,
                    "blip": blip.fingerprint, "images": len(v)}, file)
    print(f"wrote {path}; now: python evaluate.py table --searle {path}")


def parse_args(argv=None):
    p = ArgumentParser("python -m baselines.searle", description=__doc__, allow_abbrev=False,
                       formatter_class=RawDescriptionHelpFormatter)
    add = add_shared_options(p, "--blip", "--clip", "--vocab", "--image-size", "--cache-dir",
                             "--device", "--precision", "--threads")
    add("--images", default=POCKET_IMAGES, help="folder of images and .tar shards; pixels only")
    add("--count", type=int, default=3000, help="images to invert; SEARLE: 100,000 of ImageNet")
    add("--sentences", default="pocket/sentences.json", help="JSON of {concept: [sentences]}")
    add("--concepts", type=int, default=3, help="of an image; more if the list is longer")
    add("--steps", type=int, default=150, help="of inversion; SEARLE: 350, for 2 %% more cosine")
    add("--epochs", type=int, default=100, help="of distillation, as SEARLE's")
    add("--lr", type=float, default=1e-3, help="of distillation; SEARLE: 1e-4, for more images")
    add("--seed", type=int, default=0, help="images, words, sentences, weights, order")
    add("--name", default="searle", help="the run's folder is runs/NAME")
    add("--overwrite", action="store_true", help="start again although runs/NAME holds a run")
    args = p.parse_args(argv)
    check_options(p, args, count=2, concepts=1, steps=1, epochs=1)
    if args.lr <= 0:
        p.error(f"--lr has to be positive, not {args.lr}")
    return args


if __name__ == "__main__":
    run_command("baselines.searle", searle, parse_args(), "interrupted; the same command inverts "
                "the images that are left, and distils from the start")
