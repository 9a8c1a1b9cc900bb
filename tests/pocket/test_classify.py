"""pocket/classify.py: labels by a loop, losses by hand, a tiny run, and the weights that ship."""

import math
from collections import Counter

import pytest
import torch
from conftest import ROOT

import query_side
from pocket import classify, specs
from pocket.specs import GARMENT, Garment, Rng, Scene, Thing

NAMES = list(classify.ATTRIBUTES)


def named(spec):
    """{attribute: value} of a spec's label, read back."""
    row = classify.labels([spec])[0].tolist()
    return {name: list(classify.ATTRIBUTES[name])[i]
            for name, i in zip(NAMES, row, strict=True) if i != classify.ABSENT}


def test_labels_of_a_scene_name_its_background_and_each_place():
    boat, cat = Thing("boat", "blue", "small", "right"), Thing("cat", "red", "big", "left")
    assert named(Scene((boat, cat), "sea", 7)) == {
        "background": "sea", "left kind": "cat", "left colour": "red", "left size": "big",
        "middle kind": "none", "right kind": "boat", "right colour": "blue", "right size": "small"}


def test_labels_are_what_a_loop_over_the_fields_finds():
    rng = Rng(3)
    for _ in range(200):
        scene, garment = specs.random_scene(rng), specs.random_garment(rng)
        wanted = {"background": scene.background}
        for place in ("left", "middle", "right"):
            there = [thing for thing in scene.things if thing.place == place]
            wanted[f"{place} kind"] = there[0].kind if there else "none"
            for name in ("colour", "size") if there else ():
                wanted[f"{place} {name}"] = getattr(there[0], name)
        assert named(scene) == wanted
        assert named(garment) == {name: getattr(garment, name) for name in GARMENT}


def test_every_attribute_of_the_dataclasses_has_labels():
    fields = {*Thing.__dataclass_fields__} - {"place"}
    assert {name.split()[-1] for name in NAMES if " " in name} == fields
    assert {*NAMES} >= {*Garment.__dataclass_fields__, "background"} - {"pose"}
    thing = [1 + len(specs.KINDS), len(specs.SIZES), len(specs.COLOURS)]
    wanted = [len(specs.BACKGROUNDS), *3 * thing, *map(len, GARMENT.values())]
    assert Counter(classify.SIZES) == Counter(wanted)


def test_the_loss_is_the_mean_cross_entropy_of_what_is_there():
    cat, dog = Thing("cat", "red", "big", "left"), Thing("dog", "red", "big", "left")
    cup = Thing("cup", "pink", "big", "right")
    truth = classify.labels([Scene((cat,), "sea"), Scene((dog, cup), "night")])
    scores = torch.randn(2, sum(classify.SIZES), generator=torch.Generator().manual_seed(0))
    losses, start = [], 0
    for size, column in zip(classify.SIZES, truth.T.tolist(), strict=True):
        for row, label in zip(scores[:, start : start + size].exp().tolist(), column, strict=True):
            losses += [] if label == -100 else [-math.log(row[label] / sum(row))]
        start += size
    assert len(losses) == (1 + 3 + 2) + (1 + 3 + 1 + 3)  # background, things, empty places
    found = classify.cross_entropy(scores.split(classify.SIZES, 1), truth)
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("split", ["pretrain", "val"])
def test_batches_show_what_their_labels_name(split, monkeypatch):
    drawn, draw = [], classify.draw
    monkeypatch.setattr(classify, "draw", lambda spec: drawn.append(spec) or draw(spec))
    encoder = query_side.build("pocketnet")
    pixels, truth = classify.draw_batch(encoder, Rng(1), 6, split)
    assert {specs.split_of(spec) for spec in drawn} == {split}
    assert [type(spec) for spec in drawn] == [Scene, Garment] * 3
    assert torch.equal(truth, classify.labels(drawn))
    for x, spec in zip(pixels, drawn, strict=True):
        assert torch.equal(x, query_side.preprocess(encoder, draw(spec)))


def run(capsys, out, *options):
    argv = ["--precision", "fp32", "--threads", 1, "--out", out, *options]
    classify.main(classify.parse_args(list(map(str, argv))))
    return capsys.readouterr().out


