"""Text regularization and SEARLE against loops that spell out their formulas; SEARLE's command."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import baselines
import benchmarks
import blip_lite
import isa
import query_side
from baselines import setting, weights
from baselines.searle import (
    INVERTED_TOGETHER,
    distill,
    distillation_loss,
    draw_for_images,
    invert,
    invert_in_parts,
    parse_args,
)
from baselines.text_regularization import find_concept, nearest_concepts
from pocket import drawing, sentences, specs

SENTENCES = Path(sentences.__file__).with_name("sentences.json")
SMALL = {"red cat": ["a red cat", "a photo of a red cat that is at night"],
         "tree": ["a big tree next to a dog", "Tree"],
         "blue dress": ["a blue dress with long sleeves and a belt and buttons"]}


@pytest.fixture(scope="module")
def regularize(pocket_blip):
    return baselines.TextRegularization(pocket_blip, baselines.read_sentences(SENTENCES))


@pytest.fixture
def small(pocket_blip):
    """Of three concepts with two, two and one sentences of several lengths."""
    return baselines.TextRegularization(pocket_blip, SMALL, k=2)


@pytest.fixture(scope="module")
def v(pocket_blip):
    """v [24, E] of drawn images, scenes and garments."""
    rng, draw = random.Random(3), (specs.random_scene, specs.random_garment)
    drawn = [pocket_blip.preprocess(drawing.draw(draw[i % 2](rng))) for i in range(24)]
    with torch.no_grad():
        return pocket_blip.encode_image(torch.stack(drawn))[0]


def text_feature(blip, text):
    ids, mask = blip.tokenize([text])
    return blip.encode_text(blip.embed_words(ids), mask)[0]




def test_sentences_of_the_pocket_world_are_those_that_the_generator_makes(pocket_blip):
    made = json.loads(SENTENCES.read_text())
    assert made == sentences.make()
    assert SENTENCES.stat().st_size < 150_000
    words = set(" ".join(sum(made.values(), [])).split())
    assert words <= set(pocket_blip.tokenizer.vocab)  # no word has to be spelt
    assert {len(set(texts)) for texts in made.values()} == {sentences.SENTENCES}
    assert {"red cat", "blue dress", "orange top"} <= made.keys() and len(made) == 8 * 15


@pytest.mark.parametrize("concept, sentence, wanted", [
    ("red cat", "a red cat at night", ["a ", " at night"]),
    ("car", "a card, an oscar and a Car's car", ["a card, an oscar and a ", "'s car"]),
    ("c++", "a c++ book", ["a ", " book"]),
    ("cat", "two cats", None),
])
def test_a_concept_is_found_as_whole_words(concept, sentence, wanted):
    assert find_concept(concept, sentence) == wanted


@pytest.mark.parametrize("text, named", [
    (None, "cannot be read"), ("{", "JSON"), ("[" * 100_000, "JSON"), ("\xff", "JSON"),
    ("[]", "no concepts"), ("{}", "no concepts"), ('{"cat": "a cat"}', '"cat"'),
    ('{"cat": []}', '"cat"'), ('{"cat": ["a cat", 3]}', '"cat"'), ('{" ": ["a - cat"]}', '" "'),
    ('{"cat": ["a cat", "two cats"]}', '"cat" is not in its sentence "two cats"'),
])
def test_damaged_sentences_are_refused_by_name(tmp_path, text, named):
    path = tmp_path / "made.json"
    if text:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        baselines.read_sentences(path)
    said = str(error.value)
    assert str(path) in said and named in said and "\n" not in said




def test_a_concept_spoken_by_its_own_words_leaves_its_sentences_as_they_are(
        pocket_blip, regularize):
    made = json.loads(SENTENCES.read_text())
    pairs = [(concept, text) for concept, texts in made.items() for text in texts]
    rows = torch.arange(0, len(pairs), 7)
    ids, _ = pocket_blip.tokenize([pairs[i][0] for i in rows])
    words, mask = regularize.speak(rows, pocket_blip.embed_words(ids[:, 1:-1]))  # [B, 2, d_w]
    ids, wanted_mask = pocket_blip.tokenize([pairs[i][1] for i in rows])
    assert torch.equal(mask, wanted_mask)
    assert torch.equal(words * mask[..., None], pocket_blip.embed_words(ids) * mask[..., None])
    t = pocket_blip.encode_text(words, mask)
    assert (1 - (t * regularize.t[rows]).sum(1)).abs().max() < 1e-5


@pytest.mark.parametrize("L", [1, 6])
def test_tokens_of_any_number_take_the_concepts_place(pocket_blip, small, L):
    rows = torch.tensor([4, 0, 2, 3, 1, 0])
    U = torch.randn(len(rows), L, pocket_blip.word_dim)
    words, mask = small.speak(rows, U)
    around = [("a", ""), ("a photo of a", "that is at night"), ("a big", "next to a dog"), ("", ""),
              ("a", "with long sleeves and a belt and buttons")]
    for i, row in enumerate(rows.tolist()):
        head, tail = (pocket_blip.embed_words(pocket_blip.tokenize([part])[0][0, 1:-1])
                      for part in around[row])
        cls, sep = pocket_blip.embed_words(pocket_blip.tokenize([""])[0][0]).split(1)
        wanted = torch.cat([cls, head, U[i], tail, sep])
        assert torch.equal(words[i, : len(wanted)], wanted)
        assert mask[i].tolist() == [1] * len(wanted) + [0] * (words.shape[1] - len(wanted))


def test_the_regularization_is_one_minus_cosine_of_the_drawn_sentences(pocket_blip, small, v):
    U = torch.randn(3, 2, pocket_blip.word_dim, requires_grad=True)
    draws = torch.tensor([[0.1, 0.9], [0.6, 0.3], [0.99, 0.5]])
    loss = small(U, v[:3], draws)
    names, total = list(SMALL), 0
    concepts = [text_feature(pocket_blip, f"a photo of a {name}") for name in names]
    for i in range(3):
        nearest = sorted(range(3), key=lambda c: -float(v[i] @ concepts[c]))[:2]
        concept = names[nearest[int(draws[i, 0] * 2)]]
        sentence = SMALL[concept][int(draws[i, 1] * len(SMALL[concept]))]
        row = sum(SMALL.values(), []).index(sentence)
        words, mask = small.speak(torch.tensor([row]), U[i : i + 1])
        t, made = pocket_blip.encode_text(words, mask)[0], text_feature(pocket_blip, sentence)
        total += 1 - sum(a * b for a, b in zip(t.tolist(), made.tolist(), strict=True))
    assert loss.item() == pytest.approx(total / 3, abs=1e-5)
    loss.backward()
    assert (U.grad.abs().sum(2) > 0).all()
    assert all(p.grad is None for p in pocket_blip.parameters())


def test_every_concept_of_an_image_and_every_sentence_is_drawn_as_often(small, v):
    torch.manual_seed(0)
    counted = set()
    for image in v[:2].split(1):  # a scene and a garment
        rows = small.draw(image.expand(6000, -1), torch.rand(6000, 2))
        near = nearest_concepts(image, small.concepts, 2)[0].tolist()
        share = torch.bincount(rows, minlength=5) / 6000
        for concept, own in enumerate(([0, 1], [2, 3], [4])):
            for row in own:
                assert share[row] == pytest.approx((concept in near) / 2 / len(own), abs=0.03)
        edge = torch.full((1, 2), 1 - 2**-24)  # the largest number that torch.rand returns
        assert small.draw(image, edge).item() in {1, 3, 4}
        counted |= set(near)
    assert counted == {0, 1, 2}


def test_draws_come_from_torchs_global_generator(pocket_blip, regularize, v):
    U = torch.randn(len(v), 1, pocket_blip.word_dim)
    losses = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses.append(regularize(U, v).item())
    assert losses[0] == losses[1] != losses[2]


def test_concepts_of_hand_made_features():
    v = torch.tensor([[0.1, 0.9, 0.0, 0.4], [0.7, 0.0, 0.6, 0.1]])
    assert nearest_concepts(v, torch.eye(4), 3).tolist() == [[1, 3, 0], [0, 2, 3]]
    near = torch.tensor([[1.0, 0.0], [0.9998, 0.02]])  # alike in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_concepts(torch.tensor([[1.0, 0.02]]).half(), near, 1).item() == 1


def test_concepts_have_their_article(pocket_blip):
    made = {name: [name] for name in ("orange cat", "red cat", "Orange top")}
    concepts = baselines.TextRegularization(pocket_blip, made).concepts
    for t, name in zip(concepts, ("an orange cat", "a red cat", "an Orange top"), strict=True):
        torch.testing.assert_close(t, text_feature(pocket_blip, f"a photo of {name}"))




def test_inverted_words_find_their_images(pocket_blip, regularize, v):
    def features(words):
        return pocket_blip.encode_text(*isa.compose_query(pocket_blip, words))

    start, _ = draw_for_images(range(len(v)), 1, pocket_blip.word_dim, seed=0)
    words = invert(pocket_blip, v, regularize, steps=30)
    before, after = features(start), features(words)
    assert words.shape == (len(v), 1, pocket_blip.word_dim) and not words.requires_grad
    assert (after * v).sum(1).mean() > (before * v).sum(1).mean() + 0.2
    found = (after @ v.T).argmax(1) == torch.arange(len(v))
    assert found.float().mean() > 0.7  # by chance one in 24
    assert all(p.grad is None for p in pocket_blip.parameters())


@pytest.mark.parametrize("steps, decay", [(3, 0.0), (5, 0.3)])
def test_inversion_is_adamw_and_a_moving_average(pocket_blip, small, v, steps, decay):
    """Both written out, for one image. SEARLE's decay of 0.99 for 350 steps is 1 - 3.5 / 350."""
    lr = 0.05
    word, draws = (x[0] for x in draw_for_images([7], steps, pocket_blip.word_dim, seed=2))
    word, average, m, s = word.double(), word.double(), 0, 0
    for step in range(1, steps + 1):
        U = word.float()[None].requires_grad_()
        t = pocket_blip.encode_text(*isa.compose_query(pocket_blip, U))[0]
        loss = 1 - t @ v[0] + 0.5 * small(U, v[:1], draws[None, step - 1])
        gradient = torch.autograd.grad(loss, U)[0][0].double()
        m, s = 0.9 * m + 0.1 * gradient, 0.999 * s + 0.001 * gradient**2
        word = word - lr * 0.01 * word
        word = word - lr * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
        average = decay * average + (1 - decay) * word
    found = invert(pocket_blip, v[:1], small, steps=steps, lr=lr, numbers=[7], seed=2)
    assert torch.allclose(found[0].double(), average, atol=1e-4)


