"""blip_lite/images.py: lists of files and of members of tar shards, on disk, in a fixed order, refused when they are damaged."""

import io
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from blip_lite import images as module
from plumbing.images import Rows, find_images, list_images, load_images


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


@pytest.fixture
def folder(tmp_path):
    """Images in two folders and two shards, among other things."""
    root = tmp_path / "data"
    (root / "b").mkdir(parents=True)
    (root / "z.PNG").write_bytes(png((1, 0, 0)))
    (root / "a.jpg").write_bytes(png((2, 0, 0)))  # what it is decides, not what it is called
    (root / "b" / "x.png").write_bytes(png((3, 0, 0)))
    (root / "notes.txt").write_text("no image")
    tar(root / "00000.tar", {"0.txt": b"a text", "0.png": png((4, 0, 0)), "0.json": b"{}", "1.png": png((5, 0, 0))})
    tar(root / "b" / "00001.tar", {"deep/2.png": png((6, 0, 0)), "n" * 150 + ".png": png((7, 0, 0))})
    return root


def colours(images):
    return [images.open(i).getpixel((0, 0))[0] for i in range(len(images))]


def test_files_and_members_in_a_fixed_order(folder, tmp_path):
    images = find_images(folder, tmp_path / "cache")
    names = [os.path.relpath(images.name(i), folder) for i in range(len(images))]
    assert names == ["00000.tar/0.png", "00000.tar/1.png", "a.jpg", "z.PNG", "b/00001.tar/deep/2.png",
                     f"b/00001.tar/{'n' * 150}.png", "b/x.png"]  # fmt: skip
    assert colours(images) == [4, 5, 2, 1, 6, 7, 3]


def test_the_list_is_kept_until_something_changes(folder, tmp_path, monkeypatch):
    written = []
    write = module._write_list
    monkeypatch.setattr(module, "_write_list", lambda *arguments: (written.append(0), write(*arguments)))
    first = find_images(folder, tmp_path / "cache")
    again = find_images(folder, tmp_path / "cache")
    assert len(written) == 1 and first.key == again.key and colours(again) == colours(first)
    (folder / "c.png").write_bytes(png((9, 0, 0)))
    more = find_images(folder, tmp_path / "cache")
    tar(folder / "00000.tar", {"3.png": png((8, 0, 0))}, "a")
    most = find_images(folder, tmp_path / "cache")
    os.utime(folder / "a.jpg", ns=(0, 1))
    touched = find_images(folder, tmp_path / "cache")
    assert len({x.key for x in (first, more, most, touched)}) == len(written) == 4
    assert colours(most) == [4, 5, 8, 2, 9, 1, 6, 7, 3] == colours(touched)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".tmp")]


def test_a_list_survives_pickling_as_a_path(folder, tmp_path):
    images = find_images(folder, tmp_path / "cache")
    sent = pickle.dumps(images)
    assert len(sent) < 2000 and colours(pickle.loads(sent)) == colours(images)


def test_a_list_of_paths(folder):
    paths = [folder / "z.PNG", str(folder / "b" / "x.png"), folder / "gone.png"]
    images = list_images(paths)
    assert len(images) == 3 and [images.name(i) for i in range(3)] == [str(path) for path in paths]
    assert images.open(1).getpixel((0, 0)) == (3, 0, 0) and images.key == list_images(paths).key != list_images(paths[::-1]).key
    with pytest.raises(ValueError, match="gone.png: there is no such image"):
        images.open(2)
    assert len(list_images([])) == 0


def test_links_to_folders_are_followed_once(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "y.png").write_bytes(png((8, 0, 0)))
    (folder / "c").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a circle
    assert colours(find_images(folder, tmp_path / "cache")) == [4, 5, 2, 1, 6, 7, 3, 8]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "gzip", "data cut"])
def test_damaged_shards_are_named(folder, tmp_path, damage):
    path = folder / "00000.tar"
    data = path.read_bytes()
    if damage == "gzip":
        tar(path, {"0.png": png((1, 1, 1))}, "w:gz")
    else:
        path.write_bytes({"truncated": data[:700], "empty": b"", "text": b"<html>" * 200, "data cut": data[:1100]}[damage])
    with pytest.raises(ValueError, match="00000.tar: is not a whole, uncompressed tar file") as error:
        find_images(folder, tmp_path / "cache")
    assert "\n" not in str(error.value) and list((tmp_path / "cache").iterdir()) == []


def test_a_member_that_is_no_image_and_a_shard_that_goes_away(folder, tmp_path):
    tar(folder / "00002.tar", {"bad.png": b"text", "empty.jpg": b"", "good.png": png((9, 0, 0))})
    images = find_images(folder, tmp_path / "cache")
    row = next(i for i in range(len(images)) if "bad.png" in images.name(i))
    with pytest.raises(ValueError, match="00002.tar/bad.png: cannot be read as an image"):
        images.open(row)
    with pytest.raises(ValueError, match="00002.tar/empty.jpg: is empty"):
        images.open(row + 1)
    assert images.open(row + 2).getpixel((0, 0)) == (9, 0, 0)
    (folder / "00002.tar").unlink()
    with pytest.raises(ValueError, match="00002.tar: cannot be read .*; restore the shard"):
        images.open(row + 2)


def test_too_few_images_and_no_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="a.jpg: is a file"):
        find_images(folder / "a.jpg", tmp_path / "cache")
    with pytest.raises(ValueError, match="no such folder"):
        find_images(folder / "none", tmp_path / "cache")
    shutil.rmtree(folder / "b")
    for name in ("z.PNG", "00000.tar"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="holds 1 images, training needs at least two"):
        find_images(folder, tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read(folder, tmp_path):
    (folder / "b").chmod(0)
    with pytest.raises(ValueError, match="b: cannot be searched for images"):
        find_images(folder, tmp_path / "cache")


def test_rows_are_written_and_read_in_place(tmp_path):
    values = np.arange(30, dtype=np.float32).reshape(5, 2, 3)
    np.save(tmp_path / "x.npy", np.zeros_like(values))
    rows = Rows(tmp_path / "x.npy")
    rows.write([1, 3, 4], values[[1, 3, 4]].astype(np.float64))
    assert np.array_equal(np.load(tmp_path / "x.npy"), values * np.array([0, 1, 0, 1, 1])[:, None, None])
    assert np.array_equal(rows[[4, 0, 1, 4]], values[[4, 0, 1, 4]] * np.array([1, 0, 1, 1])[:, None, None])
    assert np.asarray(rows).shape == (5, 2, 3) and len(rows) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_load_images_sorts_good_from_bad(folder, workers):
    (folder / "broken.png").write_text("text")
    images = list_images([folder / name for name in ("z.PNG", "broken.png", "b/x.png", "gone.png", "broken.png", "a.jpg")])
    found = list(load_images(images, to_red, 2, workers))
    assert [rows for rows, _, _ in found] == [[0], [2], [5]] and [list(bad) for _, _, bad in found] == [[1], [3], [4]]
    assert [pixels.tolist() for _, pixels, _ in found] == [[[1.0]], [[3.0]], [[2.0]]]
    (_, pixels, bad), *rest = load_images(images, to_red, 2, workers, range(3, 5))
    assert pixels is None and list(bad) == [3, 4] and rest == []


def to_red(pil):
    return torch.tensor(pil.getpixel((0, 0))[:1], dtype=torch.float32)
