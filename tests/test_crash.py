"""A training survives what a week may bring: kills, signals, full disks, weights that are no numbers, files of other versions."""

import errno
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script

import blip_lite
import isa
from blip_lite import features
from plumbing.files import replacing
from pocket import pretrain

if sys.platform != "linux":
    pytest.skip("processes are forked from a test only where that is safe", allow_module_level=True)


# ------------------------------------------------------------------------------------------------ processes to be killed
def begin(script, *options, cwd, change=lambda: None):
    """Start a script (train.py) or module (pocket.pretrain) in a process that is forked from this one, which spares it the import
    of torch, and in a session of its own. change() is called there before. What it prints is appended to cwd/out and cwd/err.
    """

    def main():
        os.setsid()
        os.chdir(cwd)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        features.KEPT_EVERY = 1
        sys.argv = [script, *map(str, options)]
        change()
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def poll(condition, process, seconds=120):
    """Wait until condition() -> whether it came true before the process ended."""
    end = time.monotonic() + seconds
    while not condition():
        if not process.is_alive():
            return False
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)
    return True


def finish(process, seconds=120):
    """-> the exit status. Nothing that a test starts may outlive it."""
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("it does not end")
    return process.exitcode


def said(cwd, name="err"):
    """What processes in cwd have printed on stderr since this was asked for last, but for progress bars."""
    path = cwd / name
    lines = [line.split("\r")[-1] for line in path.read_text().split("\n")] if path.exists() else []
    path.unlink(missing_ok=True)
    return [line for line in lines if line.strip() and "%|" not in line]


def weights(run, file="isa.pt"):
    return torch.load(run / file, weights_only=True)["query_model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def step(run, file="last.pt"):
    return torch.load(run / file, weights_only=True)["step"]


def log(run):
    """log.jsonl but for times."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "images_per_s"} for row in rows]


def check_same(run, whole):
    """Both runs ended with the same weights, the same state of the optimizer and the same log, and nothing else is there."""
    assert same(weights(run), weights(whole)) and same(weights(run, "last.pt"), weights(whole, "last.pt"))
    a, b = (torch.load(r / "last.pt", weights_only=True)["optimizer"]["state"] for r in (run, whole))
    assert a.keys() == b.keys() and all(same(a[i], b[i]) for i in a)
    assert log(run) == log(whole)
    assert {path.name for path in run.iterdir()} == {"isa.pt", "last.pt", "log.jsonl"}
    assert not [path for path in (run.parents[1] / "cache").iterdir() if ".tmp" in path.name]


def at_step(n, act):
    """-> a change: in the process's n-th step (from 1) act(loss, t) is called, and may return another loss."""
    gcd, calls = isa.global_contrastive_distillation, []

    def wrapped(v, t, temperature):
        calls.append(0)
        loss = gcd(v, t, temperature)
        if len(calls) == n:
            changed = act(loss, t)
            return loss if changed is None else changed
        return loss

    return lambda: setattr(isa, "global_contrastive_distillation", wrapped)


def exists(cwd, pattern):
    return lambda: any(cwd.glob(pattern))


# ------------------------------------------------------------------------------------------------------------- SIGKILL
def test_three_kills_change_nothing(trained, tmp_path):
    """While features are stored, while a checkpoint is written, and between steps; resumed to the end."""
    options = [*trained.options, "--name", "a", "--save-every", 1, "--resume"]
    for moment in ("cache/features-*.tmp/rows-*.json", "runs/a/.last.tmp.pt", "runs/a/isa.pt"):
        process = begin("train.py", *options, cwd=tmp_path)
        assert poll(exists(tmp_path, moment), process)
        process.kill()
        assert finish(process) == -signal.SIGKILL
    assert finish(begin("train.py", *options, cwd=tmp_path)) == 0, said(tmp_path)
    check_same(tmp_path / "runs/a", trained.run)


def stored(cwd):
    """Rows of features that are noted as stored."""
    try:
        return sum(json.loads(path.read_text())["next"] for path in cwd.glob("cache/features-*.tmp/rows-*.json"))
    except FileNotFoundError:  # the folder was given its name
        return 0


@pytest.mark.slow
def test_thirty_two_kills_change_nothing(small_world, tmp_path):
    """At random moments, with and without the workers; most of them while features are stored or a file is written."""
    shutil.copytree(small_world / "train", tmp_path / "images")
    options = ["--images", "images", "--batch", 40, "--epochs", 4, "--precision", "fp32", "--threads", 1]
    assert finish(begin("train.py", *options, "--cache-dir", "own", "--name", "whole", cwd=tmp_path), 600) == 0
    run, rng, kills, inside = tmp_path / "runs/a", random.Random(0), 0, 0
    while True:
        workers = ["--workers", rng.choice((0, 1))]
        process = begin("train.py", *options, *workers, "--name", "a", "--save-every", 1, "--resume", cwd=tmp_path)
        if kills < 3:  # each after one more batch of features
            poll(lambda goal=128 * (kills + 1): stored(tmp_path) >= goal, process)
            time.sleep(rng.random() * 0.05)
        elif kills < 32:
            if rng.random() < 0.8:  # a file is written now; with a little luck still when the signal arrives
                poll(exists(run, rng.choice((".last.tmp.pt", ".isa.tmp.pt", ".log.tmp.jsonl"))), process)
            time.sleep(rng.random() * rng.choice((0.01, 0.3)))
        else:
            process.join()
        if not process.is_alive():
            assert finish(process) == 0, said(tmp_path)
            break
        alone = rng.random() < 0.5 or os.getpgid(process.pid) != process.pid  # which it has not reached yet
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        assert finish(process) == -signal.SIGKILL, said(tmp_path)
        kills += 1
        inside += any(run.glob(".*.tmp*"))
    assert kills >= 30 and inside >= 5, (kills, inside)
    check_same(run, tmp_path / "runs/whole")


# ------------------------------------------------------------------------------------------------- Ctrl-C and SIGTERM
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])


