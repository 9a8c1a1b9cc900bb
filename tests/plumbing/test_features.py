"""Stored features equal what BLIP says, are never stale, and resume; a failure leaves nothing."""

import errno
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from plumbing import features
from plumbing.images import find_images, list_images


@pytest.fixture
def images(tmp_path, small_world):
    """Nine image files that a test may spoil."""
    folder = tmp_path / "images"
    folder.mkdir()
    found = sorted((small_world / "train").iterdir())[:9]
    return [shutil.copy(path, folder / path.name) for path in found]


class Counting:
    """Pocket BLIP, counting the images it is given; interrupted in batch number `stop`, from 1."""

    def __init__(self, blip, stop=None):
        self.blip, self.seen, self.batches, self.stop = blip, 0, 0, stop

    def __getattr__(self, name):
        return getattr(self.blip, name)

    def encode_image(self, pixels, cls_only=False):
        self.batches += 1
        if self.batches == self.stop:
            raise KeyboardInterrupt
        self.seen += len(pixels)
        return self.blip.encode_image(pixels, cls_only)


@pytest.fixture
def blip(pocket_blip):
    return Counting(pocket_blip)


@pytest.fixture
def compute(tmp_path, blip, images):
    """image_features -> rows: the Features; v and F_v as arrays; seen: images BLIP was given."""

    def compute(paths=images, cache="cache", blip=blip, **options):
        before, options = blip.seen, {"workers": 0, "dtype": np.float32, **options}
        found = features.image_features(blip, list_images(paths), tmp_path / cache, **options)
        return SimpleNamespace(v=np.asarray(found.v), F_v=found.F_v and np.asarray(found.F_v),
                               bad=found.bad, rows=found, seen=blip.seen - before)

    return compute


def directly(blip, paths):
    with torch.no_grad():
        pixels = torch.stack([blip.preprocess(Image.open(path)) for path in paths])
        return [x.numpy() for x in blip.blip.encode_image(pixels)]


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("workers", [0, 1])
def test_values_are_those_of_encode_image(compute, blip, images, workers):
    found = compute(maps=True, batch_size=4, workers=workers)
    v, F_v = directly(blip, images)
    assert found.v.dtype == np.float32 and found.F_v.dtype == np.float16 and found.bad == {}
    assert np.allclose(found.v, v, atol=1e-6) and found.F_v.shape == F_v.shape == (9, 65, 128)
    assert np.allclose(found.F_v, F_v, atol=4e-3, rtol=1e-3)  # float16
    backward = compute(images[::-1], batch_size=4)
    assert np.allclose(backward.v[::-1], v, atol=1e-6) and backward.F_v is None


def test_rows_are_read_as_asked_for(compute):
    found = compute(maps=True, batch_size=4, dtype=np.float16)
    assert found.v.dtype == np.float16 and found.rows.v.shape == (9, 64) == found.v.shape
    sent = pickle.dumps(found.rows)  # to workers that are spawned: a path, not the features
    copy = pickle.loads(sent)
    assert len(sent) < 2000 and len(copy.F_v) == 9
    for index in ([7, 0, 7], range(9), []):
        assert np.array_equal(copy.v[index], found.v[list(index)])
        assert np.array_equal(copy.F_v[index], found.F_v[list(index)])
    with open(found.rows.folder / "v.npy", "r+b") as file:
        file.truncate(found.rows.v.offset + 128 * 4 + 5)
    assert found.rows.v[[3]].any()
    with pytest.raises(ValueError, match="v.npy: ends before row 5; delete its folder"):
        found.rows.v[[3, 5]]


def test_sizes_are_those_the_paper_would_need(blip):
    """v 512 B, F^v 0.30 MB an image for BLIP ViT-B at 224 px."""
    encoder = SimpleNamespace(pos_embed=torch.empty(1, 197, 768))
    base = SimpleNamespace(visual_encoder=encoder, embed_dim=256)
    assert features.bytes_per_image(base) == (512, 302_592)
    assert features.bytes_per_image(blip) == (128, 2 * 65 * 128)