def test_inversion_does_not_depend_on_how_images_are_batched(pocket_blip, regularize, v):
    def words(part, **numbers):
        return invert(pocket_blip, v[part], regularize, steps=8, **numbers)

    whole = words(slice(6), numbers=[3, 9, 4, 1, 5, 2])
    parts = [words(slice(2), numbers=np.array([3, 9])), words(slice(2, 6), numbers=[4, 1, 5, 2])]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-3)
    assert not torch.allclose(whole, words(slice(6)), atol=1e-2)


def test_a_damaged_file_of_words_is_refused(pocket_blip, small, v, tmp_path):
    (tmp_path / "00000000.pt").write_bytes(b"none")
    with pytest.raises(ValueError, match="00000000.pt: is damaged; delete it"):
        invert_in_parts(pocket_blip, v, range(len(v)), small, tmp_path)




def test_distillation_loss_is_searles_formula():
    torch.manual_seed(0)
    words, predicted, tau = torch.randn(5, 7), torch.randn(5, 7), 0.25

    def c(a, b):
        a, b = a.numpy().astype(float), b.numpy().astype(float)
        return math.exp(a @ b / np.linalg.norm(a) / np.linalg.norm(b) / tau)

    total = 0
    for x, y in ((words, predicted), (predicted, words)):
        for i in range(5):
            others = sum(c(x[i], y[j]) + (j != i) * c(x[i], x[j]) for j in range(5))
            total -= math.log(c(x[i], y[i]) / others)
    assert distillation_loss(words, predicted).item() == pytest.approx(total / 10, abs=1e-5)