@SIGNALS
def test_stopped_while_features_are_stored(trained, tmp_path, number):
    options = [*trained.options, "--name", "a"]
    process = begin("train.py", *options, cwd=tmp_path)
    assert poll(exists(tmp_path, "cache/features-*.tmp/rows-*.json"), process)
    os.killpg(process.pid, number)
    assert finish(process) == 128 + number
    *noise, last = said(tmp_path)  # once in many times a worker that is talked to at that moment says that nobody listens
    assert last == "train.py: interrupted; no checkpoint was written; stored features are kept"
    assert not any("KeyboardInterrupt" in line or "train.py" in line for line in noise)
    assert not (tmp_path / "runs").exists() and list(tmp_path.glob("cache/features-*.tmp/rows-*.json"))


@SIGNALS
def test_stopped_in_an_evaluation(small_world, tmp_path, number):
    options = ["--benchmark", "cirr", "--data", small_world / "cirr", "--methods", "image", "--picture", "", "--precision", "fp32"]
    process = begin("evaluate.py", "table", *options, cwd=tmp_path)
    assert poll(exists(tmp_path, "cache/features-*.tmp/rows-*.json"), process)
    os.killpg(process.pid, number)
    assert finish(process) == 128 + number
    assert said(tmp_path)[-1] == "evaluate.py: interrupted; what is stored of features is kept"
    assert not (tmp_path / "runs").exists() and list(tmp_path.glob("cache/features-*.tmp/rows-*.json"))


@SIGNALS
def test_stopped_in_training(trained, tmp_path, number):
    """To the whole process group, as Ctrl-C and `timeout` send it; --save-every is longer than the run."""
    shutil.copytree(trained.cwd / "features", tmp_path / "cache")
    options = [*trained.options, "--name", "a"]
    process = begin("train.py", *options, cwd=tmp_path, change=at_step(2, lambda *_: Path("second").touch() or time.sleep(0.3)))
    assert poll((tmp_path / "second").exists, process)
    os.killpg(process.pid, number)
    assert finish(process) == 128 + number and said(tmp_path) == []
    assert said(tmp_path, "out")[-1] == "stopped after step 2; --resume goes on from runs/a/last.pt"
    assert step(tmp_path / "runs/a") == step(tmp_path / "runs/a", "isa.pt") == 2
    assert finish(begin("train.py", *options, "--resume", cwd=tmp_path)) == 0, said(tmp_path)
    check_same(tmp_path / "runs/a", trained.run)


