"""A run survives what a week may bring: kills, signals, full disks, NaN, damaged files."""

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
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script, same, weights

import blip_lite
import isa
from plumbing import features
from plumbing.files import replacing
from query_side import query_model

if sys.platform != "linux":
    pytest.skip("forking from a test is safe only there", allow_module_level=True)


# ---- processes to be killed
def at_step(n, act):
    """GCD that calls act(loss, t) in its n-th call (from 1) and returns what act returns, if
    anything."""
    gcd, calls = isa.global_contrastive_distillation, []

    def wrapped(v, t, temperature):
        calls.append(0)
        loss = gcd(v, t, temperature)
        changed = act(loss, t) if len(calls) == n else None
        return loss if changed is None else changed

    return wrapped


def at_call(owner, name, n, act):
    """-> a change: the n-th call (from 1) of owner.name calls act() first."""
    function, calls = getattr(owner, name), []

    def wrapped(*arguments, **options):
        calls.append(0)
        if len(calls) == n:
            act()
        return function(*arguments, **options)

    return lambda: setattr(owner, name, wrapped)


def send(number):
    return lambda *_: os.kill(os.getpid(), number)


def begin(script, *options, cwd, change=lambda: None, at=None):
    """Start a script (train.py) or module (pocket.pretrain) in a process of its own session,
    forked from this one to spare the import of torch. What it prints is appended to cwd/out and
    cwd/err. change() is called there first; at=(n, act): see at_step.
    """

    def main():
        os.setsid()
        os.chdir(cwd)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        features.KEPT_EVERY = 1
        sys.argv = [script, *map(str, options)]
        change()
        if at:
            isa.global_contrastive_distillation = at_step(*at)
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
    """The lines in cwd/err since the last call, without progress bars."""
    path = cwd / name
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    lines = [line.split("\r")[-1] for line in text.split("\n")]
    return [line for line in lines if line.strip() and "%|" not in line]


@pytest.fixture
def train(trained, tmp_path):
    """train(options...) begins train.py as run "a" in tmp_path, where features are stored."""
    shutil.copytree(trained.cwd / "features", tmp_path / "cache")
    return partial(begin, "train.py", *trained.options, "--name", "a", cwd=tmp_path)


def step(run, file="last.pt"):
    return torch.load(run / file, weights_only=True)["step"]


