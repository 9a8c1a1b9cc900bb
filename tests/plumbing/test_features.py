"""blip_lite/features.py: what it stores equals what BLIP says, is never stale, and leaves nothing behind when it fails."""

import copy
import errno
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from blip_lite import features
from plumbing.files import locked
from plumbing.images import list_images, open_image


# ---------------------------------------------------------------------------------------------------- open_image
def bomb(path):
    """A PNG of 20,000 x 10,000 white pixels: a few kB on disk, 200 MB once decoded to bytes."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (20_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    data = zlib.compress((b"\0" + b"\xff" * 2500) * 10_000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def truncated(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-900])


DAMAGED = {
    "missing": (lambda path: None, "there is no such image"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("<html>not found</html>"), "cannot be read as an image"),
    "truncated": (truncated, "cannot be read as an image"),
    "bomb": (bomb, "cannot be read as an image"),
    "folder": (lambda path: path.mkdir(), "cannot be read as an image"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_unreadable_images_are_named_in_one_sentence(tmp_path, damage):
    path = tmp_path / "photo.jpg"
    make, message = DAMAGED[damage]
    make(path)
    with pytest.raises(ValueError) as error:
        open_image(path)
    text = str(error.value)
    assert text.startswith(f"{path}: {message}") and "\n" not in text and len(text) < 400


def test_open_image_has_decoded_all_of_it(tmp_path):
    Image.new("RGB", (30, 20), (9, 8, 7)).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert image.size == (30, 20) and image.getpixel((29, 19)) == (9, 8, 7)


# ------------------------------------------------------------------------------------------------ image_features
@pytest.fixture
def images(tmp_path, small_world):
    """Nine image files of their own that a test may spoil."""
    folder = tmp_path / "images"
    folder.mkdir()
    return [shutil.copy(path, folder / path.name) for path in sorted((small_world / "train").iterdir())[:9]]


class Counting:
    """A BLIP that counts how many images it was given; everything else is the pocket BLIP's."""

    def __init__(self, blip):
        self.blip, self.seen = blip, 0

    def __getattr__(self, name):
        return getattr(self.blip, name)

    def encode_image(self, pixels, cls_only=False):
        self.seen += len(pixels)
        return self.blip.encode_image(pixels, cls_only)


@pytest.fixture
def blip(pocket_blip):
    return Counting(pocket_blip)


def image_features(blip, paths, cache, **options):
    """features.image_features for paths, as arrays."""
    found = features.image_features(blip, list_images(paths), cache, **{"dtype": np.float32, **options})
    return SimpleNamespace(v=np.asarray(found.v), F_v=found.F_v and np.asarray(found.F_v), bad=found.bad, rows=found)


def images_seen(blip, call):
    """call() -> its features, and how many images it took BLIP."""
    before = blip.seen
    return call(), blip.seen - before


def directly(blip, paths):
    with torch.no_grad():
        return blip.encode_image(torch.stack([blip.preprocess(Image.open(path)) for path in paths]))


def test_values_are_those_of_encode_image(tmp_path, blip, images):
    found = image_features(blip, images, tmp_path / "cache", maps=True, batch_size=4, workers=0)
    v, F_v = directly(blip, images)
    assert found.v.dtype == np.float32 and found.F_v.dtype == np.float16 and found.bad == {}
    assert found.F_v.shape == (9, 65, 128)
    assert np.allclose(found.v, v.numpy(), atol=1e-6)
    assert np.allclose(found.F_v, F_v.numpy(), atol=4e-3, rtol=1e-3)  # float16
    assert np.allclose(np.linalg.norm(found.v, axis=1), 1, atol=1e-6)


def test_rows_are_read_as_asked_for(tmp_path, blip, images):
    found = image_features(blip, images, tmp_path / "cache", maps=True, batch_size=4, workers=0, dtype=np.float16)
    assert found.v.dtype == np.float16 and found.rows.v.shape == (9, 64) and len(found.rows.F_v) == 9
    copy = pickle.loads(pickle.dumps(found.rows))  # as it reaches workers that are spawned: a path, not the features
    assert len(pickle.dumps(found.rows)) < 2000
    for index in ([7, 0, 7], range(9), []):
        assert np.array_equal(copy.v[index], found.v[list(index)]) and np.array_equal(copy.F_v[index], found.F_v[list(index)])
    with open(found.rows.folder / "v.npy", "r+b") as file:
        file.truncate(found.rows.v.offset + 128 * 4 + 5)
    assert found.rows.v[[3]].any()
    with pytest.raises(ValueError, match="v.npy: ends before row 5; delete its folder"):
        found.rows.v[[3, 5]]