def test_stopped_in_the_last_step(trained, tmp_path):
    """All is done, and yet `train.py && evaluate.py` should stop."""
    shutil.copytree(trained.cwd / "features", tmp_path / "cache")
    change = at_step(4, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert finish(begin("train.py", *trained.options, "--name", "a", cwd=tmp_path, change=change)) == 128 + signal.SIGINT
    assert said(tmp_path) == [] and said(tmp_path, "out")[-1].startswith("wrote runs/a/isa.pt")
    check_same(tmp_path / "runs/a", trained.run)


def test_control_c_twice_stops_at_once(trained, tmp_path):
    """In a step that would take two minutes. SIGTERM twice does not: `timeout` sends it to the process, and to its group."""
    shutil.copytree(trained.cwd / "features", tmp_path / "cache")

    def slow(*_):
        Path("third").touch()
        for _ in range(1200):
            time.sleep(0.1)  # which a signal does not end

    options = [*trained.options, "--name", "a", "--save-every", 1]
    process = begin("train.py", *options, cwd=tmp_path, change=at_step(3, slow))
    assert poll((tmp_path / "third").exists, process)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.killpg(process.pid, number)
        process.join(0.3)
        assert process.is_alive()
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process, 20) == 128 + signal.SIGINT
    assert said(tmp_path) == ["train.py: interrupted; --resume goes on from runs/a/last.pt"]
    assert step(tmp_path / "runs/a") == step(tmp_path / "runs/a", "isa.pt") == 2


# ------------------------------------------------------------------------------------------------------------ full disks
def limited(size):
    """From now on no file of this process may grow beyond `size` bytes: what a full disk is to the one who writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("file, limit", [("last.pt", 5_000_000), pytest.param("log.jsonl", 70, marks=pytest.mark.slow)])
def test_a_full_disk_in_training(trained, tmp_path, file, limit):
    """One sentence; the checkpoint of the step before is whole; with room again --resume ends as if nothing had been."""
    shutil.copytree(trained.cwd / "features", tmp_path / "cache")
    assert trained.last.stat().st_size > 5_000_000
    options = [*trained.options, "--name", "a", "--save-every", 1]
    at = 3 if file == "last.pt" else 4
    assert finish(begin("train.py", *options, cwd=tmp_path, change=at_step(at, lambda *_: limited(limit)))) == 1
    (line,) = said(tmp_path)
    expected = f"train.py: runs/a/{file}: cannot be written (File too large); what was saved before is whole: make room"
    assert line.startswith(expected[: min(limit, len(expected))])  # the file that this is printed into is one that is cut off, too
    assert step(tmp_path / "runs/a") == at - 1
    assert finish(begin("train.py", *options, "--resume", cwd=tmp_path)) == 0, said(tmp_path)
    check_same(tmp_path / "runs/a", trained.run)


@pytest.mark.slow
def test_a_disk_that_is_really_full(trained, tmp_path):
    """A file system of 40 MB in memory: full while features are stored, then while a checkpoint is written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        encode = features._encode

        def fill(room):
            free = shutil.disk_usage(".").free
            Path("filler").write_bytes(bytes(free - room))

        def narrow(*arguments):
            fill(1_500_000)
            return encode(*arguments)

        options = [*trained.options, "--name", "a", "--save-every", 1, "--resume"]
        assert finish(begin("train.py", *options, cwd=disk, change=lambda: setattr(features, "_encode", narrow))) == 1
        (disk / "filler").unlink()
        (line,) = said(disk)
        assert "features-" in line and "cannot be written (No space left on device)" in line
        change = at_step(2, lambda *_: fill(3_000_000))
        assert finish(begin("train.py", *options, cwd=disk, change=change)) == 1
        (disk / "filler").unlink()
        (line,) = said(disk)
        assert line.startswith("train.py: runs/a/last.pt: cannot be written (No space left on device)"), line
        assert step(disk / "runs/a") == 1
        assert finish(begin("train.py", *options, cwd=disk)) == 0, said(disk)
        check_same(disk / "runs/a", trained.run)
    finally:
        subprocess.run(["umount", disk], check=True)


@contextmanager
def full_disk(limit):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    limited(limit)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("how", ["full", "interrupted", "other"])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, how):
    """torch.save fails to end its archive and tells of that alone; what the user reads is why."""
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    big = {"x": torch.zeros(1_000_000)}
    if how == "full":
        with full_disk(1_000_000), pytest.raises(ValueError) as error:
            with replacing(path) as file:
                torch.save(big, file)
        assert str(error.value).startswith(f"{path}: cannot be written ({os.strerror(errno.EFBIG)}); what was saved")
        assert "\n" not in str(error.value)
    elif how == "interrupted":

        class Interrupted:
            def __init__(self, file):
                self.file = file

            def write(self, data):
                if len(data) > 1000:
                    raise KeyboardInterrupt
                return self.file.write(data)

        with pytest.raises(KeyboardInterrupt):
            with replacing(path) as file:
                torch.save(big, Interrupted(file))
    else:
        with pytest.raises(ZeroDivisionError):
            with replacing(path):
                1 / 0  # noqa: B018
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"] and path.read_bytes() == b"old"


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """After a power cut the name leads to the old content or to the new one, never to an empty file."""
    path, done = tmp_path / "a.json", []
    path.write_bytes(b"old")
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: done.append((os.fstat(fd).st_size, path.read_bytes())) or fsync(fd))
    with replacing(path) as file:
        file.write(b"newer")
    assert done == [(5, b"old")] and path.read_bytes() == b"newer"


