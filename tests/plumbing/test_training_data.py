"""What a training step sees: the order of images, their augmentation, BLIP's features, damage."""

import io
import os
import shutil
import tarfile
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import blip_lite
import query_side
from plumbing import training_data
from plumbing.augment import NeutralRandAugment
from plumbing.images import list_images
from plumbing.training_data import TrainingData, TrainingImages, epoch_order

SETTINGS = dict(loss="gcd+lar", cache="full", gallery="blip", precision="fp32", workers=0,
                skip_bad_images=False, epochs=2, batch=8, seed=3, shuffle_buffer=1000, crop=1.0,
                flip=False, randaugment=0, micro_batch=None)
AUGMENTED = dict(crop=0.5, flip=True, randaugment=9)


def batches(n, batch, seed=0, first=0, steps=1, bad=(), buffer=1000, **processes):
    return list(training_data.batches(n, list(bad), batch, seed, first, steps, buffer,
                                      **processes))


def rows(found):
    return [row for batch in found for _, row in batch]


@pytest.mark.parametrize("buffer", [1, 5, 7, 100])
def test_an_epoch_shows_each_sound_row_once(buffer, monkeypatch):
    """Whatever the buffer, the first step and the number of processes."""
    monkeypatch.setattr(training_data, "RUN", 3)
    make = lambda **more: batches(12, 6, 5, steps=6, bad=[0, 4], buffer=buffer, **more)  # noqa: E731
    whole = make()
    epochs = [rows(whole[i : i + 2]) for i in (0, 2, 4)]
    assert [{epoch for epoch, _ in batch} for batch in whole] == [{0}, {0}, {1}, {1}, {2}, {2}]
    assert all(sorted(epoch) == [1, 2, 3, *range(5, 14)] for epoch in epochs)
    assert len({(*sorted(epochs[0]),), *map(tuple, epochs)}) == 4  # shuffled, and anew each time
    assert all(make(first=first) == whole[first:] for first in range(7))
    for processes in (2, 3, 6):
        shares = [make(rank=rank, processes=processes) for rank in range(processes)]
        assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    assert rows(batches(12, 6, 6, steps=2, buffer=buffer)) != rows(batches(12, 6, 5, steps=2))


def test_the_rows_that_fill_no_batch_are_others_in_each_epoch():
    left_out = Counter()
    for epoch in range(30):
        seen = set(rows(batches(10, 4, 0, 2 * epoch, 2 * epoch + 2)))
        assert len(seen) == 8
        left_out.update(set(range(10)) - seen)
    assert len(left_out) == 10


def test_a_shuffle_reads_in_runs_and_mixes_a_buffer():
    """Each buffer of 10,000 images holds ten or eleven runs of neighbours, from everywhere."""
    blocks = list(epoch_order(100_500, 0, 1, 10_000))
    assert [len(block) for block in blocks] == [10_000] * 10 + [500]
    assert np.array_equal(np.sort(np.concatenate(blocks)), np.arange(100_500))
    for block in blocks[:10]:
        gaps = np.diff(np.sort(block))
        assert (gaps > 1).sum() < 12 and np.ptp(block) > 40_000
        assert abs(np.corrcoef(block[:-1], block[1:])[0, 1]) < 0.1  # in no order within
    assert not np.array_equal(blocks[0], next(epoch_order(100_500, 0, 2, 10_000)))


def paths(folder):
    return sorted(folder.rglob("*.png"))


def training_images(folder, **options):
    settings = SETTINGS | AUGMENTED | options
    return TrainingImages(list_images(paths(folder)), query_side.build("pocketnet"), settings)


def test_augmentation_is_a_function_of_seed_epoch_and_row(images, tmp_path):
    """Of one image, copied. Neither order nor the state of a generator matters or changes."""
    for i in range(4):
        shutil.copy(images / "000000.png", tmp_path / f"{i}.png")
    data, again = training_images(tmp_path), training_images(tmp_path)
    keys = [(epoch, row) for epoch in range(3) for row in range(4)]
    first = {key: data[key][1] for key in keys}
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    for key in reversed(keys):
        row, pixels, *_ = again[key]
        assert row == key[1] and torch.equal(pixels, first[key])
    assert torch.equal(before, torch.random.get_rng_state())
    drawn = [*first.values(), training_images(tmp_path, seed=4)[0, 0][1]]
    assert len({pixels.numpy().tobytes() for pixels in drawn}) == 13


@pytest.mark.parametrize("options, decoded", [
    ({}, 4), (dict(workers=2), 4), (dict(workers=2, limit=0.5), 8), (dict(limit=0), 8),
    (dict(flip=True), 8), (dict(crop=0.5), 8)])
