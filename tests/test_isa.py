"""isa.py against loops in numpy that spell out each equation pixel by pixel, and against hand-made sentences."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import with_large_weights
from torch import nn

import blip_lite
import isa
import query_side

VOCAB = "[PAD] [UNK] [CLS] [SEP] a photo of that is not red blue cat dog ##gy".split()
ID = {token: i for i, token in enumerate(VOCAB)}
L, D_W = 3, 64
SIZES = dict(image_size=32, patch_size=16, image_width=64, image_depth=1, vocab_size=len(VOCAB) + 2, max_positions=24,
             word_dim=D_W, text_depth=2, embed_dim=32)  # fmt: skip


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A frozen BLIP of made-up weights, large enough for its answers to depend on what it is shown."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n")
    torch.manual_seed(0)
    blip = blip_lite.Blip(SIZES, blip_lite.Tokenizer(path))
    return with_large_weights(blip)


def learner(seed=0, channels=5, word_dim=7, **settings):
    torch.manual_seed(seed)
    module = isa.AdaptiveTokenLearner(
        channels, word_dim, num_tokens=L, width=8, self_hidden=6, cross_hidden=10, **settings
    ).double()
    for parameter in module.parameters():  # larger than the default, so that softmax and GELU are far from linear
        nn.init.normal_(parameter, std=0.7)
    return module


def feature_map(seed=1, channels=5, size=(3, 4)):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed):
    return nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# --------------------------------------------------------------- Eq. 1-4, written out; one image, f is [C, H, W]


def weights(module):
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def projected(w, f):
    """The feature map at width d, as a dict (h, w) -> vector [d]."""
    matrix, bias = w["project.weight"][:, :, 0, 0], w["project.bias"]
    return {(y, x): matrix @ f[:, y, x] + bias for y in range(f.shape[1]) for x in range(f.shape[2])}


def eq1(w, f):
    """a^(l)_hw as an array [L, H, W]."""
    a = np.zeros((L, *f.shape[1:]))
    for (y, x), pixel in projected(w, f).items():
        exps = [math.exp(w["W.weight"][i, :, 0, 0] @ pixel) for i in range(L)]
        for l in range(L):  # noqa: E741
            a[l, y, x] = exps[l] / sum(exps)
    return a


def eq2(w, f):
    """z^(l) as a list of L vectors."""
    a, tokens = eq1(w, f), []
    for l in range(L):  # noqa: E741
        total, rho = 0, 0
        for (y, x), pixel in projected(w, f).items():
            total, rho = total + a[l, y, x] * pixel, rho + a[l, y, x]
        tokens.append(total / rho)
    return tokens


def attention(w, kind, asking, answering):
    """One head over a list of vectors -> the answers, and the weights as an array [asking, answering]."""
    Q, K, V = (w[f"{letter}_{kind}.weight"] for letter in "QKV")
    answers, table = [], []
    for ask in asking:
        exps = [math.exp((Q @ ask) @ (K @ other) / math.sqrt(len(ask))) for other in answering]
        table.append([e / sum(exps) for e in exps])
        answers.append(sum(p * (V @ other) for p, other in zip(table[-1], answering, strict=True)))
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
    return [feed_forward(w, "c", z + answer) for z, answer in zip(tokens, answers, strict=True)], table


def sentence_tokens(w, f, self_attention, cross_attention):
    tokens = eq2(w, f)
    tokens = eq3(w, tokens) if self_attention else tokens
    tokens = eq4(w, tokens, f)[0] if cross_attention else tokens
    return np.array([w["W_p.weight"] @ z + w["W_p.bias"] for z in tokens])


def test_eq1_shares_each_pixel_out_among_the_groups():
    module, maps = learner(), feature_map()
    grouping, _ = module.attention_maps(maps)
    assert grouping.shape == (2, L, 3, 4)
    expected = np.array([eq1(weights(module), f) for f in maps.numpy()])
    np.testing.assert_allclose(grouping.detach().numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(grouping.detach().sum(1).numpy(), np.ones((2, 3, 4)))
    assert expected.std() > 0.1  # the weights are far from uniform, so a softmax over pixels would not pass


@pytest.mark.parametrize("self_attention", [True, False])
@pytest.mark.parametrize("cross_attention", [True, False])
def test_eq2_to_4_and_the_ablations(self_attention, cross_attention):
    module = learner(self_attention=self_attention, cross_attention=cross_attention)
    maps = feature_map()
    U = module(maps)
    assert U.shape == (2, L, 7)
    expected = [sentence_tokens(weights(module), f, self_attention, cross_attention) for f in maps.numpy()]
    np.testing.assert_allclose(U.detach().numpy(), np.array(expected), rtol=1e-9)


def test_ablations_hold_no_idle_parameters():
    for flag, kind in (("self_attention", "r"), ("cross_attention", "c")):
        left = dict(learner(**{flag: False}).named_parameters())
        gone = {f"{m}_{kind}.weight" for m in "QKV"} | {
            f"W_{kind}{i}.{part}" for i in (1, 2) for part in ("weight", "bias")
        }
        assert set(dict(learner().named_parameters())) - set(left) == gone
    simple = learner(self_attention=False, cross_attention=False)
    assert {name.split(".")[0] for name in dict(simple.named_parameters())} == {"project", "W", "W_p"}


def test_eq4_attention_maps():
    module, maps = learner(), feature_map()
    _, cross = module.attention_maps(maps)
    assert cross.shape == (2, L, 3, 4)
    w = weights(module)
    for f, ours in zip(maps.numpy(), cross.detach().numpy(), strict=True):
        _, table = eq4(w, eq3(w, eq2(w, f)), f)
        np.testing.assert_allclose(ours, table.reshape(L, 3, 4), rtol=1e-9)  # pixels row by row
    np.testing.assert_allclose(cross.detach().sum((2, 3)).numpy(), np.ones((2, L)))


def test_attention_maps_without_cross_attention():
    grouping, cross = learner(cross_attention=False).attention_maps(feature_map())
    assert grouping.shape == (2, L, 3, 4) and cross is None


def test_a_group_that_owns_nothing():
    module = learner()
    with torch.no_grad():
        module.project.weight.mul_(0.01)
        module.project.bias.fill_(1.0)
        module.W.weight[1] = -1e3  # no pixel wants group 1
    maps = feature_map().requires_grad_()
    grouping, _ = module.attention_maps(maps)
    assert grouping[:, 1].max() == 0
    U = module(maps)
    assert U.isfinite().all()
    U.square().sum().backward()
    assert maps.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_query_model_is_the_encoder_and_then_the_mapper():
    torch.manual_seed(0)
    encoder, mapper = nn.Conv2d(3, 5, 4, stride=4), isa.AdaptiveTokenLearner(5, D_W)
    pixels = torch.randn(2, 3, 16, 16)
    U = isa.QueryModel(encoder, mapper)(pixels)
    assert U.shape == (2, 6, D_W)  # L = 6 by default
    torch.testing.assert_close(U, mapper(encoder(pixels)), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ Table 1

TABLE_1 = {  # name -> the paper's M parameters, ours exactly. B2 is the one row that does not fit: the paper prints 8.5
    "efficientnet_b0": (5.3, 5_322_108),
    "efficientnet_b2": (9.0, 9_048_322),
    "mobilenet_v2": (3.5, 3_538_432),
    "efficientvit_m2": (5.0, 5_006_330),
    "mobilevitv2_100": (5.5, 5_506_793),
    "blip": (87.0, 86_982_144),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1_parameters(name):
    """The encoder without its classifier and the learner at its default sizes, for BLIP ViT-B at 224 px."""
    sizes = dict(image_size=224, patch_size=16, image_width=768, image_depth=12, vocab_size=30524, max_positions=512,
                 word_dim=768, text_depth=12, embed_dim=256)  # fmt: skip
    with torch.device("meta"):  # shapes without memory
        blip = blip_lite.Blip(sizes, None) if name == "blip" else None
        encoder = query_side.build(name, blip=blip)
        model = isa.QueryModel(encoder, isa.AdaptiveTokenLearner(encoder.out_channels, word_dim=768))
    parameters = [*model.parameters(), *(blip.visual_encoder.parameters() if blip else ())]
    count = sum(parameter.numel() for parameter in parameters)
    printed, exact = TABLE_1[name]
    assert count == exact
    assert round(count / 1e6, 1) == printed


# ------------------------------------------------------------------------------------------------ the sentence


def rows(blip, *tokens):
    return blip.text_encoder.embeddings.word_embeddings.weight[[ID[token] for token in tokens]]


def tokens_of(count, seed=2, scale=14.0):
    """U [count, L, d_w]; learnt tokens grow to about 14 times the norm of word rows."""
    return scale * torch.randn(count, L, D_W, generator=torch.Generator().manual_seed(seed))


def test_training_sentence(blip):
    U = tokens_of(2)
    words, mask = isa.compose_query(blip, U)
    assert words.shape == (2, 4 + L + 1, D_W) and mask.shape == words.shape[:2]
    assert mask.dtype == torch.int64 and mask.all()
    for i in range(2):
        expected = torch.cat([rows(blip, "[CLS]", "a", "photo", "of"), U[i], rows(blip, "[SEP]")])
        assert torch.equal(words[i], expected)


def test_inference_sentences_token_by_token(blip):
    modifiers = ["is a doggy", "", "is NOT a red, blue cat", "   "]
    tails = [
        ["that", "is", "a", "dog", "##gy", "[SEP]"],
        ["[SEP]"],
        ["that", "is", "not", "a", "red", "[UNK]", "blue", "cat", "[SEP]"],  # the vocabulary has no comma
        ["[SEP]"],
    ]
    U = tokens_of(4)
    words, mask = isa.compose_query(blip, U, modifiers)
    longest = 4 + L + 9
    assert words.shape == (4, longest, D_W) and mask.dtype == torch.int64
    for i, tail in enumerate(tails):
        length = 4 + L + len(tail)
        assert torch.equal(words[i, :4], rows(blip, "[CLS]", "a", "photo", "of"))
        assert torch.equal(words[i, 4 : 4 + L], U[i])  # untouched
        assert torch.equal(words[i, 4 + L : length], rows(blip, *tail))
        assert torch.equal(words[i, length:], rows(blip, *["[PAD]"] * (longest - length)))  # padding only at the end
        assert mask[i].tolist() == [1] * length + [0] * (longest - length)


def test_other_prompts(blip):
    U = tokens_of(1)
    words, _ = isa.compose_query(blip, U, prompt="a red cat is")
    assert torch.equal(words[0, :5], rows(blip, "[CLS]", "a", "red", "cat", "is"))
    assert torch.equal(words[0, 5:8], U[0])
    words, mask = isa.compose_query(blip, U, ["is blue"], prompt="")
    expected = torch.cat([rows(blip, "[CLS]"), U[0], rows(blip, "that", "is", "blue", "[SEP]")])
    assert torch.equal(words[0], expected) and mask.all()


def test_blank_modifier_is_the_training_sentence(blip):
    U = tokens_of(2)
    plain, plain_mask = isa.compose_query(blip, U)
    blank, blank_mask = isa.compose_query(blip, U, ["", " \n"])
    assert torch.equal(plain, blank) and torch.equal(plain_mask, blank_mask)
    mixed = isa.compose_query(blip, U, ["", "is a red cat"])  # here the blank one is padded, and the padding masked
    torch.testing.assert_close(blip.encode_text(*mixed)[0], blip.encode_text(plain, plain_mask)[0], rtol=0, atol=1e-6)


def test_a_modifiers_own_that_is_not_repeated(blip):
    U = tokens_of(4)
    words, mask = isa.compose_query(blip, U, ["That is blue", " that\tis blue", "is blue", "that that is blue"])
    assert torch.equal(words[0, 4 + L : 9 + L], rows(blip, "that", "is", "blue", "[SEP]", "[PAD]"))
    assert torch.equal(words[:3, 4 + L :], words[:1, 4 + L :].expand(3, -1, -1)) and torch.equal(mask[:3], mask[:1].expand(3, -1))
    assert torch.equal(words[3, 4 + L :], rows(blip, "that", "that", "is", "blue", "[SEP]"))  # one of them only
    assert torch.equal(isa.compose_query(blip, U[:1], ["that"])[0], isa.compose_query(blip, U[:1])[0])  # which says nothing
    assert [isa.continuation(m) for m in ("thatched", "that's red", "is that")] == ["that thatched", "that 's red", "that is that"]


@pytest.mark.parametrize("modifiers", [[], ["is red"], ["is red"] * 3])
def test_wrong_number_of_modifiers(blip, modifiers):
    with pytest.raises(ValueError, match=f"2 images but {len(modifiers)} modifiers"):
        isa.compose_query(blip, tokens_of(2), modifiers)


def test_one_string_is_not_a_list_of_modifiers(blip):
    with pytest.raises(TypeError, match="list of strings"):
        isa.compose_query(blip, tokens_of(6), "is red")  # six letters, six images


def test_words_in_place_of_tokens_are_the_sentence_itself(blip):
    """U made of the rows of real words gives what the whole sentence gives, position and LayerNorm included."""
    U = torch.stack([rows(blip, "red", "cat", "of"), rows(blip, "blue", "dog", "##gy")])
    words, mask = isa.compose_query(blip, U, ["is not a photo", "is red"])
    ids, whole_mask = blip.tokenize(["a photo of red cat of that is not a photo", "a photo of blue doggy that is red"])
    whole = blip.embed_words(ids)
    assert torch.equal(words, whole) and torch.equal(mask, whole_mask)
    assert torch.equal(blip.encode_text(words, mask), blip.encode_text(whole, whole_mask))
    _, F_v = blip.encode_image(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(blip.match(words, mask, F_v), blip.match(whole, whole_mask, F_v))


# ------------------------------------------------------------------------------------------------ Eq. 5-6


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
    assert loss.shape == ()
    assert loss.item() == pytest.approx(total / 2 / 5, rel=1e-5)


def test_gcd_at_its_ends():
    v = torch.eye(4)
    assert isa.global_contrastive_distillation(v, v, 0.01).item() == pytest.approx(0, abs=1e-6)
    same = unit(1, 8, seed=0).expand(4, 8)  # nothing to tell apart: every image is as likely
    assert isa.global_contrastive_distillation(same, same, 0.07).item() == pytest.approx(math.log(4), rel=1e-5)


def test_gcd_stays_in_float32_under_autocast():
    v, t = unit(16, 32, seed=3), unit(16, 32, seed=4)
    expected = isa.global_contrastive_distillation(v, t, 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(isa.global_contrastive_distillation(v, t, 0.02), expected)


# ------------------------------------------------------------------------------------------------ Eq. 7


@pytest.fixture
def batch(blip):
    """Four images and their sentences of different lengths, as LAR takes them."""
    U = tokens_of(4, scale=1.0)
    words, mask = isa.compose_query(blip, U, ["is red", "", "is not a blue doggy", "is"])
    v, F_v = blip.encode_image(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5)))
    return words, mask, F_v, v, blip.encode_text(words, mask)


def test_eq7(blip, batch):
    words, mask, F_v, v, t = batch
    torch.manual_seed(6)
    hard_image, hard_sentence = isa.sample_hard_negatives(v, t, blip.temperature)
    torch.manual_seed(6)
    loss, logits, labels = isa.local_alignment_regularization(blip, words, mask, F_v, v, t, return_logits=True)
    assert logits.shape == (12, 2) and labels.tolist() == [1] * 4 + [0] * 8

    pairs = [(i, i) for i in range(4)]  # (sentence, image)
    pairs += [(i, hard_image[i].item()) for i in range(4)]
    pairs += [(hard_sentence[i].item(), i) for i in range(4)]
    total = 0
    for number, (sentence, image) in enumerate(pairs):
        length = mask[sentence].sum()  # one pair at a time, without its padding
        alone = blip.match(words[sentence, :length][None], mask[sentence, :length][None], F_v[image][None])[0]
        np.testing.assert_allclose(logits[number].numpy(), alone.numpy(), atol=1e-5)
        exps = [math.exp(x) for x in alone.tolist()]
        total += -math.log(exps[1 if number < 4 else 0] / sum(exps))
    assert loss.item() == pytest.approx(total / 12, rel=1e-5)
    assert logits.std() > 0.01  # the matching head does not answer the same to everything

    torch.manual_seed(6)
    assert isa.local_alignment_regularization(blip, words, mask, F_v, v, t) == loss


def test_a_batch_of_one_has_no_negatives(blip, batch):
    with pytest.raises(ValueError, match="at least two"):
        isa.local_alignment_regularization(blip, *(x[:1] for x in batch))


def test_two_images_are_each_others_negatives():
    for seed in range(20):
        torch.manual_seed(seed)
        image, sentence = isa.sample_hard_negatives(torch.eye(2), torch.eye(2), 0.01)
        assert image.tolist() == sentence.tolist() == [1, 0]


def draw(v, t, temperature, times):
    """How often image j was drawn for sentence i, and sentence j for image i: two arrays [B, B]."""
    counts = np.zeros((2, len(v), len(v)))
    for _ in range(times):
        for table, drawn in zip(counts, isa.sample_hard_negatives(v, t, temperature), strict=True):
            table[range(len(v)), drawn.tolist()] += 1
    return counts


@pytest.mark.parametrize("temperature", [0.4, 0.004])  # at 0.004 the floor of 1e-4 decides for some
def test_hard_negatives_follow_the_stated_distribution(temperature):
    v, t = unit(4, 3, seed=7), unit(4, 3, seed=8)
    torch.manual_seed(0)
    times = 3000
    counts = draw(v, t, temperature, times)
    v64, t64 = v.double().numpy(), t.double().numpy()
    for table, asking, answering in ((counts[0], t64, v64), (counts[1], v64, t64)):
        assert table.trace() == 0  # never the own partner
        for i in range(4):
            exps = [math.exp(asking[i] @ answering[j] / temperature) for j in range(4)]
            weight = np.array([0 if j == i else exps[j] / sum(exps) + 1e-4 for j in range(4)])
            expected = times * weight / weight.sum()
            others = [j for j in range(4) if j != i]
            spread = np.sqrt(expected * (1 - expected / times)).clip(1)
            assert (abs(table[i] - expected) < 5 * spread)[others].all()


def test_floor_lets_every_wrong_pair_appear():
    """A certain own pair leaves the others a softmax of 0: with the floor they are drawn evenly."""
    torch.manual_seed(0)
    counts = draw(torch.eye(4), torch.eye(4), 0.005, 600)
    off_diagonal = counts[:, ~np.eye(4, dtype=bool)]
    assert (abs(off_diagonal - 200) < 60).all()


# ------------------------------------------------------------------------------------------------ training


def query_model(seed=0):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.GELU())
    return isa.QueryModel(encoder, isa.AdaptiveTokenLearner(16, D_W, L, width=32, self_hidden=32, cross_hidden=32))


def losses(blip, U, pixels):
    v, F_v = blip.encode_image(pixels)
    words, mask = isa.compose_query(blip, U)
    t = blip.encode_text(words, mask)
    gcd = isa.global_contrastive_distillation(v, t, blip.temperature)
    return gcd, isa.local_alignment_regularization(blip, words, mask, F_v, v, t)


@pytest.mark.parametrize("which", [0, 1], ids=["GCD", "LAR"])
def test_gradients_reach_the_query_model_and_not_blip(blip, which):
    before = copy.deepcopy(blip.state_dict())
    model = query_model()
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    U = model(pixels)
    U.retain_grad()
    losses(blip, U, pixels)[which].backward()
    assert (U.grad.abs().amax(dim=2) > 0).all()  # every token of every image
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in blip.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in blip.state_dict().items())


def test_training_on_a_few_images_finds_them(blip):
    """Six images and 60 steps: each sentence ends nearest to its own image, and half of the loss is gone."""
    torch.manual_seed(0)
    model, pixels = query_model(), torch.randn(6, 3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        gcd, lar = losses(blip, model(pixels), pixels)
        history.append((gcd + lar).item())
        optimizer.zero_grad()
        (gcd + lar).backward()
        optimizer.step()
    t = blip.encode_text(*isa.compose_query(blip, model(pixels)))
    v, _ = blip.encode_image(pixels)
    assert (t @ v.T).argmax(1).tolist() == list(range(6))
    assert history[-1] < history[0] / 2


def test_bfloat16_autocast(blip):
    model = query_model()
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    torch.manual_seed(0)
    exact = torch.stack(losses(blip, model(pixels), pixels))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        grouping, cross = model.mapper.attention_maps(model.encoder(pixels))
        rough = torch.stack(losses(blip, model(pixels), pixels))
    torch.testing.assert_close(grouping.float().sum(1), torch.ones(4, 4, 4), rtol=0, atol=0.02)
    torch.testing.assert_close(cross.float().sum((2, 3)), torch.ones(4, L), rtol=0, atol=0.05)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.1)
    rough.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_lar_gradient_is_the_same_to_the_bit_with_several_threads():
    """Many images share a hard sentence, whose gradients are then added up: in a fixed order, or a resumed run would drift."""
    generator = torch.Generator().manual_seed(0)
    words, F_v = torch.randn(256, 11, 128, generator=generator), torch.randn(256, 11, 128, generator=generator)
    v, t = torch.ones(256, 4) / 2, torch.nn.functional.normalize(torch.randn(256, 4, generator=generator), dim=-1)
    mask = torch.ones(256, 11, dtype=torch.int64)

    class Matcher:
        temperature = 0.02

        def match(self, words, mask, F_v, rows):
            return torch.stack([torch.zeros(len(words)), (words * F_v[rows]).sum((1, 2)) / 40], dim=1)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = []
        for _ in range(20):
            torch.manual_seed(0)
            leaf = words.clone().requires_grad_(True)
            isa.local_alignment_regularization(Matcher(), leaf, mask, F_v, v, t).backward()
            gradients.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradients[0], g) for g in gradients[1:])
