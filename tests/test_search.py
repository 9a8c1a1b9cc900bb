"""search.py: rankings computed anew from single features, an index that encodes each photo once, contact sheets looked at."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import blip_lite
import evaluate
import isa
import query_side
import search
from plumbing.images import walk
from plumbing.pictures import ACROSS, MARGIN, PAPER, PHOTO, SIDE, TILE, contact_sheet, paste, shortened
from query_side.query_model import load_query_model

FAST = ["--precision", "fp32", "--workers", "0"]


@pytest.fixture
def photos(small_world, tmp_path):
    """Thirty photos in two folders with odd names, and other things."""
    root = tmp_path / "my photos" / "été"
    root.mkdir(parents=True)
    paths = sorted((small_world / "cirr/img_raw/test1").iterdir())[:30]
    for i, path in enumerate(paths):
        shutil.copy(path, (root if i % 2 else root.parent) / f"{i:02d} día.png")
    (root / "notes.txt").write_text("no photo")
    return root.parent


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of photos that BLIP looked at, search by search."""
    counts, plain = [], blip_lite.Blip.encode_image

    def counting(blip, pixels, **options):
        counts.append(len(pixels))
        return plain(blip, pixels, **options)

    monkeypatch.setattr(blip_lite.Blip, "encode_image", counting)
    return counts


def run(call_script, photos, *more, text="is red", image=None):
    image = image or sorted(walk(photos))[3]
    return call_script("search.py", "--gallery", photos, "--image", image, "--text", text, *FAST, *more)


def found(done):
    assert done.status == 0, done.err
    return json.loads(done.out)["results"]


def one_line(done, *parts):
    assert done.status == 1 and done.message.startswith("search.py: ") and done.err.count("\n") == 1, done.err
    for part in parts:
        assert part in done.message, done.message


@torch.no_grad()
def plain_ranking(blip, photos, image, text):
    """One photo at a time, no index: [(path, score)] best first, without the query itself."""
    model, settings = load_query_model(ROOT / "pocket" / "isa.pt", blip)
    U = model(query_side.preprocess(model.encoder, Image.open(image))[None])
    q = F.normalize(blip.encode_text(*isa.compose_query(blip, U, [text])), dim=-1)[0]
    scores = {}
    for folder, _, names in os.walk(photos):
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(".png") and path != str(image):
                scores[path] = float(blip.encode_image(blip.preprocess(Image.open(path))[None])[0][0] @ q)
    return sorted(scores.items(), key=lambda pair: -pair[1])


# ---------------------------------------------------------------------------------------------- ranking
@pytest.mark.parametrize("text", ("shows a blue car at night instead", ""))
def test_ranking_is_that_of_single_features(call_script, photos, pocket_blip, text):
    image = sorted(walk(photos))[3]
    rows = found(run(call_script, photos, "--json", "-", "--top", "29", text=text))
    wanted = plain_ranking(pocket_blip, photos, image, text)
    assert [row["path"] for row in rows] == [path for path, _ in wanted] and [row["rank"] for row in rows] == list(range(1, 30))
    assert np.allclose([row["score"] for row in rows], [score for _, score in wanted], atol=1e-4)


def test_list_file_and_more_than_there_are(call_script, photos, tmp_path):
    done = run(call_script, photos, "--json", "deep/found.json", "--top", "100")
    document = json.loads((tmp_path / "deep" / "found.json").read_text())
    settings = document["settings"]
    assert settings["text"] == "is red" and settings["top"] == 100 and settings["precision"] == "fp32"
    assert len(document["nearest_words"]) == 6 and len(document["results"]) == 29
    lines = done.out.splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == [row["path"] for row in document["results"]]
    assert lines[0].split()[0] == "1" and float(lines[0].split()[1]) == document["results"][0]["score"]
    assert "30 photos" in done.err and "cannot be read" not in done.err


