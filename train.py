"""Train ISA on a folder of unlabeled images.

    python train.py                                     # the pocket world, from nothing, on a laptop (about 5 minutes)
    python train.py --preset paper --blip model_base.pth --vocab vocab.txt --images cc3m/ --encoder efficientnet_b2

BLIP is frozen: its v and F^v of every image are computed once and stored. The loop then trains only the query model, so that the
sentence it speaks of an image is, for BLIP, a description of that image. Writes runs/NAME/isa.pt (the query side, all that
evaluation needs), runs/NAME/last.pt (to resume from) and runs/NAME/log.jsonl.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torchvision import transforms
from tqdm import tqdm

import blip_lite
import isa
import light_encoders
from blip_lite.features import ImageFiles, autocast, image_features, pick_precision
from pocket import world

PRESETS = {
    "pocket": dict(blip="pocket", images="data/pocket/train", encoder="pocketnet", image_size=None, epochs=4, batch=256,
                   lr=2e-3, crop=1.0, flip=False, randaugment=0, name="pocket"),
    "paper": dict(blip=None, images=None, encoder="efficientnet_b2", image_size=224, epochs=20, batch=320, lr=3e-4, crop=0.5,
                  flip=True, randaugment=5, name="paper", pretrained="imagenet"),
}  # fmt: skip
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAY_CHANGE = {"name", "images", "cache", "workers", "threads", "resume", "overwrite", "device", "save_every", "blip", "vocab"}


# ---------------------------------------------------------------------------------------------- settings
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--preset", choices=PRESETS, default="pocket", help="the defaults of what follows: a laptop's or the paper's")
    data = p.add_argument_group("data and frozen BLIP")
    data.add_argument("--images", help="folder of images, searched with its sub-folders; nothing but pixels is read")
    data.add_argument("--blip", help='"pocket", a Salesforce .pth, or a Hugging Face folder or file')
    data.add_argument("--vocab", help="BERT's vocab.txt, where it does not lie beside the checkpoint")
    data.add_argument("--image-size", type=int, help="side in pixels that BLIP sees (default: the checkpoint's; paper: 224)")
    data.add_argument("--cache", default="cache", help="folder for v and F^v (0.30 MB an image for ViT-B at 224 px)")
    data.add_argument("--skip-bad-images", action="store_true", help="go on even if more than 1 %% of the images are damaged")
    query = p.add_argument_group("query model")
    query.add_argument("--encoder", choices=light_encoders.NAMES, help="the light network; blip = symmetric (Tables 2-4)")
    query.add_argument("--pretrained", help='"imagenet", or a state dict for the encoder; the paper starts from ImageNet')
    query.add_argument("--no-pretrained", dest="pretrained", action="store_const", const=None, help="random start (* in Table 6)")
    query.add_argument("--tokens", type=int, default=6, help="L, the length of the sentence (Figure 3)")
    query.add_argument("--prompt", default="a photo of", help="what precedes the sentence tokens")
    recipe = p.add_argument_group("recipe")
    recipe.add_argument("--loss", choices=("gcd+lar", "gcd", "lar"), default="gcd+lar", help="Eq. 8, or one term (Table 8)")
    recipe.add_argument("--epochs", type=int, help="a quarter is linear warm-up, the rest cosine annealing")
    recipe.add_argument("--batch", type=int, help="images a step: more negatives for GCD, more memory")
    recipe.add_argument("--lr", type=float, help="peak learning rate of AdamW; a short run wants more than the paper's 3e-4")
    recipe.add_argument("--weight-decay", type=float, default=0.05, help="BLIP's; the paper prints none")
    recipe.add_argument("--crop", type=float, help="smallest area that a random crop keeps; 1 = no cropping")
    recipe.add_argument("--flip", action=argparse.BooleanOptionalAction, help="random mirroring; it breaks left and right")
    recipe.add_argument("--randaugment", type=int, help="strength (0-30) of RandAugment without colour operations; 0 = none")
    recipe.add_argument("--seed", type=int, default=0, help="weights, order, augmentation, negatives")
    run = p.add_argument_group("run")
    run.add_argument("--name", help="the run's folder is runs/NAME")
    run.add_argument("--resume", action="store_true", help="go on from runs/NAME/last.pt; the weights end up bit-identical")
    run.add_argument("--overwrite", action="store_true", help="start anew although runs/NAME holds a training")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    run.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is faster here")
    run.add_argument("--threads", type=int, default=0, help="CPU threads (0 = all); 1 where several trainings share a machine")
    run.add_argument("--workers", type=int, default=1, help="processes that decode and augment images")
    run.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    preset = p.parse_known_args(argv)[0].preset
    p.set_defaults(**PRESETS[preset])
    args = p.parse_args(argv)
    for name, least in (("epochs", 1), ("batch", 2), ("tokens", 1), ("save_every", 1), ("randaugment", 0), ("threads", 0),
                        ("workers", 0), ("weight_decay", 0)):  # fmt: skip
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')} has to be at least {least}, not {getattr(args, name)}")
    if args.lr <= 0 or not math.isfinite(args.lr) or not 0 < args.crop <= 1:
        p.error(f"--lr has to be positive and --crop in (0, 1], not {args.lr} and {args.crop}")
    if args.randaugment > 30:
        p.error(f"--randaugment has to be at most 30, not {args.randaugment}")
    try:
        torch.device(args.device)
    except RuntimeError:
        p.error(f"--device has to be cpu or cuda, not {args.device}")
    for name in ("blip", "images"):
        if getattr(args, name) is None:
            p.error(f"--preset {preset} needs --{name}")
    return args


def find_images(folder):
    """Every image below `folder`, sorted by path. Raises ValueError where there are fewer than two."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder; give a folder of images with --images")
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < 2:
        raise ValueError(f"{folder}: holds {len(paths)} images, training needs at least two; check --images")
    return paths


