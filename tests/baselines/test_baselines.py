"""baselines.py against loops that spell out Pic2Word's and SEARLE's formulas, and its command line as a user runs it."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch

import baselines
import isa
import query_side
from baselines.searle import CHUNK, distill, distillation_loss, draw_for_images, invert, invert_in_chunks
from pocket import drawing, sentences, specs

SENTENCES = sentences.FILE
SMALL = {"red cat": ["a red cat", "a photo of a red cat that is at night"], "tree": ["a big tree next to a dog", "Tree"],
         "blue dress": ["a blue dress with long sleeves and a belt and buttons"]}  # fmt: skip


@pytest.fixture(scope="module")
def regularize(pocket_blip):
    return baselines.TextRegularization(pocket_blip, baselines.read_sentences(SENTENCES))


@pytest.fixture
def small(pocket_blip, tmp_path):
    """TextRegularization of three concepts with two, two and one sentences, of several lengths."""
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    return baselines.TextRegularization(pocket_blip, baselines.read_sentences(tmp_path / "small.json"), k=2)


@pytest.fixture(scope="module")
def v(pocket_blip):
    """v [24, E] of drawn images, scenes and garments."""
    rng = random.Random(3)
    drawn = [drawing.draw((specs.random_scene, specs.random_garment)[i % 2](rng)) for i in range(24)]
    with torch.no_grad():
        return pocket_blip.encode_image(torch.stack([pocket_blip.preprocess(image) for image in drawn]))[0]


def text_feature(blip, text):
    ids, mask = blip.tokenize([text])
    return blip.encode_text(blip.embed_words(ids), mask)[0]


# ------------------------------------------------------------------------------------------------------ mapping networks
@pytest.mark.parametrize("name, hidden", [("MLP", 512), ("Phi", 80)])
def test_mapping_networks_are_three_layers_on_the_mean_pixel(name, hidden):
    torch.manual_seed(0)
    network = getattr(baselines, name)(20, 12).eval()
    feature_map = torch.randn(3, 20, 4, 5)
    activate = {"MLP": lambda x: max(x, 0.0), "Phi": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2}[name]
    activate = np.vectorize(activate, otypes=[float])
    x = np.array([[feature_map[b, c].sum().item() / 20 for c in range(20)] for b in range(3)])
    W1, b1, W2, b2, W3, b3 = (p.detach().numpy() for p in network.parameters())
    wanted = activate(activate(x @ W1.T + b1) @ W2.T + b2) @ W3.T + b3
    assert W1.shape == (hidden, 20) and W2.shape == (hidden, hidden)
    assert network(feature_map).shape == (3, 1, 12)
    np.testing.assert_allclose(network(feature_map)[:, 0].detach(), wanted, atol=1e-5)


@pytest.mark.parametrize("name, rate", [("MLP", 0.1), ("Phi", 0.5)])
def test_mapping_networks_drop_hidden_units_in_training(name, rate):
    torch.manual_seed(0)
    network = getattr(baselines, name)(8, 4)
    assert [m.p for m in network.layers if isinstance(m, torch.nn.Dropout)] == [rate, rate]
    x = torch.randn(2, 8, 1, 1)
    assert not torch.equal(network(x), network(x))


# ------------------------------------------------------------------------------------------------------ sentences
def test_sentences_of_the_pocket_world_are_those_that_the_generator_makes(pocket_blip):
    made = json.loads(SENTENCES.read_text())
    assert made == sentences.make()
    assert SENTENCES.stat().st_size < 150_000
    assert set(" ".join(sum(made.values(), [])).split()) <= set(pocket_blip.tokenizer.vocab)  # no word has to be spelt
    assert {len(set(texts)) for texts in made.values()} == {sentences.SENTENCES}
    assert {"red cat", "blue dress", "orange top"} <= made.keys() and len(made) == 8 * 15


@pytest.mark.parametrize("concept, sentence, wanted", [
    ("red cat", "a red cat at night", ["a ", " at night"]),
    ("car", "a card, an oscar and a Car's car", ["a card, an oscar and a ", "'s car"]),
    ("c++", "a c++ book", ["a ", " book"]),
    ("cat", "two cats", None),
])  # fmt: skip
def test_a_concept_is_found_as_whole_words(concept, sentence, wanted):
    assert baselines.find_concept(concept, sentence) == wanted


@pytest.mark.parametrize("text, named", [
    ("{", "JSON"), ("[" * 100_000, "JSON"), ("\xff", "JSON"), ("[]", "no concepts"), ("{}", "no concepts"),
    ('{"cat": "a cat"}', '"cat"'), ('{"cat": []}', '"cat"'), ('{"cat": ["a cat", 3]}', '"cat"'),
    ('{"cat": ["a cat", "two cats"]}', '"cat" is not in its sentence "two cats"'), ('{" ": ["a - cat"]}', '" "'),
])  # fmt: skip
def test_damaged_sentences_are_refused_by_name(tmp_path, text, named):
    path = tmp_path / "made.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        baselines.read_sentences(path)
    assert str(path) in str(error.value) and named in str(error.value) and "\n" not in str(error.value)


def test_missing_sentences_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: cannot be read"):
        baselines.read_sentences(tmp_path / "nowhere.json")


# ------------------------------------------------------------------------------------------------------ text regularization
def test_a_concept_spoken_by_its_own_words_leaves_its_sentences_as_they_are(pocket_blip, regularize):
    made = json.loads(SENTENCES.read_text())
    pairs = [(concept, text) for concept, texts in made.items() for text in texts]
    rows = torch.arange(0, len(pairs), 7)
    U = torch.cat([pocket_blip.embed_words(pocket_blip.tokenize([pairs[i][0]])[0][:, 1:-1]) for i in rows])  # [B, 2, d_w]
    words, mask = regularize.speak(rows, U)
    ids, wanted_mask = pocket_blip.tokenize([pairs[i][1] for i in rows])
    assert torch.equal(mask, wanted_mask)
    assert torch.equal(words * mask[..., None], pocket_blip.embed_words(ids) * mask[..., None])
    assert (1 - (pocket_blip.encode_text(words, mask) * regularize.t[rows]).sum(1)).abs().max() < 1e-5


@pytest.mark.parametrize("L", [1, 6])
def test_tokens_of_any_number_take_the_concepts_place(pocket_blip, small, L):
    rows = torch.tensor([4, 0, 2, 3, 1, 0])
    U = torch.randn(len(rows), L, pocket_blip.word_dim)
    words, mask = small.speak(rows, U)
    for i, row in enumerate(rows.tolist()):
        before, after = [("a", ""), ("a photo of a", "that is at night"), ("a big", "next to a dog"), ("", ""),
                         ("a", "with long sleeves and a belt and buttons")][row]  # fmt: skip
        ids = [pocket_blip.tokenize([part])[0][0, 1:-1] for part in (before, after)]
        head, tail = (pocket_blip.embed_words(part) for part in ids)
        cls, sep = pocket_blip.embed_words(pocket_blip.tokenize([""])[0][0]).split(1)
        wanted = torch.cat([cls, head, U[i], tail, sep])
        assert torch.equal(words[i, : len(wanted)], wanted)
        assert mask[i].tolist() == [1] * len(wanted) + [0] * (words.shape[1] - len(wanted))


def test_the_regularization_is_one_minus_cosine_of_the_drawn_sentences(pocket_blip, small, v):
    U = torch.randn(3, 2, pocket_blip.word_dim, requires_grad=True)
    draws = torch.tensor([[0.1, 0.9], [0.6, 0.3], [0.99, 0.5]])
    loss = small(U, v[:3], draws)
    names, texts = list(SMALL), ["a photo of a red cat", "a photo of a tree", "a photo of a blue dress"]
    total = 0
    for i in range(3):
        nearest = sorted(range(3), key=lambda c: -float(v[i] @ text_feature(pocket_blip, texts[c])))[:2]
        concept = names[nearest[int(draws[i, 0] * 2)]]
        sentence = SMALL[concept][int(draws[i, 1] * len(SMALL[concept]))]
        row = small.sentences.index(sentence)
        words, mask = small.speak(torch.tensor([row]), U[i : i + 1])
        t, made = pocket_blip.encode_text(words, mask)[0].tolist(), text_feature(pocket_blip, sentence).tolist()
        total += 1 - sum(a * b for a, b in zip(t, made, strict=True))
    assert loss.item() == pytest.approx(total / 3, abs=1e-5)
    loss.backward()
    assert (U.grad.abs().sum(2) > 0).all() and all(p.grad is None for p in pocket_blip.parameters())


def test_every_concept_of_an_image_and_every_sentence_is_drawn_as_often(small, v):
    torch.manual_seed(0)
    counted = set()
    for image in v[:2].split(1):  # a scene and a garment
        rows = small.draw(image.expand(6000, -1), torch.rand(6000, 2))
        near = baselines.assign_concepts(image, small.concepts, 2)[0].tolist()
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
    concepts = torch.eye(4)
    v = torch.tensor([[0.1, 0.9, 0.0, 0.4], [0.7, 0.0, 0.6, 0.1]])
    assert baselines.assign_concepts(v.half(), concepts, 3).tolist() == [[1, 3, 0], [0, 2, 3]]


def test_concepts_are_told_in_proper_english():
    assert [baselines.with_article(c) for c in ("orange cat", "red cat", "Ear")] == ["an orange cat", "a red cat", "an Ear"]


def test_pocket_blip_classifies_plain_images(pocket_blip, regularize):
    rng, right = random.Random(0), 0
    for _ in range(20):
        thing = specs.Thing(rng.choice(specs.KINDS), rng.choice(list(specs.COLOURS)), "big", "middle")
        image = drawing.draw(specs.Scene((thing,), "meadow", rng.getrandbits(20)))
        found = baselines.assign_concepts(pocket_blip.encode_image(pocket_blip.preprocess(image)[None])[0], regularize.concepts, 1)
        right += regularize.names[found[0, 0]] == f"{thing.colour} {thing.kind}"
    assert right >= 14  # by chance one in 120


# ------------------------------------------------------------------------------------------------------ inversion
def test_inverted_words_find_their_images(pocket_blip, regularize, v):
    def features(words):
        return pocket_blip.encode_text(*isa.compose_query(pocket_blip, words))

    start, _ = draw_for_images(range(len(v)), 1, pocket_blip.word_dim, seed=0)
    words = invert(pocket_blip, v, regularize, steps=30)
    before, after = features(start), features(words)
    assert words.shape == (len(v), 1, pocket_blip.word_dim) and not words.requires_grad
    assert (after * v).sum(1).mean() > (before * v).sum(1).mean() + 0.2
    assert ((after @ v.T).argmax(1) == torch.arange(len(v))).float().mean() > 0.7  # by chance one in 24
    assert all(p.grad is None for p in pocket_blip.parameters())


@pytest.mark.parametrize("steps, decay", [(3, 0.0), (5, 0.3)])
def test_inversion_is_adamw_and_a_moving_average(pocket_blip, small, v, steps, decay):
    """AdamW for one image, and the average, written out. SEARLE's decay of 0.99 for 350 steps is 1 - 3.5 / 350."""
    lr = 0.05
    word, draws = (x[0] for x in draw_for_images([7], steps, pocket_blip.word_dim, seed=2))
    word, average, m, s = word.double(), word.double(), 0, 0
    for step in range(1, steps + 1):
        U = word.float()[None].requires_grad_()
        t = pocket_blip.encode_text(*isa.compose_query(pocket_blip, U))[0]
        loss = 1 - t @ v[0] + 0.5 * small(U, v[:1], draws[None, step - 1])
        (gradient,) = torch.autograd.grad(loss, U)
        gradient = gradient[0].double()
        m, s = 0.9 * m + 0.1 * gradient, 0.999 * s + 0.001 * gradient**2
        word = word - lr * 0.01 * word
        word = word - lr * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
        average = decay * average + (1 - decay) * word
    found = invert(pocket_blip, v[:1], small, steps=steps, lr=lr, numbers=[7], seed=2)
    assert torch.allclose(found[0].double(), average, atol=1e-4)