def test_a_tiny_run_learns_and_its_file_loads_as_it_was_written(capsys, tmp_path):
    options = ["--steps", 40, "--batch", 32, "--held-out", 400]
    said = run(capsys, tmp_path / "a.pth", *options).splitlines()
    first, last = (float(word) for word in said[0].replace(",", "").split() if word[0].isdigit())
    assert last < 0.9 * first
    right = dict(line.rsplit(maxsplit=1) for line in said[1:-1])
    right = {name.strip(): float(percent) for name, percent in right.items()}
    rng = Rng("classify")
    truth = torch.cat([classify.draw_batch(query_side.build("pocketnet"), rng, n, "val")[1]
                       for n in (250, 150)])
    for name in ("background", "colour", "length"):  # those that 40 steps learn
        column = truth[:, NAMES.index(name)].tolist()
        count = Counter(x for x in column if x != classify.ABSENT)
        assert right[name] > 100 * 1.2 * max(count.values()) / count.total(), name
    written = torch.load(tmp_path / "a.pth", weights_only=True)
    loaded = query_side.build("pocketnet", tmp_path / "a.pth").state_dict()
    assert {x.dtype for k, x in written.items() if "num" not in k} == {torch.float16}
    assert all(torch.equal(loaded[k], x.float()) for k, x in written.items() if "num" not in k)
    run(capsys, tmp_path / "b.pth", *options)
    again = torch.load(tmp_path / "b.pth", weights_only=True)
    assert all(torch.equal(x, again[k]) for k, x in written.items())


def test_a_file_serves_its_own_encoder_only(capsys, tmp_path):
    """Another network's map sizes and names; any size of the same network."""
    said = run(capsys, tmp_path / "vit.pth", "--encoder", "efficientvit_m2", "--query-size", 64,
               "--steps", 1, "--batch", 4, "--held-out", 4)
    assert "--encoder efficientvit_m2 --query-size 64 --pretrained" in said
    encoder = query_side.build("efficientvit_m2", tmp_path / "vit.pth", image_size=64)
    written = torch.load(tmp_path / "vit.pth", weights_only=True)
    state = encoder.state_dict()
    assert all(torch.equal(state[k], x.float()) for k, x in written.items() if "num" not in k)
    query_side.build("efficientvit_m2", tmp_path / "vit.pth", image_size=96)
    for name in ("pocketnet", "mobilenet_v2"):
        with pytest.raises(ValueError, match=r"^the weights \S+vit.pth do not fit .*own$"):
            query_side.build(name, tmp_path / "vit.pth")


def test_the_shipped_weights_name_what_drawings_show():
    """pocket/pocketnet.pth, through a linear layer fitted to its features by least squares."""
    encoder = query_side.build("pocketnet", "pocket").eval()
    features, truths = [], []
    with torch.no_grad():
        for split in ("pretrain", "val"):
            pixels, truth = classify.draw_batch(encoder, Rng(5), 600, split)
            mean = encoder(pixels).mean((2, 3))
            features.append(torch.cat([mean, torch.ones(600, 1)], 1))
            truths.append(truth)
    for name, least in (("background", 95), ("pattern", 80), ("left colour", 50)):
        a = NAMES.index(name)
        fit, test = (truth[:, a] != classify.ABSENT for truth in truths)
        wanted = torch.eye(len(classify.ATTRIBUTES[name]))[truths[0][fit, a]]
        weights = torch.linalg.lstsq(features[0][fit], wanted).solution
        said = (features[1][test] @ weights).argmax(1)
        assert 100 * (said == truths[1][test, a]).float().mean() > least, name
    assert (ROOT / "pocket" / "pocketnet.pth").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", [n for n in query_side.NAMES if n[:4] not in ("pock", "blip")])
def test_pocket_weights_are_shipped_for_pocketnet_alone(name):
    wanted = f"^only pocketnet's .* are shipped; make .* --encoder {name} --out FILE`, and give"
    with pytest.raises(ValueError, match=wanted):
        query_side.build(name, "pocket")