def log(run):
    """log.jsonl but for times."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "images_per_s"} for row in rows]


def check_same(run, whole):
    """The same weights, state of the optimizer and log, and nothing besides."""
    last, expected = (torch.load(r / "last.pt", weights_only=True) for r in (run, whole))
    assert same(last["query_model"], expected["query_model"])
    assert same(weights(run), weights(whole))
    a, b = (x["optimizer"]["state"] for x in (last, expected))
    assert a.keys() == b.keys() and all(same(a[i], b[i]) for i in a)
    assert log(run) == log(whole)
    assert {path.name for path in run.iterdir()} == {"isa.pt", "last.pt", "log.jsonl"}
    assert not list(run.parents[1].glob("cache/*.tmp*"))


def exists(cwd, pattern):
    return lambda: any(cwd.glob(pattern))


# ---- SIGKILL
def test_three_kills_change_nothing(trained, tmp_path):
    """While features are stored, while a checkpoint is written, and between steps."""
    options = [*trained.options, "--name", "a", "--save-every", 1, "--resume"]
    for moment in ("cache/features-*.tmp/rows-*.json", "runs/a/.last.tmp.pt", "runs/a/isa.pt"):
        process = begin("train.py", *options, cwd=tmp_path)
        assert poll(exists(tmp_path, moment), process)
        process.kill()
        assert finish(process) == -signal.SIGKILL
    assert finish(begin("train.py", *options, cwd=tmp_path)) == 0, said(tmp_path)
    check_same(tmp_path / "runs/a", trained.run)


@pytest.mark.parametrize("at", [2, 4])
def test_killed_between_last_pt_and_isa_pt(train, trained, tmp_path, at):
    """--resume at once makes them agree, in an unfinished run and in a finished one."""
    kill = at_call(query_model, "replacing", 2 * at, send(signal.SIGKILL))
    assert finish(train("--save-every", 1, change=kill)) == -signal.SIGKILL
    run = tmp_path / "runs/a"
    assert (step(run), step(run, "isa.pt")) == (at, at - 1)
    again = train("--resume", at=(1, send(signal.SIGKILL)))  # a finished run has no such step
    assert finish(again) == (0 if at == 4 else -signal.SIGKILL), said(tmp_path)
    assert step(run) == step(run, "isa.pt") == at
    assert same(weights(run), weights(run, "last.pt"))
    if at == 4:
        check_same(run, trained.run)


def stored(cwd):
    """Rows of features that are noted as stored."""
    notes = cwd.glob("cache/features-*.tmp/rows-*.json")
    try:
        return sum(json.loads(path.read_text())["next"] for path in notes)
    except FileNotFoundError:  # the folder was given its name
        return 0


@pytest.mark.slow
def test_thirty_two_kills_change_nothing(small_world, tmp_path):
    """At random moments, with and without workers; most while features or a file are written."""
    shutil.copytree(small_world / "train", tmp_path / "images")
    options = ["--images", "images", "--batch", 40, "--epochs", 9, "--precision", "fp32",
               "--threads", 1, "--name"]
    whole = begin("train.py", *options, "whole", "--cache-dir", "own", cwd=tmp_path)
    assert finish(whole, 600) == 0
    run, rng, kills, inside = tmp_path / "runs/a", random.Random(0), 0, 0
    while True:
        process = begin("train.py", *options, "a", "--save-every", 1, "--resume", "--workers",
                        rng.choice((0, 1)), cwd=tmp_path)
        if kills < 3:  # each after one more batch of features
            poll(lambda goal=128 * (kills + 1): stored(tmp_path) >= goal, process)
            time.sleep(rng.random() * 0.05)
        elif kills < 32:
            if rng.random() < 0.8:  # a file is written now; with luck still when the signal comes
                file = rng.choice((".last.tmp.pt", ".isa.tmp.pt", ".log.tmp.jsonl"))
                poll(exists(run, file), process)
            time.sleep(rng.random() * rng.choice((0.01, 0.3)))
        else:
            process.join()
        if not process.is_alive():
            assert finish(process) == 0, said(tmp_path)
            break
        alone = rng.random() < 0.5 or os.getpgid(process.pid) != process.pid  # no group so far
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        assert finish(process) == -signal.SIGKILL, said(tmp_path)
        kills += 1
        inside += any(run.glob(".*.tmp*"))
    assert kills >= 30 and inside >= 5, (kills, inside)
    check_same(run, tmp_path / "runs/whole")


# ---- Ctrl-C and SIGTERM
SIGNALS = pytest.mark.parametrize("number", [
    signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])


@SIGNALS
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_stopped_while_features_are_stored(trained, small_world, tmp_path, number, script):
    options = {"train.py": [*trained.options, "--name", "a"], "evaluate.py": [
        "table", "--benchmark", "cirr", "--data", small_world / "cirr", "--methods", "image",
        "--picture", "", "--precision", "fp32", "--workers", 1]}[script]
    process = begin(script, *options, cwd=tmp_path)
    assert poll(exists(tmp_path, "cache/features-*.tmp/rows-*.json"), process)
    os.killpg(process.pid, number)
    assert finish(process) == 128 + number
    *noise, last = said(tmp_path)  # rarely, a worker finds that nobody listens to it any more
    assert last.startswith(f"{script}: interrupted; ") and last.endswith("features are kept")
    assert script == "evaluate.py" or "no checkpoint was written" in last
    assert not any("KeyboardInterrupt" in line or script in line for line in noise)
    assert not (tmp_path / "runs").exists()
    assert list(tmp_path.glob("cache/features-*.tmp/rows-*.json"))


@SIGNALS
def test_stopped_in_training(train, trained, tmp_path, number):
    """The whole process group gets the signal, as from Ctrl-C and `timeout`."""
    process = train(at=(2, lambda *_: Path("second").touch() or time.sleep(0.3)))
    assert poll((tmp_path / "second").exists, process)
    os.killpg(process.pid, number)
    assert finish(process) == 128 + number and said(tmp_path) == []
    expected = "stopped after step 2; --resume continues from runs/a/last.pt"
    assert said(tmp_path, "out")[-1] == expected
    run = tmp_path / "runs/a"
    assert step(run) == step(run, "isa.pt") == 2
    assert finish(train("--resume")) == 0, said(tmp_path)
    check_same(run, trained.run)


def test_stopped_in_the_last_step(train, trained, tmp_path):
    """All is done, and yet `train.py && evaluate.py` should stop."""
    assert finish(train(at=(4, send(signal.SIGINT)))) == 128 + signal.SIGINT
    assert said(tmp_path) == []
    assert said(tmp_path, "out")[-1].startswith("wrote runs/a/isa.pt")
    check_same(tmp_path / "runs/a", trained.run)


def test_control_c_twice_stops_at_once(train, tmp_path):
    """In a step that would take two minutes. SIGTERM twice does not: `timeout` sends it twice."""

    def slow(*_):
        Path("third").touch()
        for _ in range(1200):
            time.sleep(0.1)  # which a signal does not end

    process = train("--save-every", 1, at=(3, slow))
    assert poll((tmp_path / "third").exists, process)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.killpg(process.pid, number)
        process.join(0.3)
        assert process.is_alive()
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process, 20) == 128 + signal.SIGINT
    assert said(tmp_path) == ["train.py: interrupted; --resume continues from runs/a/last.pt"]
    assert step(tmp_path / "runs/a") == step(tmp_path / "runs/a", "isa.pt") == 2


# ---- full disks
def limited(size):
    """From now on no file of this process may grow beyond `size` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("file, limit", [
    ("last.pt", 5_000_000), pytest.param("log.jsonl", 70, marks=pytest.mark.slow)])