def test_inversion_does_not_depend_on_how_images_are_batched(pocket_blip, regularize, v):
    whole = invert(pocket_blip, v[:6], regularize, steps=8, numbers=[3, 9, 4, 1, 5, 2])
    parts = [invert(pocket_blip, v[:2], regularize, steps=8, numbers=np.array([3, 9])),
             invert(pocket_blip, v[2:6], regularize, steps=8, numbers=[4, 1, 5, 2])]  # fmt: skip
    assert torch.allclose(whole, torch.cat(parts), atol=1e-3)
    assert not torch.allclose(whole, invert(pocket_blip, v[:6], regularize, steps=8), atol=1e-2)


def test_a_killed_inversion_goes_on_where_it_was(pocket_blip, small, v, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "CHUNK", 4)
    numbers = list(range(10))
    whole = invert_in_chunks(pocket_blip, v[:10], numbers, small, tmp_path / "whole", steps=2)
    invert, inverted = invert, []

    def killed(blip, v, regularize, numbers, **options):
        if len(inverted) == 1:
            raise KeyboardInterrupt
        inverted.append(numbers)
        return invert(blip, v, regularize, numbers=numbers, **options)

    monkeypatch.setattr(baselines, "invert", killed)
    with pytest.raises(KeyboardInterrupt):
        invert_in_chunks(pocket_blip, v[:10], numbers, small, tmp_path / "killed", steps=2)
    inverted[:] = [None, None]
    again = invert_in_chunks(pocket_blip, v[:10], numbers, small, tmp_path / "killed", steps=2)
    assert inverted == [None, None, [4, 5, 6, 7], [8, 9]]
    assert torch.equal(whole, again)