def test_images_are_decoded_once_where_nothing_changes_them(images, tmp_path, monkeypatch, options,
                                                            decoded):
    """One worker may keep up to KEPT bytes, two half as much; augmented images are not kept."""
    for path in paths(images)[:4]:
        shutil.copy(path, tmp_path)
    workers, limit = options.get("workers", 1), options.pop("limit", 1)
    monkeypatch.setattr(training_data, "KEPT", limit * workers * 4 * 3 * 64 * 64)
    data = training_images(tmp_path, **dict(crop=1.0, flip=False, randaugment=0) | options)
    opened, read = [], data.images.open
    monkeypatch.setattr(data.images, "open", lambda i: opened.append(i) or read(i))
    for epoch in range(2):
        for row in range(4):
            i, pixels, blip_pixels, damaged = data[epoch, row]
            assert (i, pixels.dtype, blip_pixels, damaged) == (row, torch.uint8, None, {})
            if "crop" not in options and "flip" not in options:
                wanted = np.asarray(Image.open(paths(tmp_path)[row]).convert("RGB"))
                assert np.array_equal(pixels.permute(1, 2, 0), wanted)
    assert len(opened) == decoded


def test_randaugment_keeps_what_colour_words_mean():
    """On an image of two colours no other may appear but the black that shearing brings in."""
    augment = NeutralRandAugment(num_ops=2, magnitude=20)
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = (200, 40, 60), (90, 120, 240)
    allowed, changed = {(200, 40, 60), (90, 120, 240), (0, 0, 0)}, 0
    torch.manual_seed(0)
    for _ in range(200):
        found = np.asarray(augment(Image.fromarray(picture)))
        strange = sum(tuple(colour) not in allowed for colour in found.reshape(-1, 3).tolist())
        assert strange < 0.15 * 64 * 64  # sharpness overshoots along edges
        changed += not np.array_equal(found, picture)
    assert changed > 100


def test_the_next_image_stands_in_for_a_damaged_one(images, tmp_path):
    for name in "abdf":
        shutil.copy(images / "000000.png", tmp_path / f"{name}.png")
    for name in "ceg":
        (tmp_path / f"{name}.png").write_text("")
    data = training_images(tmp_path)
    i, pixels, _, damaged = data[0, 2]
    assert i == 3 and torch.equal(pixels, data[0, 3][1])
    assert damaged == {2: f"{tmp_path}/c.png: is empty; replace or remove the file"}
    assert data[0, 6][0] == 0 and data[0, 1][3] == {}  # after the last comes the first
    pixels, blip_pixels, v, F_v, damaged = data.collate([data[0, 1], data[0, 2], data[0, 4]])
    assert pixels.shape == (3, 3, 64, 64) and list(damaged) == [2, 4]
    assert blip_pixels is v is F_v is None


@pytest.fixture
def make(images, pocket_blip, tmp_path):
    """make(folder, option=...) -> TrainingData: by default two epochs of three steps."""

    def data(folder=images, **options):
        settings = SETTINGS | dict(images=str(folder), cache_dir=str(tmp_path / "cache")) | options
        return TrainingData(settings, pocket_blip, query_side.build("pocketnet"))

    return data


def check_same(steps, expected):
    for a, b in zip(steps, expected, strict=True):
        assert all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("cache", ["none", "global", "full"])
@pytest.mark.parametrize("loss", ["gcd", "gcd+lar"])
def test_each_step_has_what_blip_sees_in_the_whole_image(make, images, pocket_blip, tmp_path, loss,
                                                         cache):
    """Stored or computed, however the query model's image is cropped; F^v only if LAR needs it."""
    data = make(loss=loss, cache=cache, micro_batch=3, **AUGMENTED)
    stored = {path.name for path in tmp_path.glob("cache/features-*/*.npy")}
    files = {"none": set(), "global": {"v.npy"}, "full": {"v.npy", "F_v.npy"}}[cache]
    assert stored == (files - {"F_v.npy"} if loss == "gcd" else files)
    assert (data.count, data.batch, data.steps) == (24, 8, 6)
    found = list(data.from_step(0))
    plain = training_images(images)
    order = batches(24, 8, 3, steps=6)
    for (pixels, v, F_v), batch in zip(found, order, strict=True):
        seen = torch.stack([plain[key][1] for key in batch])
        assert torch.equal(pixels, blip_lite.normalize(seen, *plain.normalization))
        whole = [pocket_blip.preprocess(Image.open(paths(images)[row])) for _, row in batch]
        true_v, true_F_v = pocket_blip.encode_image(torch.stack(whole))
        assert v.dtype == torch.float32 and (v - true_v).abs().max() < 1e-3  # stored in float16
        if loss == "gcd":
            assert F_v is None
        else:
            assert F_v.dtype == torch.float32 and (F_v - true_F_v).abs().max() < 5e-3
    check_same(data.from_step(4), found[4:])


