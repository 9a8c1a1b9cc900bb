"""train.py: its parts against values worked out by hand, and whole runs: stopped, resumed, refused."""

import io
import json
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

import blip_lite
import isa
import query_side
import train
from plumbing.augment import NeutralRandAugment
from plumbing.features import Features
from plumbing.images import list_images
from plumbing.processes import agree, gather
from plumbing.training_data import TrainingImages, batches, epoch_order


# ------------------------------------------------------------------------------------------- parts of the loop
def test_learning_rate_is_a_quarter_warm_up_then_cosine():
    rate = [train.learning_rate(step, 20, 3.0) for step in range(21)]
    assert rate[:6] == pytest.approx([0.6, 1.2, 1.8, 2.4, 3.0, 3.0])  # five of twenty; the peak
    assert rate[10] == pytest.approx(3.0 * 0.75) and rate[15] == pytest.approx(3.0 * 0.25)  # cos 60 and 120 degrees
    assert rate[20] == pytest.approx(0, abs=1e-12) and 0 < rate[19] < 0.04
    assert all(later < earlier for earlier, later in zip(rate[5:], rate[6:], strict=False))
    assert train.learning_rate(0, 1, 3.0) == train.learning_rate(0, 3, 3.0) == 3.0  # too short to warm up


def flat(batches):
    return [pair for batch in batches for pair in batch]


def batches(n, batch, seed=0, first_step=0, steps=1, bad=(), buffer=1000, **processes):
    return list(batches(n, list(bad), batch, seed, first_step, steps, buffer, **processes))


@pytest.mark.parametrize("buffer", [1, 5, 7, 12, 100])
def test_batches_show_each_row_once_an_epoch(buffer, monkeypatch):
    monkeypatch.setattr(train, "RUN", 3)
    found = batches(12, 4, steps=9, buffer=buffer)
    assert len(found) == 9 and all(len(batch) == 4 for batch in found)
    for epoch in range(3):
        pairs = flat(found[3 * epoch : 3 * epoch + 3])
        assert {e for e, _ in pairs} == {epoch} and sorted(row for _, row in pairs) == list(range(12))
    orders = [tuple(row for _, row in flat(found[3 * epoch : 3 * epoch + 3])) for epoch in range(3)]
    assert len({*orders, tuple(range(12))}) == 4  # shuffled, and anew each time


def test_batches_drop_the_rest_but_not_always_the_same():
    left_out = Counter()
    for epoch in range(30):
        seen = {row for _, row in flat(batches(10, 4, 0, 2 * epoch, 2 * epoch + 2))}
        assert len(seen) == 8
        left_out.update(set(range(10)) - seen)
    assert len(left_out) == 10


def test_batches_start_at_any_step_and_depend_on_the_seed(monkeypatch):
    monkeypatch.setattr(train, "RUN", 4)
    for buffer in (5, 1000):
        whole = batches(50, 3, 5, 0, 64, buffer=buffer)
        for first in range(65):
            assert batches(50, 3, 5, first, 64, buffer=buffer) == whole[first:]
        assert flat(batches(50, 3, 6, 0, 64, buffer=buffer)) != flat(whole)


