"""Every row of the paper's tables as a training run and an evaluation."""

import os
import shlex
import signal
import subprocess
import sys
import time
from json import loads
from pathlib import Path

from tqdm import tqdm

import evaluate
import query_side
import train
from baselines import searle as searle_script
from paper.numbers import TABLES

ROOT = Path(__file__).resolve().parents[1]
COSTS, FIGURES = ("1", "17"), ("fig4", "fig5", "fig6", "fig7", "fig8")
ALL = ("1", *map(str, range(2, 17)), "17", "18", "19", "20", "fig3", "lar", *FIGURES)


ENCODERS = ("efficientnet_b0", "efficientnet_b2", "efficientvit_m2", "mobilenet_v2", "mobilevitv2_100")


IMAGENET = {  # torchvision fetches its own; the others' files (see light_encoders.py) have to be put there
    "efficientnet_b0": "imagenet", "efficientnet_b2": "imagenet", "mobilenet_v2": "imagenet",
    "efficientvit_m2": "weights/efficientvit_m2.pth", "mobilevitv2_100": "weights/mobilevitv2_100.pth",
}  # fmt: skip


# name -> options of train.py; whatever they do not say is train.py's default, so all rows have the same images and steps.
RUNS = {
    "isa": [],
    "mlp": ["--mapper", "mlp", "--tokens", "1"],  # one word, as Pic2Word's, with LAR
    "st": ["--mapper", "st"],
    "atl-no-ca": ["--mapper", "atl-no-ca"],
    "atl-no-sa": ["--mapper", "atl-no-sa"],
    "tokens-2": ["--tokens", "2"],
    "tokens-10": ["--tokens", "10"],
    "gcd": ["--loss", "gcd"],
    "lar": ["--loss", "lar"],
    "gcd+llm": ["--loss", "gcd+llm"],
    "gcd-twice": ["--loss", "gcd", "--epochs", "2"],  # a step of GCD + LAR takes 1.5 times that of GCD (README)
    "isa-full": ["--epochs", "4"],  # as long as `python train.py`: does LAR pay later?
    "gcd-full": ["--loss", "gcd", "--epochs", "4"],
    "gcd-six": ["--loss", "gcd", "--epochs", "6"],  # as long by the clock
    "lar-weight-0.3": ["--lar-weight", "0.3"],
    "lar-weight-3": ["--lar-weight", "3"],
    "sym": ["--encoder", "blip"],  # BLIP's encoder, frozen, under the learner
    "blip-dagger": ["--encoder", "blip-tuned"],  # a copy of it is trained on the query side, the gallery's stays as it is
    "light-light": ["--gallery", "query"],  # both sides trained: "multi-task"
    "blip-blip": ["--encoder", "blip-tuned", "--gallery", "query"],
    "pic2word": ["--encoder", "blip-v", "--mapper", "mlp", "--tokens", "1", "--loss", "gcd"],
    "searle": ["--count", "1500"],  # the second stage of SEARLE, by baselines.py: see training
    **{name: ["--encoder", name, "--query-size", "96"] for name in ENCODERS},
    **{f"{name}-imagenet": ["--encoder", name, "--query-size", "96", "--pretrained", IMAGENET[name]] for name in ENCODERS},
}


BUDGET = ["--epochs", "1"]  # of every training here, a quarter of `python train.py`: eighty runs have to be affordable


ONE_SEED = {"lar-weight-0.3", "lar-weight-3"}  # trends, not rows of the paper


WEIGHTS = {f"{name}-imagenet" for name in ENCODERS}  # run with --imagenet only


UNTRAINED = {  # folder below runs/tables -> methods of evaluate.py
    "baselines": ["image", "text", "image+text", "0.5image+text", "reference caption", "target caption"],
    "searle-oti": ["searle-oti"],
}


def folder(run, seed=None):
    return Path("runs/tables") / (run if seed is None else f"{run}-{seed}")


def folder_of(method):
    """The entry of UNTRAINED that a method belongs to, else None."""
    return next((run for run, methods in UNTRAINED.items() if method in methods), None)


def training(run, seed, threads=0):
    """The command that trains one run, without the interpreter; None for what needs no training."""
    if run in UNTRAINED:
        return None
    script = ["-m", "baselines.searle", *RUNS[run]] if run == "searle" else ["train.py", *BUDGET, *RUNS[run]]
    some = ["--threads", str(threads)] if threads else []
    return [*script, "--seed", str(seed), "--name", f"tables/{run}-{seed}", *some]


def evaluation(run, seed, split):
    """The command that evaluates one run on the three benchmarks of the pocket world, and the file that it writes."""
    where = folder(run, seed)
    out = where / ("table.json" if split == "test" else f"table_{split}.json")
    what = ["--methods", *UNTRAINED[run]] if run in UNTRAINED else ["--methods", "isa", "--checkpoint", str(where / "isa.pt")]
    return ["evaluate.py", "table", "--split", split, *what, "--json", str(out), "--picture", ""], out


def needed(names, seeds, imagenet=False):
    """Names of tables and figures -> {(run, seed): splits to be evaluated}; seed None = untrained."""
    found = {}
    for name in names:
        rows = [row[1] for row in TABLES[name].rows] if name in TABLES else FIGURE_RUNS.get(name, ())
        for ours in rows:
            if ours in RUNS and (imagenet or ours not in WEIGHTS):
                some = [(ours, seed) for seed in (seeds[:1] if ours in ONE_SEED or name in FIGURES else seeds)]
            else:
                some = [(folder_of(ours), None)] if folder_of(ours) else []
            for run in some:
                splits = found.setdefault(run, [])
                if name in TABLES and TABLES[name].split not in splits:
                    splits.append(TABLES[name].split)
    return found