# ------------------------------------------------------------------------------------------- weights that are no numbers
@pytest.mark.parametrize("at, told", [
    (4, "weights are not finite after step 4"), pytest.param(2, "the loss is nan at step 2", marks=pytest.mark.slow),
])  # fmt: skip
def test_weights_that_are_no_numbers_never_replace_good_ones(trained, tmp_path, at, told):
    """A finite loss whose gradient is not: the square root of nothing. In the last step, which is saved, and in one before."""
    shutil.copytree(trained.cwd / "features", tmp_path / "cache")
    options = [*trained.options, "--name", "a", "--save-every", 3]
    nothing = at_step(at, lambda loss, t: loss + (t - t.detach()).square().sum().sqrt())
    assert finish(begin("train.py", *options, cwd=tmp_path, change=nothing)) == 1
    (line,) = said(tmp_path)
    assert line.startswith(f"train.py: {told}") and "lower --lr" in line
    for file in ("last.pt", "isa.pt") if at == 4 else ():
        assert step(tmp_path / "runs/a", file) == 3
        assert all(x.isfinite().all() for x in weights(tmp_path / "runs/a", file).values())
    assert at == 4 or not list(tmp_path.glob("runs/a/*.pt"))


# ------------------------------------------------------------------------------------------------- what --resume may find
@pytest.fixture
def finished(trained, tmp_path):
    """A copy of the finished run in tmp_path -> its folder, and the options that resume it in this process."""
    run = shutil.copytree(trained.run, tmp_path / "runs/a")
    return run, [*trained.options, "--name", "a", "--workers", 0, "--cache-dir", trained.cwd / "features", "--resume"]


def without(*names):
    def spoil(path):
        checkpoint = torch.load(path, weights_only=True)
        inside = checkpoint
        for name in names[:-1]:
            inside = inside[name]
        del inside[names[-1]]
        torch.save(checkpoint, path)

    return spoil


def reshaped(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["query_model"]["mapper.W_p.bias"] = torch.zeros(3)
    torch.save(checkpoint, path)


OTHER = "was written by another version of this program"
SPOILT = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "is damaged"),
    "empty": (lambda path: os.truncate(path, 0), "is damaged"),
    "no optimizer": (without("optimizer"), OTHER), "no step": (without("step"), OTHER), "no count": (without("images"), OTHER),
    "no weights": (without("query_model"), "is damaged"), "an option less": (without("settings", "lar_weight"), OTHER),
    "a tensor less": (without("query_model", "mapper.W_p.bias"), OTHER), "another shape": (reshaped, OTHER),
    "no groups": (without("optimizer", "param_groups"), OTHER),
}  # fmt: skip


def test_checkpoints_of_other_versions_and_damaged_ones_are_refused(finished, trained, call_script):
    run, options = finished
    others = lambda: [(run / name).read_bytes() for name in ("isa.pt", "log.jsonl")]  # noqa: E731
    before = others()
    for how, (spoil, told) in SPOILT.items():
        shutil.copy(trained.last, run / "last.pt")
        spoil(run / "last.pt")
        spoilt = (run / "last.pt").read_bytes()
        done = call_script("train.py", *options)
        assert done.status == 1 and done.err.count("\n") == 1, (how, done.err)
        assert done.message.startswith("train.py: runs/a/last.pt: ") and told in done.message, how
        assert (run / "last.pt").read_bytes() == spoilt and others() == before