def test_the_query_is_left_out_unless_kept(call_script, photos, tmp_path):
    image = sorted(walk(photos))[3]
    (tmp_path / "link.png").symlink_to(image)
    for query in (image, tmp_path / "link.png", os.path.relpath(image, tmp_path)):
        assert image not in [row["path"] for row in found(run(call_script, photos, "--json", "-", "--top", "30", image=query))]
    kept = found(run(call_script, photos, "--json", "-", "--top", "30", "--keep-query", text=""))
    assert len(kept) == 30 and image in [row["path"] for row in kept[:2]]  # its own sentence finds it
    shutil.copy(image, tmp_path / "copy.png")
    assert len(found(run(call_script, photos, "--json", "-", "--top", "30", image=tmp_path / "copy.png"))) == 30


# ---------------------------------------------------------------------------------------------- the index
def test_only_new_and_changed_photos_are_encoded(call_script, photos, encoded, pocket_blip):
    image = sorted(walk(photos))[3]
    assert len(found(run(call_script, photos, "--json", "-", "--top", "50", image=image))) == 29 and sum(encoded) == 30
    run(call_script, photos, text="at night")
    assert sum(encoded) == 30  # another text, nothing to encode
    paths = sorted(path for path in walk(photos) if path != image)
    shutil.copy(paths[0], photos / "new.png")
    os.remove(paths[1])
    os.rename(paths[2], photos / "renamed.png")
    time.sleep(0.01)
    shutil.copy(paths[5], paths[4])  # changed
    rows = found(run(call_script, photos, "--json", "-", "--top", "50", image=image))
    assert sum(encoded) == 33 and len(rows) == 29  # new, renamed, changed
    assert [row["path"] for row in rows if row["path"] not in (paths[0], str(photos / "new.png"), paths[4], paths[5])] == [
        path for path, _ in plain_ranking(pocket_blip, photos, image, "is red")
        if path not in (paths[0], str(photos / "new.png"), paths[4], paths[5])]  # fmt: skip
    scores = {row["path"]: row["score"] for row in rows}
    assert scores[paths[4]] == scores[paths[5]] and scores[paths[0]] == scores[str(photos / "new.png")]


def test_what_is_gone_is_forgotten(call_script, photos, tmp_path):
    run(call_script, photos)
    (records,) = tmp_path.glob("cache/photos-*/records")
    whole = records.stat().st_size
    for path in sorted(walk(photos))[10:]:
        os.remove(path)
    assert len(found(run(call_script, photos, "--json", "-", "--top", "50"))) == 9
    assert records.stat().st_size == whole // 3


def test_an_index_belongs_to_a_blip_a_precision_and_a_folder(call_script, photos, tmp_path):
    run(call_script, photos)
    run(call_script, photos, "--precision", "bf16")
    run(call_script, photos / "été", image=sorted(walk(photos))[3])
    assert len(list(tmp_path.glob("cache/photos-*"))) == 3


def test_a_folder_may_be_reached_by_many_ways(call_script, photos, encoded, tmp_path):
    (tmp_path / "link").symlink_to(photos)
    for way in (photos, os.path.relpath(photos, tmp_path), f"{photos}/", tmp_path / "link", photos / "été" / ".."):
        rows = found(run(call_script, way, "--json", "-", image=sorted(walk(photos))[3]))
        assert len(rows) == 10 and all(row["path"].startswith(str(way)) for row in rows)
    assert sum(encoded) == 30 and len(list(tmp_path.glob("cache/photos-*"))) == 1