def test_a_full_disk_in_training(train, trained, tmp_path, file, limit):
    """One sentence; the checkpoint of the step before is whole and --resume starts from it."""
    assert trained.last.stat().st_size > 5_000_000
    at = 3 if file == "last.pt" else 4
    full = train("--save-every", 1, at=(at, lambda *_: limited(limit)))
    assert finish(full) == 1
    (line,) = said(tmp_path)
    expected = f"train.py: runs/a/{file}: cannot be written (File too large); "
    assert line.startswith(expected[:limit])  # the file that it is printed into is limited, too
    assert step(tmp_path / "runs/a") == at - 1
    assert finish(train("--resume")) == 0, said(tmp_path)
    check_same(tmp_path / "runs/a", trained.run)


@pytest.mark.slow
def test_a_disk_that_is_really_full(trained, tmp_path):
    """40 MB in memory: full while features are stored, then while a checkpoint is written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    full = "cannot be written (No space left on device)"

    def fill(room):
        Path("filler").write_bytes(bytes(shutil.disk_usage(".").free - room))

    try:
        train = partial(begin, "train.py", *trained.options, "--name", "a", "--save-every", 1,
                        "--resume", cwd=disk)
        change = at_call(blip_lite.Blip, "encode_image", 1, lambda: fill(1_500_000))
        assert finish(train(change=change)) == 1
        (disk / "filler").unlink()
        (line,) = said(disk)
        assert "features-" in line and full in line
        assert finish(train(at=(2, lambda *_: fill(3_000_000)))) == 1
        (disk / "filler").unlink()
        (line,) = said(disk)
        assert line.startswith(f"train.py: runs/a/last.pt: {full}"), line
        assert step(disk / "runs/a") == 1
        assert finish(train()) == 0, said(disk)
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


class Interrupted:
    """A file in whose second write, a large one, Ctrl-C is pressed."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        if len(data) > 1000:
            raise KeyboardInterrupt
        return self.file.write(data)


@pytest.mark.parametrize("how", ["full", "interrupted", "other"])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, how):
    """torch.save reports that it cannot end its archive; the user reads why."""
    path, big = tmp_path / "a.pt", {"x": torch.zeros(1_000_000)}
    path.write_bytes(b"old")
    if how == "full":
        with full_disk(1_000_000), pytest.raises(ValueError) as error, replacing(path) as file:
            torch.save(big, file)
        expected = f"{path}: cannot be written ({os.strerror(errno.EFBIG)}); what was saved"
        assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    elif how == "interrupted":
        with pytest.raises(KeyboardInterrupt), replacing(path) as file:
            torch.save(big, Interrupted(file))
    else:
        with pytest.raises(ZeroDivisionError), replacing(path):
            1 / 0  # noqa: B018
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"] and path.read_bytes() == b"old"


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """After a power cut the name leads to the old or the new content, never to an empty file."""
    path, done, fsync = tmp_path / "a.json", [], os.fsync
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(
        (os.fstat(fd).st_size, path.read_bytes())) or fsync(fd))
    with replacing(path) as file:
        file.write(b"newer")
    assert done == [(5, b"old")] and path.read_bytes() == b"newer"


