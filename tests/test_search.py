"""search.py: rankings against single features, and an index that encodes each photo once."""

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
import isa
import query_side
import search
from plumbing import photos as photos_module
from plumbing import precision
from plumbing.images import walk
from plumbing.pictures import ACROSS, MARGIN, PHOTO, SIDE

FAST = ["--precision", "fp32", "--workers", "0"]
RECORD = 32 + 4 * 64  # bytes: id and v of pocket BLIP


@pytest.fixture
def photos(small_world, tmp_path):
    """Thirty photos in two folders with odd names, and other things."""
    root = tmp_path / "my photos" / "été"
    root.mkdir(parents=True)
    paths = sorted((small_world / "cirr/img_raw/test1").iterdir())[:30]
    for i, path in enumerate(paths):
        shutil.copy(path, (root if i % 2 else root.parent) / f"{i:02d} día.png")
    for name in ("notes.txt", "._01 día.PNG"):
        (root / name).write_text("no photo")
    return root.parent


@pytest.fixture
def image(photos):
    return sorted(walk(photos))[3]


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of photos that BLIP looked at, batch by batch."""
    counts, plain = [], blip_lite.Blip.encode_image

    def counting(blip, pixels, **options):
        counts.append(len(pixels))
        return plain(blip, pixels, **options)

    monkeypatch.setattr(blip_lite.Blip, "encode_image", counting)
    return counts


@pytest.fixture
def run(call_script, image):
    def run(photos, *more, text="is red", image=image):
        where = ["--gallery", photos, "--image", image, "--text", text]
        return call_script("search.py", *where, *FAST, *more)

    return run


@pytest.fixture
def find(run):
    """Run and return the rows of the result, by default all of them."""

    def find(photos, *more, **options):
        done = run(photos, "--json", "-", "--top", "50", *more, **options)
        assert done.status == 0, done.err
        return json.loads(done.out)["results"]

    return find


def records(folder):
    (found,) = folder.glob("cache/photos-*/records")
    return found


@torch.no_grad()
def plain_ranking(blip, photos, image, text):
    """One photo at a time, no index: [(path, score)] best first, without the query itself."""
    model, _ = query_side.load_query_model(ROOT / "pocket" / "isa.pt", blip)
    U = model(query_side.preprocess(model.encoder, Image.open(image))[None])
    q = F.normalize(blip.encode_text(*isa.compose_query(blip, U, [text])), dim=-1)[0]
    scores = {}
    for path in map(str, photos.rglob("*.png")):
        if path != image:
            pixels = blip.preprocess(Image.open(path))[None]
            scores[path] = float(blip.encode_image(pixels)[0][0] @ q)
    return sorted(scores.items(), key=lambda pair: -pair[1])


def test_words_that_the_model_never_saw_are_named(run, photos):
    done, known = run(photos, text="is a helicopter at night"), run(photos, text="is at night")
    assert "not in the model's vocabulary: helicopter\n" in done.err and "vocab" not in known.err
    assert done.status == 0 and len(done.out.splitlines()) == 10


@pytest.mark.parametrize("text", ("shows a blue car at night instead", ""))
def test_ranking_is_that_of_single_features(find, photos, image, pocket_blip, text):
    rows = find(photos, text=text)
    wanted = plain_ranking(pocket_blip, photos, image, text)
    assert [row["path"] for row in rows] == [path for path, _ in wanted]
    assert [row["rank"] for row in rows] == list(range(1, 30))
    assert np.allclose([row["score"] for row in rows], [score for _, score in wanted], atol=1e-4)


@torch.no_grad()
def test_the_first_k_are_reranked(find, photos, image, pocket_blip):
    """By similarity and matching probability, photo by photo; the others stay where they are."""
    text, (k, weight) = "", (20, 1000.0)  # all but two chances are below 0.001
    rows = find(photos, "--rerank", k, "--rerank-weight", weight, text=text)
    plain = plain_ranking(pocket_blip, photos, image, text)
    model, _ = query_side.load_query_model(ROOT / "pocket" / "isa.pt", pocket_blip)
    U = model(query_side.preprocess(model.encoder, Image.open(image))[None])
    scores, chances = dict(plain), {}
    for path, _ in plain[:k]:
        _, F_v = pocket_blip.encode_image(pocket_blip.preprocess(Image.open(path))[None])
        logits = pocket_blip.match(*isa.compose_query(pocket_blip, U, [text]), F_v)
        chances[path] = float(logits[0].softmax(0)[1])
        scores[path] += weight * chances[path]
    found, first = [row["path"] for row in rows], [path for path, _ in plain[:k]]
    assert sorted(found[:k]) == sorted(first) and found[:k] != first
    assert found[k:] == [path for path, _ in plain[k:]]
    best = sorted((scores[path] for path in first), reverse=True)
    assert [scores[path] for path in found[:k]] == pytest.approx(best, abs=0.01)
    for row in rows:
        assert row["score"] == pytest.approx(scores[row["path"]], abs=0.01)
        chance = chances.get(row["path"])
        assert row["match"] == (None if chance is None else pytest.approx(chance, abs=1e-4))
    few = find(photos, "--rerank", k, "--rerank-weight", weight, "--top", 3, text=text)
    assert few == rows[:3]


def test_list_and_file_say_the_same(run, photos, tmp_path, monkeypatch):
    """--precision auto is stored as what it was resolved to."""
    monkeypatch.setattr(precision, "pick_precision", lambda _: "fp32")
    done = run(photos, "--json", "deep/found.json", "--top", "100", "--precision", "auto")
    document = json.loads((tmp_path / "deep" / "found.json").read_text())
    settings, rows = document["settings"], document["results"]
    assert (settings["text"], settings["top"], settings["precision"]) == ("is red", 100, "fp32")
    assert len(document["nearest_words"]) == 6 and len(rows) == 29
    lines = [line.split(maxsplit=2) for line in done.out.splitlines()]
    wanted = [[str(row["rank"]), f"{row['score']:.4f}", row["path"]] for row in rows]
    assert lines == wanted and "30 photos" in done.err and "30 of them readable" in done.err


def test_the_query_is_left_out_unless_kept(find, photos, image, tmp_path):
    (tmp_path / "link.png").symlink_to(image)
    for query in (image, tmp_path / "link.png", os.path.relpath(image, tmp_path)):
        assert image not in [row["path"] for row in find(photos, image=query)]
    kept = find(photos, "--keep-query", text="")
    assert len(kept) == 30 and image in [row["path"] for row in kept[:2]]  # its sentence finds it
    shutil.copy(image, tmp_path / "copy.png")
    assert len(find(photos, image=tmp_path / "copy.png")) == 30


def test_only_new_and_changed_photos_are_encoded(find, photos, image, encoded, pocket_blip):
    assert len(find(photos)) == 29 and sum(encoded) == 30
    find(photos, text="at night")
    assert sum(encoded) == 30  # another text, nothing to encode
    paths = sorted(path for path in walk(photos) if path != image)
    shutil.copy(paths[0], photos / "new.png")
    os.remove(paths[1])
    os.rename(paths[2], photos / "renamed.png")
    time.sleep(0.01)
    shutil.copy(paths[5], paths[4])  # changed
    rows = find(photos)
    assert sum(encoded) == 33 and len(rows) == 29  # new, renamed, changed
    scores = {row["path"]: row["score"] for row in rows}
    wanted = dict(plain_ranking(pocket_blip, photos, image, "is red"))
    assert scores == pytest.approx(wanted, abs=1e-4)


def test_what_is_gone_is_forgotten(find, photos, tmp_path):
    find(photos)
    for path in sorted(walk(photos))[10:]:
        os.remove(path)
    assert len(find(photos)) == 9 and records(tmp_path).stat().st_size == 10 * RECORD


def test_an_index_belongs_to_a_precision_and_a_folder(run, photos, tmp_path):
    run(photos)
    run(photos, "--precision", "bf16")
    run(photos / "été")
    assert len(list(tmp_path.glob("cache/photos-*"))) == 3


def test_a_folder_may_be_reached_by_many_ways(find, photos, encoded, tmp_path):
    (tmp_path / "link").symlink_to(photos)
    relative = os.path.relpath(photos, tmp_path)
    for way in (photos, relative, f"{photos}/", tmp_path / "link", photos / "été" / ".."):
        rows = find(way)
        assert len(rows) == 29 and all(row["path"].startswith(str(way)) for row in rows)
        assert all(os.path.isfile(row["path"]) for row in rows)
    assert sum(encoded) == 30 and records(tmp_path)


def test_a_half_written_record_is_cut_off(find, photos, encoded, tmp_path):
    before, file = find(photos), records(tmp_path)
    os.truncate(file, file.stat().st_size - 1000)  # three are gone, and a part of a fourth
    assert find(photos) == before and sum(encoded) == 34


SLOWLY = """  # search.py, which prints a line after each batch and waits: argument 1 says how long
import runpy, sys, time
import plumbing.images
delay, plain = float(sys.argv.pop(1)), plumbing.images.load_images
def slow(*arguments):
    for batch in plain(*arguments):
        yield batch
        print("B", flush=True)
        time.sleep(delay)