def test_a_gallery_of_the_query_side_needs_no_blip(make, images, tmp_path, monkeypatch):
    monkeypatch.setattr(type(make().blip), "encode_image", None)
    pixels, v, F_v = next(make(gallery="query", cache_dir=str(tmp_path / "other")).from_step(0))
    encoder = query_side.build("pocketnet")
    row = batches(24, 8, 3, steps=3)[0][0][1]
    assert torch.equal(pixels[0], query_side.preprocess(encoder, Image.open(paths(images)[row])))
    assert v is F_v is None and not list(tmp_path.glob("other/features-*"))


def test_sizes_are_announced_and_batches_fit_the_images(make, capsys):
    data = make(cache="global", batch=100)
    assert (data.batch, data.steps) == (24, 2)
    out = capsys.readouterr().out  # 24 x 64 x 2 B and 24 x 65 x 128 x 2 B
    assert "24 images: v 3.07e-06 GB, F^v 0.000399 GB; --cache global" in out
    assert "storing v of 24 training images" in out


@pytest.mark.parametrize("cache, context", [("none", None), ("full", "spawn")])
def test_shards_are_read_as_their_files_are(make, images, tmp_path, monkeypatch, cache, context):
    """Image, caption and metadata, as img2dataset writes them; workers forked and spawned."""
    (tmp_path / "shards").mkdir()
    for i, path in enumerate(paths(images)):
        with tarfile.open(tmp_path / f"shards/{i // 5:05d}.tar", "a") as tar:
            for suffix, content in (("png", path.read_bytes()), ("txt", b"text"), ("json", b"{}")):
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shards, files = make(tmp_path / "shards", cache=cache, workers=1), make(cache=cache)
    expected = list(files.from_step(0))
    loader = partial(training_data.DataLoader, multiprocessing_context=context)
    monkeypatch.setattr(training_data, "DataLoader", loader)
    check_same(shards.from_step(0), expected)


@pytest.fixture
def photos(images, small_world, tmp_path):
    """photos(bad, good) -> a folder of `bad` damaged images and `good` others."""

    def folder(bad, good=24):
        out = tmp_path / "photos"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for path in sorted((small_world / "train").iterdir())[:good]:
            os.link(path, out / path.name)
        whole = (images / "000000.png").read_bytes()
        for i in range(bad):
            (out / f"bad{i}.png").write_bytes([b"", b"text", whole[:300]][i % 3])
        return out

    return folder


def test_many_damaged_images_are_an_error_unless_skipped(make, photos, tmp_path, capsys):
    with pytest.raises(ValueError, match="3 of 27 images in .*photos are damaged, .*; fix or "
                                         "remove them, or .* skip them with --skip-bad-images"):
        make(photos(3))
    err = capsys.readouterr().err
    assert all(f"skipped: {tmp_path}/photos/bad{i}.png: " in err for i in range(3))
    data = make(photos(3), skip_bad_images=True)
    assert (data.count, data.bad) == (24, [24, 25, 26])
    check_same(data.from_step(0), make().from_step(0))


def test_a_few_damaged_images_are_counted_and_named(make, photos, capsys):
    assert make(photos(1, 101), loss="gcd").count == 101
    err = capsys.readouterr().err
    assert "bad0.png: is empty" in err and "skipped: 1 of 102 images are damaged" in err


@pytest.mark.parametrize("lost, skip", [(3, False), (20, True), (20, False)])
def test_images_that_are_lost_during_the_run(make, photos, capsys, lost, skip):
    """A neighbour takes the place; more than ten, and more than 1 %, end the run."""
    folder = photos(0)
    steps = make(folder, skip_bad_images=skip).from_step(0)
    next(steps)
    for path in paths(folder)[:lost]:
        path.unlink()
    if lost == 3 or skip:
        assert len(list(steps)) == 5
        assert "skipped: " + str(folder / "000000.png: there is no such") in capsys.readouterr().err
    else:
        with pytest.raises(ValueError, match="[12][0-9] images, more than 1 %, were damaged or "
                                             r"missing up to step \d; fix or remove"):
            list(steps)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_hundred_damaged_images_in_a_row(make, photos, workers):
    data = make(photos(120), cache="none", skip_bad_images=True, workers=workers, batch=144)
    with pytest.raises(ValueError, match="a hundred damaged images in a row, the first: .*bad"):
        list(data.from_step(0))
