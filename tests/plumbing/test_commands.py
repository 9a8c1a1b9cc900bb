"""How commands end, what their options refuse, and in which precision they run."""

import argparse
import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import blip_lite
from plumbing import command, options, precision


@pytest.fixture(autouse=True)
def handlers():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def killed(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "outcome, status, said",
    [
        (None, 0, ""),
        (signal.SIGTERM, 143, ""),  # main has finished its step, and returns what stopped it
        (ValueError("a.pt: is damaged"), 1, "x: a.pt: is damaged"),
        (OSError(28, "No space left"), 1, "x: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "x: 7 interrupted"),
        (killed(signal.SIGINT), 130, "x: 7 interrupted"),
        (killed(signal.SIGTERM), 143, "x: 7 interrupted"),
        (RuntimeError("DataLoader worker (pid 3) is killed"), 1, "x: a worker was killed"),
        (RuntimeError("Connection reset by peer"), 1, "x: another process of this run"),
        (torch.cuda.OutOfMemoryError("2 GiB"), 1, "x: the GPU ran out of memory; give --micro-"),
        (RuntimeError("a bug"), None, ""),  # keeps its traceback
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0"), None, ""),
    ],
)
def test_exit_status_and_the_last_line(capsys, outcome, status, said):
    def main(args):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome() if callable(outcome) else outcome

    with pytest.raises(RuntimeError if status is None else SystemExit) as end:
        command.run_command("x", main, 7, lambda args: f"{args} interrupted")
    code = getattr(end.value, "code", None)
    line, code = (code, 1) if isinstance(code, str) else (capsys.readouterr().err, code)
    assert code == status and line.startswith(said) and bool(line) == bool(said)
    assert "\n" not in line.strip()


def test_signals_are_noted_until_the_second_ctrl_c():
    noted = command.note_signals()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        killed(number)()
    assert noted == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        killed(signal.SIGINT)()


@pytest.mark.parametrize(
    "line, message",
    [
        ("--lr nan", "be a finite number, not nan"),
        ("--image-size 7", "be at least 8, not 7"),
        ("--workers 257", "be at most 256, not 257"),
        ("--device meta", "be cpu or cuda, not meta"),
        ("--device abacus", "be cpu or cuda, not abacus"),
        ("--name ../a", "be a folder below runs/, not '../a'"),
        ("--device cpu --image-size 8 --workers 256 --name a/b", None),
    ],
)
def test_check_options(capsys, line, message):
    parser = argparse.ArgumentParser()
    options.add_shared_options(parser)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--name", default="a")
    if message is None:
        return options.check_options(parser, parser.parse_args(line.split()), image_size=8)
    with pytest.raises(SystemExit) as usage:
        options.check_options(parser, parser.parse_args(line.split()), image_size=8)
    assert usage.value.code == 2
    assert f"error: {line.split()[0]} has to {message}" in capsys.readouterr().err


@pytest.mark.parametrize("system, device, refused", [
    ("linux", "mps", True), ("darwin", "mps", True), ("darwin", "cuda:0", True),
    ("darwin", "cpu", False), ("linux", "cuda:0", False)])
def test_a_mac_computes_on_its_cpu(monkeypatch, capsys, system, device, refused):
    monkeypatch.setattr(options.sys, "platform", system)
    args = argparse.Namespace(device=device)
    if not refused:
        return options.check_options(argparse.ArgumentParser(), args)
    with pytest.raises(SystemExit):
        options.check_options(argparse.ArgumentParser(), args)
    said = capsys.readouterr().err
    assert f"--device {device}" in said and "a Mac computes on its CPU" in said
    assert "in about ten minutes" in said


def test_check_lengths(pocket_blip):
    """Pocket BLIP has 64 positions: [CLS], a, photo, of, 6 tokens, 53 words, [SEP]."""
    texts = [("query 3", "red " * 53), ("query 4", "")]
    options.check_lengths(pocket_blip, "a photo of", 6, texts)
    with pytest.raises(ValueError, match="query 5: makes a sentence of 65 .* 64 .*; shorten it"):
        options.check_lengths(pocket_blip, "a photo of", 6, [*texts, ("query 5", "red " * 54)])


@pytest.mark.parametrize("flags", ["", "avx2", "avx2 amx_bf16", "avx512_bf16 avx2"])
def test_precision_follows_the_processor(monkeypatch, flags):
    monkeypatch.setattr(precision, "cpu_flags", lambda: set(flags.split()))
    picked = "bf16" if "bf16" in flags else "fp32"
    assert precision.pick_precision("cpu") == picked
    capability = (8, 0) if picked == "bf16" else (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert precision.pick_precision("cuda") == picked
    with precision.autocast("cpu", picked):
        dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    assert dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[picked]


def test_rounded_weights_give_what_autocast_gives(monkeypatch):
    pocket_blip = blip_lite.load("pocket")  # its own: another test may have packed the shared one
    monkeypatch.setattr(precision, "packing_pays", lambda: False)
    rounded = copy.deepcopy(pocket_blip)
    precision.round_frozen_weights(rounded, "fp32")
    old, new = pocket_blip.state_dict(), rounded.state_dict()
    assert all(torch.equal(x, new[name]) for name, x in old.items())
    precision.round_frozen_weights(rounded, "bf16")
    assert rounded.vision_proj.weight.dtype == torch.bfloat16
    answers = []
    with torch.no_grad(), precision.autocast("cpu", "bf16"):
        for blip in (pocket_blip, rounded):
            v, F_v = blip.encode_image(torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64))
            ids, mask = blip.tokenize(["a red cat", "a dog"])
            words = blip.embed_words(ids)
            answers.append([v, F_v, blip.encode_text(words, mask), blip.match(words, mask, F_v)])
    assert [(x - y).abs().max().item() for x, y in zip(*answers, strict=True)] == [0, 0, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept():
    """64 MiB taken and freed 20 times; otherwise the kernel zeroes 16,384 pages each time."""
    script = """if True:
        import resource, torch
        from plumbing.precision import keep_freed_memory
        for change in (lambda: None, keep_freed_memory):
            change()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(2**24)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    out = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT)
    default, kept = map(int, out.split())
    if default < 200_000:
        pytest.skip("this C library or kernel does not take pages one by one")
    assert kept < default - 200_000


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="no oneDNN")
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-6), ("bf16", 1e-2)])
def test_packed_products_give_what_plain_ones_give(monkeypatch, dtype, tolerance):
    pocket_blip = blip_lite.load("pocket")
    monkeypatch.setattr(precision, "packing_pays", lambda: True)
    packed = copy.deepcopy(pocket_blip)
    precision.round_frozen_weights(packed, dtype)
    assert isinstance(packed.visual_encoder.blocks[0].mlp.fc1, precision.PackedLinear)
    assert packed.state_dict().keys() == pocket_blip.state_dict().keys()
    pixels = torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
    for cls_only in (False, True):
        with torch.no_grad(), precision.autocast("cpu", dtype):
            v, found = (blip.encode_image(pixels, cls_only)[0] for blip in (pocket_blip, packed))
        assert torch.allclose(v, found, atol=tolerance)
    grads = []
    for blip in (pocket_blip, packed):
        with precision.autocast("cpu", dtype):
            summed = blip.encode_image(pixels.requires_grad_())[1].float()[:, 0, 0].sum()
        grads += torch.autograd.grad(summed, pixels)
    assert (grads[0] - grads[1]).norm() <= 10 * tolerance * grads[0].norm()
    assert type(copy.deepcopy(packed).visual_encoder.blocks[0].mlp.fc1) is torch.nn.Linear


@pytest.mark.parametrize("flags, pays", [
    ("AuthenticAMD avx2", False), ("GenuineIntel avx512f", False), ("AuthenticAMD avx512f", True)])
def test_packing_follows_the_processor(monkeypatch, flags, pays):
    monkeypatch.setattr(precision, "cpu_flags", lambda: set(flags.split()))
    assert precision.packing_pays() == (pays and torch.backends.mkldnn.is_available())