def test_names_of_earlier_versions_stay(blip, tmp_path, monkeypatch):
    """What users have stored is found again: these names were made before the last rewrite."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("x")
    for path in ("x/a.bmp", "x/b.bmp"):
        Image.new("RGB", (64, 64)).save(path)
        os.utime(path, ns=(0, 10**18))
    blip.fingerprint = "a BLIP@64"
    features.image_features(blip, find_images("x", "cache"), "cache", maps=True)
    features.image_features(blip, list_images(["x/b.bmp"]), "cache", dtype=np.float32)
    names = ["features-3ba0532c5bfa0d47", "features-e2b87649b7c7af79", "images-492d8c1e4ff33bd9"]
    assert left(tmp_path / "cache") == names


def test_whatever_differs_makes_another_cache(compute, blip, images):
    exact, rounded = compute(), compute(precision="bf16")
    assert rounded.seen == 9 and not np.array_equal(exact.v, rounded.v)
    assert np.allclose(exact.v, rounded.v, atol=0.05)
    other = Counting(blip.blip)
    other.fingerprint = "another BLIP@64"
    for options in ({"maps": True}, {"blip": other}, {"dtype": np.float16}):
        assert compute(**options).seen == 9
    assert compute(images[:8]).seen == 8 and compute(images[1:] + images[:1]).seen == 9
    for paths in (images, images[:8]):  # and the first ones are still there
        assert compute(paths).seen == 0


def test_a_changed_file_is_read_again(compute, blip, images):
    before = compute().v
    Image.new("RGB", (64, 64), (200, 40, 40)).save(images[3])
    after = compute()
    assert after.seen == 9 and np.allclose(after.v[:3], before[:3], atol=1e-6)
    assert np.allclose(after.v[3], directly(blip, images[3:4])[0], atol=1e-6)
    assert not np.allclose(after.v[3], before[3], atol=1e-2)
    os.utime(images[3], ns=(0, 1000))  # only the time differs
    assert compute().seen == 9


def test_names_that_are_not_utf8(compute, images):
    odd = os.fsdecode(os.fsencode(images[0])[:-4] + b"\xff\xfe.png")
    try:
        os.rename(images[0], odd)
    except OSError:
        pytest.skip("this file system knows UTF-8 names only")
    assert np.isfinite(compute([odd]).v).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_an_error_or_named_rows_of_zeros(compute, blip, images, tmp_path, workers):
    for i in (1, 2):
        open(images[i], "w").write("not an image")
    os.remove(images[0])  # with a batch of 3, none of the first is readable
    options = {"maps": True, "batch_size": 3, "workers": workers}
    with pytest.raises(ValueError, match="000000.png: there is no such image"):
        compute(**options)
    assert left(tmp_path / "cache") == []  # nothing half-written
    found = compute(skip_bad=True, **options)
    assert set(found.bad) == {0, 1, 2} and "000002.png: cannot be read" in found.bad[2]
    assert not found.v[:3].any() and not found.F_v[:3].any()
    assert np.allclose(found.v[3:], directly(blip, images[3:])[0], atol=1e-6)
    again = compute(skip_bad=True, **options)
    assert again.seen == 0 and again.bad == found.bad
    with pytest.raises(ValueError, match="000000.png"):  # stored rows of zeros are not handed out
        compute(**options)


def test_refuses_when_the_disk_is_too_small(compute, tmp_path, monkeypatch, capsys):
    need = 9 * (4 * 64 + 2 * 65 * 128)  # v in float32, F^v in float16
    free = SimpleNamespace(free=need * 1.01)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ValueError, match="GB free; choose another --cache-dir"):
        compute(maps=True)
    assert left(tmp_path / "cache") == [] and capsys.readouterr().out == ""
    free.free = need * 1.10
    compute(maps=True, what="things")
    assert f"storing v and F^v of 9 things: {need / 1e9:.2f} GB" in capsys.readouterr().out


@pytest.mark.parametrize("stop, missing", [(1, 8), (2, 6), (3, 5), (5, 1)])
def test_resumes_to_the_same_bits(compute, blip, images, tmp_path, monkeypatch, stop, missing):
    """Two of nine images a batch, noted after each; one of them is damaged."""
    monkeypatch.setattr(features, "KEPT_EVERY", 1)
    open(images[2], "w").write("not an image")
    options = {"maps": True, "batch_size": 2, "skip_bad": True}
    whole = compute(cache="whole", **options)
    with pytest.raises(KeyboardInterrupt):
        compute(cache="parts", blip=Counting(blip.blip, stop), **options)
    assert left(tmp_path / "parts") == [f"{whole.rows.folder.name}.tmp"][: stop - 1]
    parts = compute(cache="parts", **options)
    assert parts.seen == missing and set(whole.bad) == {2} and whole.bad == parts.bad
    a, b = ({path.name: path.read_bytes() for path in found.rows.folder.iterdir()}
            for found in (whole, parts))
    assert set(a) == {"v.npy", "F_v.npy", "done.json"} and a == b
    assert left(tmp_path / "parts") == left(tmp_path / "whole")


def test_a_full_disk_is_one_sentence(compute, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(features, "_write", full)
    with pytest.raises(ValueError, match="tmp: cannot be written .No space left .* make room"):
        compute()
    assert left(tmp_path / "cache") == []


HOLD = """if True:
    import sys
    from pathlib import Path
    from plumbing.files import drafted
    with drafted(Path(sys.argv[1])) as draft:
        print("held", flush=True)
        input()
        for path in Path(sys.argv[2]).iterdir():
            path.rename(draft / path.name)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_do_not_compute_the_same(compute, tmp_path, capsys, killed):
    """The second waits, then finds what the first has stored; a killed one holds up nobody."""
    first = compute(cache="elsewhere")
    folder = tmp_path / "cache" / first.rows.folder.name
    command = [sys.executable, "-c", HOLD, folder, first.rows.folder]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        end = other.kill if killed else lambda: print(file=other.stdin, flush=True)
        threading.Timer(0.5, end).start()
        began = time.monotonic()
        again = compute()
    assert again.seen == (9 if killed else 0) and np.array_equal(first.v, again.v)
    assert time.monotonic() - began > 0.4
    assert "waiting for another process" in capsys.readouterr().err
    assert left(tmp_path / "cache") == [folder.name]
