"""Pre-train pocket BLIP from nothing on drawn pairs: image-text contrast (ITC) and image-text matching (ITM), as BLIP does.

    python -m pocket.pretrain --out pocket/blip.pth      # the committed weights; resumes where it was stopped
    python -m pocket.pretrain --validate pocket          # their held-out figures; --seed 1 draws other images
    python -m pocket.pretrain --matching-of FILE --out other.pth    # only the last 900 steps, from these weights

Pairs are drawn anew at every step (pocket.specs.pretraining_pair), so nothing is seen twice and no set has to be stored. What
differs from BLIP's own recipe: no momentum encoder and no queue (a batch of 192 is large beside a world this small), no decoder
loss, and captions that are true of other images in the batch are not used as negatives. From step 4,000 on steps are *fine*:
batches hold twins, images that differ in one thing, and matching also sees captions that are wrong in one thing. From step 5,600
on only what matching alone uses is trained, also on terser captions: v and t, and with them every ranking, stay as they are.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import blip_lite
from blip_lite.blip import MEAN, STD
from plumbing.command import note_signals, run_command
from plumbing.files import check_output, cut_log, explained, replacing
from plumbing.options import check_options
from plumbing.precision import autocast, pick_precision
from pocket import specs as language
from pocket.drawing import draw
from pocket.specs import EARLY_MIX, EDIT_KINDS, LATE_MIX, Rng

HERE = Path(__file__).parent
SIZES = dict(image_size=64, patch_size=8, stem=True, image_width=128, image_depth=3, max_positions=64, word_dim=128, text_depth=3,
             embed_dim=64)  # fmt: skip
WARMUP = 200  # steps
LATE_AT = 1750  # the step from which captions also correct themselves at length
HARD_AT = 2000  # the step from which negatives for matching are as hard as BLIP's
FINE_LR = 0.5  # of the peak, at the first of them
FINE_AT = 4000  # the step from which batches hold twins, and matching sees captions that are wrong in one thing
MATCH_AT = 5600  # the step from which only matching is trained, on the parameters with one of these in their names
MATCHING = ("crossattention", "itm_head")
MATCH_WEIGHT = 2.0  # of a true pair's loss in these steps: two wrong pairs are drawn for each


def new_model(tokenizer, sizes=SIZES):
    """Pocket BLIP with fresh weights: torch's own initialisation for linear layers, N(0, 0.02) for embeddings."""
    blip = blip_lite.Blip({**sizes, "vocab_size": tokenizer.vocab_size}, tokenizer)
    for name, parameter in blip.named_parameters():
        if "embeddings.weight" in name or name.endswith(("pos_embed", "cls_token")):
            torch.nn.init.normal_(parameter, std=0.02)
    return blip


def new_optimizer(blip, step):
    """AdamW for this step and those of its kind: on all of BLIP, or from MATCH_AT on on what matching alone uses."""
    for name, parameter in blip.named_parameters():
        parameter.requires_grad_(step < MATCH_AT or any(part in name for part in MATCHING))
    trained = [p for p in blip.parameters() if p.requires_grad]
    decayed = {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05}
    plain = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, plain], betas=(0.9, 0.98))