def test_distillation_teaches_phi_the_words(pocket_blip, regularize, v):
    torch.manual_seed(0)
    words = torch.randn(len(v), 1, pocket_blip.word_dim)
    phi = query_side.Phi(pocket_blip.embed_dim, pocket_blip.word_dim)
    losses = distill(phi, v, words, regularize, epochs=25, batch=12, lr=3e-3)
    assert len(losses) == 25 and losses[-1] < losses[0] - 0.5 and not phi.training
    cosines = normalize(phi(v[..., None, None])[:, 0], dim=1) @ normalize(words[:, 0], dim=1).T
    assert (cosines.argmax(1) == torch.arange(len(v))).float().mean() > 0.7


def test_distillation_adds_the_regularization_with_its_weight(v):
    seen, losses = [], {}

    def regularize(U, v):
        seen.append(len(U))
        return torch.tensor(2.0)

    for weight in (0.0, 0.75):
        torch.manual_seed(0)
        phi, words = query_side.Phi(v.shape[1], 8), torch.randn(len(v), 1, 8)
        losses[weight] = distill(phi, v, words, regularize, epochs=1, batch=10, weight=weight)[0]
    assert losses[0.75] - losses[0.0] == pytest.approx(1.5, abs=1e-5)
    assert seen == [10, 10] * 2  # the last four images make no batch