@pytest.mark.parametrize("how", ["absent", "older", "truncated", "newer"])
def test_resume_repairs_isa_pt(finished, trained, call_script, how):
    """Killed between last.pt and isa.pt, be it at the very end."""
    run, options = finished
    checkpoint = torch.load(trained.isa, weights_only=True)
    if how == "absent":
        (run / "isa.pt").unlink()
    elif how == "truncated":
        os.truncate(run / "isa.pt", 1000)
    else:
        torch.save({**checkpoint, "step": 2 if how == "older" else 7, "query_model": {}}, run / "isa.pt")
    done = call_script("train.py", *options)
    assert done.status == 0, done.err
    repaired = torch.load(run / "isa.pt", weights_only=True)
    assert same(repaired["query_model"], checkpoint["query_model"]) and repaired["step"] == 4
    assert repaired.keys() == checkpoint.keys() and repaired["blip"] == checkpoint["blip"]
    check_files(run, trained)


def check_files(run, trained):
    assert {path.name for path in run.iterdir()} == {"isa.pt", "last.pt", "log.jsonl"} and log(run) == log(trained.run)


def test_a_log_that_was_cut_off_in_a_line(finished, trained, call_script):
    """What the log tells of steps after last.pt goes, whole or not; what it tells of those before stays from the start on."""
    run, options = finished
    before = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(before + '{"step": 20, "images_per_s": 3}\n{"step": 4')
    assert call_script("train.py", *options).status == 0
    assert (run / "log.jsonl").read_text() == before


def test_a_resumed_run_that_is_killed_early_keeps_its_log(finished, tmp_path):
    """In its first step, when nothing new was logged yet."""
    run, options = finished
    torch.save({**torch.load(run / "last.pt", weights_only=True), "step": 2}, run / "last.pt")
    (run / "log.jsonl").write_text('{"step": 2}\n')
    kill = at_step(1, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert finish(begin("train.py", *options, cwd=tmp_path, change=kill)) == -signal.SIGKILL
    assert log(run) == [{"step": 2}]


# ---------------------------------------------------------------------------------------------------------- determinism
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_same_seed_same_bits_in_another_process(trained, tmp_path, workers):
    """With another hash seed, without workers or with two, from the features on: the weights of `trained`, which has one."""
    done = run_script("train.py", *trained.options, "--name", "a", "--workers", workers, cwd=tmp_path, PYTHONHASHSEED="7")
    assert done.status == 0, done.err
    check_same(tmp_path / "runs/a", trained.run)


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    ["--encoder", "blip-v", "--mapper", "mlp", "--tokens", 1, "--loss", "gcd"], ["--loss", "gcd+llm"],
    ["--crop", 0.5, "--flip", "--randaugment", 5, "--cache", "none"], ["--gallery", "query"],
], ids=["dropout", "sentences", "augmentation", "both sides"])  # fmt: skip
def test_whatever_is_random_is_the_seeds(trained, tmp_path, more):
    """Killed or not, with one worker or two: dropout, drawn sentences, augmentation, negatives, and new weights."""
    options = [*trained.options, "--save-every", 1, "--sentences", ROOT / "pocket/sentences.json", *more]
    assert finish(begin("train.py", *options, "--name", "whole", cwd=tmp_path)) == 0, said(tmp_path)
    process = begin("train.py", *options, "--name", "a", "--workers", 2, cwd=tmp_path)
    assert poll(exists(tmp_path, "runs/a/isa.pt"), process)
    process.kill()
    assert finish(process) == -signal.SIGKILL and 0 < step(tmp_path / "runs/a") < 4
    assert finish(begin("train.py", *options, "--name", "a", "--resume", cwd=tmp_path)) == 0, said(tmp_path)
    check_same(tmp_path / "runs/a", tmp_path / "runs/whole")
    assert finish(begin("train.py", *options, "--name", "b", "--seed", 1, cwd=tmp_path)) == 0
    assert not same(weights(tmp_path / "runs/b"), weights(tmp_path / "runs/a"))


# ------------------------------------------------------------------------------------------- pocket.pretrain and SEARLE
PRETRAIN = ["--steps", 4, "--batch", 12, "--held-out", 8, "--save-every", 3, "--precision", "fp32"]


def pretrained(path):
    return torch.load(path, weights_only=True)["model"]