def to_pixels(specs):
    """Specs -> float32 [B, 3, 64, 64], normalised as Blip.preprocess does."""
    images = torch.from_numpy(np.stack([np.asarray(draw(s)) for s in specs]))  # [B, 64, 64, 3] uint8
    return ((images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


def contrastive_loss(v, t, temperature, true):
    """Symmetric InfoNCE over [B, B] similarities; true [B, B] (text i is true of image j) leaves false negatives out."""
    target = torch.arange(len(v))
    others = true & ~torch.eye(len(v), dtype=torch.bool)
    logits = (t @ v.T / temperature).masked_fill(others, -1e4)  # [text, image]
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def by_length(encode, words, mask, *images):
    """encode(words, mask, *images) in four groups of like length: captions have 4 to 50 tokens, most of a batch is padding."""
    order = mask.sum(1).argsort()
    parts = []
    for rows in order.chunk(4):
        longest = int(mask[rows].sum(1).max())
        parts.append(encode(words[rows, :longest], mask[rows, :longest], *(x[rows] for x in images)))
    return torch.cat(parts)[order.argsort()]


def draw_negatives(similarity, true, hardness, count):
    """For texts 0 .. count a wrong image, for images 0 .. count a wrong text, of a batch: int64 [count] and [count].

    similarity [B, B] (text, image) / temperature. They are drawn with probability softmax(hardness * similarity): from
    hardness 0, where all are alike, to 1, BLIP's own. With hard ones from the start the head never leaves the majority answer.
    """
    weights = (hardness * similarity.detach()).masked_fill(true, -1e4)
    image = torch.multinomial(weights[:count].softmax(1) + 1e-8, 1)[:, 0]
    text = torch.multinomial(weights[:, :count].T.softmax(1) + 1e-8, 1)[:, 0]
    return image, text


def matching_loss(blip, words, mask, F_v, texts, images, labels, weight=1.0):
    """ITM on pairs: text texts[i] of words [*, T, d_w] with image images[i] of F_v [B, 1+N, D] -> loss, accuracy.

    weight: of true pairs, beside 1 of wrong ones.
    """
    logits = by_length(blip.match, words[texts], mask[texts], F_v[images])
    return F.cross_entropy(logits.float(), labels, torch.tensor([1.0, weight])), (logits.argmax(1) == labels).float().mean()


def coarse_pairs(similarity, true, hardness, count):
    """Of `count` pairs of the batch: the pair, its text with a hard image, its image with a hard text -> texts, images, labels
    [3 * count]."""
    own = torch.arange(count)
    image, text = draw_negatives(similarity, true, hardness, count)
    labels = torch.cat([torch.ones(count), torch.zeros(2 * count)]).long()
    return torch.cat([own, own, text]), torch.cat([own, image, own]), labels


def fine_pairs(similarity, true, wrong):
    """The whole batch: each pair, each image with a caption that is wrong in one thing (texts B .. 2B; where there is none, with
    a hard text), and a quarter of the texts with a hard image, of the images with a hard text -> texts, images, labels [5B/2]."""
    size, few = len(true), len(true) // 4
    own = torch.arange(size)
    image, text = draw_negatives(similarity, true, 1.0, size)
    texts = torch.cat([own, torch.where(wrong, size + own, text), own[:few], text[:few]])
    images = torch.cat([own, own, image[:few], own[:few]])
    return texts, images, (torch.arange(len(texts)) < size).long()


@torch.no_grad()
def validate(blip, count=1000, seed=0, precision="fp32"):
    """Held-out figures on specs of the validation split, in percent.

    full / partial: text-to-image R@1 among `count` images with full captions / captions of any length. composed: R@1 of
    "caption of the reference that modifier". matching: accuracy on each image's own caption and on the highest-ranked caption
    that is not true of it (chance 50), with full and with partial captions. drawn: the same with negatives that are drawn from
    a batch of 250, as LAR draws them, half of them images and half texts.
    """
    blip.eval()
    out, rng = {}, Rng(seed)
    held_out = lambda: language.sample(rng, "val", rng.choice((language.random_scene, language.random_garment)))  # noqa: E731

    def encode(texts, specs):
        with autocast("cpu", precision):
            ids, mask = blip.tokenize(texts)
            words = blip.embed_words(ids)
            v, F_v = blip.encode_image(to_pixels(specs))
            t = by_length(blip.encode_text, words, mask)
        return words, mask, F_v, t @ v.T  # outside autocast: bfloat16 similarities would tie

    for name, keep in (("full", 1.0), ("partial", None)):
        specs = [held_out() for _ in range(count)]
        texts, facts = zip(*(language.describe(s, rng, keep) for s in specs), strict=True)
        words, mask, F_v, similarity = encode(list(texts), specs)
        out[f"{name}_R@1"] = 100 * (similarity.argmax(1) == torch.arange(count)).float().mean().item()
        true = torch.from_numpy(language.holds(facts, specs))
        hard = similarity.masked_fill(true, -2).argmax(0)  # [image] -> the wrong text that looks most right
        with autocast("cpu", precision):
            positive = blip.match(words, mask, F_v).argmax(1) == 1
            negative = blip.match(words[hard], mask[hard], F_v).argmax(1) == 0
            drawn = []
            for own in torch.arange(count).split(250):
                image, text = draw_negatives(similarity[own][:, own] / blip.temp, true[own][:, own], 1.0, len(own))
                drawn.append(blip.match(words[own], mask[own], F_v[own[image]]).argmax(1) == 0)
                drawn.append(blip.match(words[own[text]], mask[own[text]], F_v[own]).argmax(1) == 0)
        out[f"{name}_matching"] = 50 * (positive.float().mean() + negative.float().mean()).item()
        out[f"{name}_drawn"] = 50 * (positive.float().mean() + torch.cat(drawn).float().mean()).item()
    for kind in EDIT_KINDS:
        texts, specs = [], []
        while len(specs) < count:
            before = rng.choice((language.random_scene, language.random_garment))(rng)
            change = language.edit(before, rng, kind)
            if language.split_of(change.apply(before)) == "val":
                specs.append(change.apply(before))
                texts.append(f"a photo of {language.describe(before, rng, 1.0)[0]} that {change.text}")
        similarity = encode(texts, specs)[-1]
        out[f"composed_{kind}_R@1"] = 100 * (similarity.argmax(1) == torch.arange(count)).float().mean().item()
    blip.train()
    return out


def learning_rate(step, steps, peak):
    """Linear warm-up, a plateau, linear to zero over the last 30 %; then, over the fine steps, from half the peak to zero; and
    once more from the peak, where only matching is trained."""
    if step < FINE_AT:
        steps = min(steps, FINE_AT)
        return peak * min(1, (step + 1) / WARMUP, (steps - step) / (0.3 * steps))
    if step < MATCH_AT:
        first, steps, peak = FINE_AT, min(steps, MATCH_AT), peak * FINE_LR
    else:
        first = MATCH_AT
    return peak * min((step - first + 1) / WARMUP, (steps - step) / (steps - first))


def batch(rng, size, tokenizer, mix=EARLY_MIX, terse=0):
    """size pairs -> pixels [B, 3, 64, 64], ids and mask [B, T], true [B, B] (text i is true of image j).

    terse: how many of the captions just describe, from terse to full, and nothing else.
    """
    rows = [language.pretraining_pair(rng, mix) for _ in range(size)]
    rows[:terse] = [(spec, *language.describe(spec, rng)) for spec, *_ in rows[:terse]]
    specs, captions, facts = zip(*rows, strict=True)
    return to_pixels(specs), *tokenizer(list(captions)), torch.from_numpy(language.holds(facts, specs))


def fine_batch(rng, size, tokenizer, mix=LATE_MIX):
    """size pairs, a third of them twins of another third: images that differ in one thing, each with a caption of its own.

    -> pixels [B, 3, 64, 64], ids and mask [2B, T], true [B, B], wrong [B]. Text B+i is a caption of image i that is wrong in one
    thing, where wrong[i]: for few there is none.
    """
    rows = [language.pretraining_example(rng, mix) for _ in range(size - size // 3)]
    twins = [language.twin(spec, rng) for spec, *_ in rows[: size // 3]]
    rows = [*rows[: size // 3], *(language.described(spec, rng) for spec in twins), *rows[size // 3 :]]
    rng.shuffle(rows)
    specs, captions, facts, mistaken = zip(*rows, strict=True)
    ids, mask = tokenizer([*captions, *(text or "" for text in mistaken)])
    wrong = torch.tensor([text is not None for text in mistaken])
    return to_pixels(specs), ids, mask, torch.from_numpy(language.holds(facts, specs)), wrong


def load_state(path, settings, blip):
    """OUT.state into the model -> the next step, the optimizer. Raises ValueError where it is damaged or of other settings."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        other = [name for name, value in settings.items() if state["settings"][name] != value]
        if not other:
            blip.load_state_dict(state["model"])
            optimizer = new_optimizer(blip, state["step"] - 1)
            optimizer.load_state_dict(state["optimizer"])
            return state["step"], optimizer
    except Exception:  # torch.load reports damaged files in many ways
        raise ValueError(f"{path}: is damaged or of another version of this program; delete it to start anew") from None
    name = other[0]
    option, was = f"--{name.replace('_', '-')}", state["settings"][name]
    raise ValueError(f"{path}: is of {option} {was}, not {settings[name]}; give {option} {was}, or delete the file to start anew")


def main():
    """-> the number of the signal that stopped it, or 0."""
    parser = argparse.ArgumentParser(prog="python -m pocket.pretrain", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--steps", type=int, default=6500, help="the schedule's length; fewer steps mean a weaker BLIP")
    parser.add_argument("--batch", type=int, default=192, help="pairs a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one a process where several run side by side")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is faster here")
    parser.add_argument("--held-out", type=int, default=1000, help="images that the held-out figures rank")
    parser.add_argument("--save-every", type=int, default=250, help="steps between states to resume from")
    parser.add_argument("--validate", metavar="FILE", help='only print the held-out figures of these weights; "pocket" = ours')
    parser.add_argument("--matching-of", metavar="FILE", help=f'begin at step {MATCH_AT} with these weights; "pocket" = ours')
    parser.add_argument("--out", type=Path, default=HERE / "blip.pth", help="weights (fp16); OUT.state resumes, OUT.log tells")
    args = parser.parse_args()
    check_options(parser, args, steps=1, batch=8, seed=0, threads=1, held_out=2, save_every=1)
    if args.lr <= 0:
        parser.error(f"--lr has to be positive, not {args.lr}")
    if args.matching_of and args.steps <= MATCH_AT:
        parser.error(f"--steps has to be more than {MATCH_AT} with --matching-of, not {args.steps}: it begins there")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    precision = pick_precision("cpu") if args.precision == "auto" else args.precision
    load = lambda file: blip_lite.load(file, vocab=None if file == "pocket" else HERE / "vocab.txt")  # noqa: E731
    if args.validate:
        figures = validate(load(args.validate), args.held_out, args.seed, precision)
        print(json.dumps({k: round(x, 1) for k, x in figures.items()}))
        return
    check_output(args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    vocab = HERE / "vocab.txt"
    if not vocab.exists():
        with replacing(vocab) as file:
            file.write(("\n".join(language.vocabulary()) + "\n").encode())
    state_file, log_file = Path(f"{args.out}.state"), Path(f"{args.out}.log")
    blip = load(args.matching_of) if args.matching_of else new_model(blip_lite.Tokenizer(vocab))
    settings = {name: getattr(args, name) for name in ("steps", "batch", "lr", "seed", "matching_of")}
    start = MATCH_AT if args.matching_of else 0
    optimizer = new_optimizer(blip, start)
    if state_file.exists():
        start, optimizer = load_state(state_file, settings, blip)
    cut_log(log_file, start)
    print(f"{sum(p.numel() for p in blip.parameters()) / 1e6:.2f} M parameters, steps {start}..{args.steps}")
    began, stop = time.time(), note_signals()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=None)
    for step in bar:
        torch.manual_seed(args.seed * 1_000_003 + step)  # a resumed run draws the same negatives
        rng, fine, matching_alone = Rng(f"{args.seed}-{step}"), FINE_AT <= step < MATCH_AT, step >= MATCH_AT
        if step == MATCH_AT:
            optimizer = new_optimizer(blip, step)
        if fine:
            pixels, ids, mask, true, wrong = fine_batch(rng, args.batch * 3 // 4, blip.tokenizer)  # of two texts an image
        else:
            mix, terse = LATE_MIX if step >= LATE_AT else EARLY_MIX, args.batch // 2 if matching_alone else 0
            pixels, ids, mask, true = batch(rng, args.batch, blip.tokenizer, mix, terse)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        with autocast("cpu", precision):
            v, F_v = blip.encode_image(pixels)
            words = blip.embed_words(ids)
            t = by_length(blip.encode_text, words[: len(v)], mask[: len(v)])
        temperature = blip.temp.clamp(0.02, 0.5)  # a floor: colder, the contrast is all there is
        itc = contrastive_loss(v, t, temperature, true)  # in float32: bfloat16 has steps of 0.25 at logits of 50
        hardness = min(1.0, step / HARD_AT)
        similarity = t @ v.T / temperature
        with autocast("cpu", precision):
            if fine:
                pairs = fine_pairs(similarity, true, wrong)
            else:
                pairs = coarse_pairs(similarity, true, hardness, len(v) if matching_alone else len(v) // 2)
            itm, accuracy = matching_loss(blip, words, mask, F_v, *pairs, weight=MATCH_WEIGHT if matching_alone else 1.0)
        loss = itc + itm
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {step}; lower --lr")
        blip.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(blip.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(itc=f"{itc.item():.3f}", itm=f"{itm.item():.3f}", matched=f"{accuracy.item():.2f}")
        last = step + 1 == args.steps
        if (step + 1) % 500 == 0 or last:
            figures = {k: round(x, 1) for k, x in validate(blip, args.held_out, precision=precision).items()}
            row = {"step": step + 1, "seconds": round(time.time() - began), "itc": round(itc.item(), 4),
                   "itm": round(itm.item(), 4), "temperature": round(temperature.item(), 4), **figures}  # fmt: skip
            with explained(log_file), log_file.open("a") as log:
                log.write(json.dumps(row) + "\n")
            tqdm.write(json.dumps(row))
            if last:
                blip.temp.data.clamp_(0.02, 0.5)  # as the loss used it; below the floor no gradient reaches it
            with replacing(args.out) as file:
                blip_lite.save(blip, file)
        if (step + 1) % args.save_every == 0 or last or stop:  # at the end: a run that is killed before does the step again
            if not all(x.isfinite().all() for x in blip.state_dict().values()):
                raise ValueError(f"weights are not finite after step {step + 1} and are not saved; lower --lr")
            state = {"model": blip.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "settings": settings}
            with replacing(state_file) as file:
                torch.save(state, file)
        if stop:
            print(f"\nstopped after step {step + 1}; the same command goes on from {state_file}")
            return stop[0]
    return 0


if __name__ == "__main__":
    run_command("pocket.pretrain", lambda _: main(), None, "interrupted; the same command continues from the last state, if there is one")