def test_automatic_precision_keeps_to_the_index_that_is_there(call_script, photos, encoded, monkeypatch, tmp_path):
    """Timed anew at each start, it may come out otherwise; a choice of the user's own is not overruled."""
    image = sorted(walk(photos))[3]
    results = []
    for picked, asked in (("bf16", "auto"), ("fp32", "auto"), ("fp32", "fp32"), ("bf16", "auto"), ("fp32", "auto")):
        monkeypatch.setattr(evaluate, "pick_precision", lambda device, picked=picked: picked)
        done = call_script("search.py", "--gallery", photos, "--image", image, "--workers", 0, "--precision", asked, "--json", "-")
        results.append(json.loads(done.out))
    assert [r["settings"]["precision"] for r in results] == ["bf16", "bf16", "fp32", "bf16", "fp32"] and sum(encoded) == 60
    assert results[0]["results"] == results[1]["results"] != results[2]["results"]


def test_a_half_written_record_is_cut_off(call_script, photos, encoded, tmp_path):
    before = found(run(call_script, photos, "--json", "-"))
    (records,) = tmp_path.glob("cache/photos-*/records")
    os.truncate(records, records.stat().st_size - 1000)  # 288 bytes each: three are gone, and a part of a fourth
    assert found(run(call_script, photos, "--json", "-")) == before and sum(encoded) == 34


SLOWLY = """  # search.py, which prints a line after each batch and waits: the first argument says how long
import runpy, sys, time
import search
delay, plain = float(sys.argv.pop(1)), search.load_images
def slow(*arguments):
    for batch in plain(*arguments):
        yield batch
        print("B", flush=True)
        time.sleep(delay)
import blip_lite.images
blip_lite.images.load_images = slow
runpy.run_path(search.__file__, run_name="__main__")
"""


