"""train.py: options, learning rate, and whole runs: variants, stop and resume, torchrun."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, same, weights

import isa
import query_side
import train
from plumbing import precision, training_data
from plumbing.features import Features


def test_learning_rate_is_a_quarter_warm_up_then_cosine():
    rate = [train.learning_rate(step, 20, 3.0) for step in range(21)]
    assert rate[:6] == pytest.approx([0.6, 1.2, 1.8, 2.4, 3.0, 3.0])  # five of twenty; the peak
    assert rate[10] == pytest.approx(3.0 * 0.75) and rate[15] == pytest.approx(3.0 * 0.25)
    assert rate[20] == pytest.approx(0, abs=1e-12) and 0 < rate[19] < 0.04
    assert train.learning_rate(0, 3, 3.0) == 3.0  # too short to warm up


def test_presets_are_the_papers_and_can_be_overridden():
    paper = ["--preset", "paper", "--blip", "x.pth", "--images", "cc3m"]
    args = train.parse_args(paper)
    assert (args.epochs, args.batch, args.lr, args.weight_decay) == (20, 320, 3e-4, 0.05)
    assert (args.encoder, args.pretrained) == ("efficientnet_b2", "imagenet")
    assert (args.image_size, args.tokens, args.loss) == (224, 6, "gcd+lar")
    args = train.parse_args(["--batch", "7", *paper, "--no-pretrained"])
    assert (args.batch, args.pretrained, args.epochs) == (7, None, 20)
    args = train.parse_args([])
    assert (args.blip, args.images) == ("pocket", "data/pocket/train")
    assert (args.encoder, args.tokens, args.lr) == ("pocketnet", 6, 2e-3)


@pytest.mark.parametrize("options, named", [
    ("stray", "stray"), ("--preset paper", "--blip"),
    ("--preset paper --blip x", "--images"), *((wrong, wrong.split()[0]) for wrong in (
        "--epoch 3", "--encoder resnet", "--lr 0", "--lr nan", "--lr fast", "--crop 0",
        "--crop 1.5", "--epochs 0", "--batch 1", "--tokens 0", "--save-every 0", "--threads -1",
        "--workers -2", "--weight-decay -1", "--lar-weight -1", "--query-size 0", "--temperature 0",
        "--shuffle-buffer 0", "--randaugment -1", "--randaugment 31", "--seed -1",
        f"--seed {2**32}", "--device abacus", "--micro-batch 0")),
])
def test_wrong_options_are_usage_errors(options, named, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(options.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error:" in last and named in last


@pytest.fixture
def here(images, tmp_path, monkeypatch):
    """here(name, options...) trains six steps in this process, in tmp_path -> the run's folder.

    at=(step, act): act() is called in that step (from 0), before its loss.
    """
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    rate = train.learning_rate

    def run(name, *options, at=(None, None)):
        common = ["--images", images, "--cache-dir", f"{images} cache", "--precision", "fp32"]
        common += ["--workers", 0, "--batch", 8, "--epochs", 2, "--lr", 1e-3, "--crop", 0.8]
        monkeypatch.setattr(train, "learning_rate", lambda step, steps, peak: (
            step == at[0] and at[1]()) or rate(step, steps, peak))
        try:
            train.train(train.parse_args([*map(str, [*common, "--name", name, *options])]))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return tmp_path / "runs" / name

    return run


def log(run):
    """log.jsonl but for times."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "images_per_s"} for row in rows]


def test_a_run_prints_its_settings_and_what_it_wrote(trained):
    out = trained.printed.out
    assert "batch=40" in out and "seed=0" in out and "wrote runs/tiny/isa.pt" in out


