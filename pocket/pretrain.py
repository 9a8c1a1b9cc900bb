"""Pre-train pocket BLIP on drawn pairs, by image-text contrast (ITC) and matching (ITM).

    python -m pocket.pretrain --out pocket/blip.pth   # the shipped weights
    python -m pocket.pretrain --validate pocket       # their held-out figures
    python -m pocket.pretrain --clip                  # pocket CLIP: the same pairs, ITC alone

Every step draws new pairs. Unlike BLIP's recipe there is no momentum encoder and no queue (a batch
of 192 is large beside a world this small), no decoder loss, and a caption that is true of another
image in the batch is not its negative.
"""

import argparse
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import blip_lite
import clip_lite
from plumbing.command import note_signals, run_command
from plumbing.files import check_output, cut_log, log_row, replacing
from plumbing.options import add_shared_options, check_options
from plumbing.precision import autocast, pick_precision

from . import specs as language
from .drawing import draw
from .specs import EARLY_MIX, LATE_MIX

VOCAB = Path(__file__).with_name("vocab.txt")
SIZES = dict(image_size=64, patch_size=8, stem=True, image_width=128, image_depth=3, text_depth=3,
             max_positions=64, word_dim=128, embed_dim=64)
CLIP_SIZES = dict(max_positions=77, quick=True, image_heads=2, text_heads=2, image_hidden=512,
                  text_hidden=512)
CLIP_VOCAB = VOCAB.with_name("merges.txt")
DEFAULTS = (dict(steps=6500, out=VOCAB.with_name("blip.pth")),
            dict(steps=4000, out=VOCAB.with_name("clip.pth")))  # CLIP's
LATE_AT = 1750  # step from which captions also correct themselves at length
HARD_AT = 2000  # step from which ITM's negatives are as hard as BLIP's
WARMUP = 200  # steps of each phase
TEMPERATURES = (0.02, 0.5)  # limits; colder, the contrast would be all there is


# --- the recipe
@dataclass(frozen=True)
class Phase:
    first: int  # step
    size: float = 1.0  # of a batch, share of --batch
    twins: bool = False  # add images that differ in one thing, and captions wrong in one thing
    terse: float = 0.0  # share of the captions that just describe, from terse to full
    trains: tuple[str, ...] = ("",)  # only parameters with one of these in their names
    peak: float = 1.0  # of the learning rate, share of --lr
    decay: float = 1.0  # last share of the phase, in which the learning rate falls to zero
    matched: float = 1.0  # share of the pairs that ITM sees ...
    hard: float = 1.0  # ... and of these, the share that it sees with a hard image and a hard text
    weight: float = 1.0  # of a true pair in ITM, beside 1 of a wrong one


PHASES = (
    Phase(first=0, decay=0.3, matched=0.5),
    Phase(first=4000, size=0.75, twins=True, peak=0.5, hard=0.25),  # two texts for each image
    # v, t and so every ranking stay the same; only matching learns.
    Phase(first=5600, terse=0.5, trains=("crossattention", "itm_head"), weight=2.0),
)


def phase_at(step):
    return [phase for phase in PHASES if phase.first <= step][-1]


def learning_rate(step, steps, lr):
    phase = phase_at(step)
    end = min([steps, *(later.first for later in PHASES if later.first > step)])
    fall = (end - step) / (phase.decay * (end - phase.first))
    return lr * phase.peak * min(1, (step - phase.first + 1) / WARMUP, fall)


def draw_rows(rng, size, mix, phase):
    """`size` results of specs.pretraining_example."""
    third = size // 3 if phase.twins else 0
    rows = [language.pretraining_example(rng, mix, phase.twins) for _ in range(size - third)]
    if phase.twins:
        twins = [language.twin(spec, rng) for spec, *_ in rows[:third]]
        rows[third:third] = [language.described(spec, rng) for spec in twins]
        rng.shuffle(rows)
    terse = int(phase.terse * size)
    rows[:terse] = [language.described(spec, rng, wrong=False) for spec, *_ in rows[:terse]]
    return rows


def learn_merges(words):
    """Byte-pair encoding until each word is one token -> the lines of a merges.txt."""
    parts, merges = [[*word[:-1], f"{word[-1]}</w>"] for word in words], []
    while pairs := Counter(pair for word in parts for pair in pairwise(word)):
        merges.append(" ".join(pairs.most_common(1)[0][0]))
        for _ in range(2):  # where a pair follows itself, every second place is found
            parts = [f" {' '.join(word)} ".replace(f" {merges[-1]} ",
                     f" {merges[-1].replace(' ', '')} ").split() for word in parts]
    return ["#version: 0.2", *merges]


