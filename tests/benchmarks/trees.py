"""Small benchmarks in each layout, and what the tests of benchmarks/ share."""

import io
import json

import pytest
from PIL import Image

import benchmarks

CIRR_NAMES = [f"dev-{i}-0-img0" for i in range(8)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def edited(path, change):
    """change(content) of a JSON file may return another content."""
    content = json.loads(path.read_text())
    write(path, change(content) or content)


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, "PNG")
    for name in names:
        (folder / name).write_bytes(picture.getvalue())


def refused(error, *words):
    """One sentence with all these words."""
    parts = "".join(f"(?=[^\n]*{word})" for word in words)
    return pytest.raises(error, match=f"(?s)^[^\n]*{parts}[^\n]*$")


def bench(name, queries, gallery=(), category=None):
    return benchmarks.Benchmark(name, "val", list(gallery), {}, queries, category)


def cirr_tree(root, searle=False):
    notes = root / "cirr" if searle else root
    write(notes / "image_splits" / "split.rc2.val.json", {n: f"./dev/{n}.png" for n in CIRR_NAMES})
    write(notes / "captions" / "cap.rc2.val.json", [
        {"pairid": 12, "reference": CIRR_NAMES[0], "target_hard": CIRR_NAMES[1],
         "target_soft": {CIRR_NAMES[2]: 1.0}, "caption": " two  dogs ", "modifier_type": "one",
         "img_set": {"members": CIRR_NAMES[:6], "reference_rank": 5, "target_rank": 0}},
        {"pairid": 40, "reference": CIRR_NAMES[5], "target_hard": CIRR_NAMES[7], "caption": " ",
         "modifier_type": "describing", "img_set": {"members": CIRR_NAMES[2:]}}])
    images = root / "dev" if searle else root / "img_raw" / "dev"
    touch(images, *(f"{name}.png" for name in CIRR_NAMES))
    return root


def fashioniq_tree(root, extension=".png"):
    for kind in benchmarks.CATEGORIES:
        write(root / "image_splits" / f"split.{kind}.val.json", [f"{kind}{i}" for i in range(4)])
        write(root / "captions" / f"cap.{kind}.val.json", [
            {"target": f"{kind}1", "candidate": f"{kind}0",
             "captions": [" is red?, ", "has . dots, long."]},
            {"target": f"{kind}3", "candidate": f"{kind}1", "captions": ["", "shorter"]},
            {"target": f"{kind}2", "candidate": f"{kind}1", "captions": [" ", ".\t"]}])
        touch(root / "images", *(f"{kind}{i}{extension}" for i in range(4)))
    return root


def circo_tree(root, images="folder", extension=".jpg"):
    write(root / "annotations" / "val.json", [
        {"reference_img_id": 7, "target_img_id": 30, "relative_caption": "is red", "id": 0,
         "gt_img_ids": [2, 30], "semantic_aspects": ["negation", "addition"]},
        {"reference_img_id": 2, "target_img_id": 111, "relative_caption": "is at night", "id": 1,
         "gt_img_ids": [111], "semantic_aspects": ["addition"]}])
    write(root / "annotations" / "test.json", [
        {"reference_img_id": 7, "relative_caption": "is blue", "id": 0}])
    coco = root / "COCO2017_unlabeled"
    if images != "none":
        names = (f"{i:012d}{extension}" for i in (2, 7, 30, 111, 5))
        touch(coco / "unlabeled2017", *names, ".DS_Store", "._000000000003.jpg", "a.txt")
    if images == "list":
        write(coco / "annotations" / "image_info_unlabeled2017.json", {"info": {}, "images": [
            {"id": i, "file_name": f"{i:012d}.jpg"} for i in (111, 7, 30, 2, 5)]})
    return root


TREES = {"cirr": cirr_tree, "fashioniq": fashioniq_tree, "circo": circo_tree}