def test_batches_pass_over_bad_rows():
    for bad in ([0], [3, 4, 9], [11], [0, 1, 2, 3], [0, 5, 6, 7, 8, 11]):
        found = flat(batches(12 - len(bad), 2, steps=(12 - len(bad)) // 2, bad=bad))
        assert set(row for _, row in found) <= set(range(12)) - set(bad) and len(set(found)) == (12 - len(bad)) // 2 * 2
        if len(bad) % 2 == 0:
            assert sorted(row for _, row in found) == sorted(set(range(12)) - set(bad))


def test_processes_share_each_batch_out():
    """Side by side their shares are what one process would see at that step."""
    whole = batches(30, 6, steps=10, bad=[3])
    for processes in (2, 3, 6):
        shares = [batches(30, 6, steps=10, bad=[3], rank=r, processes=processes) for r in range(processes)]
        assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole


def test_a_shuffle_reads_in_runs_and_mixes_a_buffer():
    """100,000 images, 10,000 mixed at a time: a buffer is ten runs or eleven; every image is there; runs come from everywhere."""
    blocks = list(epoch_order(100_500, 0, 1, 10_000))
    assert [len(block) for block in blocks] == [10_000] * 10 + [500]
    assert np.array_equal(np.sort(np.concatenate(blocks)), np.arange(100_500))
    for block in blocks[:10]:
        rows = np.sort(block)
        pieces = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        assert len(pieces) <= 12 and rows.max() - rows.min() > 40_000
        assert abs(np.corrcoef(block[:-1], block[1:])[0, 1]) < 0.1  # in no order within
    assert not np.array_equal(blocks[0], next(epoch_order(100_500, 0, 2, 10_000)))


@pytest.fixture(scope="session")
def images(small_world, tmp_path_factory):
    """A folder of 24 images, some of them in a sub-folder, and a file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for i, path in enumerate(sorted((small_world / "train").iterdir())[:24]):
        shutil.copy(path, folder / "more" / path.name if i % 2 else folder / path.name)
    (folder / "notes.txt").write_text("no image")
    return folder


def listed(folder):
    return sorted(path for path in folder.rglob("*.png"))


def augmented(images, **options):
    options = SimpleNamespace(**dict(crop=0.5, flip=True, randaugment=9, seed=3) | options)
    return TrainingImages(list_images(listed(images)), query_side.build("pocketnet"), options)


def test_augmentation_is_a_function_of_seed_epoch_and_row(images):
    data, again = augmented(images), augmented(images)
    first = {(epoch, row): data[epoch, row][1] for epoch in range(3) for row in range(4)}
    torch.manual_seed(99)  # neither the order of questions nor the state of any generator matters
    np.random.seed(1)
    before = torch.random.get_rng_state()
    for key in reversed(first):
        row, pixels, *_ = again[key]
        assert row == key[1] and torch.equal(pixels, first[key])
    assert torch.equal(before, torch.random.get_rng_state())  # and it disturbs none
    for row in range(4):
        assert not torch.equal(first[0, row], first[1, row]) and not torch.equal(first[1, row], first[2, row])
    assert not torch.equal(first[0, 0], augmented(images, seed=4)[0, 0][1])


def test_without_augmentation_the_pixels_are_those_of_preprocess(images):
    data = augmented(images, crop=1.0, flip=False, randaugment=0)
    encoder = query_side.build("pocketnet")
    for row in range(3):
        assert torch.equal(data[0, row][1], query_side.preprocess(encoder, Image.open(data.images.name(row))))


def test_augmented_images_reach_workers_that_are_not_forked(images):
    """macOS, Windows and Python 3.14 start workers afresh and send them the data set by pickle."""
    data = augmented(images)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[1, 2][1], data[1, 2][1])


def test_the_next_image_stands_in_for_a_damaged_one(images, tmp_path):
    for name in "abdf":
        shutil.copy(images / "000000.png", tmp_path / f"{name}.png")
    for name in "ceg":
        (tmp_path / f"{name}.png").write_text("")
    data = augmented(tmp_path)
    i, pixels, _, damaged = data[0, 2]
    assert i == 3 and torch.equal(pixels, data[0, 3][1])
    assert damaged == {2: f"{tmp_path}/c.png: is empty; replace or remove the file"}
    assert data[0, 6][0] == 0 and data[0, 1][3] == {}  # after the last comes the first
    sample = data.batch([data[0, 1], data[0, 2], data[0, 4]])
    assert sample["pixels"].shape == (3, 3, 64, 64) and list(sample["damaged"]) == [2, 4] and sample["v"] is None


def test_a_folder_of_damaged_images(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("")
    data = augmented(tmp_path)
    hopeless = data[0, 1]
    assert hopeless[0] is None and data.batch([hopeless]) == {"hopeless": f"{tmp_path}/1.png: is empty; replace or remove the file"}


def test_randaugment_keeps_what_colour_words_mean():
    """On an image of two colours no other colour may appear but the black that shearing brings in."""
    augment = NeutralRandAugment(num_ops=2, magnitude=20)
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = (200, 40, 60), (90, 120, 240)
    allowed, changed = {(200, 40, 60), (90, 120, 240), (0, 0, 0)}, 0
    torch.manual_seed(0)
    for _ in range(200):
        found = np.asarray(augment(Image.fromarray(picture)))
        colours, counts = np.unique(found.reshape(-1, 3), axis=0, return_counts=True)
        strange = sum(count for colour, count in zip(colours.tolist(), counts, strict=True) if tuple(colour) not in allowed)
        assert strange < 0.15 * 64 * 64  # sharpness overshoots along edges
        changed += not np.array_equal(found, picture)
    assert changed > 100
    kept = set(augment._augmentation_space(31, (64, 64)))
    assert kept and not kept & {"Brightness", "Color", "Contrast", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert"}


# -------------------------------------------------------------------------------------------------- options
def test_presets_are_the_papers_and_can_be_overridden():
    args = train.parse_args(["--preset", "paper", "--blip", "x.pth", "--images", "cc3m"])
    assert (args.epochs, args.batch, args.lr, args.tokens, args.weight_decay) == (20, 320, 3e-4, 6, 0.05)
    assert (args.encoder, args.image_size, args.pretrained, args.loss) == ("efficientnet_b2", 224, "imagenet", "gcd+lar")
    args = train.parse_args(["--batch", "7", "--preset", "paper", "--blip", "x", "--images", "y", "--no-pretrained"])
    assert args.batch == 7 and args.pretrained is None and args.epochs == 20
    args = train.parse_args([])
    assert (args.blip, args.images, args.encoder, args.tokens) == ("pocket", "data/pocket/train", "pocketnet", 6)


@pytest.mark.parametrize("options, named", [
    (["--batchsize", "8"], "--batchsize"), (["--epoch", "3"], "--epoch"), (["stray"], "stray"), (["--batch", "1"], "--batch"),
    (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"), (["--lr", "fast"], "--lr"), (["--epochs", "0"], "--epochs"),
    (["--crop", "0"], "--crop"), (["--crop", "1.5"], "--crop"), (["--encoder", "resnet"], "--encoder"),
    (["--tokens", "0"], "--tokens"), (["--loss", "lar+"], "--loss"), (["--save-every", "0"], "--save-every"),
    (["--preset", "paper"], "--blip"), (["--preset", "paper", "--blip", "x"], "--images"), (["--threads", "-1"], "--threads"),
    (["--randaugment", "31"], "--randaugment"), (["--randaugment", "-1"], "--randaugment"), (["--seed", str(2**32)], "--seed"),
    (["--workers", "-2"], "--workers"), (["--device", "abacus"], "--device"),
    (["--weight-decay", "-1"], "--weight-decay"), (["--mapper", "rnn"], "--mapper"), (["--lar-weight", "-1"], "--lar-weight"),
    (["--mapper", "mlp"], "--tokens 1"), (["--gallery", "clip"], "--gallery"), (["--query-size", "0"], "--query-size"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")  # fmt: skip
def test_wrong_options_are_usage_errors(options, named, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(options)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "error:" in lines[-1] and named in lines[-1]


def test_a_failure_is_one_line_and_status_1(tmp_path):
    failure = run_script("train.py", "--images", "nowhere", cwd=tmp_path)
    assert failure.status == 1
    assert failure.err == "train.py: nowhere: there is no such folder; give a folder of images with --images\n"
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


# --------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(images, cache, tmp_path, monkeypatch):
    """here(name, options...) trains six steps in this process, in tmp_path -> the run's folder."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(name, *options, folder=images):
        common = ["--images", folder, "--cache-dir", cache, "--precision", "fp32", "--workers", 0]
        common += ["--batch", 8, "--epochs", 2, "--lr", 1e-3, "--crop", 0.8]
        try:
            train.train(train.parse_args([str(x) for x in (*common, "--name", name, *options)]))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return tmp_path / "runs" / name

    return run


def weights(run, file="isa.pt"):
    return torch.load(run / file, weights_only=True)["query_model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def at_step(n, act):
    """Inside, the loop's n-th step (from 1) calls act(gcd, v, t, temperature) instead of gcd(v, t, temperature)."""
    calls, gcd = [], isa.global_contrastive_distillation

    def wrapped(*arguments):
        calls.append(0)
        return act(gcd, *arguments) if len(calls) == n else gcd(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isa, "global_contrastive_distillation", wrapped)
        yield


def terminated(gcd, *arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return gcd(*arguments)


def killed(*_):
    raise MemoryError  # nothing in train.py may catch it: as good as SIGKILL, seen from the disk


def test_a_run_writes_its_checkpoints_and_its_log(trained, pocket_blip):
    assert sorted(path.name for path in trained.run.iterdir()) == ["isa.pt", "last.pt", "log.jsonl"]
    assert "batch=40" in trained.printed.out and "seed=0" in trained.printed.out  # the resolved settings
    (row,) = map(json.loads, trained.log.read_text().splitlines())
    assert row["step"] == 4 and row["loss"] == pytest.approx(row["gcd"] + row["lar"], abs=2e-4) and 0 <= row["matched"] <= 1
    assert math.isfinite(row["loss"]) and row["images_per_s"] > 0
    checkpoint, last = (torch.load(path, weights_only=True) for path in (trained.isa, trained.last))
    assert checkpoint["step"] == last["step"] == 4 and checkpoint["blip"] == pocket_blip.fingerprint
    assert checkpoint["settings"]["batch"] == 40 and checkpoint["settings"]["precision"] == "fp32"
    assert same(checkpoint["query_model"], last["query_model"])


def test_isa_pt_holds_the_query_side_alone(trained, pocket_blip):
    checkpoint = torch.load(trained.isa, weights_only=True)
    assert set(checkpoint) == {"query_model", "settings", "blip", "images", "step"}
    tensors = checkpoint["query_model"]
    assert {name.split(".")[0] for name in tensors} == {"encoder", "mapper"}
    encoder = query_side.build("pocketnet")
    expected = sum(x.numel() for x in encoder.state_dict().values())
    expected += sum(x.numel() for x in isa.AdaptiveTokenLearner(96, pocket_blip.word_dim).parameters())
    assert sum(x.numel() for x in tensors.values()) == expected
    assert trained.isa.stat().st_size < 4 * expected + 50_000


def test_load_query_model_gives_back_what_was_trained(trained, pocket_blip):
    model, settings = query_side.load_query_model(trained.isa, pocket_blip)
    assert settings["tokens"] == 6 and settings["prompt"] == "a photo of" and not model.training
    assert same(model.state_dict(), torch.load(trained.isa, weights_only=True)["query_model"])
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 6, pocket_blip.word_dim)


def test_training_moves_every_weight_but_not_blip(here, pocket_blip):
    before = {name: x.clone() for name, x in pocket_blip.state_dict().items()}
    start, end = weights(here("start", "--lr", "1e-30", "--weight-decay", 0)), weights(here("end"))
    still = [name for name in start if torch.equal(start[name], end[name]) and "num_batches" not in name]
    assert still == []
    assert same(before, blip_lite.load("pocket").state_dict())


def test_same_seed_same_weights_other_seed_others(here):
    a, b, c = (weights(here(name, "--seed", seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert same(a, b) and not same(a, c)


def test_workers_change_nothing(here):
    assert same(weights(here("none")), weights(here("two", "--workers", 1)))


def test_training_learns(here):
    """24 images until they are known by heart: the loss falls far below that of guessing, ln 8 + H(1/3)."""
    run = here("learns", "--epochs", 14, "--crop", 1, "--lr", "2e-3")
    losses = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    guessing = math.log(8) + math.log(3) - 2 / 3 * math.log(2)
    assert [row["step"] for row in losses] == [20, 40, 42]
    assert losses[-1]["loss"] < 0.6 * guessing and losses[-1]["gcd"] < 0.6 * math.log(8) and losses[-1]["gcd"] < losses[0]["gcd"]


VARIANTS = {
    "st": ["--mapper", "st"], "no-ca": ["--mapper", "atl-no-ca"], "no-sa": ["--mapper", "atl-no-sa"],
    "mlp": ["--mapper", "mlp", "--tokens", 1], "two": ["--tokens", 2], "llm": ["--loss", "gcd+llm"],
    "dagger": ["--encoder", "blip-tuned"], "light-light": ["--gallery", "query"],
    "blip-blip": ["--encoder", "blip-tuned", "--gallery", "query"],
    "pic2word": ["--encoder", "blip-v", "--mapper", "mlp", "--tokens", 1, "--loss", "gcd"],
    "mobilenet_v2": ["--encoder", "mobilenet_v2", "--query-size", 64],
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_and_are_read_again(here, pocket_blip, name):
    """Six steps: every trained weight moves, the frozen BLIP does not, the file gives back what was trained."""
    frozen = {key: x.clone() for key, x in pocket_blip.state_dict().items()}
    run = here(name, *VARIANTS[name], "--sentences", ROOT / "pocket" / "sentences.json", "--lr", "1e-2")
    model, settings = query_side.load_query_model(run / "isa.pt", pocket_blip)
    torch.manual_seed(0)
    start = query_side.build_query_model(settings, pocket_blip).state_dict()
    learnt = {key for key, _ in model.named_parameters()}
    still = [key for key in learnt if torch.equal(start[key], model.state_dict()[key])]
    assert not [key for key in still if "vision_proj.bias" not in key], still
    assert all(torch.equal(x, frozen[key]) for key, x in pocket_blip.state_dict().items())
    parts = {key.split(".")[1] for key in learnt if key.startswith("mapper.Q_")}
    assert parts == {"st": set(), "no-ca": {"Q_r"}, "no-sa": {"Q_c"}, "mlp": set(), "pic2word": set()}.get(name, {"Q_r", "Q_c"})
    size = settings["query_size"] or 64
    U = model(torch.randn(2, 3, size, size))
    if settings["gallery"] == "query":
        U, v, F_v = U
        assert v.shape == (2, 64) and torch.allclose(v.norm(dim=1), torch.ones(2)) and F_v.shape == (2, 65, 128)
    assert U.shape == (2, settings["tokens"], 128)
    row = json.loads((run / "log.jsonl").read_text())
    assert math.isfinite(row["loss"]) and set(row) >= {"pic2word": {"gcd"}, "llm": {"gcd", "llm"}}.get(name, {"gcd", "lar"})


def test_a_tuned_copy_starts_as_blip_in_full_precision(pocket_blip, here):
    """In bfloat16 training the frozen weights are rounded; the copy that is trained must not be."""
    run = here("dagger", "--encoder", "blip-tuned", "--precision", "bf16", "--lr", "1e-9", "--weight-decay", 0)
    start = pocket_blip.visual_encoder.state_dict()
    copied = {k.removeprefix("encoder.visual_encoder."): x for k, x in weights(run).items() if "visual_encoder" in k}
    assert copied.keys() == start.keys() and all(torch.allclose(copied[k], start[k], atol=1e-7) for k in start)


def test_weight_of_lar(here):
    """Without weight LAR is computed but changes nothing; twice the weight is twice the term."""
    rows = {w: json.loads((here(f"w{w}", "--lar-weight", w, "--lr", "1e-9") / "log.jsonl").read_text()) for w in (0, 2)}
    assert rows[0]["loss"] == rows[0]["gcd"] and rows[0]["lar"] > 0
    assert rows[2]["loss"] == pytest.approx(rows[2]["gcd"] + 2 * rows[2]["lar"], abs=2e-4)


@pytest.mark.parametrize("loss, stored", [("gcd", False), ("lar", True)])
def test_one_loss_alone(here, tmp_path, loss, stored):
    run = here(loss, "--loss", loss, "--cache-dir", "own_cache")
    row = json.loads((run / "log.jsonl").read_text())
    assert row["loss"] == row[loss] and ("matched" in row and "lar" in row) == stored
    assert bool(list((tmp_path / "own_cache").glob("*/F_v.npy"))) == stored  # GCD alone needs no F^v


def test_symmetric_encoder(here, pocket_blip, images):
    run = here("symmetric", "--encoder", "blip")
    assert (run / "isa.pt").stat().st_size < 4_000_000
    assert not any("encoder" in name for name in weights(run))  # BLIP's encoder is BLIP's: only the learner is stored
    model, _ = query_side.load_query_model(run / "isa.pt", pocket_blip)
    pixels = torch.stack([pocket_blip.preprocess(Image.open(path)) for path in listed(images)[:3]])
    with torch.no_grad():
        patches = pocket_blip.encode_image(pixels)[1][:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        assert torch.allclose(model(pixels), model.mapper(patches), atol=1e-6)


# ------------------------------------------------------------------------------------------------ stop and resume
def test_sigterm_ends_after_the_step_and_resume_gives_the_same_weights(here, capsys):
    whole = here("whole")
    with at_step(4, terminated):
        run = here("parts")
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 4 and "stopped after step 4" in capsys.readouterr().out
    here("parts", "--resume")
    ends = [torch.load(r / "last.pt", weights_only=True) for r in (run, whole)]
    assert same(ends[0]["query_model"], ends[1]["query_model"]) and same(weights(run), weights(whole))
    ends = [end["optimizer"]["state"] for end in ends]
    assert ends[0].keys() == ends[1].keys() and all(same(ends[0][i], ends[1][i]) for i in ends[0])
    log = [[json.loads(line) for line in (r / "log.jsonl").read_text().splitlines()] for r in (run, whole)]
    assert [{k: v for k, v in row.items() if k != "images_per_s"} for row in log[0]] == [
        {k: v for k, v in row.items() if k != "images_per_s"} for row in log[1]
    ]


def test_killed_between_checkpoints(here):
    """Steps after the last checkpoint are done again, with the same result; the log tells each step once."""
    options = ["--batch", 2, "--save-every", 15, "--loss", "gcd"]  # 24 steps
    whole = here("whole", *options)
    with at_step(23, killed), pytest.raises(MemoryError):
        here("parts", *options)
    run = whole.parent / "parts"
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 15
    here("parts", *options, "--resume")
    assert same(weights(run), weights(whole))
    steps = [[json.loads(line)["step"] for line in (r / "log.jsonl").read_text().splitlines()] for r in (run, whole)]
    assert steps == [[20, 24]] * 2


def test_resume_of_a_finished_run_changes_nothing(here):
    run = here("a")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    here("a", "--resume")
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def test_resume_without_a_checkpoint_starts(here):
    assert (here("a", "--resume") / "isa.pt").exists()


def test_an_older_run_is_not_overwritten_unasked(here):
    run = here("a", "--epochs", 1)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match="runs/a already holds a training; .*--resume.*--overwrite.*--name"):
        here("a")
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    here("a", "--overwrite")
    assert torch.load(run / "isa.pt", weights_only=True)["step"] == 6
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [6]


@pytest.mark.parametrize("options, was, now", [
    (["--lr", "0.5"], "--lr 0.001", "0.5"), (["--tokens", 3], "--tokens 6", "3"), (["--seed", 4], "--seed 0", "4"),
    (["--loss", "gcd"], "--loss gcd+lar", "gcd"), (["--precision", "bf16"], "--precision fp32", "bf16"),
    (["--epochs", 3], "--epochs 2", "3"),
])  # fmt: skip
def test_resume_with_other_settings_is_refused_naming_both(here, options, was, now):
    with at_step(2, terminated):
        run = here("a")
    before = (run / "last.pt").read_bytes()
    with pytest.raises(ValueError) as error:
        here("a", "--resume", *options)
    assert f"was trained with {was}, not {now};" in str(error.value) and "\n" not in str(error.value)
    assert (run / "last.pt").read_bytes() == before


def test_resume_on_other_images_is_refused(here, images, tmp_path):
    with at_step(2, terminated):
        here("a")
    shutil.copytree(images, tmp_path / "fewer")
    (tmp_path / "fewer" / "000000.png").unlink()
    with pytest.raises(ValueError, match="24.*23|23.*24"):
        here("a", "--resume", folder=tmp_path / "fewer")


def test_precision_auto_resumes_in_the_precision_it_began_with(here, monkeypatch):
    monkeypatch.setattr(train, "pick_precision", lambda device: "bf16")
    with at_step(2, terminated):
        run = here("a", "--precision", "auto")
    monkeypatch.setattr(train, "pick_precision", lambda device: "fp32")
    here("a", "--precision", "auto", "--resume")
    assert torch.load(run / "last.pt", weights_only=True)["settings"]["precision"] == "bf16"


@pytest.fixture(scope="session")
def other_blip(pocket_blip, tmp_path_factory):
    """Pocket BLIP with one weight changed, as --blip and --vocab."""
    folder = tmp_path_factory.mktemp("other_blip")
    blip = blip_lite.load("pocket")
    blip.text_proj.bias[0] += 0.5
    blip_lite.save(blip, folder / "blip.pth")
    shutil.copy(ROOT / "pocket" / "vocab.txt", folder / "vocab.txt")
    return folder / "blip.pth"


def test_another_blip_is_refused(here, trained, other_blip, pocket_blip):
    other = blip_lite.load(other_blip)
    with pytest.raises(ValueError, match="was trained against BLIP") as error:
        query_side.load_query_model(trained.isa, other)
    assert pocket_blip.fingerprint in str(error.value) and other.fingerprint in str(error.value)
    with at_step(1, terminated):
        here("a")
    with pytest.raises(ValueError, match=f"was trained against BLIP {pocket_blip.fingerprint}, not {other.fingerprint}"):
        here("a", "--resume", "--blip", other_blip)
    larger = blip_lite.load("pocket", image_size=96)  # the same weights, but other features
    with pytest.raises(ValueError, match="--image-size"):
        query_side.load_query_model(trained.isa, larger)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "list", "weights"])
def test_damaged_checkpoints_are_refused(tmp_path, content, pocket_blip):
    path = tmp_path / "isa.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save([1, 2] if content == "list" else {"query_model": {}}, path)
    with pytest.raises(ValueError, match="isa.pt: is damaged or was not written by train.py"):
        query_side.load_query_model(path, pocket_blip)
    with pytest.raises(ValueError, match="there is no such file"):
        query_side.load_query_model(tmp_path / "none.pt", pocket_blip)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_checkpoints_execute_nothing(tmp_path, pocket_blip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"query_model": Evil(), "settings": {}, "blip": ""}, tmp_path / "isa.pt")
    with pytest.raises(ValueError, match="isa.pt"):
        query_side.load_query_model(tmp_path / "isa.pt", pocket_blip)
    assert not (tmp_path / "executed").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(here, tmp_path):
    with at_step(5, lambda gcd, v, t, temperature: gcd(v, t, temperature) * math.nan):
        with pytest.raises(ValueError, match="the loss is nan at step 4") as error:
            here("a", "--save-every", 2)
    checkpoint = torch.load(tmp_path / "runs" / "a" / "last.pt", weights_only=True)
    assert checkpoint["step"] == 4 and all(x.isfinite().all() for x in checkpoint["query_model"].values())
    assert "--lr" in str(error.value) and "--resume" not in str(error.value)  # which would refuse another --lr


def poll(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_real_signals_to_the_whole_process_group(trained, tmp_path, number):
    """As Ctrl-C and `timeout` do: the workers get the signal too. (More in test_crash.py.)"""
    command = [sys.executable, ROOT / "train.py", *trained.options, "--name", "a", "--cache-dir", trained.cwd / "features"]
    command = [str(x) for x in (*command, "--epochs", 3, "--batch", 20, "--save-every", 3)]  # 24 steps
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)
    poll((tmp_path / "runs" / "a" / "last.pt").exists)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    step = torch.load(tmp_path / "runs" / "a" / "last.pt", weights_only=True)["step"]
    assert 0 < step < 24
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL and step % 3 == 0
    else:
        assert process.returncode == 128 + number and f"stopped after step {step}; --resume" in out and err == ""
    for name, more in (("a", ["--resume"]), ("whole", [])):
        options = [*command[2:], "--name", name, *more]
        done = run_script("train.py", *options, cwd=tmp_path)
        assert done.status == 0, done.err
    assert same(weights(tmp_path / "runs" / "a"), weights(tmp_path / "runs" / "whole"))
    assert not [path for path in tmp_path.rglob("*.tmp*")]


@pytest.mark.slow
def test_workers_that_are_spawned(images, cache, tmp_path):
    """What macOS does, and Python 3.14 on Linux in a like way."""
    script = tmp_path / "spawned.py"
    script.write_text(
        f"import multiprocessing, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
        "if __name__ == '__main__':\n    multiprocessing.set_start_method('spawn')\n    train.train(train.parse_args())\n"
    )
    options = ["--images", images, "--cache-dir", tmp_path / "own", "--batch", 8, "--epochs", 1, "--precision", "fp32"]
    done = run_script(script, *options, "--name", "spawned", cwd=tmp_path)
    assert done.status == 0, done.err
    assert run_script("train.py", *options, "--name", "plain", cwd=tmp_path).status == 0
    assert same(*(weights(tmp_path / "runs" / name) for name in ("spawned", "plain")))


# -------------------------------------------------------------------------------------------------- what is stored
def test_with_or_without_stored_features(here, tmp_path, pocket_blip):
    """Stored features are those that BLIP computes at the step, up to the rounding to float16."""
    runs = {}
    for cache in ("none", "global", "full"):
        runs[cache] = weights(here(cache, "--cache", cache, "--cache-dir", f"of_{cache}", "--loss", "gcd", "--crop", 1))
    change = lambda a, b: sum(float((a[x] - b[x]).square().sum()) for x in a if a[x].is_floating_point()) ** 0.5  # noqa: E731
    start = weights(here("start", "--loss", "gcd", "--lr", "1e-30", "--weight-decay", 0))
    for cache in ("global", "full"):
        assert change(runs["none"], runs[cache]) < 0.1 * change(runs["none"], start)
    stored = {cache: sorted(path.name for path in (tmp_path / f"of_{cache}").glob("features-*/*.npy")) for cache in runs}
    assert stored == {"none": [], "global": ["v.npy"], "full": ["v.npy"]}  # GCD alone has no use for F^v


def test_lar_computes_what_is_not_stored(here):
    log = {}
    for cache in ("none", "global", "full"):
        run = here(cache, "--cache", cache, "--cache-dir", f"of_{cache}", "--crop", 1, "--lr", "1e-5", "--weight-decay", 0)
        log[cache] = json.loads((run / "log.jsonl").read_text())
    assert log["none"]["lar"] == log["global"]["lar"] == pytest.approx(log["full"]["lar"], abs=2e-3)
    assert log["full"]["gcd"] == pytest.approx(log["none"]["gcd"], abs=2e-3)


def test_sizes_are_announced(here, capsys):
    here("a", "--cache", "global", "--cache-dir", "own")
    out = capsys.readouterr().out
    assert "24 images: v 3.07e-06 GB, F^v 0.000399 GB; --cache global" in out  # 24 x 128 B, 24 x 2 x 65 x 128 B
    assert "storing v of 24 training images" in out


def test_images_that_are_lost_in_the_middle(here, images, tmp_path, capsys):
    """After the features were stored: a stand-in takes the place; more than ten, and more than 1 %, end the run."""
    shutil.copytree(images, tmp_path / "photos")

    def lose(count):
        def act(gcd, *arguments):
            for path in listed(tmp_path / "photos")[:count]:
                path.unlink()
            return gcd(*arguments)

        return act

    with at_step(1, lose(3)):
        run = here("few", folder=tmp_path / "photos")
    assert torch.load(run / "isa.pt", weights_only=True)["step"] == 6
    assert "000000.png: there is no such image" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "photos")
    shutil.copytree(images, tmp_path / "photos")
    with at_step(1, lose(20)), pytest.raises(ValueError, match="images, more than 1 %, were damaged or gone up to step"):
        here("many", folder=tmp_path / "photos")


def shards(folder, images):
    """Tar shards as img2dataset writes them: image, caption and metadata of each, five to a shard."""
    folder.mkdir()
    for i, path in enumerate(images):
        with tarfile.open(folder / f"{i // 5:05d}.tar", "a") as tar:
            for name, data in ((f"{i:09d}.png", path.read_bytes()), (f"{i:09d}.txt", b"a text"), (f"{i:09d}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def test_shards_train_as_their_files_do(here, images, tmp_path):
    """The same images in the same order: the same weights, to the bit."""
    flat_folder = tmp_path / "flat"
    flat_folder.mkdir()
    for i, path in enumerate(listed(images)):
        shutil.copy(path, flat_folder / f"{i:09d}.png")
    folder = shards(tmp_path / "shards", listed(images))
    assert len(list(folder.iterdir())) == 5
    for cache in ("none", "full"):
        a = here(f"files_{cache}", "--cache", cache, folder=flat_folder)
        b = here(f"shards_{cache}", "--cache", cache, "--workers", 1, folder=folder)
        assert same(weights(a), weights(b))


# -------------------------------------------------------------------------------------------------- several processes
def torchrun(processes, *options, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", 29512]
    command += [ROOT / "train.py", "--precision", "fp32", "--workers", 0, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(x) for x in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def one_process_of_two(rank, port, folder):
    """Gradients of GCD for this process's half of eight images, as the loop computes them."""
    torch.set_num_threads(1)
    train.dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    blip, model, pixels, v = gcd_case()
    mine = slice(4 * rank, 4 * rank + 4)
    speak = torch.nn.parallel.DistributedDataParallel(model)
    t = blip.encode_text(*isa.compose_query(blip, speak(pixels[mine])))
    loss = isa.global_contrastive_distillation(gather(v[mine]), gather(t), blip.temperature)
    (2 * loss).backward()
    assert agree(torch.tensor(1.0 + rank), 3 * rank) == [1.5, 1.5]
    torch.save([loss.detach(), *(p.grad for p in model.parameters())], f"{folder}/{rank}.pt")
    train.dist.destroy_process_group()


def gcd_case():
    torch.manual_seed(0)
    blip = blip_lite.load("pocket")
    settings = {"encoder": "pocketnet", "tokens": 6, "mapper": "atl", "gallery": "blip", "query_size": None}
    model = query_side.build_query_model(settings, blip).eval()  # batch-norm statistics are each process's own: here they are fixed
    return blip, model, torch.randn(8, 3, 64, 64), torch.nn.functional.normalize(torch.randn(8, 64), dim=-1)


def test_two_processes_give_the_gradients_of_one(tmp_path):
    blip, model, pixels, v = gcd_case()
    t = blip.encode_text(*isa.compose_query(blip, model(pixels)))
    loss = isa.global_contrastive_distillation(v, t, blip.temperature)
    loss.backward()
    expected = [loss.detach(), *(p.grad for p in model.parameters())]
    context = torch.multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    halves = [context.Process(target=one_process_of_two, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in halves:
        process.start()
    for process in halves:
        process.join()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found[0] == pytest.approx(loss.item(), rel=1e-6)
        total = torch.cat([x.flatten() for x in expected]).norm()
        assert torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)]).norm() < 1e-6 * total


@pytest.mark.slow
def test_torchrun_trains_as_one_process_and_resumes_with_any_number(images, tmp_path):
    """GCD with an encoder that has no batch norm is the same computation however it is shared out. One log, one checkpoint."""
    options = ["--images", images, "--batch", 8, "--epochs", 4, "--crop", 0.8, "--loss", "gcd", "--encoder", "blip"]
    one, two = (torchrun(n, *options, "--name", name, cwd=tmp_path) for n, name in ((1, "one"), (2, "two")))
    assert two.stdout.count("wrote runs/two/isa.pt") == two.stdout.count("steps 0..12") == one.stdout.count("steps 0..12") == 1
    a, b = (weights(tmp_path / "runs" / name) for name in ("one", "two"))
    assert all((a[name] - b[name]).abs().max() <= 2e-4 * a[name].abs().max() for name in a)
    logs = [(tmp_path / "runs" / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [len(log) for log in logs] == [1, 1]
    assert json.loads(logs[0][0])["gcd"] == pytest.approx(json.loads(logs[1][0])["gcd"], rel=1e-4)

    script = tmp_path / "half.py"  # two processes that are told to stop after step 5
    script.write_text(f"import os, runpy, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport isa\ngcd, calls = "
                      "isa.global_contrastive_distillation, []\ndef stopped(*a):\n    calls.append(0)\n    if len(calls) == 5 and "
                      "os.environ['RANK'] == '1':\n        os.kill(os.getpid(), signal.SIGTERM)\n    return gcd(*a)\n"
                      f"isa.global_contrastive_distillation = stopped\nrunpy.run_path({str(ROOT / 'train.py')!r}, "
                      "run_name='__main__')\n")  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29513, script]
    command += [*options, "--precision", "fp32", "--workers", 0, "--name", "parts"]
    done = subprocess.run([str(x) for x in command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode and done.stdout.count("stopped after step 5") == 1, done.stderr
    assert torch.load(tmp_path / "runs" / "parts" / "last.pt", weights_only=True)["step"] == 5
    torchrun(1, *options, "--name", "parts", "--resume", cwd=tmp_path)
    c = weights(tmp_path / "runs" / "parts")
    assert all((a[name] - c[name]).abs().max() <= 2e-4 * a[name].abs().max() for name in a)


def test_torchrun_trains_with_both_losses(images, tmp_path):
    done = torchrun(2, "--images", images, "--batch", 8, "--epochs", 1, "--name", "both", cwd=tmp_path)
    row = json.loads((tmp_path / "runs" / "both" / "log.jsonl").read_text())
    assert row["step"] == 3 and math.isfinite(row["lar"]) and 0 <= row["matched"] <= 1 and "24 images, steps 0..3" in done.stdout
    stored = list((tmp_path / "cache").glob("*"))
    assert len(stored) == 2 and not [path for path in stored if path.name.endswith(".tmp")]  # the list and the features
    features = Features(next(path for path in stored if path.name.startswith("features")))
    assert np.abs(np.linalg.norm(np.asarray(features.v, np.float32), axis=1) - 1).max() < 1e-3  # both shares


def test_a_batch_that_cannot_be_shared_out(here, monkeypatch):
    monkeypatch.setattr(train, "process", lambda: (0, 3))
    with pytest.raises(ValueError, match="--batch 8 cannot be shared out among 3 processes; give a multiple of 3"):
        here("a")


# ----------------------------------------------------------------------------------------------------- bad input
def one_line(finished, *parts):
    """Failed with status 1 and one line on stderr, which holds every part."""
    assert finished.status == 1 and finished.err.startswith("train.py: ") and finished.err.count("\n") == 1, finished.err
    for part in parts:
        assert part in finished.err


@pytest.mark.parametrize("options, parts", [
    (["--images", "nowhere"], ["nowhere: there is no such folder"]), (["--images", "empty"], ["empty: holds 0 images"]),
    (["--images", "one"], ["one: holds 1 images"]), (["--blip", "missing.pth"], ["missing.pth: there is no such file"]),
    (["--blip", "text.pth"], ["text.pth"]), (["--vocab", "none.txt"], ["none.txt"]), (["--image-size", "60"], ["60"]),
    (["--pretrained", "imagenet"], ["pocketnet has no ImageNet weights"]), (["--pretrained", "text.pth"], ["text.pth"]),
    (["--cache-dir", "text.pth"], ["text.pth"]), (["--prompt", "a " * 80], ["positions"]),
], ids=lambda x: " ".join(x)[:30])  # fmt: skip
def test_failures_are_one_line(call_script, images, tmp_path, options, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    shutil.copy(images / "000000.png", tmp_path / "one")
    (tmp_path / "text.pth").write_text("text")
    common = ["--precision", "fp32", "--workers", 0] + ([] if "--images" in options else ["--images", images])
    one_line(call_script("train.py", *common, *options), *parts)
    assert not list(tmp_path.glob("runs/*/*.pt"))


def spoil(folder, count, images):
    """`count` damaged images into the folder, of several kinds."""
    for i in range(count):
        whole = (images / "000000.png").read_bytes()
        (folder / f"bad{i}.png").write_bytes([b"", b"text", whole[:300]][i % 3])


def test_many_damaged_images_fail_unless_skipped(call_script, images, tmp_path):
    shutil.copytree(images, tmp_path / "photos")
    spoil(tmp_path / "photos", 3, images)
    options = ["--images", "photos", "--batch", 8, "--epochs", 1, "--precision", "fp32", "--workers", 0, "--name", "a"]
    failed = call_script("train.py", *options)
    assert failed.status == 1 and failed.message.startswith("train.py: 3 of 27 images in photos are damaged")
    assert "--skip-bad-images" in failed.message
    assert all(f"photos/bad{i}.png: " in failed.err for i in range(3)) and not (tmp_path / "runs").exists()
    done = call_script("train.py", *options, "--skip-bad-images")
    assert done.status == 0 and all(f"photos/bad{i}.png: " in done.err for i in range(3)) and "24 images, steps 0..3" in done.out
    good = call_script("train.py", *options[2:], "--images", "photos", "--skip-bad-images", "--name", "b")
    assert good.status == 0 and same(weights(tmp_path / "runs" / "a"), weights(tmp_path / "runs" / "b"))


def test_a_few_damaged_images_are_counted_named_and_skipped(call_script, small_world, images, tmp_path):
    (tmp_path / "photos").mkdir()
    for path in sorted((small_world / "train").iterdir())[:101]:
        os.link(path, tmp_path / "photos" / path.name)
    spoil(tmp_path / "photos", 1, images)
    options = ["--images", "photos", "--batch", 50, "--epochs", 1, "--loss", "gcd", "--precision", "fp32", "--workers", 0]
    done = call_script("train.py", *options)
    assert done.status == 0 and "photos/bad0.png: is empty" in done.err and "1 of 102 images" in done.err
    assert "101 images, steps 0..2" in done.out


def test_no_readable_image_at_all(call_script, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_text("no image")
    done = call_script("train.py", "--images", tmp_path, "--skip-bad-images", "--precision", "fp32", "--workers", 0)
    assert done.status == 1 and "holds 0 readable images" in done.message


def test_fewer_images_than_a_batch(here):
    run = here("a", "--batch", 100)
    assert torch.load(run / "isa.pt", weights_only=True)["step"] == 2  # two epochs of one step with all 24