# ------------------------------------------------------------------------------------------------------ distillation
def test_distillation_loss_is_searles_formula():
    torch.manual_seed(0)
    words, predicted, tau = torch.randn(5, 7), torch.randn(5, 7), 0.25

    def c(a, b):
        a, b = a.numpy().astype(float), b.numpy().astype(float)
        return math.exp(a @ b / np.linalg.norm(a) / np.linalg.norm(b) / tau)

    total = 0
    for x, y in ((words, predicted), (predicted, words)):
        for i in range(5):
            others = sum(c(x[i], y[j]) for j in range(5)) + sum(c(x[i], x[j]) for j in range(5) if j != i)
            total -= math.log(c(x[i], y[i]) / others)
    assert distillation_loss(words, predicted, tau).item() == pytest.approx(total / 10, abs=1e-5)


def test_distillation_teaches_phi_the_words(pocket_blip, regularize, v):
    torch.manual_seed(0)
    words = torch.randn(len(v), 1, pocket_blip.word_dim)
    phi = query_side.Phi(pocket_blip.embed_dim, pocket_blip.word_dim)
    losses = distill(pocket_blip, phi, v, words, regularize, epochs=25, batch=12, lr=3e-3)
    assert len(losses) == 25 and losses[-1] < losses[0] - 0.5 and not phi.training
    U = phi(v[..., None, None])[:, 0]
    found = torch.nn.functional.normalize(U, dim=1) @ torch.nn.functional.normalize(words[:, 0], dim=1).T
    assert (found.argmax(1) == torch.arange(len(v))).float().mean() > 0.7