VARIANTS = {
    "atl": "", "st": "--mapper st", "no-ca": "--mapper atl-no-ca", "no-sa": "--mapper atl-no-sa",
    "mlp": "--mapper mlp --tokens 1", "two": "--tokens 2", "lar": "--loss lar",
    "llm": f"--loss gcd+llm --sentences {ROOT}/pocket/sentences.json",
    "half": "--lar-weight 0.5", "sym": "--encoder blip",
    "dagger": "--encoder blip-tuned", "light-light": "--gallery query",
    "blip-blip": "--encoder blip-tuned --gallery query",
    "pic2word": "--encoder blip-v --mapper mlp --tokens 1 --loss gcd",
    "mobilenet_v2": "--encoder mobilenet_v2 --query-size 64",
}
LOGGED = {"llm": {"llm"}, "pic2word": set()}  # beside GCD
LEARNERS = {"st": set(), "no-ca": {"Q_r"}, "no-sa": {"Q_c"}, "mlp": set(), "pic2word": set()}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_and_are_read_again(here, pocket_blip, name):
    """Every trained weight moves, the frozen BLIP does not; the log has the terms of the loss."""
    frozen = {key: x.clone() for key, x in pocket_blip.state_dict().items()}
    run = here(name, *VARIANTS[name].split(), "--lr", "1e-2", "--weight-decay", 0)
    model, settings = query_side.load_query_model(run / "isa.pt", pocket_blip)
    torch.manual_seed(0)
    start = query_side.build_query_model(settings, pocket_blip).state_dict()
    learnt = {key for key, _ in model.named_parameters() if "vision_proj.bias" not in key}
    assert not [key for key in learnt if torch.equal(start[key], model.state_dict()[key])]
    assert same(frozen, pocket_blip.state_dict())
    # BLIP's own encoder is not stored again
    assert any("encoder" in key for key in weights(run)) == (name not in ("sym", "pic2word"))
    parts = {key.split(".")[1] for key in learnt if key.startswith("mapper.Q_")}
    assert parts == LEARNERS.get(name, {"Q_r", "Q_c"})
    size = settings["query_size"] or 64
    U = model(torch.randn(2, 3, size, size))
    if settings["gallery"] == "query":
        U, v, F_v = U
        assert v.shape == (2, 64) and torch.allclose(v.norm(dim=1), torch.ones(2))
        assert F_v.shape == (2, 65, 128)
    assert U.shape == (2, settings["tokens"], 128)

    (row,) = log(run)
    other = LOGGED.get(name, {"lar", "matched"})
    assert row.keys() == {"step", "loss", "gcd"} | other and math.isfinite(row["loss"])
    terms = (name != "lar") * row["gcd"] + row.get("llm", 0)
    terms += row.get("lar", 0) * (0.5 if name == "half" else 1)
    assert row["loss"] == pytest.approx(terms, abs=2e-4)


def test_the_log_holds_the_accuracy_of_matching(here, monkeypatch):
    """Of the last step: the share of pairs that BLIP's matching head judges rightly."""
    lar, right = isa.local_alignment_regularization, []

    def recorded(*arguments, **more):
        loss, logits, labels = lar(*arguments, **more)
        right.append(sum((a < b) == (i < 8) for i, (a, b) in enumerate(logits.tolist())))
        return loss, logits, labels

    monkeypatch.setattr(isa, "local_alignment_regularization", recorded)
    (row,) = log(here("a"))
    assert len(right) == 6 and row["matched"] == pytest.approx(right[-1] / 24, abs=1e-4)


def test_gcd_has_its_own_temperature(here, monkeypatch, pocket_blip):
    gcd, seen = isa.global_contrastive_distillation, []
    monkeypatch.setattr(isa, "global_contrastive_distillation",
                        lambda v, t, tau: seen.append(tau) or gcd(v, t, tau))
    here("soft", "--temperature", 0.5, "--epochs", 1)
    here("own", "--epochs", 1)
    assert seen == [0.5] * 3 + [pocket_blip.temperature] * 3


def test_training_learns(here):
    """24 images learnt by heart: the loss falls far below guessing, ln 8 + H(1/3)."""
    rows = log(here("a", "--epochs", 14, "--crop", 1, "--lr", "2e-3"))
    guessing = math.log(8) + math.log(3) - 2 / 3 * math.log(2)
    assert [row["step"] for row in rows] == [20, 40, 42]
    assert rows[2]["loss"] < 0.6 * guessing and rows[2]["gcd"] < rows[0]["gcd"]
    assert rows[2]["gcd"] < 0.6 * math.log(8)


def test_a_tuned_copy_starts_as_blip_in_full_precision(pocket_blip, here):
    """In bf16 the frozen weights are rounded; the copy that is trained must not be. What else is
    trained starts from the seed."""
    run = here("a", "--encoder", "blip-tuned", "--precision", "bf16", "--lr", "1e-9",
               "--weight-decay", 0, "--seed", 5)
    model, settings = query_side.load_query_model(run / "isa.pt", pocket_blip)
    torch.manual_seed(5)
    start = query_side.build_query_model(settings, pocket_blip)
    copied = start.encoder.visual_encoder.state_dict()
    assert same(copied, pocket_blip.visual_encoder.state_dict())
    for found, expected in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def killed():
    raise MemoryError  # nothing in train.py may catch it: on disk, as good as SIGKILL


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


def test_killed_between_checkpoints(here):
    """Steps after the last checkpoint are done again, with the same result; each is logged once."""
    options = ["--batch", 2, "--save-every", 15, "--loss", "gcd"]  # 2 epochs of 12 steps
    whole = here("whole", *options)
    with pytest.raises(MemoryError):
        here("parts", *options, at=(22, killed))
    run = whole.parent / "parts"
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 15
    here("parts", *options, "--resume")
    assert same(weights(run), weights(whole)) and log(run) == log(whole)
    assert [row["step"] for row in log(run)] == [20, 24]


def test_an_older_run_is_not_overwritten_unasked(here):
    run = here("a", "--epochs", 1)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match="runs/a already holds a run; continue it with --resume, "
                                         "replace it with --overwrite or give another --name"):
        here("a")
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(MemoryError):  # leaves nothing to resume
        here("a", "--overwrite", at=(1, killed))
    assert not (run / "last.pt").exists()
    here("a", "--overwrite")
    assert torch.load(run / "isa.pt", weights_only=True)["step"] == 6
    assert [row["step"] for row in log(run)] == [6]