# ---- weights that are not finite
@pytest.mark.parametrize("at, error", [
    (4, "weights are not finite after step 4"), (2, "the loss is nan at step 2")])
def test_weights_that_are_not_finite_never_replace_good_ones(train, tmp_path, at, error):
    """A finite loss whose gradient is not: the square root of 0. In the last step, which is saved,
    and in one before: the next GCD is NaN, from which no negatives can be drawn."""
    change = lambda loss, t: loss + (t - t.detach()).square().sum().sqrt()  # noqa: E731
    assert finish(train("--save-every", 3, at=(at, change))) == 1
    (line,) = said(tmp_path)
    assert line.startswith(f"train.py: {error}") and "lower --lr" in line
    assert "start again with --overwrite" in line
    run = tmp_path / "runs/a"
    for file in ("last.pt", "isa.pt") if at == 4 else ():
        assert step(run, file) == 3 and all(x.isfinite().all() for x in weights(run, file).values())
    assert at == 4 or not list(run.glob("*.pt"))


# ---- what --resume may find
@pytest.fixture
def finished(trained, train, tmp_path):
    """A copy of the finished run as run "a"."""
    return shutil.copytree(trained.run, tmp_path / "runs/a")


def test_a_damaged_isa_pt_and_a_log_that_was_cut_off(finished, train, trained, tmp_path):
    """isa.pt is repaired; the log loses what it says of steps after last.pt, and only that."""
    os.truncate(finished / "isa.pt", 1000)
    with open(finished / "log.jsonl", "a") as file:
        file.write('{"step": 20, "images_per_s": 3}\n{"step": 4')
    assert finish(train("--resume")) == 0, said(tmp_path)
    check_same(finished, trained.run)
    assert step(finished, "isa.pt") == 4


def test_a_resumed_run_that_is_killed_early_keeps_its_log(finished, train):
    """In its first step, when nothing new was logged yet."""
    last = torch.load(finished / "last.pt", weights_only=True)
    torch.save({**last, "step": 2}, finished / "last.pt")
    (finished / "log.jsonl").write_text('{"step": 2}\n')
    assert finish(train("--resume", at=(1, send(signal.SIGKILL)))) == -signal.SIGKILL
    assert log(finished) == [{"step": 2}]


# ---- determinism
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_same_seed_same_bits_in_another_process(trained, tmp_path, workers):
    """With another hash seed and other workers, from the features on."""
    done = run_script("train.py", *trained.options, "--name", "a", "--workers", workers,
                      cwd=tmp_path, PYTHONHASHSEED="7")
    assert done.status == 0, done.err
    check_same(tmp_path / "runs/a", trained.run)


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    "--encoder blip-v --mapper mlp --tokens 1 --loss gcd", "--loss gcd+llm", "--gallery query",
    "--crop 0.5 --flip --randaugment 5 --cache none",
], ids=["dropout", "sentences", "both sides", "augmentation"])
def test_whatever_is_random_is_the_seeds(trained, tmp_path, more):
    """Killed or not, with one worker or two: dropout, drawn sentences, augmentation, negatives."""
    train = partial(begin, "train.py", *trained.options, "--save-every", 1, "--sentences",
                    ROOT / "pocket/sentences.json", *more.split(), cwd=tmp_path)
    assert finish(train("--name", "whole")) == 0, said(tmp_path)
    process, run = train("--name", "a", "--workers", 2), tmp_path / "runs/a"
    assert poll(exists(run, "isa.pt"), process)
    process.kill()
    assert finish(process) == -signal.SIGKILL and 0 < step(run) < 4
    assert finish(train("--name", "a", "--resume")) == 0, said(tmp_path)
    check_same(run, tmp_path / "runs/whole")
    assert finish(train("--name", "b", "--seed", 1)) == 0
    assert not same(weights(tmp_path / "runs/b"), weights(run))


# ---- pretraining and SEARLE
PRETRAIN = ["--steps", 4, "--batch", 12, "--held-out", 8, "--save-every", 3, "--precision", "fp32"]