def new_model(tokenizer, clip=False):
    network, sizes = (clip_lite.Clip, CLIP_SIZES) if clip else (blip_lite.Blip, {})
    blip = network({**SIZES, **sizes, "vocab_size": tokenizer.vocab_size}, tokenizer)
    for name, parameter in blip.named_parameters():
        if "embeddings.weight" in name or name.endswith(("pos_embed", "cls_token")):
            torch.nn.init.normal_(parameter, std=0.02)
    return blip


def new_optimizer(blip, phase):
    for name, parameter in blip.named_parameters():
        parameter.requires_grad_(any(part in name for part in phase.trains))
    trained = [p for p in blip.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


# --- losses
def by_length(encode, words, mask, *images):
    """`encode` in four groups of similar length, to pad less."""
    order, parts = mask.sum(1).argsort(), []
    for rows in order.chunk(4):
        T = int(mask[rows].sum(1).max())
        parts.append(encode(words[rows, :T], mask[rows, :T], *(x[rows] for x in images)))
    return torch.cat(parts)[order.argsort()]


def encode(blip, specs, texts, precision):
    """-> v, F_v of B images; words, mask of all texts; t of the first B."""
    with autocast("cpu", precision):
        v, F_v = blip.encode_image(torch.stack([blip.preprocess(draw(spec)) for spec in specs]))
        ids, mask = blip.tokenize(texts)
        words = blip.embed_words(ids)
        t = by_length(blip.encode_text, words[: len(v)], mask[: len(v)])
    return v, F_v, words, mask, t


def contrastive_loss(v, t, temperature, true):
    """Symmetric InfoNCE over [B, B] similarities, without the false negatives that `true` shows."""
    target = torch.arange(len(v))
    others = true & ~torch.eye(len(v), dtype=torch.bool)
    logits = (t @ v.T / temperature).masked_fill(others, -1e4)  # [text, image]
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def draw_negatives(similarity, true, hardness, count):
    """A wrong image for each of the first `count` texts, a wrong text for each of the first images.

    similarity, true: [text, image]. hardness: 1 is BLIP's; with hard negatives from the start
    matching never leaves the majority answer.
    """
    weights = (hardness * similarity.detach()).masked_fill(true, -1e4)
    image = torch.multinomial(weights[:count].softmax(1) + 1e-8, 1)[:, 0]
    text = torch.multinomial(weights[:, :count].T.softmax(1) + 1e-8, 1)[:, 0]
    return image, text


def matching_pairs(similarity, true, wrong, hardness, phase):
    """Texts, images and labels of ITM, int64 [P] each, true pairs first.

    With twins, the wrong caption of image i is text B + i, or a hard text unless wrong[i].
    """
    count = int(phase.matched * len(true))
    own, hard = torch.arange(count), int(phase.hard * count)
    image, text = draw_negatives(similarity, true, hardness, count)
    texts, images = [own, own[:hard], text[:hard]], [own, image[:hard], own[:hard]]
    if phase.twins:
        texts.insert(1, torch.where(wrong, len(true) + own, text))
        images.insert(1, own)
    texts, images = torch.cat(texts), torch.cat(images)
    return texts, images, (torch.arange(len(texts)) < count).long()


def losses(blip, rows, phase, hardness, precision):
    """-> ITC, ITM, the temperature, the accuracy of matching."""
    specs, captions, facts, mistaken = zip(*rows, strict=True)
    wrong = torch.tensor([text is not None for text in mistaken])
    texts = [*captions, *(text or "" for text in mistaken)] if phase.twins else list(captions)
    true = torch.from_numpy(language.holds(facts, specs))  # [B, B]: is text i true of image j?
    v, F_v, words, mask, t = encode(blip, specs, texts, precision)
    temperature = blip.temp.clamp(*TEMPERATURES)
    itc = contrastive_loss(v, t, temperature, true)  # in float32: bfloat16 steps by 0.25 at 50
    if isinstance(blip, clip_lite.Clip):
        return itc, torch.zeros(()), temperature, math.nan
    similarity = t @ v.T / temperature
    texts, images, labels = matching_pairs(similarity, true, wrong, hardness, phase)
    with autocast("cpu", precision):
        logits = by_length(blip.match, words[texts], mask[texts], F_v[images]).float()
    itm = F.cross_entropy(logits, labels, torch.tensor([1.0, phase.weight]))
    return itc, itm, temperature, share(logits.argmax(1) == labels)


def share(right):
    return right.float().mean()


@torch.no_grad()
def validate(blip, count=1000, seed=0, precision="fp32"):
    """Held-out figures on specs of the validation split, in percent.

    R@1: text to image, among `count` images; partial: captions of any length. matching: accuracy on
    an image's own caption and on the highest-ranked wrong one (chance 50). drawn: the same with
    negatives drawn from 250 pairs as LAR draws them, half images and half texts.
    """
    blip.eval()
    out, rng, own = {}, language.Rng(seed), torch.arange(count)
    for name, keep in (("full", 1.0), ("partial", None)):
        specs = [language.sample(rng, "val", rng.choice(language.MAKERS)) for _ in own]
        texts, facts = zip(*(language.describe(spec, rng, keep) for spec in specs), strict=True)
        v, F_v, words, mask, t = encode(blip, specs, list(texts), precision)
        similarity = t @ v.T  # outside autocast: bfloat16 similarities would tie
        out[f"{name}_R@1"] = 100 * share(similarity.argmax(1) == own).item()
        if isinstance(blip, clip_lite.Clip):
            continue
        true = torch.from_numpy(language.holds(facts, specs))
        hard = similarity.masked_fill(true, -2).argmax(0)  # [image] -> the best of the wrong texts
        drawn = []
        for part in own.split(250):
            logits = similarity[part][:, part] / blip.temp
            image, text = draw_negatives(logits, true[part][:, part], 1.0, len(part))
            drawn += [(part, part[image]), (part[text], part)]
        with autocast("cpu", precision):
            positive, negative, *drawn = (blip.match(words[i], mask[i], F_v[j]).argmax(1)
                                          for i, j in ((own, own), (hard, own), *drawn))
        right = share(positive == 1)
        out[f"{name}_matching"] = 50 * (right + share(negative == 0)).item()
        out[f"{name}_drawn"] = 50 * (right + share(torch.cat(drawn) == 0)).item()
    for kind in language.EDIT_KINDS:
        texts, specs = [], []
        while len(specs) < count:
            before = rng.choice(language.MAKERS)(rng)
            change = language.edit(before, rng, kind)
            if language.split_of(change.apply(before)) == "val":
                specs.append(change.apply(before))
                caption, _ = language.describe(before, rng, 1.0)
                texts.append(f"a photo of {caption} that {change.text}")
        v, *_, t = encode(blip, specs, texts, precision)
        out[f"composed_{kind}_R@1"] = 100 * share((t @ v.T).argmax(1) == own).item()
    blip.train()
    return {name: round(percent, 1) for name, percent in out.items()}


# --- training
def load_state(path, settings, blip):
    """OUT.state into the model -> the next step, the optimizer. ValueError if unusable."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        was = {"clip": False} | state["settings"]  # may be older than this option
        other = [name for name, value in settings.items() if was[name] != value]
        if not other:
            blip.load_state_dict(state["model"])
            optimizer = new_optimizer(blip, phase_at(state["step"] - 1))
            optimizer.load_state_dict(state["optimizer"])
            return state["step"], optimizer
    except Exception:  # torch.load reports damaged files in many ways
        raise ValueError(f"{path}: is damaged or of another version; delete it to start anew"
                         ) from None
    option = f"--{other[0].replace('_', '-')} {was[other[0]]}"
    raise ValueError(f"{path}: is of {option}, not {settings[other[0]]}; give {option}, or delete "
                     "the file to start anew")


def train(blip, settings, out, held_out, save_every, precision):
    """-> the signal that stopped it, or 0. A run resumes only with the same settings."""
    steps, seed = settings["steps"], settings["seed"]
    state_file, log_file = Path(f"{out}.state"), Path(f"{out}.log")
    start, optimizer = PHASES[-1].first if settings["matching_of"] else 0, None
    late = steps // 2 if settings["clip"] else LATE_AT
    if state_file.exists():
        start, optimizer = load_state(state_file, settings, blip)
    cut_log(log_file, start)
    size = sum(p.numel() for p in blip.parameters())
    print(f"{size / 1e6:.2f} M parameters, steps {start}..{steps}")
    began, stop = time.time(), note_signals()
    bar = tqdm(range(start, steps), initial=start, total=steps, disable=None)
    for step in bar:
        phase = phase_at(step)
        if optimizer is None or phase.trains != phase_at(step - 1).trains:
            optimizer = new_optimizer(blip, phase)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings["lr"])
        torch.manual_seed(seed * 1_000_003 + step)  # a resumed run draws the same negatives
        rng, mix = language.Rng(f"{seed}-{step}"), LATE_MIX if step >= late else EARLY_MIX
        rows = draw_rows(rng, int(phase.size * settings["batch"]), mix, phase)
        itc, itm, temperature, right = losses(blip, rows, phase, min(1, step / HARD_AT), precision)
        blip.zero_grad(set_to_none=True)
        (itc + itm).backward()
        norm = torch.nn.utils.clip_grad_norm_(blip.parameters(), 1.0)
        if not torch.isfinite(itc + itm + norm):
            raise ValueError(f"the loss is {(itc + itm).item()} and its gradient {norm.item()} at "
                             f"step {step}; lower --lr")
        optimizer.step()
        bar.set_postfix(itc=f"{itc:.3f}", itm=f"{itm:.3f}", matched=f"{right:.2f}")
        done, last = step + 1, step + 1 == steps
        if done % 500 == 0 or last:
            row = {"step": done, "seconds": round(time.time() - began),
                   "itc": round(itc.item(), 4),
                   **({} if settings["clip"] else {"itm": round(itm.item(), 4)}),
                   "temperature": round(temperature.item(), 4),
                   **validate(blip, held_out, precision=precision)}
            log_row(log_file, row)
            tqdm.write(json.dumps(row))
            if last:
                blip.temp.data.clamp_(*TEMPERATURES)  # beyond the limits no gradient reaches it
            with replacing(out) as file:
                blip_lite.save(blip, file)
        if done % save_every == 0 or last or stop:  # last: a run killed before repeats the step
            state = {"model": blip.state_dict(), "optimizer": optimizer.state_dict(), "step": done,
                     "settings": settings}
            with replacing(state_file) as file:
                torch.save(state, file)
        if stop:
            print(f"\nstopped after step {done}; the same command resumes from {state_file}")
            return stop[0]
    return 0


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m pocket.pretrain", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add, first = parser.add_argument, PHASES[-1].first
    add("--clip", action="store_true", help="train pocket CLIP, by ITC alone")
    add("--steps", type=int, help="fewer mean a weaker model (default: 6500, CLIP 4000)")
    add("--batch", type=int, default=192, help="pairs a step")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    add("--seed", type=int, default=0, help="with --validate, of the images")
    add("--threads", type=int, default=1, help="of the CPU")
    add_shared_options(parser, "--precision")
    add("--held-out", type=int, default=1000, help="images of the held-out figures")
    add("--save-every", type=int, default=250, help="steps between states to resume from")
    add("--validate", metavar="FILE", help='only print figures of FILE or "pocket"')
    add("--matching-of", metavar="FILE", help=f'begin at step {first} with FILE or "pocket"')
    add("--out", type=Path, help="weights (default: pocket/blip.pth or pocket/clip.pth); OUT.log "
        "has the figures, OUT.state is what the same command resumes")
    parser.set_defaults(**DEFAULTS[parser.parse_known_args(argv)[0].clip])
    args = parser.parse_args(argv)
    check_options(parser, args, steps=1, batch=8, threads=1, held_out=2, save_every=1)
    if args.lr <= 0:
        parser.error(f"--lr has to be positive, not {args.lr}")
    if args.matching_of and args.steps <= first:
        parser.error(f"--steps has to be more than {first} with --matching-of, not {args.steps}: "
                     "it begins there")
    if args.clip and (args.matching_of or args.steps > first):
        parser.error(f"--clip has no matching to train: no --matching-of, at most {first} --steps")
    return args


def main(args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    precision = pick_precision("cpu") if args.precision == "auto" else args.precision
    kind, vocab = (clip_lite, CLIP_VOCAB) if args.clip else (blip_lite, VOCAB)
    if file := args.validate or args.matching_of:
        blip = kind.load(file, vocab=None if file == "pocket" else vocab)
    if args.validate:
        print(json.dumps(validate(blip, args.held_out, args.seed, precision)))
        return 0
    check_output(args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    words = language.vocabulary()
    lines = learn_merges(filter(str.isalpha, words)) if args.clip else words
    if not vocab.exists():
        with replacing(vocab) as file:
            file.write(("\n".join(lines) + "\n").encode())
    if not args.matching_of:
        size = (len(lines) + 513,) if args.clip else ()
        blip = new_model(kind.Tokenizer(vocab, *size), args.clip)
    options = ("steps", "batch", "lr", "seed", "matching_of", "clip")
    settings = {key: getattr(args, key) for key in options}
    return train(blip, settings, args.out, args.held_out, args.save_every, precision)


if __name__ == "__main__":
    run_command("pocket.pretrain", main, parse_args(),
                "interrupted; the same command resumes from the last state, if there is one")