plumbing.images.load_images = slow
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", [9, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_indexing_resumes(photos, image, small_world, tmp_path, number):
    """A real process is stopped after its first batch of 64; the next one encodes the rest."""
    for i, path in enumerate(sorted((small_world / "train").iterdir())[:200]):
        shutil.copy(path, photos / f"more {i}.png")

    def process(delay):
        code = SLOWLY.replace("sys.argv[0]", repr(str(ROOT / "search.py")))
        options = ["--gallery", str(photos), "--image", image, *FAST]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(delay), *options]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    first = process(60)
    assert first.stdout.readline() == "B\n"
    first.send_signal(number)
    assert first.wait() == (-9 if number == signal.SIGKILL else 143)
    assert records(tmp_path).stat().st_size == 64 * RECORD
    second = process(0)
    out, _ = second.communicate()
    assert second.returncode == 0 and out.count("B\n") == -(-(230 - 64) // 64)
    assert len(out.splitlines()) == out.count("B\n") + 10


@pytest.mark.slow
def test_two_searches_at_once(photos, image, tmp_path):
    options = ["--gallery", str(photos), "--image", image, *FAST]
    command = [sys.executable, str(ROOT / "search.py"), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=tmp_path, **pipes) for _ in range(2)]
    (first, _), (second, _) = [process.communicate() for process in both]
    assert first == second and len(first.splitlines()) == 10
    assert [process.returncode for process in both] == [0, 0]
    assert records(tmp_path).stat().st_size == 30 * RECORD