def test_sizes_are_those_the_paper_would_need(blip):
    """v 512 B, F^v 0.30 MB an image for BLIP ViT-B at 224 px."""
    pos_embed = SimpleNamespace(pos_embed=torch.empty(1, 197, 768))
    assert features.bytes_per_image(SimpleNamespace(visual_encoder=pos_embed, embed_dim=256)) == (512, 302_592)
    assert features.bytes_per_image(blip) == (128, 2 * 65 * 128)


def test_order_of_files_and_workers_change_nothing(tmp_path, blip, images):
    forward = image_features(blip, images, tmp_path / "a", batch_size=4, workers=0).v
    backward = image_features(blip, images[::-1], tmp_path / "a", batch_size=4, workers=1).v
    assert np.allclose(forward, backward[::-1], atol=1e-6) and not np.allclose(forward, backward, atol=1e-2)
    v_only = image_features(blip, images, tmp_path / "a", workers=0)
    assert v_only.F_v is None


def test_computed_once(tmp_path, blip, images):
    call = lambda **kw: lambda: image_features(blip, images, tmp_path / "cache", workers=0, **kw)  # noqa: E731
    first, seen = images_seen(blip, call())
    assert seen == 9
    (folder,) = (tmp_path / "cache").iterdir()
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again, seen = images_seen(blip, call())
    assert seen == 0 and np.array_equal(first.v, again.v)
    assert stamps == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_whatever_differs_makes_another_cache(tmp_path, blip, images):
    def call(paths=images, **kw):
        return lambda: image_features(blip, paths, tmp_path / "cache", workers=0, **kw)

    exact, seen = images_seen(blip, call())
    rounded, seen = images_seen(blip, call(precision="bf16"))
    assert seen == 9 and not np.array_equal(exact.v, rounded.v) and np.allclose(exact.v, rounded.v, atol=0.05)
    assert images_seen(blip, call(maps=True))[1] == 9
    assert images_seen(blip, call(images[:8]))[1] == 8
    assert images_seen(blip, call(images[1:] + images[:1]))[1] == 9
    other = Counting(blip.blip)
    other.fingerprint = "another BLIP@64"
    assert images_seen(other, lambda: image_features(other, images, tmp_path / "cache", workers=0))[1] == 9
    for paths in (images, images[:8]):  # and the first ones are still there
        assert images_seen(blip, call(paths))[1] == 0


def test_a_changed_file_is_read_again(tmp_path, blip, images):
    call = lambda: image_features(blip, images, tmp_path / "cache", workers=0)  # noqa: E731
    before = call().v
    Image.new("RGB", (64, 64), (200, 40, 40)).save(images[3])
    after, seen = images_seen(blip, call)
    assert seen == 9 and np.allclose(after.v[3:4], directly(blip, images[3:4])[0], atol=1e-6)
    assert not np.allclose(after.v[3], before[3], atol=1e-2) and np.allclose(after.v[:3], before[:3], atol=1e-6)
    stamp = os.stat(images[3])
    os.utime(images[3], ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1000))  # the time of change alone tells
    assert images_seen(blip, call)[1] == 9


def test_names_that_are_not_utf8(tmp_path, blip, images):
    odd = os.fsdecode(os.fsencode(images[0])[:-4] + b"\xff\xfe.png")
    try:
        os.rename(images[0], odd)
    except OSError:
        pytest.skip("this file system knows UTF-8 names only")
    assert np.isfinite(image_features(blip, [odd], tmp_path / "cache", workers=0).v).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_an_error_or_named_rows_of_zeros(tmp_path, blip, images, workers):
    open(images[2], "w").write("not an image")
    os.remove(images[7])
    call = lambda **kw: image_features(blip, images, tmp_path / "cache", maps=True, batch_size=4, workers=workers, **kw)  # noqa: E731
    with pytest.raises(ValueError, match="000002.png: cannot be read"):
        call()
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-written
    found = call(skip_bad=True)
    assert set(found.bad) == {2, 7} and "000002.png: cannot be read" in found.bad[2] and "no such image" in found.bad[7]
    assert not found.v[[2, 7]].any() and not found.F_v[[2, 7]].any()
    good = [0, 1, 3, 4, 5, 6, 8]
    assert np.allclose(found.v[good], directly(blip, [images[i] for i in good])[0], atol=1e-6)
    again, seen = images_seen(blip, lambda: call(skip_bad=True))
    assert seen == 0 and again.bad == found.bad
    with pytest.raises(ValueError, match="000002.png: cannot be read"):  # the stored rows of zeros are not handed out
        call()