def test_distillation_adds_the_regularization_with_its_weight(pocket_blip, v):
    seen = []

    def regularize(U, v):
        seen.append(len(U))
        return torch.tensor(2.0)

    words = torch.randn(len(v), 1, pocket_blip.word_dim)
    losses = {}
    for weight in (0.0, 0.75):
        torch.manual_seed(0)
        phi = query_side.Phi(pocket_blip.embed_dim, pocket_blip.word_dim)
        losses[weight] = distill(pocket_blip, phi, v, words, regularize, epochs=1, batch=10, weight=weight)[0]
    assert losses[0.75] - losses[0.0] == pytest.approx(1.5, abs=1e-5)
    assert seen == [10, 10] * 2  # the last four images make no batch


def test_a_loss_that_is_not_finite_stops_distillation(pocket_blip, v):
    phi = query_side.Phi(pocket_blip.embed_dim, pocket_blip.word_dim)
    words = torch.full((len(v), 1, pocket_blip.word_dim), float("nan"))
    with pytest.raises(ValueError, match="the loss is nan; lower --lr"):
        distill(pocket_blip, phi, v, words, lambda U, v: torch.zeros(()), epochs=1)


# ------------------------------------------------------------------------------------------------------ command line
@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 253 drawn images, more than are inverted at a time, "few" of 9 of them, and three concepts' sentences."""
    folder, rng = tmp_path_factory.mktemp("searle"), random.Random(0)
    (folder / "images").mkdir()
    (folder / "few").mkdir()
    for i in range(CHUNK + 3):
        drawing.draw(specs.random_garment(rng)).save(folder / "images" / f"{i:03d}.png")
    for i in range(9):
        shutil.copy(folder / "images" / f"{i:03d}.png", folder / "few")
    (folder / "small.json").write_text(json.dumps(SMALL))
    return folder


