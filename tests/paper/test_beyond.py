"""Larger galleries, damaged query images, stronger baselines: against numpy and single features."""

import io
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import query_side
import train
from paper import __main__ as command
from paper import beyond, stress
from paper.__main__ import main, needed, parse_args
from paper.runs import folder, training
from pocket import drawing, specs


@pytest.fixture
def here(tmp_path, monkeypatch, small_world, pocket_blip):
    """A current folder with a small pocket world and an untrained run."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/pocket").symlink_to(small_world)
    monkeypatch.chdir(tmp_path)
    settings = vars(train.parse_args(training(beyond.RUN, 0)[1:]))
    torch.manual_seed(0)
    model = query_side.build_query_model(settings, pocket_blip)
    folder(beyond.RUN, 0).mkdir(parents=True)
    state = {"query_model": model.state_dict(), "settings": settings}
    torch.save(state | {"blip": pocket_blip.fingerprint}, folder(beyond.RUN, 0) / "isa.pt")
    return tmp_path


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """fp32 on any machine."""
    plain = beyond.options
    for module in (beyond, stress):
        monkeypatch.setattr(module, "options",
                            lambda threads, *words: plain(threads, "--precision", "fp32", *words))


def scene(seed=0):
    return drawing.draw(specs.random_scene(random.Random(seed), count=3))


def cells(lines):
    """The rows of the first markdown table: {first cell: other cells}."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return {first: rest for first, *rest in rows}


# ---- distortions
def test_blur_is_a_gaussian_of_a_32nd_of_the_side():
    """Against sums of a Gaussian's weights; PIL approximates it by boxes."""
    bar = Image.new("RGB", (64, 64))
    bar.paste((255, 255, 255), (32, 0, 64, 64))
    row = np.asarray(stress.DISTORTIONS["blur"](bar))[32, :, 0] / 255
    weights = np.exp(-np.arange(-40, 41) ** 2 / (2 * 2.0**2))
    wanted = [weights[max(0, 72 - x):].sum() / weights.sum() for x in range(64)]
    assert np.abs(row - wanted).max() < 0.03
    wide = Image.new("RGB", (128, 20))  # twice the side, twice the radius
    wide.paste((255, 255, 255), (64, 0, 128, 20))
    found = np.asarray(stress.DISTORTIONS["blur"](wide))[10, 1::2, 0] / 255
    assert np.abs(found - row).max() < 0.06


def test_jpeg_darkness_and_noise():
    image = scene()
    pixels = np.asarray(image).astype(float)
    found = {name: distort(image) for name, distort in stress.DISTORTIONS.items()}
    assert all(x.mode == "RGB" and x.size == image.size for x in found.values())
    assert np.array_equal(np.asarray(found["as it is"]), pixels)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=10)
    assert np.array_equal(np.asarray(found["JPEG, quality 10"]), np.asarray(Image.open(file)))
    assert Image.open(file).quantization[0][0] == 80  # 16 of the standard's table, times 5
    dark = np.asarray(found["a quarter of the light"])
    assert np.abs(dark - pixels / 4).max() <= 1
    grey, other = Image.new("RGB", (64, 64), (128,) * 3), Image.new("RGB", (64, 64), (127,) * 3)
    noise = np.asarray(stress.add_noise(grey)) - 128.0
    assert abs(noise.mean()) < 1 and abs(noise.std() - 30) < 1
    assert np.array_equal(noise, np.asarray(stress.add_noise(grey)) - 128.0)  # seeded
    assert np.corrcoef(noise.ravel(), np.asarray(stress.add_noise(other)).ravel())[0, 1] < 0.1
    assert np.asarray(stress.add_noise(Image.new("RGB", (64, 64)))).max() < 200  # no overflow