def test_damaged_photos_are_named_and_left_out(run, photos, encoded):
    (photos / "text.jpg").write_text("no photo")
    (photos / "empty.png").write_bytes(b"")
    done, again = run(photos, "--top", "50"), run(photos, "--top", "50")
    for part in ("left out: ", "text.jpg", "empty.png: is empty", "32 photos", "30 of them read"):
        assert part in done.err and part in again.err
    assert len(done.out.splitlines()) == 29 and done.out == again.out and sum(encoded) == 30


def test_what_could_not_be_read_once_is_tried_again(find, photos):
    """A disk that fails for a moment changes neither a photo's size nor its time."""
    path = sorted(walk(photos))[7]
    stat, whole = os.stat(path), Path(path).read_bytes()
    for content, count in ((bytes(len(whole)), 28), (whole, 29)):
        Path(path).write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        found = [row["path"] for row in find(photos)]
        assert len(found) == count and (path in found) == (content == whole)


def test_names_that_are_not_utf8(run, photos, image, tmp_path):
    name = os.fsencode(photos) + b"/caf\xe9.png"
    os.rename(image, name)
    image = sorted(walk(photos))[5]
    done = run(photos, "--json", "f.json", "--top", "50", "--out", "sheet.png", image=image)
    assert done.status == 0 and "caf\\udce9.png" in done.out
    paths = [row["path"] for row in json.loads((tmp_path / "f.json").read_text())["results"]]
    assert name in map(os.fsencode, paths)  # exact, for a program


