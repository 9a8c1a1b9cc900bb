"""Drawings, looked at pixel by pixel."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from benchmarks import Benchmark, Query
from plumbing.pictures import (
    GREEN,
    MARGIN,
    PAPER,
    PHOTO,
    SIDE,
    TILE,
    check_picture,
    contact_sheet,
    draw_picture,
    overlay,
    paste,
    save_picture,
    shortened,
)

SIZES = [((400, 100), (100, 25)), ((2, 8), (25, 100)), ((5000, 1), (100, 1))]


@pytest.mark.parametrize("size, wide", SIZES)
def test_proportions_are_kept(size, wide):
    """A square of 100 pixels at (10, 20): the photo in its middle, paper around it, no more."""
    sheet = Image.new("RGB", (130, 130), "white")
    paste(sheet, Image.new("RGB", size, "red"), 10, 20, 100)
    red, paper = ((np.asarray(sheet) == color).all(axis=2) for color in ((255, 0, 0), PAPER))
    rows, columns = red.any(axis=1).nonzero()[0], red.any(axis=0).nonzero()[0]
    assert (len(columns), len(rows)) == wide and red.sum() == wide[0] * wide[1]
    assert abs(columns.mean() - 59.5) <= 1 and abs(rows.mean() - 69.5) <= 1
    assert paper.sum() == 100 * 100 - red.sum() and (red | paper)[20:120, 10:110].all()


def test_long_names_lose_their_middle():
    font = ImageFont.load_default(12)
    short = shortened("a" * 80 + "_the_end.jpeg", font, 150)
    assert 130 < font.getlength(short) <= 150 and "..." in short
    assert short.startswith("aaa") and short.endswith("end.jpeg")
    assert shortened("short.png", font, 150) == "short.png"


@pytest.mark.parametrize("tokens, maps", [(6, (1, 1)), (10, (1, 0)), (1, (0, 0))])
def test_sheets_of_other_mappers(tmp_path, tokens, maps):
    """Ten tokens take two lines; a mapper may have no maps; long texts stay in their place."""
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for path in paths:
        Image.new("RGB", (64, 64), "gray").save(path)
    grids = [torch.rand(tokens, 4, 4) if there else None for there in maps]
    text = "word " * 60 + "x" * 90  # 16 lines of at most 24 letters
    words = ["a-rather-long-word"] * tokens
    sheet = contact_sheet(Image.open(paths[0]), text, words, grids, paths, [1, 2, 3])
    pixels = np.asarray(sheet, int)
    ink = (pixels != 255).any(axis=2)
    m, line = MARGIN, 30 + sum(maps) * (TILE + 22)
    left = max(2 * SIDE, min(tokens, 6) * (TILE + 6)) + 2 * m
    top = 16 * 20 + 2 * m
    assert sheet.size == (left + m + 3 * (PHOTO + m), top + -(-tokens // 6) * line)
    beside = ink[:top, m + SIDE + m : left]
    assert beside[300:320].any() and not beside[-m:].any() and not ink[:, left : left + m].any()
    red = (pixels[..., 0] - pixels[..., 1] > 60)[top:]
    assert red[:line].any() == maps[0] and red[line:].any() == (tokens > 6)
    assert red[line - 80 : line].any() == any(maps)


def test_targets_are_framed(tmp_path):
    """Two queries, each found at another place: that image alone has a green frame."""
    colors = {"a": "navy", "b": "gold", "c": "purple"}
    for name, color in colors.items():
        Image.new("RGB", (64, 32), color).save(tmp_path / f"{name}.png")
    queries = [Query("0", "a", ["x"], ["b"]), Query("1", "b", ["x"], ["a"])]
    paths = {name: tmp_path / f"{name}.png" for name in colors}
    benchmark = Benchmark("circo", "val", list(colors), paths, queries)
    rankings = {"0": ["a", "b", "c"], "1": ["a", "c", "b"]}
    sheet = np.asarray(draw_picture(benchmark, rankings, count=2, top=3, side=96))
    for line, query in enumerate(queries):
        for place, name in enumerate(rankings[query.id]):
            y, x = 8 + line * 104, 96 * (4 + place) + 4
            assert (sheet[y - 2, x + 40] == GREEN).all() == (name in query.targets)
            middle = Image.new("RGB", (1, 1), colors[name]).getpixel((0, 0))
            assert (sheet[y + 44, x + 44] == middle).all()
            assert (sheet[y + 2, x + 44] == PAPER).all()  # twice as wide as high


def test_the_suffix_is_the_format(tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    for suffix, kind in ((".png", "PNG"), (".jpg", "JPEG"), (".WEBP", "WEBP")):
        path = tmp_path / "deep" / f"a{suffix}"
        check_picture(path)
        save_picture(picture, path)
        assert Image.open(path).format == kind
    for wrong in ("a.txt", "a", "a.jpeg2", tmp_path / "deep" / "a.png" / "b.png"):
        with pytest.raises(ValueError, match=".png"):
            check_picture(wrong)


def test_overlay_is_red_where_the_token_looks():
    weights = torch.zeros(8, 8)
    weights[1, 6] = 0.3
    sheet = np.asarray(overlay(Image.new("RGB", (64, 64), "white"), weights), int)
    redness = sheet[..., 0] - sheet[..., 1]
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert y in range(8, 16) and x in range(48, 56) and redness[40:].max() == 0
    with warnings.catch_warnings(action="error"):  # a token that looks nowhere: no division by 0
        assert np.asarray(overlay(Image.new("RGB", (64, 64)), torch.zeros(8, 8))).std() == 0
