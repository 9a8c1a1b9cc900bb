"""The runs behind the tables: their commands, which of those are missing, and running them.

A run is `train.py` with options from runs.md, in runs/tables/NAME-SEED, then `evaluate.py table`.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from functools import cache
from json import loads
from pathlib import Path

from tqdm import tqdm

import clip_lite
import evaluate
import query_side
import train
from baselines import searle
from paper.numbers import METHODS, RUNS

ROOT = Path(__file__).resolve().parents[1]
HOME = Path("runs/tables")
ONE_SEED = {"lar-weight-0.3", "lar-weight-3"}  # trends, not rows of the paper
FOLDERS = {f"clip {method}" if run == "clip" else method: run
           for run, methods in METHODS.items() for method in methods}


def folder(run, seed=None):
    return HOME / (run if seed is None else f"{run}-{seed}")


def on_clip(run):
    return run.endswith("clip")  # "clip", "pic2word-clip", "searle-clip"


@cache
def clip_fingerprint():
    return clip_lite.load("pocket").fingerprint


def seeds_of(run, seeds):
    return seeds[:1] if run in ONE_SEED else seeds


def training(run, seed, threads=0):
    """The command that trains a run of RUNS, without the interpreter."""
    script = ["-m", "baselines.searle"] if "searle" in run else ["train.py"]
    command = [*script, *RUNS[run], "--seed", str(seed), "--name", f"tables/{run}-{seed}"]
    return command + (["--threads", str(threads)] if threads else [])


def classification(run, threads=0):
    """The command, in a list, that makes the weights a run starts from, if they are missing."""
    given = dict(zip(RUNS[run], RUNS[run][1:], strict=False))  # option -> its value
    path = given.get("--pretrained", "pocket")
    if path == "pocket" or Path(path).exists():
        return []
    same = [word for name in ("--encoder", "--query-size") for word in (name, given[name])]
    command = ["-m", "pocket.classify", *same, "--out", path]
    return [command + (["--threads", str(threads)] if threads else [])]


def evaluation(run, seed, split):
    """The command that evaluates a run on the three pocket benchmarks, and the file it writes."""
    out = folder(run, seed) / ("table.json" if split == "test" else f"table_{split}.json")
    command = ["evaluate.py", "table", "--split", split, "--methods", *METHODS.get(run, ["isa"])]
    if run in RUNS:
        command += ["--checkpoint", str(folder(run, seed) / "isa.pt")]
    command += ["--clip", "pocket"] if on_clip(run) else []
    return [*command, "--json", str(out), "--picture", ""], out


def trained(run, seed, fingerprint):
    """The state of a training: "done", "begun" (or not), or "other": other options or BLIP."""
    path = folder(run, seed) / "isa.pt"
    if not path.exists():
        return "begun"
    checkpoint, command = query_side.read_checkpoint(path), training(run, seed)
    script, options = (searle, command[2:]) if "searle" in run else (train, command[1:])
    fingerprint = clip_fingerprint() if on_clip(run) else fingerprint
    wanted = vars(script.parse_args(options))
    settings = {**vars(script.parse_args([])), **checkpoint["settings"]}  # older than an option
    fixed = wanted.keys() - query_side.MAY_CHANGE - {"precision"}
    if checkpoint["blip"] != fingerprint or any(settings[name] != wanted[name] for name in fixed):
        return "other"
    if "searle" in run:
        return "done"  # it is only written at the end
    steps = wanted["epochs"] * max(1, checkpoint["images"] // wanted["batch"])
    return "done" if checkpoint["step"] >= steps else "begun"


def read_results(path):
    """What `evaluate.py table` wrote -> its "settings" and "results". Raises ValueError."""
    try:
        content = loads(path.read_text())
        return {name: {**content[name]} for name in ("settings", "results")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: is damaged; delete it, and it is computed again") from None


def evaluated(run, seed, split, fingerprint):
    """Whether results exist, of the same methods, and no older than the checkpoint."""
    command, out = evaluation(run, seed, split)
    if not out.exists():
        return False
    settings, wanted = read_results(out)["settings"], vars(evaluate.parse_args(command[1:]))
    same = all(settings.get(name) == wanted[name] for name in ("methods", "split", "checkpoint"))
    fingerprint = clip_fingerprint() if on_clip(run) else fingerprint
    newer = run in METHODS or out.stat().st_mtime >= out.with_name("isa.pt").stat().st_mtime
    return same and newer and settings.get("blip_fingerprint") == fingerprint


def missing(run, seed, splits, fingerprint, threads=0):
    """The commands that a run still needs: its encoder's weights, training, an evaluation of each
    split."""
    state = "done" if run in METHODS else trained(run, seed, fingerprint)
    commands = [evaluation(run, seed, split)[0] for split in splits
                if state != "done" or not evaluated(run, seed, split, fingerprint)]
    if state == "done":
        return commands
    how = ["--overwrite"] if state == "other" else [] if "searle" in run else ["--resume"]
    return [*classification(run, threads), training(run, seed, threads) + how, *commands]


def shown(command):
    return f"python {shlex.join(command)}"


def call(command, log, threads=0):
    """Run one command, its output and duration appended to `log`. Raises ValueError if it fails.

    Ctrl-C is passed on once and waited for: train.py saves first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}  # -m works in any current folder
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    script = command if command[0] == "-m" else [str(ROOT / command[0]), *command[1:]]
    began = time.time()
    with log.open("a") as out:
        print("$", shown(command), file=out, flush=True)
        child = subprocess.Popen([sys.executable, *script], stdout=out, stderr=subprocess.STDOUT,
                                 env=environment, start_new_session=True)
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
        finally:
            if child.poll() is None:  # a second Ctrl-C
                child.kill()
            print(f"paper: {time.time() - began:.0f} s", file=out)
    if status - 128 in (signal.SIGINT, signal.SIGTERM):
        raise ValueError(f"`{shown(command)}` was interrupted; run it again to resume")
    if status:
        raise ValueError(f"`{shown(command)}` failed; see the end of {log}")


def run_missing(runs, threads, fingerprint):
    """Run what is missing of {(run, seed): splits} in turn -> a line for each run that failed.

    A failure does not stop the others: it must not cost a night.
    """
    waiting = [key for key, splits in runs.items() if missing(*key, splits, fingerprint)]
    failures = []
    for run, seed in tqdm(waiting, desc="runs", disable=None):
        try:
            for command in missing(run, seed, runs[run, seed], fingerprint, threads):
                tqdm.write(f"$ {shown(command)}")
                call(command, folder(run, seed) / "log.txt", threads)
        except ValueError as error:
            failures.append(str(error))
            tqdm.write(f"paper: {error}")
    return failures