def trained(run, seed, fingerprint):
    """How far the training of a run is: "done", "begun" (or not begun), or "other": by other options or against another BLIP."""
    path = folder(run, seed) / "isa.pt"
    if not path.exists():
        return "begun"
    checkpoint, command = query_side.read_checkpoint(path), training(run, seed)
    parse_args, usual = (searle_script.parse_args, []) if run == "searle" else (train.parse_args, [])
    wanted, usual = vars(parse_args(command[1 if command[0] == "train.py" else 2 :])), vars(parse_args(usual))
    fixed = wanted.keys() - query_side.MAY_CHANGE - {"precision", "command", "run"}
    settings = {**usual, **checkpoint["settings"]}  # a checkpoint may be older than an option
    if checkpoint["blip"] != fingerprint or any(settings[name] != wanted[name] for name in fixed):
        return "other"
    if run == "searle":
        return "done"  # written once, at its end
    steps = wanted["epochs"] * (checkpoint["images"] // min(wanted["batch"], checkpoint["images"]))
    return "done" if checkpoint["step"] >= steps else "begun"


def read_results(path):
    """What `evaluate.py table` wrote -> dict."""
    try:
        content = loads(path.read_text())
        return {"settings": {**content["settings"]}, "results": {**content["results"]}}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: is damaged; delete it, it is then made again") from None


def evaluated(run, seed, split, fingerprint):
    """Whether the run's table is there, of the same methods, and not older than its checkpoint."""
    command, out = evaluation(run, seed, split)
    if not out.exists():
        return False
    settings, wanted = read_results(out)["settings"], vars(evaluate.parse_args(command[1:]))
    checkpoint = folder(run, seed) / "isa.pt"
    same = all(settings.get(name) == wanted[name] for name in ("methods", "split", "checkpoint"))
    newer = run in UNTRAINED or out.stat().st_mtime >= checkpoint.stat().st_mtime
    return same and newer and settings["blip_fingerprint"] == fingerprint


def missing(run, seed, splits, fingerprint, threads=0):
    """The commands that are still to be run for one run: training and evaluations, or none."""
    command = training(run, seed, threads)
    state = trained(run, seed, fingerprint) if command else "done"
    splits = [split for split in splits if state != "done" or not evaluated(run, seed, split, fingerprint)]
    commands = [evaluation(run, seed, split)[0] for split in splits]
    if state == "other":
        return [[*command, "--overwrite"], *commands]
    if state == "begun":
        return [[*command, *(["--resume"] if command[0] == "train.py" else [])], *commands]
    return commands


def shown(command):
    return f"python {shlex.join(command)}"


def call(command, log, threads=0):
    """One script in a process of its own; what it prints goes to the end of `log`, and after it the seconds that it took.

    Raises ValueError where it fails. Ctrl-C is passed on once, and waited for: train.py then saves and ends after the step in hand.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    began = time.time()
    with log.open("a") as out:
        print("$", shown(command), file=out, flush=True)
        child = subprocess.Popen([sys.executable, *([] if command[0] == "-m" else [str(ROOT / command[0])]), *command[command[0] != "-m" :]], stdout=out, stderr=subprocess.STDOUT,
                                 env=environment, start_new_session=True)  # fmt: skip
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
        finally:
            if child.poll() is None:  # Ctrl-C for the second time
                child.kill()
            print(f"tables.py: {time.time() - began:.0f} s", file=out)
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise ValueError(f"`{shown(command)}` was stopped from outside; the same command goes on")
    if status:
        raise ValueError(f"`{shown(command)}` failed; its last words are in {log}")


def run_missing(names, args, fingerprint):
    """Run what the tables need and what is not there yet, one process at a time. -> one line for each run that failed."""
    runs = needed(names, args.seeds, args.imagenet).items()
    waiting = [(run, seed, splits) for (run, seed), splits in runs if missing(run, seed, splits, fingerprint)]
    failures = []
    for run, seed, splits in tqdm(waiting, desc="runs", disable=None):
        try:
            for command in missing(run, seed, splits, fingerprint, args.threads):
                tqdm.write(f"$ {shown(command)}")
                call(command, folder(run, seed) / "log.txt", args.threads)
        except ValueError as error:  # the others go on: a night should not be lost to one row
            failures.append(str(error))
            tqdm.write(f"tables.py: {error}")
    return failures


LAR_RUNS = {"gcd": "GCD", "isa": "GCD + LAR", "lar": "LAR", "gcd-twice": "GCD, twice the steps", "lar-weight-0.3": "GCD + 0.3 LAR",
            "lar-weight-3": "GCD + 3 LAR", "gcd-full": "GCD, four epochs", "isa-full": "GCD + LAR, four epochs",
            "gcd-six": "GCD, six epochs"}  # fmt: skip


FIGURE_RUNS = {"fig4": ("tokens-2", "isa", "tokens-10"), "fig5": ("isa",), "fig6": ("isa",), "fig7": ("tokens-2", "isa"),
               "fig8": ("isa", "tokens-10"), "lar": tuple(LAR_RUNS)}  # fmt: skip
