"""What the paper compares ISA with (section 4): the three simple baselines, Pic2Word and SEARLE; and "LLM TR", a loss of Table 8.

    python train.py --encoder blip-v --mapper mlp --tokens 1 --loss gcd --name pic2word         # Pic2Word
    python baselines.py searle                                                                  # SEARLE, about 10 minutes
    python evaluate.py table --pic2word runs/pic2word/isa.pt --searle runs/searle/isa.pt

All of them query with the frozen BLIP's own image feature v, so they are symmetric: nothing runs on a phone. As the paper does, we
put Pic2Word (Saito et al., CVPR 2023) and SEARLE (Baldrati et al., ICCV 2023), which were made for CLIP, on BLIP. Figures that
are said to be SEARLE's or Pic2Word's are the defaults of the code that their authors published (miccunifi/SEARLE,
google-research/composed_image_retrieval).

    B, M images    E BLIP's joint embedding    d_w BLIP's word width    L tokens    C concepts    k of them for an image
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import blip_lite
import isa
import query_side
from baselines.text_regularization import TextRegularization, read_sentences
from plumbing.command import run_command
from plumbing.features import image_features
from plumbing.files import check_folder, replacing
from plumbing.images import find_images
from plumbing.options import check_options
from plumbing.precision import autocast, keep_freed_memory, pick_precision, round_frozen_weights
from pocket import world
from query_side.mappers import Phi

PROMPT = "a photo of"


POCKET_IMAGES = "data/pocket/train"


CHUNK = 250  # images that are inverted together and then stored


def invert(blip, v, regularize, steps=150, lr=2e-2, weight=0.5, weight_decay=0.01, precision="fp32", numbers=None, seed=0):
    """Optimization-based textual inversion, OTI (SEARLE, section 3): for each image the word that says it best.

    v [M, E], unit norm -> words [M, 1, d_w]. Each image has a free word, at first drawn from N(0, 0.02^2), that AdamW moves so
    that (1 - cosine(text feature of "a photo of [word]", v)) + weight * regularize becomes small; what comes back is the
    exponential moving average of the word over the steps. SEARLE: 350 steps, lr 2e-2, weight 0.5, weight decay 0.01, decay 0.99
    of the average, and one of 24 templates at each step; here ISA's prompt alone, since pocket BLIP has seen no other. With fewer
    steps the average spans the same share of them: its decay is 1 - 3.5 / steps. In the pocket world (128 images, sought among 512)
    50, 100, 150, 200 and 350 steps give a cosine of 0.88, 0.91, 0.925, 0.93 and 0.94; from 150 on every word finds its own image.

    Images do not touch each other: image i draws from a generator of its own, seeded by (seed, numbers[i]); numbers defaults to
    0 .. M-1. So how they are batched changes no more than rounding.
    """
    start, random = draw_for_images(range(len(v)) if numbers is None else numbers, steps, blip.word_dim, seed)
    words = start.to(v.device).requires_grad_()  # [M, 1, d_w]
    average, random = words.detach().clone(), random.to(v.device)
    optimizer = torch.optim.AdamW([words], lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        with autocast(v.device, precision):
            t = blip.encode_text(*isa.compose_query(blip, words, prompt=PROMPT))  # [M, E]
            other = regularize(words, v, random[:, step])
        loss = (1 - (t * v).sum(dim=1)).sum() + weight * len(v) * other  # a sum: an image's gradient does not depend on M
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.lerp_(words.detach(), min(1.0, 3.5 / steps))
    return average


def draw_for_images(numbers, steps, word_dim, seed):
    """For each image its first word and its choices of concept and sentence -> [M, 1, d_w], [M, steps, 2]."""
    words, random = [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(hash((seed, int(number))))
        words.append(0.02 * torch.randn(1, word_dim, generator=generator))
        random.append(torch.rand(steps, 2, generator=generator))
    return torch.stack(words), torch.stack(random)


def distillation_loss(words, predicted, temperature=0.25):
    """SEARLE's L_distil (section 3): symmetric, and the negatives come from both sides.

    words and predicted [B, d_w] -> scalar. Of the 2B normalized vectors each has to find its partner among the 2B - 1 others.
    """
    both = F.normalize(torch.cat([words, predicted]).float(), dim=1)  # [2B, d_w]
    logits = (both @ both.T / temperature).fill_diagonal_(-math.inf)  # [2B, 2B]
    partner = torch.arange(len(both), device=both.device).roll(len(words))
    return F.cross_entropy(logits, partner)


def distill(blip, phi, v, words, regularize, epochs=100, batch=256, lr=1e-4, weight=0.75, weight_decay=0.01, temperature=0.25,
            precision="fp32"):  # fmt: skip
    """Train phi in place to say of v [M, E] what inversion found, words [M, 1, d_w]: L_distil + weight * regularize.

    SEARLE: AdamW at a constant lr of 1e-4, 100 epochs of batches of 256, weight 0.75, weight decay 0.01, temperature 0.25. With
    3,000 images of the pocket world lr 1e-3 is better (R@1 on its CIRR's validation set 47 against 36; 45 after 30 epochs).
    Order, dropout and sentences come from torch's global generator. Returns the mean loss of each epoch; leaves phi in eval
    mode. Raises ValueError for a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(phi.parameters(), lr=lr, weight_decay=weight_decay)
    phi.train()
    losses = []
    bar = tqdm(range(epochs), desc="distilling", unit="epoch", disable=None)
    for _ in bar:
        order, total = torch.randperm(len(v)).to(v.device), 0.0
        parts = order.split(batch)
        parts = parts[:-1] if len(parts) > 1 and len(parts[-1]) < batch else parts  # few images have few negatives
        for rows in parts:
            with autocast(v.device, precision):
                U = phi(v[rows, :, None, None])  # [B, 1, d_w]
                other = regularize(U, v[rows])
            loss = distillation_loss(words[rows, 0], U[:, 0], temperature) + weight * other
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


def invert_in_chunks(blip, v, numbers, regularize, folder, **options):
    """invert, CHUNK images at a time, each kept in `folder`: what is there already is read. -> words [M, 1, d_w]."""
    folder.mkdir(parents=True, exist_ok=True)
    words = []
    for start in tqdm(range(0, len(v), CHUNK), desc="inverting", unit=f"x{CHUNK} img", disable=None):
        path, part = folder / f"{start:08d}.pt", slice(start, start + CHUNK)
        if not path.exists():
            found = invert(blip, v[part], regularize, numbers=numbers[part], **options).cpu()
            with replacing(path) as file:
                torch.save(found, file)
        try:
            words.append(torch.load(path, weights_only=True))
        except Exception:  # torch.load reports damaged files in many ways
            raise ValueError(f"{path}: is damaged; delete it, it is then computed again") from None
    return torch.cat(words).to(v.device)


def choose_images(args, blip, precision):
    """--count images of --images: their numbers [M] and v [M, E], from the features that `train.py --loss gcd` stores too."""
    if args.images == POCKET_IMAGES:
        world.ensure(Path(args.images).parent)
    images = find_images(args.images, args.cache_dir)
    features = image_features(blip, images, args.cache_dir, skip_bad=True, precision=precision, what="training images")
    for why in list(features.bad.values())[:10]:
        print(f"left out: {why}", file=sys.stderr)
    if len(features.bad) > 0.01 * len(images):
        raise ValueError(f"{len(features.bad)} of {len(images)} images in {args.images} are damaged; mend or remove them")
    sound = np.setdiff1d(np.arange(len(images)), list(features.bad))
    numbers = np.sort(np.random.default_rng(args.seed).permutation(sound)[: args.count])
    return numbers, torch.from_numpy(features.v[numbers]).float().to(args.device)


def searle(args):
    """Invert --count images, train phi on their words, write runs/NAME/isa.pt."""
    run = Path("runs") / args.name
    if (run / "isa.pt").exists() and not args.overwrite:
        raise ValueError(f"{run} already holds a training; replace it with --overwrite or give another --name")
    check_folder(run)
    made = read_sentences(args.sentences)  # now: an error should not wait for the features
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    blip = blip_lite.load(args.blip, vocab=args.vocab, image_size=args.image_size, device=args.device)
    precision = pick_precision(args.device) if args.precision == "auto" else args.precision
    round_frozen_weights(blip, precision)
    settings = {**vars(args), "precision": precision, "encoder": "blip-v", "mapper": "phi", "tokens": 1, "prompt": PROMPT,
                "gallery": "blip", "query_size": None}  # fmt: skip
    print(" ".join(f"{k}={v}" for k, v in settings.items()))

    numbers, v = choose_images(args, blip, precision)
    regularize = TextRegularization(blip, made, args.concepts, precision)
    what = json.dumps([blip.fingerprint, precision, args.seed, args.steps, args.concepts, made, numbers.tolist()])
    key = hashlib.sha256(what.encode() + v.cpu().numpy().tobytes()).hexdigest()  # of all that a word depends on
    folder = Path(args.cache_dir) / f"words-{key[:16]}"
    words = invert_in_chunks(blip, v, numbers, regularize, folder, steps=args.steps, precision=precision, seed=args.seed)

    torch.manual_seed(args.seed)
    encoder = query_side.build("blip-v", None, blip)
    phi = Phi(encoder.out_channels, blip.word_dim).to(args.device)
    losses = distill(blip, phi, v, words, regularize, args.epochs, lr=args.lr, precision=precision)
    print(f"loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last")
    run.mkdir(parents=True, exist_ok=True)
    state = isa.QueryModel(encoder, phi).state_dict()
    with replacing(run / "isa.pt") as file:
        torch.save({"query_model": state, "settings": settings, "blip": blip.fingerprint, "images": len(v)}, file)
    print(f"wrote {run}/isa.pt; now: python evaluate.py table --searle {run}/isa.pt")


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m baselines.searle", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--blip", default="pocket", help='"pocket", a Salesforce .pth, or a Hugging Face folder or file')
    p.add_argument("--vocab", help="BERT's vocab.txt, where it does not lie beside the checkpoint")
    p.add_argument("--image-size", type=int, help="side in pixels that BLIP sees (None: the checkpoint's)")
    p.add_argument("--images", default=POCKET_IMAGES, help="folder of images and of .tar shards; only pixels are read")
    p.add_argument("--count", type=int, default=3000, help="images to invert, drawn by --seed; SEARLE: 100,000 (ImageNet test)")
    p.add_argument("--sentences", default="pocket/sentences.json", help="JSON, concept -> list of sentences made by an LLM")
    p.add_argument("--concepts", type=int, default=3, help="concepts that an image is given; more where the list is longer")
    p.add_argument("--steps", type=int, default=150, help="of inversion; SEARLE: 350, for 2 %% more cosine here")
    p.add_argument("--epochs", type=int, default=100, help="of distillation; SEARLE: 100")
    p.add_argument("--lr", type=float, default=1e-3, help="of distillation; SEARLE: 1e-4, too low for few images")
    p.add_argument("--seed", type=int, default=0, help="images, words, sentences, weights, order")
    p.add_argument("--name", default="searle", help="the run's folder is runs/NAME")
    p.add_argument("--overwrite", action="store_true", help="start anew although runs/NAME holds a training")
    p.add_argument("--cache-dir", default="cache", help="folder for features and inverted words")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is faster here")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (0 = all); 1 where several trainings share a machine")
    args = p.parse_args(argv)
    check_options(p, args, count=2, concepts=1, steps=1, epochs=1, seed=0, threads=0)
    if args.lr <= 0:
        p.error(f"--lr has to be positive, not {args.lr}")
    return args


if __name__ == "__main__":
    run_command("baselines.searle", searle, parse_args(), "interrupted; the same command continues with the images that are not inverted yet, and distils from the start")