@pytest.mark.parametrize("number", (signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)))
def test_an_interrupted_indexing_goes_on(photos, small_world, tmp_path, number):
    """A real process is stopped after its first batch of 64; the next one encodes the rest."""
    for i, path in enumerate(sorted((small_world / "train").iterdir())[:200]):
        shutil.copy(path, photos / f"more {i}.png")
    image = sorted(walk(photos))[3]
    options = ["--gallery", str(photos), "--image", image, *FAST]

    def process(delay):
        command, environment = [sys.executable, "-c", SLOWLY, str(delay), *options], {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    first = process(60)
    assert first.stdout.readline() == "B\n"
    first.send_signal(number)
    assert first.wait() == (-9 if number == signal.SIGKILL else 143)
    (records,) = tmp_path.glob("cache/photos-*/records")
    assert records.stat().st_size % 288 == 0
    done = records.stat().st_size // 288
    assert done == 64
    second = process(0)
    out, _ = second.communicate()
    assert second.returncode == 0 and out.count("B\n") == -(-(230 - done) // 64) and len(out.splitlines()) == out.count("B\n") + 10


@pytest.mark.slow
def test_two_searches_at_once(photos, tmp_path):
    command = [sys.executable, str(ROOT / "search.py"), "--gallery", str(photos), "--image", sorted(walk(photos))[3], *FAST]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    (first, _), (second, _) = [process.communicate() for process in both]
    assert first == second and len(first.splitlines()) == 10 and [process.returncode for process in both] == [0, 0]
    (records,) = tmp_path.glob("cache/photos-*/records")
    assert records.stat().st_size == 30 * 288


def test_damaged_photos_are_named_and_left_out(call_script, photos, encoded):
    (photos / "text.jpg").write_text("no photo")
    (photos / "empty.png").write_bytes(b"")
    done = run(call_script, photos, "--json", "-", "--top", "50")
    assert len(found(done)) == 29 and "left out:" in done.err and "text.jpg" in done.err and "empty.png: is empty" in done.err
    assert "32 photos" in done.err and "2 of them cannot be read" in done.err
    again = run(call_script, photos, "--json", "-", "--top", "50")
    assert found(again) == found(done) and sum(encoded) == 30
    assert "text.jpg" in again.err and "2 of them cannot be read" in again.err


def test_what_could_not_be_read_once_is_tried_again(call_script, photos):
    """A disk that fails for a moment changes neither a photo's size nor its time."""
    path = sorted(walk(photos))[7]
    stat, whole = os.stat(path), Path(path).read_bytes()
    for content, count in ((bytes(len(whole)), 28), (whole, 29)):
        Path(path).write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        rows = found(run(call_script, photos, "--json", "-", "--top", "50"))
        assert len(rows) == count and (path in [row["path"] for row in rows]) == (content == whole)


def test_names_that_are_not_utf8(call_script, photos, tmp_path):
    name = os.fsencode(photos) + b"/caf\xe9.png"
    shutil.copy(sorted(walk(photos))[3], name)
    done = run(call_script, photos, "--json", "found.json", "--top", "50", "--out", "sheet.png", image=sorted(walk(photos))[5])
    assert done.status == 0 and "caf\\udce9.png" in done.out
    paths = [row["path"] for row in json.loads((tmp_path / "found.json").read_text())["results"]]
    assert name in map(os.fsencode, paths)  # exact, for a program


def test_listing_and_loading_do_not_take_long(photos, pocket_blip, tmp_path, monkeypatch):
    """20,000 photos that are known: no photo is opened, and a second of the processor is enough."""
    paths = [str(tmp_path / f"{i}.png") for i in range(20_000)]
    ones = lambda blip, new, *_: ((range(a, a + 1000), np.ones((1000, 64))) for a in range(0, len(new), 1000))  # noqa: E731
    monkeypatch.setattr(search, "encode", ones)
    assert search.index(pocket_blip, paths, tmp_path, "fp32", tmp_path / "cache").shape == (20_000, 64)
    monkeypatch.setattr(search, "encode", lambda blip, new, *_: [] if not new else pytest.fail("encoded again"))
    start = time.process_time()
    assert (search.index(pocket_blip, paths, tmp_path, "fp32", tmp_path / "cache") == 1).all()
    assert time.process_time() - start < 5  # 0.3 s


# ---------------------------------------------------------------------------------------------- the contact sheet
def test_the_contact_sheet_shows_query_and_photos(call_script, photos, tmp_path):
    done = run(call_script, photos, "--out", "out/sheet.png", "--json", "-", "--top", "7")
    rows, sheet = found(done), np.asarray(Image.open(tmp_path / "out" / "sheet.png").convert("RGB"), int)
    query = Image.open(sorted(walk(photos))[3]).convert("RGB").resize((SIDE,) * 2, Image.Resampling.BICUBIC)
    m = MARGIN
    assert np.abs(sheet[m : m + SIDE, m : m + SIDE] - np.asarray(query, int)).max() == 0
    left = sheet.shape[1] - ACROSS * (PHOTO + m)
    for row in rows:
        i = row["rank"] - 1
        x, y = left + i % 5 * (PHOTO + m), m + i // 5 * (PHOTO + 44)
        photo = Image.open(row["path"]).convert("RGB").resize((PHOTO,) * 2, Image.Resampling.BICUBIC)
        assert np.abs(sheet[y : y + PHOTO, x : x + PHOTO] - np.asarray(photo, int)).max() == 0
    assert (sheet[-60:, -PHOTO :] == 255).all()  # seven photos leave the end of the second line empty


@pytest.mark.parametrize("size, inside", (((400, 100), (50, 20)), ((2, 8), (30, 50)), ((5000, 1), (50, 50))))
def test_proportions_are_kept(size, inside):
    """A square of 100 pixels at (10, 20): the photo in its middle, paper above and below or left and right, nothing beyond."""
    sheet = Image.new("RGB", (130, 130), "white")
    paste(sheet, Image.new("RGB", size, "red"), 10, 20, 100)
    red = (np.asarray(sheet) == (255, 0, 0)).all(axis=2)
    rows, columns = red.any(axis=1).nonzero()[0], red.any(axis=0).nonzero()[0]
    wide = {(400, 100): (100, 25), (2, 8): (25, 100), (5000, 1): (100, 1)}[size]
    assert (len(columns), len(rows)) == wide and red.sum() == wide[0] * wide[1]
    assert abs(columns.mean() - 59.5) <= 1 and abs(rows.mean() - 69.5) <= 1
    paper = (np.asarray(sheet) == PAPER).all(axis=2)
    assert paper.sum() == 100 * 100 - red.sum() and (red | paper)[20:120, 10:110].all()


def test_long_names_lose_their_middle():
    font = search.ImageFont.load_default(12)
    name = "a" * 80 + "_the_end.jpeg"
    short = shortened(name, font, 150)
    assert font.getlength(short) <= 150 and short.startswith("aaa") and short.endswith("end.jpeg") and "..." in short
    assert shortened("short.png", font, 150) == "short.png"


@pytest.mark.parametrize("tokens, maps", ((6, (True, True)), (10, (True, False)), (1, (False, False))))
def test_sheets_of_other_mappers(photos, tokens, maps):
    """Ten tokens take two lines; a mapper without attention has no maps. Many words, one of them long, stay in their place."""
    grid = torch.rand(tokens, 4, 4)
    words, paths = ["a-rather-long-word"] * tokens, sorted(walk(photos))[:3]
    grids = [grid if there else None for there in maps]
    text = "word " * 60 + "x" * 90  # 16 lines of at most 24 letters
    sheet = contact_sheet(Image.open(paths[0]).convert("RGB"), text, words, grids, paths, [1, 2, 3])
    pixels = np.asarray(sheet, int)
    ink = (pixels != 255).any(axis=2)
    m, line = MARGIN, 30 + sum(maps) * (TILE + 22)
    left = max(2 * SIDE, min(tokens, 6) * (TILE + 6)) + 2 * m
    assert sheet.size == (left + m + 3 * (PHOTO + m), 16 * 20 + 2 * m + -(-tokens // 6) * line)
    beside = ink[: 16 * 20 + 2 * m, m + SIDE + m : left]
    assert beside[300:320].any() and not beside[-m:].any() and not ink[:, left : left + m].any()
    red = (pixels[..., 0] - pixels[..., 1] > 60)[16 * 20 + 2 * m :]
    assert red[:line].any() == maps[0] and red[line:].any() == (tokens > 6) and red[line - 80 : line].any() == any(maps)


# ---------------------------------------------------------------------------------------------- bad input
def test_wrong_input_is_one_line(call_script, photos, tmp_path):
    image = sorted(walk(photos))[3]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    base = {"--gallery": photos, "--image": image, "--text": "is red"}
    for changed, parts in (
        ({"--gallery": "nowhere"}, ("nowhere", "no such folder", "--gallery")), ({"--gallery": "empty"}, ("empty", "no photos")),
        ({"--gallery": image}, ("no such folder",)), ({"--image": "nowhere.png"}, ("nowhere.png", "no such image", "--image")),
        ({"--image": "text.png"}, ("text.png",)),
        ({"--image": photos}, (str(photos),)), ({"--text": "red " * 600}, ("--text", "64 positions")),
        ({"--checkpoint": "no.pt"}, ("no.pt",)),
        ({"--blip": "nowhere.pth"}, ("nowhere.pth",)), ({"--out": "text.png/x.png"}, ("text.png",)),
        ({"--json": "empty"}, ("empty", "folder")), ({"--cache-dir": "text.png/deep"}, ("text.png", "is a file")),
    ):  # fmt: skip
        options = [str(x) for pair in (base | changed).items() for x in pair]
        one_line(call_script("search.py", *options, *FAST), *parts)
    assert not list(tmp_path.glob("cache/*"))  # all of that before anything was indexed


@pytest.mark.parametrize("options", (["--top", "0"], ["--out", "a.txt"], ["--texts", "y"], ["--workers", "-1"]), ids=" ".join)
def test_usage_errors(call_script, photos, options):
    done = run(call_script, photos, *options)
    assert done.status == 2 and "error:" in done.message
