"""Lists of files and of members of tar shards, in a fixed order; what is damaged is named."""

import hashlib
import io
import os
import pickle
import shutil
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from plumbing import images as module
from plumbing.images import find_images, identity, list_images, load_images, open_image, walk


def png(colour, size=(8, 6)):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-900])


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
BOMB = struct.pack("<2sQIIiiHH24x", b"BM", 0, 54, 40, 30_000, 30_000, 1, 24)  # BMP
NONE = "cannot be read as an image (it is none of JPEG, PNG, WEBP, BMP, GIF, TIFF)"

DAMAGED = {
    "missing": (lambda path: None, "there is no such image"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("not found"), NONE),
    "EPS": (lambda path: path.write_bytes(EPS), NONE),
    "page": (lambda path: path.write_text("\ufeff\n<!DOCTYPE html>"), "is a web page"),
    "error of a server": (lambda path: path.write_text("<?xml version='1.0'?><Error>"), "is a web"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x"),
                "is a git-lfs pointer"),
    "HEIC": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99)), "is HEIC"),
    "bomb": (lambda path: path.write_bytes(BOMB), "exceeds the limit of 178"),
    "truncated": (truncated, "cannot be read as an image (image file is truncated)"),
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
    if path.is_file():  # and in the same words as a member of a shard
        with pytest.raises(ValueError) as error:
            open_image(path, io.BytesIO(path.read_bytes()))
        assert str(error.value) == text


@pytest.fixture
def folder(tmp_path):
    """Images in two folders and two shards, among other things."""
    root = tmp_path / "data"
    (root / "b").mkdir(parents=True)
    (root / "z.PNG").write_bytes(png((1, 0, 0)))
    (root / "a.jpg").write_bytes(png((2, 0, 0)))  # what it is decides, not what it is called
    (root / "b" / "x.png").write_bytes(png((3, 0, 0)))
    (root / "notes.txt").write_text("no image")
    a, b = {"0.png": png((4, 0, 0)), "1.png": png((5, 0, 0))}, {"deep/2.png": png((6, 0, 0))}
    tar(root / "00000.tar", {"0.txt": b"a text"} | a | {"0.json": b"{}"})
    tar(root / "b" / "00001.tar", b | {"n" * 150 + ".png": png((7, 0, 0))})
    return root


@pytest.fixture
def find(folder, tmp_path):
    return lambda: find_images(folder, tmp_path / "cache")


def colours(images):
    return [images.open(i).getpixel((0, 0))[0] for i in range(len(images))]


def test_files_and_members_in_a_fixed_order(folder, find):
    images = find()
    names = [os.path.relpath(images.name(i), folder) for i in range(len(images))]
    deep = ["b/00001.tar/deep/2.png", f"b/00001.tar/{'n' * 150}.png", "b/x.png"]
    assert names == ["00000.tar/0.png", "00000.tar/1.png", "a.jpg", "z.PNG", *deep]
    sent = pickle.dumps(images)  # to workers: paths, not the list
    assert len(sent) < 2000 and colours(pickle.loads(sent)) == [4, 5, 2, 1, 6, 7, 3]


def test_the_list_is_kept_until_something_changes(folder, find, tmp_path, monkeypatch):
    written, write = [], module._write_list
    monkeypatch.setattr(module, "_write_list", lambda *x: (written.append(0), write(*x)))
    first, again = find(), find()
    assert len(written) == 1 and first.key == again.key and colours(again) == colours(first)
    (folder / "c.png").write_bytes(png((9, 0, 0)))
    more = find()
    tar(folder / "00000.tar", {"3.png": png((8, 0, 0))}, "a")
    most = find()
    os.utime(folder / "a.jpg", ns=(0, 1))
    touched = find()
    assert len({x.key for x in (first, more, most, touched)}) == len(written) == 4
    assert colours(most) == [4, 5, 8, 2, 9, 1, 6, 7, 3] == colours(touched)
    assert not list((tmp_path / "cache").glob("*.tmp"))


LEFT_OVER = ("._0.png", "__MACOSX/0.png", "@eaDir/0.png/THUMB.jpg", ".ipynb_checkpoints/0.png",
             ".hidden/deep/0.png", "$RECYCLE.BIN/0.png", ".00000.tar")