def test_listing_and_loading_do_not_take_long(pocket_blip, tmp_path, monkeypatch):
    """20,000 photos that are known: no photo is opened, and a second of the processor is enough."""
    paths = [str(tmp_path / f"{i}.png") for i in range(20_000)]
    ones = ((range(a, a + 1000), np.ones((1000, 64))) for a in range(0, 20_000, 1000))
    monkeypatch.setattr(photos_module, "encode", lambda *_: ones)
    search.index(pocket_blip, paths, tmp_path, "fp32", tmp_path / "cache")
    monkeypatch.setattr(photos_module, "encode", lambda *_: pytest.fail("encoded again"))
    start = time.process_time()
    found, v = search.index(pocket_blip, paths, tmp_path, "fp32", tmp_path / "cache")
    assert time.process_time() - start < 5  # 0.3 s
    assert found == paths and v.shape == (20_000, 64) and (v == 1).all()


def test_the_contact_sheet_shows_query_and_photos(run, photos, image, tmp_path):
    done = run(photos, "--out", "out/sheet.png", "--json", "-", "--top", "7")
    rows = json.loads(done.out)["results"]
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png").convert("RGB"), int)
    left, m = sheet.shape[1] - ACROSS * (PHOTO + MARGIN), MARGIN
    shown = [(image, m, m, SIDE)]
    for i, row in enumerate(rows):
        shown.append((row["path"], left + i % 5 * (PHOTO + m), m + i // 5 * (PHOTO + 44), PHOTO))
    for path, x, y, side in shown:
        photo = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        assert np.array_equal(sheet[y : y + side, x : x + side], np.asarray(photo, int))
    assert (sheet[-60:, -PHOTO:] == 255).all()  # seven photos leave the second line's end empty


@pytest.mark.parametrize("option, value, parts", [
    ("--gallery", "nowhere", ("nowhere", "no such folder", "--gallery")),
    ("--gallery", "empty", ("empty", "no photos")), ("--gallery", "text.png", ("no such folder",)),
    ("--image", "nowhere.png", ("nowhere.png", "no such image", "--image")),
    ("--image", "text.png", ("text.png",)), ("--image", "empty", ("empty",)),
    ("--text", "red " * 600, ("--text", "64 positions")), ("--checkpoint", "no.pt", ("no.pt",)),
    ("--checkpoint", "own.pt", ("own.pt", "its own gallery")),
    ("--blip", "nowhere.pth", ("nowhere.pth",)), ("--out", "text.png/x.png", ("text.png",)),
    ("--out", "a.txt", ("a.txt", ".png")), ("--json", "empty", ("empty", "folder")),
    ("--cache-dir", "text.png/deep", ("text.png", "is a file")),
], ids=lambda x: x[:9] if isinstance(x, str) else "")
def test_wrong_input_is_one_line(run, photos, pocket_blip, tmp_path, option, value, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    if value == "own.pt":
        checkpoint = torch.load(ROOT / "pocket" / "isa.pt", weights_only=True)
        checkpoint["settings"]["gallery"] = "query"
        model = query_side.build_query_model(checkpoint["settings"], pocket_blip)
        torch.save({**checkpoint, "query_model": model.state_dict()}, tmp_path / "own.pt")
    done = run(photos, option, value)
    assert done.status == 1 and done.message.startswith("search.py: ") and done.err.count("\n") == 1
    assert all(part in done.message for part in parts), done.message
    assert not list(tmp_path.glob("cache/*"))  # all of that before anything is indexed


@pytest.mark.parametrize("options", (["--top", "0"], ["--texts", "y"], ["--workers", "-1"]))
def test_usage_errors(run, photos, options):
    done = run(photos, *options)
    assert done.status == 2 and "error:" in done.message