def options(folder, **more):
    given = {"images": folder / "few", "sentences": folder / "small.json", "steps": 2, "epochs": 1, "precision": "fp32"}
    return [part for name, value in {**given, "threads": 1, **more}.items() for part in (f"--{name}", value)]


def test_a_killed_command_goes_on_and_writes_a_query_model(call_script, images, tmp_path, monkeypatch, pocket_blip):
    compose, calls = isa.compose_query, []

    def count(*args, **kwargs):
        calls.append(len(args[1]))
        if calls == [250, 250, 3]:
            raise KeyboardInterrupt
        return compose(*args, **kwargs)

    monkeypatch.setattr(isa, "compose_query", count)
    stopped = call_script("-m", "baselines.searle", *options(images, images=images / "images"))
    assert stopped.status == 130 and stopped.message.startswith("baselines.py: interrupted") and not (tmp_path / "runs").exists()
    calls.clear()
    done = call_script("-m", "baselines.searle", *options(images, images=images / "images"))
    assert done.status == 0, done.err
    assert calls == [3, 3]  # the first 250 were kept
    model, settings = query_side.load_query_model(tmp_path / "runs/searle/isa.pt", pocket_blip)
    wanted = {"encoder": "blip-v", "mapper": "phi", "tokens": 1, "prompt": "a photo of", "gallery": "blip", "query_size": None}
    assert wanted.items() <= settings.items()
    pixels = torch.randn(2, 3, 64, 64)
    v, _ = pocket_blip.encode_image(pixels)
    assert isinstance(model.encoder, query_side.BlipFeature) and isinstance(model.mapper, query_side.Phi)
    assert torch.allclose(model(pixels), model.mapper(v[..., None, None]), atol=1e-6)

    again = call_script("-m", "baselines.searle", *options(images, images=images / "images"))
    assert again.status == 1 and "runs/searle already holds a training; replace it with --overwrite" in again.message
    saved = model.state_dict()
    assert call_script("-m", "baselines.searle", *options(images, images=images / "images"), "--overwrite").status == 0
    anew = torch.load(tmp_path / "runs/searle/isa.pt")["query_model"]
    assert all(torch.equal(anew[name], saved[name]) for name in saved)  # the same seed
    assert not list(tmp_path.rglob("*.tmp*"))


def test_other_settings_invert_anew(call_script, images, tmp_path):
    for number, more in enumerate(({}, {"steps": 1}, {"seed": 1}, {"count": 3}, {"concepts": 1}), start=1):
        done = call_script("-m", "baselines.searle", *options(images, **{"count": 2, "name": number, **more}))
        assert done.status == 0, done.err
        assert len(list((tmp_path / "cache").glob("words-*"))) == number


def test_bad_input_ends_with_one_line(call_script, images, tmp_path):
    (tmp_path / "bad.json").write_text('{"cat": ["a dog"]}')
    for given, status, said in (
        ({"sentences": "bad.json"}, 1, 'bad.json: the concept "cat" is not in its sentence "a dog"'),
        ({"images": "nowhere"}, 1, "nowhere: there is no such folder"),
        ({"steps": 0}, 2, "--steps has to be at least 1, not 0"),
        ({"count": 1}, 2, "--count has to be at least 2, not 1"),
        ({"lr": "nan"}, 2, "--lr has to be a finite number, not nan"),
        ({"device": "moon"}, 2, "--device has to be cpu or cuda, not moon"),
    ):
        done = call_script("-m", "baselines.searle", *options(images, **given))
        assert (done.status, said in done.message) == (status, True), done.err
    assert call_script("-m", "baselines.searle", "--nonsense").status == 2
    assert not (tmp_path / "runs").exists()


def test_damaged_images_are_left_out_or_refused(call_script, images, tmp_path):
    for folder, sound, status in ((tmp_path / "few", 9, 1), (tmp_path / "images", 253, 0)):  # one in 10: more than 1 %
        folder.mkdir()
        for path in (images / folder.name).iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "x.png").write_bytes(b"none")
        done = call_script("-m", "baselines.searle", *options(images, images=folder, count=4, name=folder.name))
        assert done.status == status and "left out:" in done.err and "x.png" in done.err
        assert status == 0 or f"1 of {sound + 1} images in {folder} are damaged" in done.message
