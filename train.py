"""Train ISA on a folder of unlabeled images.

    python train.py                             # the pocket world, from nothing, on a laptop
    python train.py --preset paper --blip model_base.pth --vocab vocab.txt --images cc3m/
    torchrun --nproc_per_node 4 train.py --preset paper ...       # four GPUs share each batch

BLIP is frozen. Only the query model is trained, so that the sentence it makes of an image is, to
BLIP, a description of that image. Writes runs/NAME/isa.pt (the query side, all that evaluation
needs), runs/NAME/last.pt (to resume from) and runs/NAME/log.jsonl.
"""

import argparse
import math
import time
from pathlib import Path
from signal import SIGTERM

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import baselines
import isa
import query_side
from plumbing.command import note_signals, run_command
from plumbing.files import check_folder, cut_log, log_row
from plumbing.options import add_shared_options, check_lengths, check_options
from plumbing.pieces import in_pieces, warn_of_memory
from plumbing.precision import autocast, compiled, open_blip, round_frozen_weights
from plumbing.processes import agree, gather, join_processes, process, wait_for_all
from plumbing.training_data import TrainingData
from pocket import world
from query_side.query_model import build_query_model, read_checkpoint, resume_run, save_run

PRESETS = {
    "pocket": dict(images="data/pocket/train", encoder="pocketnet", name="pocket", cache="full",
                   epochs=4, batch=128, lr=2e-3, crop=1.0, flip=False, randaugment=0),
    "paper": dict(blip=None, image_size=224, encoder="efficientnet_b2", pretrained="imagenet",
                  name="paper", cache="none", epochs=20, batch=320, lr=3e-4, crop=0.5, flip=True,
                  randaugment=5),  # section 4.1
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="pocket", help="where defaults come from")
    add = add_shared_options(p.add_argument_group("frozen BLIP and data"), "--blip", "--clip",
                             "--vocab", "--image-size", "--cache-dir")
    add("--images", help="folder of images and .tar shards, with its sub-folders; pixels only")
    add("--cache", choices=("none", "global", "full"), help="store nothing, v (512 B an image; "
        "enough for --loss gcd), or v and F^v (0.30 MB for ViT-B); BLIP computes the rest")
    add("--shuffle-buffer", type=int, default=100_000, help="images shuffled at a time")
    add("--skip-bad-images", action="store_true", help="continue if over 1 %% are damaged")
    add = p.add_argument_group("query model").add_argument
    add("--encoder", choices=query_side.NAMES, help="the light network; or BLIP's: blip is frozen "
        "(Sym, Tables 2-4), blip-tuned a trained copy (Table 7), blip-v gives v (Pic2Word)")
    add("--query-size", type=int, help="side in pixels that it sees (default: its own)")
    add("--pretrained", help='"imagenet" (as in the paper), "pocket" (pocketnet) or a state dict')
    add("--no-pretrained", dest="pretrained", action="store_const", const=None, help="* in Table 6")
    add("--mapper", choices=query_side.MAPPERS, default="atl", help="adaptive token learner, simple"
        " tokenizer, a learner less one attention, or an MLP's one word (Tables 5, 11, 18-20)")
    add("--tokens", type=int, default=6, help="L, the length of the sentence (Figure 3)")
    add("--prompt", default="a photo of", help="words before the sentence tokens")
    add("--gallery", choices=("blip", "query"), default="blip", help="who encodes it: BLIP, or the "
        "query side's encoder, then trained for both sides (Tables 7, 13)")
    add = p.add_argument_group("recipe").add_argument
    add("--loss", choices=("gcd+lar", "gcd", "lar", "gcd+llm"), default="gcd+lar",
        help="Eq. 8, one of its terms, or SEARLE's text regularization for LAR (Tables 8, 14)")
    add("--lar-weight", type=float, default=1.0, help="of LAR beside GCD; 1 in Eq. 8")
    add("--temperature", type=float, help="tau of Eq. 5, not printed (default: BLIP's own)")
    add("--sentences", default="pocket/sentences.json", help="gcd+llm: {concept: [sentences]}")
    add("--epochs", type=int, help="a quarter is linear warm-up, the rest cosine annealing")
    add("--batch", type=int, help="images a step, over all processes; larger: more negatives")
    add("--micro-batch", type=int, help="images computed at a time: less memory, more time")
    add("--lr", type=float, help="AdamW's peak; short runs need more than the paper's 3e-4")
    add("--weight-decay", type=float, default=0.05, help="BLIP's; the paper prints none")
    add("--crop", type=float, help="smallest area that a random crop keeps; 1 = no cropping")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror; breaks left and right")
    add("--randaugment", type=int, help="strength (0-30), without colour operations; 0 = none")
    add("--seed", type=int, default=0, help="weights, order, augmentation, negatives")
    add = add_shared_options(p.add_argument_group("run"), "--device", "--precision", "--workers",
                             "--threads")
    add("--name", help="the run's folder is runs/NAME")
    add("--resume", action="store_true", help="from runs/NAME/last.pt, to bit-identical weights")
    add("--overwrite", action="store_true", help="start again although runs/NAME holds a run")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--compile", action="store_true", help="torch.compile the query model; pays on CUDA")
    p.set_defaults(**PRESETS[p.parse_known_args(argv)[0].preset])
    args = p.parse_args(argv)
    check_options(p, args, epochs=1, batch=2, micro_batch=1, tokens=1, save_every=1, randaugment=0,
                  weight_decay=0, shuffle_buffer=1, query_size=1, lar_weight=0, temperature=1e-3)
    if args.lr <= 0 or not 0 < args.crop <= 1:
        p.error(f"--lr has to be positive and --crop in (0, 1], not {args.lr} and {args.crop}")
    for name in ("blip", "images"):
        if getattr(args, name) is None and (name == "images" or not args.clip):
            p.error(f"--preset {args.preset} needs --{name}")
    return args


