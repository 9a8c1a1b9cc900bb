"""Train ISA on a folder of unlabeled images.

    python train.py                                     # the pocket world, from nothing, on a laptop (about 5 minutes)
    python train.py --preset paper --blip model_base.pth --vocab vocab.txt --images cc3m/ --encoder efficientnet_b2
    torchrun --nproc_per_node 4 train.py --preset paper ...     # four GPUs or processes, the same --batch shared out among them

BLIP is frozen: its v and F^v of every image are computed once and stored, or at every step where they would not fit (--cache). The
loop then trains only the query model, so that the sentence it speaks of an image is, for BLIP, a description of that image. Writes
runs/NAME/isa.pt (the query side, all that evaluation needs), runs/NAME/last.pt (to resume from) and runs/NAME/log.jsonl.
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from signal import SIGTERM

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import baselines
import blip_lite
import isa
import query_side
from plumbing.command import ignore_signals, note_signals, run_command
from plumbing.files import check_folder, cut_log, explained
from plumbing.options import check_lengths, check_options
from plumbing.precision import autocast, keep_freed_memory, pick_precision, round_frozen_weights
from plumbing.processes import agree, from_the_first, gather, join_processes, process, wait_for_all
from plumbing.training_data import TrainingImages, batches, open_images
from pocket import world
from query_side.query_model import MAPPERS, build_query_model, read_checkpoint, resume, save, step_of

PRESETS = {
    "pocket": dict(blip="pocket", images="data/pocket/train", encoder="pocketnet", image_size=None, epochs=4, batch=128,
                   lr=2e-3, crop=1.0, flip=False, randaugment=0, name="pocket", cache="full"),
    "paper": dict(blip=None, images=None, encoder="efficientnet_b2", image_size=224, epochs=20, batch=320, lr=3e-4, crop=0.5,
                  flip=True, randaugment=5, name="paper", pretrained="imagenet", cache="none"),
}  # fmt: skip


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--preset", choices=PRESETS, default="pocket", help="the defaults of what follows: a laptop's or the paper's")
    data = p.add_argument_group("data and frozen BLIP")
    data.add_argument("--images", help="folder of images and of .tar shards, searched with its sub-folders; only pixels are read")
    data.add_argument("--blip", help='"pocket", a Salesforce .pth, or a Hugging Face folder or file')
    data.add_argument("--vocab", help="BERT's vocab.txt, where it does not lie beside the checkpoint")
    data.add_argument("--image-size", type=int, help="side in pixels that BLIP sees (default: the checkpoint's; paper: 224)")
    data.add_argument("--cache", choices=("none", "global", "full"), help="what to store: nothing, v (512 B an image), or v and "
                      "F^v (0.30 MB, for ViT-B at 224 px); what is missing is computed at every step. global is for --loss gcd")
    data.add_argument("--cache-dir", default="cache", help="folder for what is stored")
    data.add_argument("--shuffle-buffer", type=int, default=100_000, help="images whose order is mixed at a time: fewer keep reads "
                      "close together, for shards on slow or distant disks; the numbers are held, not the images")
    data.add_argument("--skip-bad-images", action="store_true", help="go on even if more than 1 %% of the images are damaged")
    query = p.add_argument_group("query model")
    query.add_argument("--encoder", choices=query_side.NAMES, help="the light network; blip = BLIP's own, frozen (Sym, "
                       "Tables 2-4); blip-tuned = a trained copy of it (Table 7, dagger); blip-v = BLIP's v alone (Pic2Word)")
    query.add_argument("--query-size", type=int, help="side in pixels that the light network sees (default: its own)")
    query.add_argument("--pretrained", help='"imagenet", or a state dict for the encoder; the paper starts from ImageNet')
    query.add_argument("--no-pretrained", dest="pretrained", action="store_const", const=None, help="random start (* in Table 6)")
    query.add_argument("--mapper", choices=MAPPERS, default="atl", help="adaptive token learner, simple tokenizer, the learner "
                       "without cross- or self-attention, or one word by an MLP with --tokens 1 (Tables 5, 11, 18-20)")
    query.add_argument("--tokens", type=int, default=6, help="L, the length of the sentence (Figure 3)")
    query.add_argument("--prompt", default="a photo of", help="what precedes the sentence tokens")
    query.add_argument("--gallery", choices=("blip", "query"), default="blip", help="whose features the gallery has: BLIP's, "
                       "or those of the query side's own encoder, which then is trained for both (Tables 7, 13)")
    recipe = p.add_argument_group("recipe")
    recipe.add_argument("--loss", choices=("gcd+lar", "gcd", "lar", "gcd+llm"), default="gcd+lar", help="Eq. 8, one term of it, or "
                        "SEARLE's text regularization in place of LAR (Tables 8, 14)")
    recipe.add_argument("--lar-weight", type=float, default=1.0, help="of LAR beside GCD; the paper's Eq. 8 has 1")
    recipe.add_argument("--sentences", default="pocket/sentences.json", help="for gcd+llm: JSON, concept -> list of sentences")
    recipe.add_argument("--epochs", type=int, help="a quarter is linear warm-up, the rest cosine annealing")
    recipe.add_argument("--batch", type=int, help="images a step, of all processes together: more negatives for GCD, more memory")
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
    run.add_argument("--compile", action="store_true", help="torch.compile the query model: minutes at first, then faster on CUDA")
    run.add_argument("--threads", type=int, default=0, help="CPU threads (0 = all); 1 where several trainings share a machine")
    run.add_argument("--workers", type=int, default=1, help="processes that decode and augment images, for each torchrun process")
    run.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    preset = p.parse_known_args(argv)[0].preset
    p.set_defaults(**PRESETS[preset])
    args = p.parse_args(argv)
    check_options(p, args, epochs=1, batch=2, tokens=1, save_every=1, randaugment=0, threads=0, workers=0, weight_decay=0, seed=0,
                  shuffle_buffer=1, query_size=1, lar_weight=0)  # fmt: skip
    if args.lr <= 0 or not 0 < args.crop <= 1:
        p.error(f"--lr has to be positive and --crop in (0, 1], not {args.lr} and {args.crop}")
    if args.mapper == "mlp" and args.tokens != 1:
        p.error(f"--mapper mlp makes one word: give --tokens 1, not {args.tokens}")
    if args.seed >= 2**32:
        p.error(f"--seed has to be below {2**32}, not {args.seed}")
    if args.randaugment > 30:
        p.error(f"--randaugment has to be at most 30, not {args.randaugment}")
    for name in ("blip", "images"):
        if getattr(args, name) is None:
            p.error(f"--preset {preset} needs --{name}")
    return args


def learning_rate(step, steps, peak):
    """Section 4.1: 5 of 20 epochs linear warm-up, then cosine annealing to zero; the same shape for any length."""
    warmup = steps // 4
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(args):
    """-> the number of the signal that stopped the run, or 0. Raises ValueError and OSError for what the user can mend."""
    args.device = join_processes(args.device)
    run, device = Path("runs") / args.name, torch.device(args.device)
    if (run / "last.pt").exists() and not (args.resume or args.overwrite):
        raise ValueError(f"{run} already holds a training; go on with --resume, replace it with --overwrite or give another --name")
    check_folder(run)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    rank, processes = process()
    if args.batch % processes:
        raise ValueError(f"--batch {args.batch} cannot be shared out among {processes} processes; give a multiple of {processes}")
    sentences = baselines.read_sentences(args.sentences) if args.loss == "gcd+llm" else None
    blip = blip_lite.load(args.blip, vocab=args.vocab, image_size=args.image_size, device=device)
    precision = from_the_first(pick_precision(device)) if args.precision == "auto" else args.precision  # which is timed
    if args.resume and (run / "last.pt").exists() and args.precision == "auto":
        precision = read_checkpoint(run / "last.pt")["settings"]["precision"]
    torch.manual_seed(args.seed)
    query_model = build_query_model(vars(args), blip, args.pretrained).to(device).train()  # before BLIP's weights are rounded
    round_frozen_weights(blip, precision)
    settings = {**vars(args), "precision": precision}
    if rank == 0:
        print(" ".join(f"{k}={v}" for k, v in settings.items()))
        if args.resume and not (run / "last.pt").exists():
            print(f"{run}/last.pt is not there: nothing to resume, training starts at step 0")
    check_lengths(blip, args.prompt, args.tokens, [("--prompt with --tokens", "")])  # now: to store features may take hours

    if process()[0] == 0 and args.images == PRESETS["pocket"]["images"]:
        world.ensure(Path(args.images).parent)
    images, features, bad = open_images(args, blip, precision)
    count = len(images) - len(bad)
    batch = min(args.batch, count // processes * processes)
    if batch < 2 * processes:
        raise ValueError(f"{args.images}: holds {count} readable images, training needs at least two for each process")
    steps = args.epochs * (count // batch)
    needs_maps = "lar" in args.loss
    looks = args.gallery == "blip" and (args.cache == "none" or (args.cache == "global" and needs_maps))  # BLIP, at every step
    if args.loss == "gcd+llm":
        text_regularization = baselines.TextRegularization(blip, sentences, precision=precision)

    parameters = [p for p in query_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    first = 0
    if args.resume and (run / "last.pt").exists():
        first = resume(run, settings, blip.fingerprint, count, query_model, optimizer)
    speak = torch.compile(query_model) if args.compile else query_model
    if processes > 1:  # averages gradients over the processes; batch-norm statistics stay each process's own, the first's are kept
        speak = DistributedDataParallel(speak, [device] if device.type == "cuda" else None)
    if rank == 0:
        size = sum(p.numel() for p in parameters) / 1e6
        print(f"{size:.2f} M trained parameters on the query side, {count} images, steps {first}..{steps}")
        run.mkdir(parents=True, exist_ok=True)
        cut_log(run / "log.jsonl", first)

    checkpoint = partial(save, run, settings=settings, fingerprint=blip.fingerprint, images=count, query_model=query_model,
                         optimizer=optimizer)  # fmt: skip
    if rank == 0 and first and step_of(run / "isa.pt") != first:  # killed between the two files
        checkpoint(first)
    stop = note_signals(at_once=processes == 1)  # they end the training after the step in hand; torchrun sends its own besides
    preprocess = partial(blip_lite.to_pixels, image_size=blip.image_size, mean=blip_lite.MEAN, std=blip_lite.STD)
    data = TrainingImages(images, query_model.encoder, args, features, preprocess if looks else None)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=batches(count, bad, batch, args.seed, first, steps, args.shuffle_buffer, rank, processes),
        collate_fn=data.batch, num_workers=args.workers, pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )  # fmt: skip
    bar = tqdm(loader, total=steps, initial=first, desc="training", disable=True if rank else None)
    damaged, began = set(), time.time()
    for step, sample in enumerate(bar, start=first):
        if "hopeless" in sample:
            raise ValueError(f"a hundred damaged images follow each other, the first: {sample['hopeless']}")
        torch.manual_seed((args.seed * 1_000_003 + step) * processes + rank)  # LAR's negatives
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        pixels, blip_pixels, v, F_v = (  # b = B / processes images; the copies to a GPU go on beside what it computes
            None if x is None else x.to(device, non_blocking=True) for x in map(sample.get, ("pixels", "blip_pixels", "v", "F_v"))
        )
        if looks:
            with torch.no_grad(), autocast(device, precision):
                v, F_v = blip.encode_image(blip_pixels, cls_only=not needs_maps)  # [b, E], [b, 1+N, D]

        with autocast(device, precision):
            if args.gallery == "query":
                U, v, F_v = speak(pixels)
            else:
                U = speak(pixels)  # [b, L, d_w]
            words, mask = isa.compose_query(blip, U, prompt=args.prompt)
            t = blip.encode_text(words, mask)  # [b, E]
        gcd = isa.global_contrastive_distillation(gather(v.float()), gather(t), blip.temperature)  # of all B, the same everywhere
        lar = llm = torch.zeros((), device=device)
        matched = float("nan")
        if needs_maps and torch.isfinite(gcd):
            with autocast(device, precision):  # negatives within the process, as in BLIP's own pre-training
                lar, logits, labels = isa.local_alignment_regularization(blip, words, mask, F_v.float(), v, t, return_logits=True)
            matched = (logits.argmax(1) == labels).float().mean()
        if args.loss == "gcd+llm":
            with autocast(device, precision):
                llm = text_regularization(U, v.float())
        # Eq. 8. The gradients are averaged over the processes, but the parts of GCD's (see gather) are to be added up
        loss = (gcd * processes if "gcd" in args.loss else 0) + args.lar_weight * lar + llm

        gcd, lar, llm, matched, stopped = agree(gcd.detach(), lar.detach(), llm.detach(), matched, len(stop))
        total = (gcd if "gcd" in args.loss else 0) + args.lar_weight * lar + llm
        if not math.isfinite(gcd + lar + llm):
            raise ValueError(f"the loss is {gcd + lar + llm} at step {step}; lower --lr and start anew with --overwrite")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        row = {"loss": total, "gcd": gcd}
        row |= {"lar": lar, "matched": matched} if needs_maps else {"llm": llm} if args.loss == "gcd+llm" else {}
        for i, why in sample["damaged"].items():
            print(f"skipped: {why}", file=sys.stderr)
            damaged.add(i)
        if len(damaged) > max(10, 0.01 * (step + 1 - first) * batch / processes) and not args.skip_bad_images:
            counts = f"{len(damaged)} images, more than 1 %, were damaged or gone up to step {step + 1}"
            raise ValueError(f"{counts}; mend them, or go on without them by --skip-bad-images")
        speed = (step + 1 - first) * batch / (time.time() - began)
        bar.set_postfix({k: f"{x:.3f}" for k, x in row.items()} | {"img/s": round(speed)}, refresh=False)
        if rank == 0 and ((step + 1) % 20 == 0 or step + 1 == steps):
            row = {"step": step + 1, "images_per_s": round(speed), **{k: round(x, 4) for k, x in row.items()}}
            with explained(run / "log.jsonl"), (run / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if rank == 0 and ((step + 1) % args.save_every == 0 or step + 1 == steps or stopped):
            checkpoint(step + 1)
        if stopped and step + 1 < steps:
            if rank == 0:
                print(f"\nstopped after step {step + 1}; --resume goes on from {run}/last.pt")
            wait_for_all()  # torchrun ends the others as soon as one has ended
            return stop[0] if stop else SIGTERM
    if rank == 0:
        print(f"wrote {run}/isa.pt after {time.time() - began:.0f} s; now: python evaluate.py table --checkpoint {run}/isa.pt")
    return stop[0] if stop else 0


if __name__ == "__main__":
    run_command("train.py", train, parse_args())