def test_only_query_images_are_distorted(here, monkeypatch, pocket_blip):
    """Black queries: the sum finds what the text and black ask for, in the gallery as it is."""
    monkeypatch.setattr(stress, "DISTORTIONS", {
        "as it is": stress.DISTORTIONS["as it is"],
        "black": lambda image: Image.new("RGB", image.size)})
    rows = cells(stress.robustness_table([0], 1))
    (part,) = evaluate.open_benchmarks("cirr")
    setting = evaluate.Setting(pocket_blip, part)
    best, _ = setting.rank(setting.query_features("weighted"))
    assert rows["as it is"][2] == f"{beyond.headline(part, best):.2f}"
    with torch.no_grad():
        black = pocket_blip.encode_image(
            pocket_blip.preprocess(Image.new("RGB", (64, 64)))[None])[0][0]
    q = setting.weights["weighted"] * black + setting.query_features("text")
    best, _ = setting.rank(q / q.norm(dim=1, keepdim=True))
    assert rows["black"][2] == f"{beyond.headline(part, best):.2f}" and len(rows["black"]) == 9
    assert rows["black"] != rows["as it is"]


# ---- galleries
@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(stress, "BLOCK", 6)
    monkeypatch.setattr(stress, "BATCH", 3)
    monkeypatch.setattr(stress, "SIZES", (60, 100))


def test_distractors_resume_and_are_v_of_drawn_scenes(here, small, pocket_blip):
    v = stress.distractors(pocket_blip, "fp32", 20).clone()
    (path,) = here.glob("runs/tables/growth/*.f16")
    whole = path.read_bytes()
    assert v.dtype == torch.float16 and v.shape == (20, 64) and len(whole) == 24 * 64 * 2
    path.write_bytes(whole[: 6 * 128 + 77])  # stopped within the second block
    assert torch.equal(stress.distractors(pocket_blip, "fp32", 20), v)
    assert path.read_bytes() == whole
    rng, drawn = specs.Rng("distractors 1"), []
    for _ in range(6):
        spec = specs.sample(rng, "unlabeled", specs.random_scene)
        assert specs.split_of(spec) == "unlabeled"  # neither validation nor test
        drawn.append(drawing.draw(spec))
    for row, image in enumerate(drawn):
        with torch.no_grad():
            alone = pocket_blip.encode_image(pocket_blip.preprocess(image)[None])[0][0]
        torch.testing.assert_close(v[6 + row].float(), alone, atol=1e-3, rtol=0)


def test_growth_against_a_sort(here, small, pocket_blip, monkeypatch):
    monkeypatch.setattr(stress, "median_ms", lambda *_: 1.0)
    rows = cells(stress.growth_table([0], 1, images=90))
    (part,) = evaluate.open_benchmarks("cirr")
    setting = evaluate.Setting(pocket_blip, part)
    q = setting.query_features("reference caption").double().numpy()
    more = stress.distractors(pocket_blip, "fp32", 90 - len(part.gallery))
    gallery = np.concatenate([setting.gallery.half(), more.numpy()]).astype(float)
    assert list(rows)[2:] == [str(len(part.gallery)), "60", "90"]
    for size in (len(part.gallery), 60, 90):
        hits = {1: 0, 10: 0}
        for row, query in enumerate(part.queries):
            similarity = gallery[:size] @ q[row]
            similarity[part.gallery.index(query.reference)] = -9
            place = (similarity > similarity[part.gallery.index(query.targets[0])]).sum()
            hits = {k: n + (place < k) for k, n in hits.items()}
        wanted = [f"{100 * n / len(part.queries):.2f}" for n in hits.values()]
        assert rows[str(size)][6:8] == wanted and rows[str(size)][8] == "1.00"
    with Image.open("paper/figures/growth.png") as picture:
        assert len(picture.getcolors(100_000)) > 20