def test_a_loss_that_is_not_finite_stops_distillation(v):
    words = torch.full((len(v), 1, 8), float("nan"))
    with pytest.raises(ValueError, match="the loss is nan; lower --lr"):
        distill(query_side.Phi(v.shape[1], 8), v, words, lambda U, v: torch.zeros(()), epochs=1)




@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 253 drawn images, more than are inverted together, and "few" of nine of them."""
    folder, rng = tmp_path_factory.mktemp("searle"), random.Random(0)
    (folder / "images").mkdir()
    (folder / "few").mkdir()
    for i in range(INVERTED_TOGETHER + 3):
        drawing.draw(specs.random_garment(rng)).save(folder / "images" / f"{i:03d}.png")
    for i in range(9):
        shutil.copy(folder / "images" / f"{i:03d}.png", folder / "few")
    (folder / "small.json").write_text(json.dumps(SMALL))
    return folder


@pytest.fixture
def searle(call_script, images):
    """searle(options) runs the command, by default on the few images."""

    def call(*flags, **options):
        given = {"images": images / "few", "sentences": images / "small.json", "steps": 2,
                 "epochs": 1, "precision": "fp32", "threads": 1, **options}
        arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
        return call_script("-m", "baselines.searle", *arguments, *flags)

    return call


def test_a_killed_command_resumes_and_writes_a_query_model(
        searle, images, tmp_path, monkeypatch, pocket_blip):
    compose, calls = isa.compose_query, []

    def count(*args, **kwargs):
        calls.append(len(args[1]))
        if calls == [250, 250, 3]:
            raise KeyboardInterrupt
        return compose(*args, **kwargs)

    monkeypatch.setattr(isa, "compose_query", count)
    stopped = searle(images=images / "images")
    assert stopped.status == 130 and stopped.message.startswith("baselines.searle: interrupted")
    assert not (tmp_path / "runs").exists()
    calls.clear()
    done = searle(images=images / "images")
    assert done.status == 0, done.err
    assert calls == [3, 3]  # the first 250 were kept
    model, settings = query_side.load_query_model(tmp_path / "runs/searle/isa.pt", pocket_blip)
    wanted = {"encoder": "blip-v", "mapper": "phi", "tokens": 1, "prompt": "a photo of",
              "gallery": "blip", "query_size": None}
    assert wanted.items() <= settings.items()
    pixels = torch.randn(2, 3, 64, 64)
    v, _ = pocket_blip.encode_image(pixels)
    assert isinstance(model.mapper, query_side.Phi)
    assert torch.allclose(model(pixels), model.mapper(v[..., None, None]), atol=1e-6)

    again = searle(images=images / "images")
    assert again.status == 1
    assert "runs/searle already holds a run; replace it with --overwrite" in again.message
    saved = model.state_dict()
    assert searle("--overwrite", images=images / "images").status == 0
    anew = torch.load(tmp_path / "runs/searle/isa.pt")["query_model"]
    assert all(torch.equal(anew[name], saved[name]) for name in saved)  # the same seed
    assert not list(tmp_path.rglob("*.tmp*"))


def test_other_settings_invert_anew(searle, tmp_path):
    changes = ({}, {"steps": 1}, {"seed": 1}, {"count": 3}, {"concepts": 1})
    for number, change in enumerate(changes, start=1):
        done = searle(**{"count": 2, "name": number, **change})
        assert done.status == 0, done.err
        assert len(list((tmp_path / "cache").glob("words-*"))) == number


@pytest.mark.parametrize("option", ["count", "concepts", "steps", "epochs", "lr", "seed"])
def test_impossible_options_are_usage_errors(option, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args([f"--{option}=-1"])
    assert stop.value.code == 2 and f"--{option} has to be" in capsys.readouterr().err


def test_damaged_images_are_left_out_or_refused(searle, images, tmp_path):
    for folder, sound, status in ((tmp_path / "few", 9, 1), (tmp_path / "images", 253, 0)):
        shutil.copytree(images / folder.name, folder)
        (folder / "x.png").write_bytes(b"none")
        done = searle(images=folder, count=4, name=folder.name)
        assert done.status == status and "skipped:" in done.err and "x.png" in done.err
        counts = f"1 of {sound + 1} images in {folder} are damaged"  # of ten: more than 1 %
        assert status == 0 or counts in done.message


# ---- weights
def test_weights_are_the_best_by_the_mean(small_world, tmp_path, monkeypatch, capsys):
    """What was tried is what the formulas give; the best mean of the two benchmarks wins."""
    monkeypatch.setattr(weights, "GRID", {"weighted": (0.1, 1), "slerp": (0.3,), "isa+text": (0,)})
    where = ["--data", str(small_world), "--cache-dir", str(tmp_path / "cache"), "--workers", "0",
             "--precision", "fp32", "--out", str(tmp_path / "w.json")]
    weights.main(weights.parse_args(where))
    written = json.loads((tmp_path / "w.json").read_text())
    tried, chosen = written["tried"]["weighted"], written["chosen"]
    mean = {weight: sum(row.values()) / 3 for weight, row in tried.items()}
    assert str(chosen["weighted"]) == max(mean, key=mean.get) and len(set(mean.values())) == 2
    assert f"weighted {chosen['weighted']}: " in capsys.readouterr().out
    assert setting.read_weights(tmp_path / "w.json") == chosen
    (part,) = setting.open_benchmarks("circo", small_world / "circo", "val")
    whole = setting.Setting(blip_lite.load("pocket"), part, cache_dir=tmp_path / "cache")
    sums, _ = whole.rank(whole.query_features("image+text"))
    assert tried["1"]["circo"] == benchmarks.score(part, sums)["mAP@5"]


def test_the_weights_in_use_are_those_that_were_tried():
    written = json.loads(Path(setting.WEIGHTS).read_text())
    assert written["split"] == "val" and written["tried"].keys() == weights.GRID.keys()
    for method, rows in written["tried"].items():
        best = max(rows, key=lambda weight: sum(rows[weight].values()))
        assert setting.read_weights()[method] == float(best)