def pretrain_log(path):
    return [{k: x for k, x in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def at_call(owner, name, n, number):
    """-> a change: in its n-th call the process sends itself the signal."""
    function, calls = getattr(owner, name), []

    def wrapped(*arguments, **options):
        calls.append(0)
        if len(calls) == n:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return lambda: setattr(owner, name, wrapped)


@pytest.mark.slow
def test_pretraining_survives_signals_and_kills(tmp_path):
    """Ctrl-C in the first step, SIGKILL at the end, between the log and the weights; then to the end."""
    assert finish(begin("pocket.pretrain", *PRETRAIN, "--out", "whole.pth", cwd=tmp_path)) == 0, said(tmp_path)
    for change, status, reached in (
        (at_call(torch.nn.utils, "clip_grad_norm_", 1, signal.SIGINT), 128 + signal.SIGINT, 1),
        (at_call(blip_lite, "save", 1, signal.SIGKILL), -signal.SIGKILL, 3),
    ):
        said(tmp_path)
        assert finish(begin("pocket.pretrain", *PRETRAIN, "--out", "parts.pth", cwd=tmp_path, change=change)) == status
        assert said(tmp_path) == [] and not (tmp_path / "parts.pth").exists()
        assert torch.load(tmp_path / "parts.pth.state", weights_only=True)["step"] == reached
        told = said(tmp_path, "out")[-1]
        assert told == "stopped after step 1; the same command goes on from parts.pth.state" or reached == 3
    assert finish(begin("pocket.pretrain", *PRETRAIN, "--out", "parts.pth", cwd=tmp_path)) == 0, said(tmp_path)
    assert same(pretrained(tmp_path / "parts.pth"), pretrained(tmp_path / "whole.pth"))
    assert torch.load(tmp_path / "parts.pth.state", weights_only=True)["step"] == 4  # so that it is not done again
    assert pretrain_log(tmp_path / "parts.pth.log") == pretrain_log(tmp_path / "whole.pth.log") != []
    assert {path.name for path in tmp_path.iterdir()} - {"out", "err"} == {
        f"{name}.pth{suffix}" for name in ("whole", "parts") for suffix in ("", ".log", ".state")
    }


def test_pretraining_refuses_states_of_other_settings_and_damaged_ones(tmp_path, monkeypatch):
    out = tmp_path / "a.pth"
    settings = {"steps": 4, "batch": 12, "lr": 1e-3, "seed": 0, "matching_of": None}
    state = {"model": {}, "optimizer": {}, "step": 2, "settings": settings}
    older = {name: x for name, x in state.items() if name != "settings"}
    for content, more, told in (
        (state, ["--batch", 16], "is of --batch 12, not 16"), (state, ["--seed", 3], "is of --seed 0, not 3"),
        (older, [], "is damaged or of another version"), (b"PK", [], "is damaged or of another version"),
        (state, [], "is damaged or of another version"),
    ):  # fmt: skip
        path = tmp_path / "a.pth.state"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, [*PRETRAIN, "--out", out, *more])])
        with pytest.raises(ValueError, match="a.pth.state: ") as error:
            pretrain.main()
        assert told in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def searle(small_world, tmp_path):
    (tmp_path / "images").mkdir()
    for path in sorted((small_world / "train").iterdir())[:6]:
        shutil.copy(path, tmp_path / "images")
    (tmp_path / "small.json").write_text('{"cat": ["a red cat"], "tree": ["a big tree next to a dog"]}')
    return ["searle", "--images", "images", "--sentences", "small.json", "--steps", 2, "--epochs", 3, "--precision", "fp32"]


@SIGNALS
def test_searle_stopped_in_distillation(searle, tmp_path, number):
    """Nothing half-written, one line; what was inverted stays; the same weights in the end."""
    assert finish(begin("baselines.py", *searle, "--name", "whole", "--cache-dir", "own", cwd=tmp_path)) == 0, said(tmp_path)
    change = at_call(torch, "randperm", 2, number)  # at the second epoch
    assert finish(begin("baselines.py", *searle, cwd=tmp_path, change=change)) == 128 + number
    assert said(tmp_path) == ["baselines.py: interrupted; the same command goes on with the images that are not inverted yet, "
                              "and distils from the start"]  # fmt: skip
    assert not (tmp_path / "runs/searle").exists() and len(list(tmp_path.glob("cache/words-*/*.pt"))) == 1
    assert not list(tmp_path.rglob("*.tmp*"))
    assert finish(begin("baselines.py", *searle, cwd=tmp_path, change=at_call(isa, "compose_query", 1, signal.SIGKILL))) == 0
    assert same(weights(tmp_path / "runs/searle"), weights(tmp_path / "runs/whole"))


def test_searle_reads_its_sentences_once(searle, tmp_path, monkeypatch, call_script):
    read = Path.read_text
    seen = []
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: seen.append(self.name) or read(self, *a, **k))
    assert call_script("baselines.py", *searle).status == 0
    assert seen.count("small.json") == 1