def test_a_whole_batch_of_bad_images(tmp_path, blip, images):
    for path in images[:4]:
        open(path, "w").close()
    found = image_features(blip, images, tmp_path / "cache", skip_bad=True, batch_size=4, workers=0)
    assert set(found.bad) == {0, 1, 2, 3} and found.v[4:].any(axis=1).all()


def test_refuses_when_the_disk_is_too_small(tmp_path, blip, images, monkeypatch, capsys):
    need = 9 * (4 * 64 + 2 * 65 * 128)  # v in float32, F^v in float16
    for free, enough in ((need * 1.01, False), (need * 1.10, True)):
        monkeypatch.setattr(features.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if enough:
            image_features(blip, images, tmp_path / "cache", maps=True, workers=0, what="things")
            assert f"storing v and F^v of 9 things: {need / 1e9:.2f} GB" in capsys.readouterr().out
        else:
            with pytest.raises(ValueError, match="GB free; choose another --cache-dir"):
                image_features(blip, images, tmp_path / "cache", maps=True, workers=0)
            assert list((tmp_path / "cache").iterdir()) == [] and capsys.readouterr().out == ""


def interrupted(blip, batch):
    """A Counting BLIP that is stopped when it should look at its batch number `batch`, from 1."""

    class Stopping(Counting):
        def encode_image(self, pixels, cls_only=False, calls=[]):  # noqa: B006
            calls.append(0)
            if len(calls) == batch:
                raise KeyboardInterrupt
            return super().encode_image(pixels, cls_only)

    return Stopping(blip.blip)


def test_nothing_is_left_when_it_is_interrupted_early(tmp_path, blip, images):
    with pytest.raises(KeyboardInterrupt):
        image_features(interrupted(blip, 2), images, tmp_path / "cache", maps=True, batch_size=4, workers=0)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("stop, left", [(2, 6), (3, 5), (5, 1)])
def test_what_was_stored_before_an_interrupt_is_gone_on_with(tmp_path, blip, images, monkeypatch, capsys, stop, left):
    """Two of nine images a batch, noted after each; one of them is damaged. The files end up the same, to the bit."""
    monkeypatch.setattr(features, "KEPT_EVERY", 1)
    open(images[2], "w").write("not an image")
    call = lambda blip, cache: image_features(blip, images, tmp_path / cache, maps=True, batch_size=2, workers=0, skip_bad=True)  # noqa: E731
    whole, _ = images_seen(blip, lambda: call(blip, "whole"))
    with pytest.raises(KeyboardInterrupt):
        call(interrupted(blip, stop), "parts")
    assert [path.suffix for path in (tmp_path / "parts").iterdir()] == [".tmp"]
    parts, seen = images_seen(blip, lambda: call(blip, "parts"))
    assert seen == left and "storing the rest of v and F^v of 9 images" in capsys.readouterr().out
    assert set(whole.bad) == {2} and whole.bad == parts.bad
    files = [{path.name: path.read_bytes() for path in found.rows.folder.iterdir()} for found in (whole, parts)]
    assert set(files[0]) == {"v.npy", "F_v.npy", "done.json"} and files[0] == files[1]
    assert not list((tmp_path / "parts").glob("*.tmp"))


def test_a_full_disk_is_one_sentence_and_what_was_stored_is_kept(tmp_path, blip, images, monkeypatch):
    monkeypatch.setattr(features, "KEPT_EVERY", 1)
    call = lambda cache: image_features(blip, images, tmp_path / cache, maps=True, batch_size=2, workers=0)  # noqa: E731
    whole = call("whole")
    write, calls = features.Rows.write, []

    def full(self, *arguments):
        calls.append(0)
        if len(calls) == 6:  # F^v of the third batch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(features.Rows, "write", full)
        with pytest.raises(ValueError, match="features-.*tmp: cannot be written .No space left on device.; .*make room"):
            call("parts")
    parts, seen = images_seen(blip, lambda: call("parts"))
    assert seen == 5 and np.array_equal(whole.v, parts.v) and np.array_equal(whole.F_v, parts.F_v)


def in_another_process(code, *arguments):
    script = f"import sys\nfrom pathlib import Path\nfrom blip_lite.files import *\n{code}"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, **pipes)