@pytest.mark.slow
def test_pretraining_survives_signals_and_kills(tmp_path):
    """Ctrl-C in the first step, SIGKILL at the end, between log and weights; then to the end."""
    pretrain = partial(begin, "pocket.pretrain", *PRETRAIN, "--out", cwd=tmp_path)
    assert finish(pretrain("whole.pth")) == 0, said(tmp_path)
    state = tmp_path / "parts.pth.state"
    for change, status, reached in (
        (at_call(torch.nn.utils, "clip_grad_norm_", 1, send(signal.SIGINT)), 130, 1),
        (at_call(blip_lite, "save", 1, send(signal.SIGKILL)), -signal.SIGKILL, 3),
    ):
        said(tmp_path)
        said(tmp_path, "out")
        assert finish(pretrain("parts.pth", change=change)) == status
        assert said(tmp_path) == [] and not (tmp_path / "parts.pth").exists()
        assert step(tmp_path, state.name) == reached
        last = said(tmp_path, "out")[-1]
        assert reached == 3 or last.startswith("stopped after step 1; the same command ")
    assert finish(pretrain("parts.pth")) == 0, said(tmp_path)
    assert step(tmp_path, state.name) == 4  # so that it is not done again
    parts, whole = (torch.load(tmp_path / f"{name}.pth") for name in ("parts", "whole"))
    assert same(parts["model"], whole["model"])
    logs = [[{k: x for k, x in json.loads(line).items() if k != "seconds"} for line in
             (tmp_path / f"{name}.pth.log").read_text().splitlines()] for name in
            ("parts", "whole")]
    assert logs[0] == logs[1] != []
    assert {path.name for path in tmp_path.iterdir()} - {"out", "err"} == {
        f"{name}.pth{suffix}" for name in ("whole", "parts") for suffix in ("", ".log", ".state")}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_pretraining_refuses_states_of_other_settings_and_damaged_ones(tmp_path, call_script):
    settings = {"steps": 4, "batch": 12, "lr": 1e-3, "seed": 0, "matching_of": None}
    state = {"model": {}, "optimizer": {}, "step": 2, "settings": settings}
    older = {name: x for name, x in state.items() if name != "settings"}
    path, damaged = tmp_path / "a.pth.state", "is damaged or of another version"
    for content, more, why in (
        (state, ["--batch", 16], "is of --batch 12, not 16"),
        (state, ["--seed", 3], "is of --seed 0, not 3"),
        (older, [], damaged), (b"PK", [], damaged), (state, [], damaged),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        done = call_script("-m", "pocket.pretrain", *PRETRAIN, "--out", "a.pth", *more)
        assert done.status == 1 and done.err.count("\n") == 1
        assert "a.pth.state: " in done.message and why in done.message


@pytest.fixture
def searle(small_world, tmp_path):
    (tmp_path / "images").mkdir()
    for path in sorted((small_world / "train").iterdir())[:6]:
        shutil.copy(path, tmp_path / "images")
    sentences = {"cat": ["a red cat"], "tree": ["a big tree next to a dog"]}
    (tmp_path / "small.json").write_text(json.dumps(sentences))
    return ["--images", "images", "--sentences", "small.json", "--steps", 2, "--epochs", 3,
            "--precision", "fp32"]


@SIGNALS
def test_searle_stopped_in_distillation(searle, tmp_path, number):
    """Nothing half-written, one line; what was inverted stays; the same weights in the end."""
    start = partial(begin, "baselines.searle", *searle, cwd=tmp_path)
    assert finish(start("--name", "whole", "--cache-dir", "own")) == 0, said(tmp_path)
    change = at_call(torch, "randperm", 2, send(number))  # at the second epoch
    assert finish(start(change=change)) == 128 + number
    (line,) = said(tmp_path)
    assert line.startswith("baselines.searle: interrupted; the same command ")
    assert len(list(tmp_path.glob("cache/words-*/*.pt"))) == 1
    assert not (tmp_path / "runs/searle").exists() and not list(tmp_path.rglob("*.tmp*"))
    kill = at_call(isa, "compose_query", 1, send(signal.SIGKILL))  # nothing is inverted again
    assert finish(start(change=kill)) == 0
    assert same(weights(tmp_path / "runs/searle"), weights(tmp_path / "runs/whole"))