def learning_rate(step, steps, peak):
    """Section 4.1: linear warm-up for 5 of 20 epochs, then cosine annealing to 0; any length."""
    warmup = steps // 4
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def prepare(args):
    """-> the run's folder, settings, blip, query_model, data; what can fail fails here, early."""
    settings, run = {**vars(args), "device": join_processes(args.device)}, Path("runs") / args.name
    rank, processes = process()
    begun = (run / "last.pt").exists()
    if begun and not (args.resume or args.overwrite):
        raise ValueError(f"{run} already holds a run; continue it with --resume, replace it with "
                         "--overwrite or give another --name")
    check_folder(run)
    blip, settings["precision"] = open_blip(settings, round_weights=False)
    if begun and args.resume and args.precision == "auto":  # this machine may be another one
        settings["precision"] = read_checkpoint(run / "last.pt")["settings"].get("precision")
    torch.manual_seed(args.seed)
    query_model = build_query_model(settings, blip, args.pretrained).to(settings["device"]).train()
    round_frozen_weights(blip, settings["precision"])  # now that blip-tuned has its copy
    check_lengths(blip, args.prompt, args.tokens, [("--prompt with --tokens", "")])
    if rank == 0:
        print(" ".join(f"{k}={v}" for k, v in settings.items()))
        if args.resume and not begun:
            print(f"{run}/last.pt is missing: nothing to resume, training starts at step 0")
        if args.images == PRESETS["pocket"]["images"]:
            world.ensure(Path(args.images).parent)
    data = TrainingData(settings, blip, query_model.encoder)
    warn_of_memory(settings, blip, query_model, data.batch // processes)
    return run, settings, blip, query_model, data


def train(args):
    """-> the number of the signal that stopped the run, or 0. ValueError: what the user can fix."""
    asked = args.loss.split("+")
    sentences = baselines.read_sentences(args.sentences) if "llm" in asked else None
    run, settings, blip, query_model, data = prepare(args)
    device, precision, (rank, processes) = blip.temp.device, settings["precision"], process()
    if sentences:
        text_regularization = baselines.TextRegularization(blip, sentences, precision=precision)
    parameters = [p for p in query_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    weights = {"gcd": float("gcd" in asked), "lar": args.lar_weight, "llm": 1.0}
    state = settings, blip, data.count, query_model, optimizer
    first = resume_run(run, *state) if args.resume and (run / "last.pt").exists() else 0
    speak = compiled(query_model, device) if args.compile else query_model
    speak = in_pieces(speak, blip, args.micro_batch)
    if processes > 1:  # averages gradients; a batch-norm sees its process's images alone
        speak = DistributedDataParallel(speak, [device] if device.type == "cuda" else None)
    if rank == 0:
        print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters on the query "
              f"side, {data.count} images, steps {first}..{data.steps}")
        run.mkdir(parents=True, exist_ok=True)
        cut_log(run / "log.jsonl", first)
        if first:  # a kill may have come between last.pt and isa.pt
            save_run(run, first, *state)
        else:  # of a run that --overwrite replaces
            (run / "last.pt").unlink(missing_ok=True)

    tau = args.temperature or blip.temperature
    began, stop = time.time(), note_signals(at_once=processes == 1)
    bar = tqdm(data.from_step(first), "training", data.steps, initial=first, disable=rank or None)
    for step, (pixels, v, F_v) in enumerate(bar, start=first):
        torch.manual_seed((args.seed * 1_000_003 + step) * processes + rank)  # LAR's negatives
        optimizer.param_groups[0]["lr"] = learning_rate(step, data.steps, args.lr)

        with autocast(device, precision):
            U = speak(pixels)  # [b, L, d_w], b = B / processes
            if args.gallery == "query":  # both sides trained: v and F^v are its own
                U, v, F_v = U
            words, mask = isa.compose_query(blip, U, prompt=args.prompt)
            t = blip.encode_text(words, mask)  # [b, E]; gathered, [B, E]
        terms, seen = {"gcd": isa.global_contrastive_distillation(gather(v), gather(t), tau)}, {}
        with autocast(device, precision):
            if "lar" in asked and terms["gcd"].isfinite():  # no negatives can be drawn from NaN
                terms["lar"], logits, labels = isa.local_alignment_regularization(
                    blip, words, mask, F_v.float(), v, t, return_logits=True)
                seen["matched"] = (logits.argmax(1) == labels).float().mean()
            if sentences:
                terms["llm"] = text_regularization(U, v)
        loss = sum(weights[name] * term for name, term in terms.items())  # Eq. 8

        row = {"loss": loss, **terms, **seen}
        *means, stopped = agree(*row.values(), len(stop))
        row = dict(zip(row, means, strict=True))
        if not math.isfinite(row["loss"]):
            raise ValueError(f"the loss is {row['loss']} at step {step}; lower --lr and start "
                             "again with --overwrite")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        done, speed = step + 1, (step + 1 - first) * data.batch / (time.time() - began)
        bar.set_postfix({**row, "img/s": speed}, refresh=False)
        if rank == 0 and (done % 20 == 0 or done == data.steps):
            log_row(run / "log.jsonl", {"step": done, "images_per_s": round(speed), **row})
        if rank == 0 and (done % args.save_every == 0 or done == data.steps or stopped):
            save_run(run, done, *state)
        if stopped and done < data.steps:
            if rank == 0:
                print(f"\nstopped after step {done}; --resume continues from {run}/last.pt")
            wait_for_all()  # torchrun ends the others as soon as one has ended
            return stop[0] if stop else SIGTERM
    if rank == 0:
        print(f"wrote {run}/isa.pt after {time.time() - began:.0f} s; now: "
              f"python evaluate.py table --checkpoint {run}/isa.pt")
    return stop[0] if stop else 0


def interrupted(args):
    last = Path("runs") / args.name / "last.pt"
    return "interrupted; " + (f"--resume continues from {last}" if last.exists() else
                              "no checkpoint was written; stored features are kept")


if __name__ == "__main__":
    run_command("train.py", train, parse_args(), interrupted)