def test_precision_auto_resumes_in_the_checkpoints_precision(here, monkeypatch):
    """On a machine where it would be another one."""
    picked = {"precision": "bf16"}
    monkeypatch.setattr(precision, "pick_precision", lambda device: picked["precision"])
    whole = here("whole", "--precision", "auto")
    here("a", "--precision", "auto", at=(1, terminated))
    picked["precision"] = "fp32"
    run = here("a", "--precision", "auto", "--resume")
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    assert checkpoint["settings"]["precision"] == "bf16" and checkpoint["step"] == 6
    assert same(weights(run), weights(whole)) and log(run) == log(whole)


def test_without_a_compiler_a_run_continues_uncompiled(images, tmp_path):
    (tmp_path / "empty").mkdir()
    env = {k: x for k, x in os.environ.items() if k != "CXX"} | {
        "PATH": str(tmp_path / "empty"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    line = [sys.executable, ROOT / "train.py", "--images", images, "--compile", "--epochs", 1]
    done = subprocess.run([str(x) for x in line], cwd=tmp_path, env=env, capture_output=True,
                          text=True, timeout=300)
    said = [row for row in done.stderr.replace("\r", "\n").splitlines() if "compile" in row]
    assert done.returncode == 0 and "wrote runs/pocket/isa.pt" in done.stdout, done.stderr
    assert len(said) == 1 and "needs a C++ compiler" in said[0] and "Traceback" not in done.stderr


def torchrun(processes, script, *options, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               processes, script, "--precision", "fp32", "--workers", 0, "--batch", 8, *options]
    return subprocess.run([str(x) for x in command], cwd=cwd, capture_output=True, text=True,
                          timeout=300)


def state(run):
    """Weights, and AdamW's means of gradients, which alone show the scale of the loss."""
    last = torch.load(run / "last.pt", weights_only=True)
    means = [x["exp_avg"] for x in last["optimizer"]["state"].values()]
    return [*last["query_model"].values(), *means]


STOPPED = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import isa
gcd, calls = isa.global_contrastive_distillation, []
def stopped(*arguments):
    calls.append(0)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return gcd(*arguments)
isa.global_contrastive_distillation = stopped
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


def test_a_run_in_pieces_is_the_run_of_whole_batches(here):
    options = "--encoder", "blip", "--crop", 1, "--cache", "none"  # no batch norm
    whole, pieces = here("whole", *options), here("pieces", *options, "--micro-batch", 3)
    for x, y in zip(state(whole), state(pieces), strict=True):
        assert (x - y).norm() <= 1e-3 * x.norm()
    for row, expected in zip(log(pieces), log(whole), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_torchrun_trains_as_one_process_and_resumes_with_any_number(images, tmp_path):
    """GCD without batch norm is the same, however it is split. Both stop where one is told to."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    options = ["--images", images, "--epochs", 4, "--crop", 0.8, "--loss", "gcd", "--encoder",
               "blip", "--name"]
    for n, name, *more in ((1, "one"), (2, "two", "--micro-batch", 3)):
        done = torchrun(n, ROOT / "train.py", *options, name, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"wrote runs/{name}/isa.pt") == done.stdout.count("0..12") == 1
    done = torchrun(2, tmp_path / "stopped.py", *options, "parts", cwd=tmp_path)
    assert done.returncode and done.stdout.count("stopped after step 5") == 1, done.stderr
    one, two, parts = (tmp_path / "runs" / name for name in ("one", "two", "parts"))
    assert torch.load(parts / "last.pt", weights_only=True)["step"] == 5
    done = torchrun(1, ROOT / "train.py", *options, "parts", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for run in (two, parts):
        for x, y in zip(state(one), state(run), strict=True):
            assert (x - y).norm() <= 1e-3 * x.norm()
        assert log(run)[0]["gcd"] == pytest.approx(log(one)[0]["gcd"], rel=1e-3)


def test_torchrun_trains_with_both_losses(images, tmp_path):
    options = "--images", images, "--epochs", 1, "--micro-batch", 3
    done = torchrun(2, ROOT / "train.py", *options, cwd=tmp_path)
    assert done.returncode == 0 and "24 images, steps 0..3" in done.stdout, done.stderr
    (row,) = log(tmp_path / "runs/pocket")
    assert row["step"] == 3 and math.isfinite(row["lar"]) and 0 <= row["matched"] <= 1
    features, listed = sorted((tmp_path / "cache").glob("[!.]*"))  # without the lock
    assert listed.name.startswith("images-")
    v = np.asarray(Features(features).v, np.float32)
    assert np.abs(np.linalg.norm(v, axis=1) - 1).max() < 1e-3  # both processes' shares


def test_a_batch_that_cannot_be_split(here, monkeypatch):
    monkeypatch.setattr(training_data, "process", lambda: (0, 3))
    with pytest.raises(ValueError, match="--batch 8 cannot be split among 3 processes; give a "
                                         "multiple of 3"):
        here("a")
