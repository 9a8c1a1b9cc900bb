"""pocket/pretrain.py, and the weights that the pocket world ships with."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from PIL import Image

import blip_lite
import clip_lite
import isa
import query_side
from pocket import pretrain
from pocket.drawing import draw
from pocket.specs import EARLY_MIX, LATE_MIX, Rng, holds, vocabulary
from query_side.query_model import MAY_CHANGE, load_query_model
from train import parse_args

COARSE, FINE, MATCHING = pretrain.PHASES
VOCAB = ROOT / "pocket" / "vocab.txt"


def test_contrastive_loss_is_symmetric_infonce_without_false_negatives():
    generator = torch.Generator().manual_seed(0)
    v, t = (torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=-1)
            for _ in range(2))
    true = (torch.rand(6, 6, generator=generator) < 0.3) | torch.eye(6, dtype=torch.bool)
    assert 8 < true.sum() < 24
    wanted = 0.0
    for i in range(6):
        own = math.exp(float(t[i] @ v[i]) / 0.1)
        for pairs in ([(i, j) for j in range(6)], [(j, i) for j in range(6)]):  # (text, image)
            others = sum(math.exp(float(t[a] @ v[b]) / 0.1) for a, b in pairs if not true[a, b])
            wanted -= math.log(own / (own + others)) / 12
    assert pretrain.contrastive_loss(v, t, 0.1, true).item() == pytest.approx(wanted, rel=1e-5)


def test_by_length_changes_nothing_but_the_padding():
    mask = torch.tensor([[1] * n + [0] * (9 - n) for n in (5, 2, 9, 3, 3, 8, 4, 7)])
    words, image, shapes = torch.rand(8, 9), torch.rand(8), []

    def encode(words, mask, image):
        shapes.append(words.shape[1])
        return (words * mask).sum(1) * image

    found = pretrain.by_length(encode, words, mask, image)
    assert torch.allclose(found, encode(words, mask, image)) and shapes == [3, 4, 7, 9, 9]


@pytest.mark.parametrize("hardness", [0.0, 1.0])
def test_negatives_are_wrong_and_at_full_hardness_the_most_similar(hardness):
    true = torch.eye(8, dtype=torch.bool)
    true[0, 3] = true[2, 5] = True  # never to be drawn
    similarity = torch.zeros(8, 8)
    similarity[0, 3] = similarity[2, 5] = similarity[1, 6] = similarity[7, 1] = 40.0
    torch.manual_seed(0)
    drawn = Counter()
    for _ in range(20):
        texts, images, labels = pretrain.matching_pairs(similarity, true, None, hardness, COARSE)
        assert texts[:8].tolist() == [0, 1, 2, 3] * 2 and labels.tolist() == [1] * 4 + [0] * 8
        assert images[:4].tolist() == images[8:].tolist() == [0, 1, 2, 3]
        drawn.update(zip(texts[4:].tolist(), images[4:].tolist(), strict=True))
    assert sum(drawn.values()) == 160 and not any(true[pair] for pair in drawn)
    hard = drawn[1, 6] + drawn[7, 1]  # a hard image for text 1, a hard text for image 1
    assert hard == 40 if hardness else hard < 20


def test_fine_pairs_add_captions_that_are_wrong_in_one_thing():
    similarity, true = torch.zeros(8, 8), torch.eye(8, dtype=torch.bool)
    similarity[0, 3] = similarity[1, 6] = similarity[7, 1] = similarity[5, 4] = 40.0
    wrong = torch.arange(8) != 4  # image 4 has no wrong caption, and gets a hard text
    texts, images, labels = pretrain.matching_pairs(similarity, true, wrong, 1.0, FINE)
    assert labels.tolist() == [1] * 8 + [0] * 12
    assert texts[:8].tolist() == images[:8].tolist() == images[8:16].tolist() == list(range(8))
    assert texts[8:16].tolist() == [8, 9, 10, 11, 5, 13, 14, 15]
    assert texts[16:18].tolist() == [0, 1] and images[16:18].tolist() == [3, 6]  # hard images
    assert images[18:].tolist() == [0, 1] and texts[19] == 7 and texts[18] != 0  # hard texts


@pytest.mark.parametrize("phase", pretrain.PHASES)
def test_losses_are_those_of_each_pair_alone(pocket_blip, phase):
    rows = pretrain.draw_rows(Rng(3), 12, LATE_MIX, phase)
    torch.manual_seed(5)
    itc, itm, _, accuracy = pretrain.losses(pocket_blip, rows, phase, 1.0, "fp32")
    specs, captions, facts, mistaken = zip(*rows, strict=True)
    true = torch.from_numpy(holds(facts, specs))
    wrong = torch.tensor([text is not None for text in mistaken])
    losses, weights, right = [], [], []
    with torch.no_grad():
        pixels = torch.stack([pocket_blip.preprocess(draw(spec)) for spec in specs])
        v, F_v = pocket_blip.encode_image(pixels)
        texts = [pocket_blip.tokenize([text or ""]) for text in captions + mistaken]
        texts = [(pocket_blip.embed_words(ids), mask) for ids, mask in texts]
        t = torch.cat([pocket_blip.encode_text(*text) for text in texts[:12]])
        wanted = pretrain.contrastive_loss(v, t, pocket_blip.temp, true)
        torch.manual_seed(5)
        pairs = pretrain.matching_pairs(t @ v.T / pocket_blip.temp, true, wrong, 1.0, phase)
        for text, image, label in zip(*pairs, strict=True):
            logits = pocket_blip.match(*texts[text], F_v[image : image + 1])[0]
            weights.append(phase.weight if label else 1.0)
            losses.append(-weights[-1] * logits.log_softmax(0)[label].item())
            right.append(logits.argmax().item() == label)
    assert itc.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert itm.item() == pytest.approx(sum(losses) / sum(weights), rel=1e-3)
    assert accuracy.item() == pytest.approx(sum(right) / len(right))


def test_rows_are_those_that_the_committed_weights_learnt_from():
    rows = [pretrain.draw_rows(Rng(3), 48, mix, phase)
            for phase in pretrain.PHASES for mix in (EARLY_MIX, LATE_MIX)]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == "b30054418f8e4d55"


def test_rows_of_each_phase():
    usual, terse = (pretrain.draw_rows(Rng(5), 40, LATE_MIX, replace(COARSE, terse=share))
                    for share in (0, 0.5))
    assert [row[0] for row in usual] == [row[0] for row in terse] and usual[20:] == terse[20:]
    that = [[" that " in row[1] for row in rows] for rows in (usual, terse)]
    assert any(that[0][:20]) and not any(that[1][:20]) and any(that[1][20:])
    rows = pretrain.draw_rows(Rng(3), 12, LATE_MIX, FINE)
    poses = Counter(row[0].pose for row in rows)  # of twins the same
    assert sorted(poses.values()) == [1] * 4 + [2] * 4 and len({row[0] for row in rows}) == 12
    assert sum(row[3] is not None for row in rows) > 6


def test_learning_rate_of_pretraining():
    def rates(total, *steps):
        return [pretrain.learning_rate(step, total, 2.0) for step in steps]

    wanted = [0.01, 1.0, 2.0, 2.0, 2.0, 1.0, 0.0]
    assert rates(3000, 0, 99, 199, 2000, 2100, 2550, 3000) == pytest.approx(wanted)
    assert rates(6000, 3999) == pytest.approx([2 / 1200])  # more steps are fine ones, afterwards
    for total in (5600, 6600):  # and more than these are for matching
        assert rates(total, 4200, 4800, 5599) == pytest.approx([0.875, 0.5, 1 / 1600])
    assert rates(6600, 5600, 5800, 6100, 6600) == pytest.approx([0.01, 1.6, 1.0, 0.0])


def run(out, *options):
    argv = ["--steps", 3, "--batch", 8, "--held-out", 4, "--save-every", 2, "--precision", "fp32"]
    return pretrain.main(pretrain.parse_args(list(map(str, [*argv, "--out", out, *options]))))


@pytest.mark.parametrize("fine, matching", [
    pytest.param(4000, 5600, marks=pytest.mark.slow), (1, 5600), (0, 2), (0, 1)])
def test_pretraining_killed_in_a_step_resumes_to_the_same_weights(
        tmp_path, monkeypatch, fine, matching):
    phases = (COARSE, replace(FINE, first=fine), replace(MATCHING, first=matching))
    monkeypatch.setattr(pretrain, "PHASES", phases)
    run(tmp_path / "whole.pth")
    calls, contrastive_loss = [], pretrain.contrastive_loss

    def killed(*arguments):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt  # in the third step; the last state is that of step 2
        return contrastive_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "contrastive_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts.pth")
    assert not (tmp_path / "parts.pth").exists()
    run(tmp_path / "parts.pth")
    files = [tmp_path / f"{name}.pth" for name in ("whole", "parts")]
    whole, parts = (torch.load(file, weights_only=True)["model"] for file in files)
    assert all(torch.equal(whole[name], parts[name]) for name in whole.keys() | parts.keys())
    logs = [json.loads(f.with_suffix(".pth.log").read_text().splitlines()[-1]) for f in files]
    assert all(log.pop("seconds") >= 0 for log in logs) and logs[0] == logs[1]
    assert logs[0]["step"] == 3
    assert blip_lite.load(files[0], vocab=VOCAB).image_size == 64


def test_merges_make_each_word_one_token(tmp_path):
    words = [word for word in vocabulary() if word.isalpha()]
    shipped = (ROOT / "pocket/merges.txt").read_text().splitlines()
    assert pretrain.learn_merges(words) == shipped
    lines = pretrain.learn_merges(["banana", "aaaa", "nab"])
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    tokenizer = clip_lite.Tokenizer(tmp_path / "merges.txt", len(lines) + 513)
    assert tokenizer.tokenize("banana aaaa nab") == ["banana</w>", "aaaa</w>", "nab</w>"]


def test_clip_learns_by_contrast_alone(pocket_clip):
    rows = pretrain.draw_rows(Rng(3), 12, LATE_MIX, COARSE)
    specs, captions, facts, _ = zip(*rows, strict=True)
    itc, itm, temperature, _ = pretrain.losses(pocket_clip, rows, COARSE, 1.0, "fp32")
    with torch.no_grad():
        pixels = torch.stack([pocket_clip.preprocess(draw(spec)) for spec in specs])
        v, _ = pocket_clip.encode_image(pixels)
        texts = (pocket_clip.tokenize([text]) for text in captions)
        t = torch.cat([pocket_clip.encode_text(pocket_clip.embed_words(i), m) for i, m in texts])
    true = torch.from_numpy(holds(facts, specs))
    wanted = pretrain.contrastive_loss(v, t, pocket_clip.temperature, true)
    assert itc.item() == pytest.approx(wanted.item(), rel=1e-4) and itm == 0
    assert temperature.item() == pytest.approx(pocket_clip.temperature)


def test_clip_resumes_and_loads(tmp_path, monkeypatch):
    run(tmp_path / "whole.pth", "--clip")
    monkeypatch.setattr(pretrain, "note_signals", lambda: [15])  # stopped after each step
    for _ in range(3):
        assert run(tmp_path / "parts.pth", "--clip") == 15
    whole, parts = (torch.load(tmp_path / f"{name}.pth", weights_only=True)["model"]
                    for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole.keys() | parts.keys())
    row = json.loads((tmp_path / "whole.pth.log").read_text())
    assert "itm" not in row and not any("matching" in name or "drawn" in name for name in row)
    clip = clip_lite.load(tmp_path / "whole.pth", vocab=ROOT / "pocket/merges.txt")
    assert (clip.image_size, clip.max_positions) == (64, 77)


def test_the_shipped_clip_is_small_and_has_learnt(pocket_clip):
    assert (ROOT / "pocket/clip.pth").stat().st_size < 6e6
    logged = json.loads((ROOT / "pocket/clip.pth.log").read_text().splitlines()[-1])
    found = pretrain.validate(pocket_clip, 200)
    assert found.keys() == logged.keys() - {"step", "seconds", "itc", "temperature"}
    assert found["full_R@1"] > logged["full_R@1"] > 50  # among fewer images


def test_the_last_phase_trains_nothing_but_matching(tmp_path, pocket_blip):
    out, steps = tmp_path / "matching.pth", MATCHING.first + 2
    options = ["--steps", steps, "--lr", 0.5]  # so that two steps show in fp16 weights
    run(out, "--matching-of", "pocket", *options)
    blip = blip_lite.load(out, vocab=VOCAB)
    before, after = pocket_blip.state_dict(), blip.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "crossattention" in name or "itm_head" in name}
    assert json.loads((tmp_path / "matching.pth.log").read_text())["step"] == steps
    with pytest.raises(ValueError, match="is of --matching-of pocket, not None; give --matching"):
        run(out, *options)


def test_the_shipped_query_model_fits_the_shipped_blip(small_world, pocket_blip):
    """`python train.py` trained it with pocket/blip.pth; its sentences name their own images."""
    model, settings = load_query_model(ROOT / "pocket" / "isa.pt", pocket_blip)
    settings = {"micro_batch": None, "temperature": None} | settings  # options since then
    free = MAY_CHANGE | {"precision"}
    assert {k: v for k, v in settings.items() if k not in free} == {
        k: v for k, v in vars(parse_args([])).items() if k not in free}
    images = [Image.open(p) for p in sorted((small_world / "cirr/img_raw/test1").iterdir())]
    pixels = torch.stack([query_side.preprocess(model.encoder, image) for image in images])
    with torch.no_grad():
        v, _ = pocket_blip.encode_image(torch.stack(list(map(pocket_blip.preprocess, images))))
        t = pocket_blip.encode_text(*isa.compose_query(pocket_blip, model(pixels)))
    right = ((t @ v.T).argmax(1) == torch.arange(len(images))).float().mean()
    assert right > 0.8, right  # of 48, in groups of six similar ones; without training 0.02