# ---- tables
def test_stronger_and_reranked_rows(here, pocket_blip):
    rows = cells(beyond.stronger_table([0], 1, k=3))
    labels = [*evaluate.SIMPLE, "weighted", "slerp", "product", "isa", "isa+text",
              "reference caption"]
    assert [label for label in rows if label in labels] == labels
    assert {label for label in rows if "re-ranked" in label} == {
        f"{label} re-ranked" for label in ("isa", "isa+text", "reference caption")}
    (part,) = evaluate.open_benchmarks("circo")
    setting = evaluate.Setting(pocket_blip, part)
    best, _ = setting.rank(setting.query_features("product"))
    assert rows["product"][2] == f"{beyond.headline(part, best):.2f}"


def test_reranking_is_chosen_on_validation(here):
    lines = beyond.rerank_table([0], 1, ks=(2, 5), weights=(0.0, 0.3))
    rows, without = cells(lines), lines[0].rsplit("Without: ", 1)[1].rstrip(".")
    assert rows["2"][0] == rows["5"][0] == without and len(rows["5"]) == 3
    assert rows["5"][2] != without
    model = str(folder(beyond.RUN, 0) / "isa.pt")
    words = ["--split", "val", "--checkpoint", model, "--rerank", "5", "--rerank-weight", "0.3"]
    found = [(s.benchmark.name, beyond.headline(s.benchmark, best)) for s, method, _, best, _
             in evaluate.all_rankings(beyond.options(1, *words), ["isa"]) if "re-ranked" in method]
    wanted = " / ".join(f"{x:.1f}" for x in beyond.averaged(found).values())
    assert rows["5"][1] == wanted


def test_the_cost_of_reranking_is_timed(pocket_blip, monkeypatch):
    """Four times: images and matching of pocket BLIP, and of the paper's."""
    timed, side = [], pocket_blip.image_size
    monkeypatch.setattr(beyond, "blip_base", lambda: pocket_blip)
    monkeypatch.setattr(beyond, "median_ms", lambda run, calls: timed.append(run()) or len(timed))
    lines = " ".join(beyond.rerank_cost([0], 1, k=3))
    F_v, logits = timed[0][1], timed[1]
    assert F_v.shape == (3, 1 + (side // 8) ** 2, 128) and logits.shape == (3, 2)
    assert "F^v of 3 images" in lines
    assert "1.0 + 2.0 ms with pocket BLIP, 3 + 4 ms with BLIP ViT-B" in lines


def test_what_the_pages_need():
    assert needed(["growth"], [3, 4]) == {(beyond.RUN, 3): [], (beyond.RUN, 4): []}
    args = parse_args(["beyond"])
    assert args.names == ["stronger", "rerank", "cost", "growth", "robustness"]
    assert args.out == "paper/BEYOND.md" and parse_args(["growth"]).out is None


def test_without_a_checkpoint_the_reason_is_printed(here, capsys):
    (folder(beyond.RUN, 0) / "isa.pt").unlink()
    main(parse_args(["robustness", "--as-is", "--seeds", "0"]))
    assert "is not measured" in capsys.readouterr().out


def test_a_page_keeps_what_is_no_older_than_its_checkpoints(here, monkeypatch):
    calls = []
    monkeypatch.setattr(command, "BEYOND", {
        name: lambda *_, name=name, **__: calls.append(name) or [f"{name} {len(calls)}"]
        for name in ("growth", "rerank")})
    monkeypatch.setattr(command.runs, "run_missing", lambda *_: [])

    def run(*words):
        calls.clear()
        main(parse_args([*words, "--seeds", "0"]))
        return calls

    assert run("growth") == ["growth"] == run("growth")
    assert run("growth", "--as-is") == [] and run("beyond") == ["rerank"] and run("beyond") == []
    page = Path("paper/BEYOND.md").read_text()
    assert page.startswith("# Beyond the paper") and "growth 1" in page and "rerank 1" in page
    later = time.time() + 9
    os.utime(folder(beyond.RUN, 0) / "isa.pt", (later, later))
    assert run("beyond") == ["growth", "rerank"]