def test_two_processes_do_not_fill_one_draft(tmp_path, blip, images):
    """The second waits, and then finds what the first has stored; a killed one holds up nobody."""
    first = image_features(blip, images, tmp_path / "cache", workers=0)
    draft, folder = first.rows.folder.with_name(f"{first.rows.folder.name}.tmp"), first.rows.folder
    hold = "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    input()\n"
    other = in_another_process(hold + "    complete(Path(sys.argv[1]), Path(sys.argv[2]))\n", draft, folder)
    assert other.stdout.readline() == "held\n"
    for path in folder.iterdir():
        path.rename(draft / path.name)
    folder.rmdir()
    threading.Timer(0.5, other.communicate, ["\n"]).start()
    began = time.monotonic()
    again, seen = images_seen(blip, lambda: image_features(blip, images, tmp_path / "cache", workers=0))
    assert seen == 0 and np.array_equal(first.v, again.v) and time.monotonic() - began > 0.4
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]

    other = in_another_process(hold, draft)
    assert other.stdout.readline() == "held\n"
    with locked(draft, wait=False) as mine:
        assert not mine
    other.kill()
    other.communicate()
    with locked(draft, wait=False) as mine:
        assert mine
    assert not draft.exists()


def test_drafts_are_removed_after_a_week_unless_a_process_fills_them(tmp_path, blip, images):
    old, used, young, folder = (tmp_path / "cache" / f"features-{name}" for name in ("a.123.tmp", "b.tmp", "c.tmp", "d"))
    for path in (old, used, young, folder):
        path.mkdir(parents=True)
        (path / "v.npy").write_bytes(b"x")
    other = in_another_process("with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    input()\n", used)
    assert other.stdout.readline() == "held\n"
    for path, days in ((old, 8), (used, 8), (young, 6), (folder, 8)):
        os.utime(path, (time.time() - days * 86400,) * 2)
    image_features(blip, images, tmp_path / "cache", workers=0)
    other.communicate("\n")
    assert [path.exists() for path in (old, used, young, folder)] == [False, True, True, True]


# ------------------------------------------------------------------------------------------------------ precision
@pytest.mark.parametrize("faster, picked, untried", [(1.2, "fp32", 0), (2.0, "bf16", 0), (0.3, "fp32", 4)])
def test_precision_is_the_clearly_faster_one(monkeypatch, faster, picked, untried):
    clock, durations = [0.0], iter([1.0] * 6 + [1.0 / faster] * 6)

    def now(started=[False]):  # noqa: B006
        if started[0]:
            clock[0] += next(durations) * 0.1
        started[0] = not started[0]
        return clock[0]

    monkeypatch.setattr(features.time, "perf_counter", now)
    assert features.pick_precision("cpu") == picked and len(list(durations)) == untried


def test_rounded_weights_give_what_autocast_gives(blip, images):
    pixels = torch.stack([blip.preprocess(Image.open(path)) for path in images[:2]])
    rounded = copy.deepcopy(blip.blip)
    features.round_frozen_weights(rounded, "fp32")
    assert all(torch.equal(x, rounded.state_dict()[name]) for name, x in blip.blip.state_dict().items())
    features.round_frozen_weights(rounded, "bf16")
    answers = []
    with torch.no_grad(), features.autocast("cpu", "bf16"):
        for b in (blip.blip, rounded):
            ids, mask = b.tokenize(["a red cat", "a dog"])
            v, F_v = b.encode_image(pixels)
            words = b.embed_words(ids)
            answers.append([v, F_v, b.encode_text(words, mask), b.match(words, mask, F_v)])
    assert all(torch.equal(x, y) for x, y in zip(*answers, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept():
    """64 MiB taken and freed twenty times: by default the kernel is asked for 16,384 pages each time, then only at first."""
    script = """if True:
        import resource, sys, torch
        from plumbing.precision import keep_freed_memory
        if sys.argv[1] == "keep":
            keep_freed_memory()
        for _ in range(20):
            torch.ones(2**24)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"""
    faults = {}
    for how in ("default", "keep"):
        done = subprocess.run([sys.executable, "-c", script, how], cwd=ROOT, capture_output=True, text=True)
        faults[how] = int(done.stdout)
    if faults["default"] < 200_000:
        pytest.skip("this C library or kernel does not take pages one by one")
    assert faults["keep"] < faults["default"] - 200_000


def test_autocast():
    a = torch.ones(2, 2)
    with features.autocast("cpu", "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with features.autocast("cpu", "fp32"):
        assert (a @ a).dtype == torch.float32