def test_what_systems_leave_behind_is_passed_over(folder, tmp_path, monkeypatch):
    """In folders and shards; but the folder that is named may itself be hidden."""
    hidden = tmp_path / ".data" / "lost+found"
    shutil.copytree(folder, hidden)
    for name in LEFT_OVER:
        for path in (hidden / name, hidden / "b" / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\0\5\x16\7")
    tar(hidden / "00000.tar", {f"./x/{name}": b"\0" for name in LEFT_OVER}, "a")
    tar(hidden / "00000.tar", {"./x/../2.png": png((9, 0, 0))}, "a")
    images = find_images(hidden, tmp_path / "cache")
    assert colours(images) == [4, 5, 9, 2, 1, 6, 7, 3] and images.hidden == len(LEFT_OVER) - 1
    scandir = os.scandir

    def refuse(path):
        if path.endswith((".hidden", "@eaDir")):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(list(walk(hidden))) == 5 and len(list(walk(hidden, True))) == 16


def test_lists_of_earlier_versions(folder, find, tmp_path):
    """They hold hidden members of shards, and so do features: both are then made again."""

    def earlier():
        return hashlib.sha256(b"".join(map(identity, walk(folder)))).hexdigest()

    assert find().key == earlier()  # nothing is hidden: what was stored is found
    tar(folder / "00000.tar", {"._0.png": b"\0"}, "a")
    (tmp_path / "cache" / f"images-{earlier()[:16]}").mkdir()
    assert find().key != earlier() and colours(find()) == [4, 5, 2, 1, 6, 7, 3]


def test_a_list_of_paths(folder):
    paths = [folder / "z.PNG", str(folder / "b" / "x.png"), folder / "gone.png"]
    images = list_images(paths)
    assert [images.name(i) for i in range(len(images))] == [str(path) for path in paths]
    assert images.open(1).getpixel((0, 0)) == (3, 0, 0)
    assert images.key == list_images(paths).key != list_images(paths[::-1]).key
    with pytest.raises(ValueError, match="gone.png: there is no such image"):
        images.open(2)
    assert len(list_images([])) == 0


def test_links_to_folders_are_followed_once(folder, find, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "y.png").write_bytes(png((8, 0, 0)))
    (folder / "c").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a cycle
    assert colours(find()) == [4, 5, 2, 1, 6, 7, 3, 8]


@pytest.mark.parametrize("damage", [700, 0, b"<html>" * 200, "w:gz", 1100, "two"])
def test_damaged_shards_are_named(folder, find, tmp_path, damage):
    """Cut in a header, empty, a text, compressed, cut in a member's data, not over at its end."""
    path = folder / "00000.tar"
    if damage == "two":
        path.write_bytes(2 * path.read_bytes())
    elif damage == "w:gz":
        tar(path, {"0.png": png((1, 1, 1))}, damage)
    else:
        path.write_bytes(path.read_bytes()[:damage] if isinstance(damage, int) else damage)
    with pytest.raises(ValueError, match="00000.tar: is not a whole, uncompressed") as error:
        find()
    assert "\n" not in str(error.value) and os.listdir(tmp_path / "cache") == [".lock"]


def test_a_member_that_is_no_image_and_a_shard_that_goes_away(folder, find):
    members = {"bad.png": b"text", "empty.jpg": b"", "good.png": png((9, 0, 0))}
    tar(folder / "00002.tar", members)
    images = find()
    row = next(i for i in range(len(images)) if "bad.png" in images.name(i))
    with pytest.raises(ValueError, match="00002.tar/bad.png: cannot be read as an image"):
        images.open(row)
    with pytest.raises(ValueError, match="00002.tar/empty.jpg: is empty"):
        images.open(row + 1)
    assert images.open(row + 2).getpixel((0, 0)) == (9, 0, 0)
    (folder / "00002.tar").unlink()
    with pytest.raises(ValueError, match="00002.tar: cannot be read .*; restore the shard"):
        images.open(row + 2)


def test_too_few_images_and_no_folder(folder, find, tmp_path):
    for name, message in (("a.jpg", "a.jpg: is a file"), ("none", "no such folder")):
        with pytest.raises(ValueError, match=message):
            find_images(folder / name, tmp_path / "cache")
    shutil.rmtree(folder / "b")
    for name in ("z.PNG", "00000.tar"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="holds 1 images, training needs two"):
        find()


@pytest.mark.parametrize("workers", [0, 2])
def test_load_images_sorts_good_from_bad(folder, workers):
    (folder / "broken.png").write_text("text")
    names = ("z.PNG", "broken.png", "b/x.png", "gone.png", "broken.png", "a.jpg")
    images = list_images([folder / name for name in names])
    found = list(load_images(images, to_red, 2, workers))
    assert [(rows, list(bad)) for rows, _, bad in found] == [([0], [1]), ([2], [3]), ([5], [4])]
    assert [pixels.tolist() for _, pixels, _ in found] == [[[1.0]], [[3.0]], [[2.0]]]
    (_, pixels, bad), *rest = load_images(images, to_red, 2, workers, range(3, 5))
    assert pixels is None and list(bad) == [3, 4] and rest == []


def to_red(pil):
    return torch.tensor(pil.getpixel((0, 0))[:1], dtype=torch.float32)
