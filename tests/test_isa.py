"""isa.py against loops that spell out each equation pixel by pixel, and sentences made by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import same, with_large_weights
from torch import nn

import blip_lite
import isa
import query_side

VOCAB = "[PAD] [UNK] [CLS] [SEP] a photo of that is not red blue cat dog ##gy".split()
L, D_W = 3, 64
SIZES = dict(image_size=32, patch_size=16, image_width=64, image_depth=1, vocab_size=len(VOCAB) + 2,
             max_positions=24, word_dim=D_W, text_depth=2, embed_dim=32)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A frozen BLIP of made-up weights."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n")
    torch.manual_seed(0)
    return with_large_weights(blip_lite.Blip(SIZES, blip_lite.Tokenizer(path)))


def learner(**settings):
    torch.manual_seed(0)
    module = isa.AdaptiveTokenLearner(5, 7, num_tokens=L, width=8, self_hidden=6, cross_hidden=10,
                                      **settings).double()
    for parameter in module.parameters():  # so large that softmax and GELU are far from linear
        nn.init.normal_(parameter, std=0.7)
    return module


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def feature_map():
    return random(2, 5, 3, 4, seed=1).double()


def unit(*shape, seed):
    return nn.functional.normalize(random(*shape, seed=seed), dim=-1)


def weights(module):
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def projected(w, f):
    """The feature map at width d, as a dict (h, w) -> vector [d]."""
    matrix, bias = w["project.weight"][:, :, 0, 0], w["project.bias"]
    return {(y, x): matrix @ f[:, y, x] + bias for y, x in np.ndindex(f.shape[1:])}


def eq1(w, f):
    """a^(l)_hw as an array [L, H, W]."""
    a = np.zeros((L, *f.shape[1:]))
    for (y, x), pixel in projected(w, f).items():
        exps = [math.exp(w["W.weight"][i, :, 0, 0] @ pixel) for i in range(L)]
        for i in range(L):
            a[i, y, x] = exps[i] / sum(exps)
    return a


def eq2(w, f):
    """z^(l) as a list of L vectors."""
    tokens, pixels = [], projected(w, f)
    for a in eq1(w, f):
        total = sum(a[place] * pixel for place, pixel in pixels.items())
        tokens.append(total / sum(a[place] for place in pixels))
    return tokens


def attention(w, kind, asking, answering):
    """One head over a list of vectors -> answers, and weights as an array [asking, answering]."""
    Q, K, V = (w[f"{letter}_{kind}.weight"] for letter in "QKV")
    answers, table = [], []
    for ask in asking:
        exps = [math.exp((Q @ ask) @ (K @ x) / math.sqrt(len(ask))) for x in answering]
        table.append([e / sum(exps) for e in exps])
        answers.append(sum(p * (V @ x) for p, x in zip(table[-1], answering, strict=True)))
    return answers, np.array(table)


def feed_forward(w, kind, token):
    hidden = w[f"W_{kind}1.weight"] @ token + w[f"W_{kind}1.bias"]
    gelu = np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
    return token + w[f"W_{kind}2.weight"] @ gelu + w[f"W_{kind}2.bias"]


def eq3(w, tokens):
    answers, _ = attention(w, "r", tokens, tokens)
    return [feed_forward(w, "r", z + answer) for z, answer in zip(tokens, answers, strict=True)]


def eq4(w, tokens, f):
    """Z_c after its feed-forward, before W_p, and the weights [L, H*W]."""
    answers, table = attention(w, "c", tokens, list(projected(w, f).values()))
    tokens = [feed_forward(w, "c", z + answer) for z, answer in zip(tokens, answers, strict=True)]
    return tokens, table


def test_eq1_splits_each_pixel_among_the_groups():
    module, maps = learner(), feature_map()
    grouping = module.attention_maps(maps)[0].detach().numpy()
    expected = np.array([eq1(weights(module), f) for f in maps.numpy()])
    assert grouping.shape == (2, L, 3, 4)
    np.testing.assert_allclose(grouping, expected, rtol=1e-10)
    np.testing.assert_allclose(grouping.sum(1), np.ones((2, 3, 4)))
    assert expected.std() > 0.1  # far from uniform: a softmax over pixels would not pass


@pytest.mark.parametrize("self_attention", [True, False])
@pytest.mark.parametrize("cross_attention", [True, False])
def test_eq2_to_4_and_the_ablations(self_attention, cross_attention):
    module = learner(self_attention=self_attention, cross_attention=cross_attention)
    maps, w = feature_map(), weights(module)
    U, (_, cross) = module(maps), module.attention_maps(maps)
    assert U.shape == (2, L, 7) and (cross is not None) == cross_attention
    for i, f in enumerate(maps.numpy()):
        tokens = eq2(w, f)
        tokens = eq3(w, tokens) if self_attention else tokens
        if cross_attention:
            tokens, table = eq4(w, tokens, f)
            found = cross[i].detach().numpy()
            np.testing.assert_allclose(found, table.reshape(L, 3, 4), rtol=1e-9)  # row by row
        expected = [w["W_p.weight"] @ z + w["W_p.bias"] for z in tokens]
        np.testing.assert_allclose(U[i].detach().numpy(), expected, rtol=1e-9)


def test_ablations_hold_no_idle_parameters():
    names = {flags: set(weights(learner(self_attention=flags[0], cross_attention=flags[1])))
             for flags in np.ndindex(2, 2)}
    for kind, left in (("r", names[0, 1]), ("c", names[1, 0])):
        gone = {f"{m}_{kind}.weight" for m in "QKV"}
        gone |= {f"W_{kind}{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
        assert names[1, 1] - left == gone
    assert {name.split(".")[0] for name in names[0, 0]} == {"project", "W", "W_p"}


def test_a_group_that_owns_nothing():
    module = learner()
    with torch.no_grad():
        module.project.weight.mul_(0.01)
        module.project.bias.fill_(1.0)
        module.W.weight[1] = -1e3  # no pixel wants group 1
    maps = feature_map().requires_grad_()
    assert module.attention_maps(maps)[0][:, 1].max() == 0
    U = module(maps)
    U.square().sum().backward()
    assert U.isfinite().all() and maps.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_query_model_is_the_encoder_and_then_the_mapper():
    encoder, mapper = nn.Conv2d(3, 5, 4, stride=4), isa.AdaptiveTokenLearner(5, D_W)
    pixels = torch.randn(2, 3, 16, 16)
    U = isa.QueryModel(encoder, mapper)(pixels)
    assert U.shape == (2, 6, D_W) and torch.equal(U, mapper(encoder(pixels)))  # L = 6 by default


TABLE_1 = {  # -> the paper's M parameters, ours exactly; B2 does not fit: the paper prints 8.5
    "efficientnet_b0": (5.3, 5_322_108),
    "efficientnet_b2": (9.0, 9_048_322),
    "mobilenet_v2": (3.5, 3_538_432),
    "efficientvit_m2": (5.0, 5_006_330),
    "mobilevitv2_100": (5.5, 5_506_793),
    "blip": (87.0, 86_982_144),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1_parameters(name):
    """Encoder without classifier, and the learner at its default sizes, for BLIP ViT-B at 224."""
    sizes = dict(image_size=224, patch_size=16, image_width=768, image_depth=12, vocab_size=30524,
                 max_positions=512, word_dim=768, text_depth=12, embed_dim=256)
    with torch.device("meta"):  # shapes without memory
        blip = blip_lite.Blip(sizes, None) if name == "blip" else None
        encoder = query_side.build(name, blip=blip)
        model = isa.QueryModel(encoder, isa.AdaptiveTokenLearner(encoder.out_channels, 768))
    parameters = [*model.parameters(), *(blip.visual_encoder.parameters() if blip else ())]
    count = sum(parameter.numel() for parameter in parameters)
    assert (round(count / 1e6, 1), count) == TABLE_1[name]


def rows(blip, text):
    """Rows of the word embedding: of tokens, by their names."""
    ids = [VOCAB.index(token) for token in text.split()]
    return blip.text_encoder.embeddings.word_embeddings.weight[ids]


def tokens_of(count, scale=14.0):
    """U [count, L, d_w]; learnt tokens grow to about 14 times the norm of word rows."""
    return scale * random(count, L, D_W, seed=2)


@pytest.mark.parametrize("prompt", ["a photo of", "a red cat is", ""])
def test_sentences_token_by_token(blip, prompt):
    tails = {  # the vocabulary has no comma; a modifier's own "that" is not repeated
        "is a doggy": "that is a dog ##gy [SEP]", "": "[SEP]", " \n": "[SEP]", "that": "[SEP]",
        "is NOT a red, blue cat": "that is not a red [UNK] blue cat [SEP]",
        "That is blue": "that is blue [SEP]", " that\tis blue": "that is blue [SEP]",
        "that that is blue": "that that is blue [SEP]",
    }
    U = tokens_of(len(tails))
    words, mask = isa.compose_query(blip, U, list(tails), prompt)
    head = rows(blip, f"[CLS] {prompt}")
    longest = len(head) + L + 9
    assert words.shape == (len(U), longest, D_W) and mask.dtype == torch.int64
    for i, tail in enumerate(tails.values()):
        sentence = torch.cat([head, U[i], rows(blip, tail)])  # U is untouched
        padding = longest - len(sentence)  # at the end
        assert torch.equal(words[i], torch.cat([sentence, rows(blip, "[PAD] " * padding)]))
        assert mask[i].tolist() == [1] * len(sentence) + [0] * padding
    words, mask = isa.compose_query(blip, U, prompt=prompt)  # training: no modifiers
    for i in range(len(U)):
        assert torch.equal(words[i], torch.cat([head, U[i], rows(blip, "[SEP]")]))
    assert mask.shape == words.shape[:2] and mask.all()


def test_that_is_a_word_of_its_own():
    said = [isa.continuation(m) for m in ("thatched", "that's red", "is that")]
    assert said == ["that thatched", "that 's red", "that is that"]


def test_padding_is_masked(blip):
    U = tokens_of(2)
    mixed = isa.compose_query(blip, U, ["", "is a red cat"])
    alone = blip.encode_text(*isa.compose_query(blip, U))[0]
    torch.testing.assert_close(blip.encode_text(*mixed)[0], alone, rtol=0, atol=1e-6)


def test_wrong_modifiers(blip):
    for modifiers in ([], ["is red"], ["is red"] * 3):
        with pytest.raises(ValueError, match=f"2 images but {len(modifiers)} modifiers"):
            isa.compose_query(blip, tokens_of(2), modifiers)
    with pytest.raises(TypeError, match="list of strings"):
        isa.compose_query(blip, tokens_of(6), "is red")  # six letters, six images


def test_words_in_place_of_tokens_are_the_sentence_itself(blip):
    """U of real words gives what the whole sentence gives, position and LayerNorm included."""
    U = torch.stack([rows(blip, "red cat of"), rows(blip, "blue dog ##gy")])
    words, mask = isa.compose_query(blip, U, ["is not a photo", "is red"])
    ids, whole_mask = blip.tokenize(["a photo of red cat of that is not a photo",
                                     "a photo of blue doggy that is red"])
    whole = blip.embed_words(ids)
    assert torch.equal(words, whole) and torch.equal(mask, whole_mask)
    assert torch.equal(blip.encode_text(words, mask), blip.encode_text(whole, whole_mask))
    _, F_v = blip.encode_image(random(2, 3, 32, 32, seed=0))
    assert torch.equal(blip.match(words, mask, F_v), blip.match(whole, whole_mask, F_v))


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_eq5_and_6(temperature):
    v, t = unit(5, 8, seed=3), unit(5, 8, seed=4)
    v64, t64 = v.double().numpy(), t.double().numpy()
    total = 0
    for i in range(5):
        own = math.exp(v64[i] @ t64[i] / temperature)
        p_i2t = own / sum(math.exp(v64[i] @ t64[j] / temperature) for j in range(5))
        p_t2i = own / sum(math.exp(t64[i] @ v64[j] / temperature) for j in range(5))
        total += -math.log(p_i2t) - math.log(p_t2i)
    loss = isa.global_contrastive_distillation(v, t, temperature)
    assert loss.shape == () and loss.item() == pytest.approx(total / 2 / 5, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # it stays in float32
        assert torch.equal(isa.global_contrastive_distillation(v, t, temperature), loss)


@pytest.fixture
def batch(blip):
    """Four images and their sentences of different lengths, as LAR takes them."""
    U = tokens_of(4, scale=1.0)
    words, mask = isa.compose_query(blip, U, ["is red", "", "is not a blue doggy", "is"])
    v, F_v = blip.encode_image(random(4, 3, 32, 32, seed=5))
    return words, mask, F_v, v, blip.encode_text(words, mask)


def test_eq7(blip, batch):
    words, mask, F_v, v, t = batch
    lar = isa.local_alignment_regularization
    torch.manual_seed(6)
    hard_image, hard_sentence = isa.sample_hard_negatives(v, t, blip.temperature)
    torch.manual_seed(6)
    loss, logits, labels = lar(blip, *batch, return_logits=True)
    assert logits.shape == (12, 2) and labels.tolist() == [1] * 4 + [0] * 8

    pairs = [(i, i) for i in range(4)]  # (sentence, image)
    pairs += [*enumerate(hard_image.tolist())] + [(s, i) for i, s in enumerate(hard_sentence)]
    total = 0
    for number, (sentence, image) in enumerate(pairs):  # one pair at a time, without its padding
        one = slice(0, mask[sentence].sum())
        alone = blip.match(words[sentence, one][None], mask[sentence, one][None], F_v[image][None])
        torch.testing.assert_close(logits[number], alone[0], rtol=0, atol=1e-5)
        exps = [math.exp(x) for x in alone[0].tolist()]
        total += -math.log(exps[1 if number < 4 else 0] / sum(exps))
    assert loss.item() == pytest.approx(total / 12, rel=1e-5)
    assert logits.std() > 0.01  # the matching head does not answer the same to everything

    torch.manual_seed(6)
    assert lar(blip, *batch) == loss
    with pytest.raises(ValueError, match="at least two"):
        lar(blip, *(x[:1] for x in batch))


@pytest.mark.parametrize("temperature", [0.4, 0.05])  # at 0.05 the floor of 1e-4 decides for some
def test_hard_negatives_follow_the_stated_distribution(temperature):
    v, times = unit(4, 3, seed=7), 3000
    t = nn.functional.normalize(v + 0.5 * unit(4, 3, seed=8), dim=-1)
    torch.manual_seed(0)
    counts = np.zeros((2, 4, 4))
    for _ in range(times):
        for table, drawn in zip(counts, isa.sample_hard_negatives(v, t, temperature), strict=True):
            table[range(4), drawn.tolist()] += 1
    v64, t64 = v.double().numpy(), t.double().numpy()
    for table, asking, answering in ((counts[0], t64, v64), (counts[1], v64, t64)):
        assert table.trace() == 0  # never the own partner
        for i in range(4):
            exps = [math.exp(asking[i] @ answering[j] / temperature) for j in range(4)]
            weight = [0 if j == i else exps[j] / sum(exps) + 1e-4 for j in range(4)]
            expected = times * np.array(weight) / sum(weight)
            spread = np.sqrt(expected * (1 - expected / times)).clip(1)
            assert (abs(table[i] - expected) < 5 * spread).all()


def query_model():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.GELU())
    return isa.QueryModel(encoder, isa.AdaptiveTokenLearner(16, D_W, L, 32, 32, 32))


def losses(blip, U, pixels):
    v, F_v = blip.encode_image(pixels)
    words, mask = isa.compose_query(blip, U)
    t = blip.encode_text(words, mask)
    gcd = isa.global_contrastive_distillation(v, t, blip.temperature)
    return gcd, isa.local_alignment_regularization(blip, words, mask, F_v, v, t)


@pytest.mark.parametrize("which", [0, 1], ids=["GCD", "LAR"])
def test_gradients_reach_the_query_model_and_not_blip(blip, which):
    before, model = copy.deepcopy(blip.state_dict()), query_model()
    pixels = random(4, 3, 32, 32, seed=9)
    U = model(pixels)
    U.retain_grad()
    losses(blip, U, pixels)[which].backward()
    assert (U.grad.abs().amax(dim=2) > 0).all()  # every token of every image
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert all(parameter.grad is None for parameter in blip.parameters())
    assert same(before, blip.state_dict())


def test_training_on_a_few_images_finds_them(blip):
    """In 60 steps each sentence ends nearest to its own image, and half of the loss is gone."""
    model, pixels, history = query_model(), torch.randn(6, 3, 32, 32), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = sum(losses(blip, model(pixels), pixels))
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    t = blip.encode_text(*isa.compose_query(blip, model(pixels)))
    v, _ = blip.encode_image(pixels)
    assert (t @ v.T).argmax(1).tolist() == list(range(6)) and history[-1] < history[0] / 2


def test_bfloat16_autocast(blip):
    model, pixels = query_model(), random(4, 3, 32, 32, seed=9)
    torch.manual_seed(0)
    exact = torch.stack(losses(blip, model(pixels), pixels))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        grouping, cross = model.mapper.attention_maps(model.encoder(pixels))
        rough = torch.stack(losses(blip, model(pixels), pixels))
    torch.testing.assert_close(grouping.float().sum(1), torch.ones(4, 4, 4), rtol=0, atol=0.02)
    torch.testing.assert_close(cross.float().sum((2, 3)), torch.ones(4, L), rtol=0, atol=0.05)
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.1)  # and both are float32
    rough.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class Matcher:
    temperature = 0.02

    def match(self, words, mask, F_v, rows):
        logits = (words * F_v[rows]).sum((1, 2)) / 40
        return torch.stack([torch.zeros(len(words)), logits], dim=1)


def test_lar_gradient_is_the_same_to_the_bit_with_several_threads():
    """Images share hard sentences, whose gradients are summed: in a fixed order, or a resumed run
    would drift."""
    words, F_v = random(256, 11, 128, seed=0), random(256, 11, 128, seed=1)
    v, t = torch.ones(256, 4) / 2, unit(256, 4, seed=2)
    mask = torch.ones(256, 11, dtype=torch.int64)
    threads, gradients = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            torch.manual_seed(0)
            leaf = words.clone().requires_grad_(True)
            isa.local_alignment_regularization(Matcher(), leaf, mask, F_v, v, t).backward()
            gradients.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradients[0], g) for g in gradients[1:])