# ---------------------------------------------------------------------------------------------- the query side
def build_query_model(settings, blip, pretrained=None):
    """The light encoder and the adaptive token learner that the settings (a dict of the options) describe."""
    encoder = light_encoders.build(settings["encoder"], pretrained, blip)
    return isa.QueryModel(encoder, isa.AdaptiveTokenLearner(encoder.out_channels, blip.word_dim, settings["tokens"]))


def read_checkpoint(path):
    """isa.pt or last.pt -> dict; tensors and plain data only, nothing is executed. Raises ValueError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(checkpoint, dict) and {"query_model", "settings", "blip"} <= checkpoint.keys():
            return checkpoint
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; `python train.py` writes it") from None
    except Exception:  # torch.load reports damaged files in many ways
        pass
    raise ValueError(f"{path}: is damaged or was not written by train.py; train again or name another checkpoint")


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
    model = build_query_model(checkpoint["settings"], blip)
    model.load_state_dict(checkpoint["query_model"])
    return model.to(blip.temp.device).eval(), checkpoint["settings"]


# ---------------------------------------------------------------------------------------------- data
class NeutralRandAugment(transforms.RandAugment):
    """RandAugment without the operations after which "a red car" is no longer true."""

    KEPT = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Sharpness")

    def _augmentation_space(self, *args):
        return {k: v for k, v in super()._augmentation_space(*args).items() if k in self.KEPT}


class AugmentedImages(ImageFiles):
    """(epoch, i) -> (i, pixels of image i as the query model sees it in that epoch): a pure function of seed, epoch and i."""

    def __init__(self, paths, encoder, args):
        super().__init__(paths, self.prepare)
        self.size, self.normalization = encoder.image_size, encoder.normalization
        bicubic = transforms.InterpolationMode.BICUBIC
        steps = [transforms.RandomResizedCrop(self.size, (args.crop, 1), interpolation=bicubic)] if args.crop < 1 else []
        steps += [transforms.RandomHorizontalFlip()] if args.flip else []
        steps += [NeutralRandAugment(num_ops=2, magnitude=args.randaugment)] if args.randaugment else []
        self.augment, self.seed = transforms.Compose(steps), args.seed

    def prepare(self, pil):
        return blip_lite.to_pixels(self.augment(blip_lite.to_rgb(pil)), self.size, *self.normalization)

    def __getitem__(self, epoch_and_row):
        epoch, i = epoch_and_row
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, epoch, i)))
            return super().__getitem__(i)


def batches(rows, batch, seed, first_step, steps):
    """Lists of (epoch, row): each epoch a new permutation, its last incomplete batch dropped. Starts at any step."""
    per_epoch = len(rows) // batch
    for epoch in range(first_step // per_epoch, steps // per_epoch):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(hash((seed, epoch))))
        for b in range(first_step % per_epoch if epoch == first_step // per_epoch else 0, per_epoch):
            yield [(epoch, rows[j]) for j in order[b * batch : (b + 1) * batch].tolist()]


def leave_signals_to_the_loop(worker):
    """Ctrl-C and often SIGTERM go to all processes of a run, but the step in hand still wants its images."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def learning_rate(step, steps, peak):
    """Section 4.1: 5 of 20 epochs linear warm-up, then cosine annealing to zero; the same shape for any length."""
    warmup = steps // 4
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# ---------------------------------------------------------------------------------------------- training
def save(checkpoint, path):
    """Write to a temporary name, then rename: whoever stops this process never leaves half a file."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def resume(run, settings, fingerprint, images, query_model, optimizer):
    """Load runs/NAME/last.pt into the model and the optimizer -> the next step. Raises ValueError where settings differ."""
    checkpoint = read_checkpoint(run / "last.pt")
    for name in settings.keys() - MAY_CHANGE:
        if checkpoint["settings"].get(name) != settings[name]:
            raise ValueError(
                f"{run}/last.pt was trained with --{name.replace('_', '-')} {checkpoint['settings'].get(name)}, not "
                f"{settings[name]}; resume with the same settings, or give another --name"
            )
    if checkpoint["blip"] != fingerprint:
        raise ValueError(f"{run}/last.pt was trained against BLIP {checkpoint['blip']}, not {fingerprint}; give the same --blip")
    if checkpoint["images"] != images:
        raise ValueError(f"{run}/last.pt was trained on {checkpoint['images']} images, not {images}; give the same --images")
    query_model.load_state_dict(checkpoint["query_model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"]


def train(args):
    run, device = Path("runs") / args.name, torch.device(args.device)
    if (run / "last.pt").exists() and not (args.resume or args.overwrite):
        raise ValueError(f"{run} already holds a training; go on with --resume, replace it with --overwrite or give another --name")
    if args.threads:
        torch.set_num_threads(args.threads)
    blip = blip_lite.load(args.blip, vocab=args.vocab, image_size=args.image_size, device=device)
    if args.images == PRESETS["pocket"]["images"]:
        world.ensure(Path(args.images).parent)
    precision = pick_precision(device) if args.precision == "auto" else args.precision
    if args.resume and (run / "last.pt").exists() and args.precision == "auto":
        precision = read_checkpoint(run / "last.pt")["settings"]["precision"]
    settings = {**vars(args), "precision": precision}
    print(" ".join(f"{k}={v}" for k, v in settings.items()))

    paths = find_images(args.images)
    features = image_features(blip, paths, args.cache, maps=args.loss != "gcd", skip_bad=True, precision=precision,
                              workers=args.workers, what="training images")  # fmt: skip
    for why in list(features.bad.values())[:10]:
        print(f"skipped: {why}", file=sys.stderr)
    if len(features.bad) > 0.01 * len(paths) and not args.skip_bad_images:
        counts = f"{len(features.bad)} of {len(paths)} images in {args.images} are damaged"
        raise ValueError(f"{counts}, which is more than 1 %; mend them, or train without them by --skip-bad-images")
    if features.bad:
        print(f"{len(features.bad)} of {len(paths)} images are damaged and left out", file=sys.stderr)
    rows = [i for i in range(len(paths)) if i not in features.bad]
    batch = min(args.batch, len(rows))
    if batch < 2:
        raise ValueError(f"{args.images}: holds {len(rows)} readable images, training needs at least two")
    steps = args.epochs * (len(rows) // batch)

    torch.manual_seed(args.seed)
    query_model = build_query_model(settings, blip, args.pretrained).to(device).train()
    parameters = [p for p in query_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    first = 0
    if args.resume and (run / "last.pt").exists():
        first = resume(run, settings, blip.fingerprint, len(rows), query_model, optimizer)
    size = sum(p.numel() for p in parameters) / 1e6
    print(f"{size:.2f} M trained parameters on the query side, {len(rows)} images, steps {first}..{steps}")
    run.mkdir(parents=True, exist_ok=True)

    def checkpoint(step):
        state = {"query_model": query_model.state_dict(), "settings": settings, "blip": blip.fingerprint, "images": len(rows),
                 "step": step}  # fmt: skip
        save({**state, "optimizer": optimizer.state_dict()}, run / "last.pt")
        save(state, run / "isa.pt")

    stop = []  # Ctrl-C and SIGTERM end the training after the step in hand
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))
    loader = torch.utils.data.DataLoader(
        AugmentedImages(paths, query_model.encoder, args), num_workers=args.workers, pin_memory=device.type == "cuda",
        batch_sampler=batches(rows, batch, args.seed, first, steps),
        worker_init_fn=leave_signals_to_the_loop,
    )  # fmt: skip
    bar = tqdm(loader, total=steps, initial=first, desc="training", disable=None)
    log_file = run / "log.jsonl"
    logged = log_file.read_text().splitlines(keepends=True) if first and log_file.exists() else []
    log, began = log_file.open("w"), time.time()
    log.writelines(line for line in logged if json.loads(line)["step"] <= first)  # what a killed run did after it is done again
    for step, (index, pixels) in enumerate(bar, start=first):
        torch.manual_seed(args.seed * 1_000_003 + step)  # LAR's negatives
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        pixels = pixels.to(device, non_blocking=True)  # [B, 3, S, S]
        v = torch.from_numpy(features.v[index]).to(device)  # [B, E]

        with autocast(device, precision):
            U = query_model(pixels)  # [B, L, d_w]
            words, mask = isa.compose_query(blip, U, prompt=args.prompt)
            t = blip.encode_text(words, mask)  # [B, E]
        gcd = isa.global_contrastive_distillation(v, t, blip.temperature)
        lar, matched = torch.zeros((), device=device), float("nan")
        if args.loss != "gcd" and torch.isfinite(gcd):
            F_v = torch.from_numpy(features.F_v[index]).to(device).float()  # [B, 1+N, D]
            with autocast(device, precision):
                lar, logits, labels = isa.local_alignment_regularization(blip, words, mask, F_v, v, t, return_logits=True)
            matched = (logits.argmax(1) == labels).float().mean().item()
        loss = {"gcd+lar": gcd + lar, "gcd": gcd, "lar": lar}[args.loss]  # Eq. 8

        if not torch.isfinite(gcd + lar):
            raise ValueError(f"the loss is {(gcd + lar).item()} at step {step}; lower --lr and start anew with --overwrite")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        row = {"loss": loss.item(), "gcd": gcd.item(), "lar": lar.item(), "matched": matched}
        speed = (step + 1 - first) * batch / (time.time() - began)
        bar.set_postfix({k: f"{x:.3f}" for k, x in row.items()} | {"img/s": round(speed)}, refresh=False)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            row = {"step": step + 1, "images_per_s": round(speed), **{k: round(x, 4) for k, x in row.items()}}
            log.write(json.dumps(row) + "\n")
            log.flush()
        if (step + 1) % args.save_every == 0 or step + 1 == steps or stop:
            checkpoint(step + 1)
        if stop:
            print(f"\nstopped after step {step + 1}; --resume goes on from {run}/last.pt")
            return
    print(f"wrote {run}/isa.pt after {time.time() - began:.0f} s; now: python evaluate.py table --checkpoint {run}/isa.pt")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: features that are half done are removed
    try:
        train(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted before the first step; nothing was written")
