"""Mappers and the model of both sides against their formulas, spelt out."""

import math

import numpy as np
import pytest
import torch

import isa
import query_side
from query_side import MAPPERS, build_query_model

SETTINGS = dict(encoder="pocketnet", query_size=None, gallery="blip")
RELU, GELU = lambda x: max(x, 0.0), lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2  # noqa: E731


@pytest.mark.parametrize("name, hidden, activate, rate", [
    ("MLP", 512, RELU, 0.1), ("Phi", 80, GELU, 0.5),
])
def test_mappers_are_three_layers_on_the_mean_pixel(name, hidden, activate, rate):
    torch.manual_seed(0)
    mapper, feature_map = getattr(query_side, name)(20, 12), torch.randn(3, 20, 4, 5)
    assert [m.p for m in mapper.layers if isinstance(m, torch.nn.Dropout)] == [rate, rate]
    assert not torch.equal(mapper(feature_map), mapper(feature_map))  # in training
    mapper.eval()
    activate = np.vectorize(activate, otypes=[float])
    x = np.array([[feature_map[b, c].sum().item() / 20 for c in range(20)] for b in range(3)])
    W1, b1, W2, b2, W3, b3 = (p.detach().numpy() for p in mapper.parameters())
    wanted = activate(activate(x @ W1.T + b1) @ W2.T + b2) @ W3.T + b3
    assert W1.shape == (hidden, 20) and W2.shape == (hidden, hidden)
    assert mapper(feature_map).shape == (3, 1, 12)
    np.testing.assert_allclose(mapper(feature_map)[:, 0].detach(), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["pocketnet", "blip-tuned"])
def test_both_sides_start_from_one_encoder(pocket_blip, name):
    """At first a copy of BLIP gives its v and F^v; a light encoder's go through linear layers."""
    torch.manual_seed(0)
    encoder = query_side.build(name, blip=pocket_blip)
    mapper = isa.AdaptiveTokenLearner(encoder.out_channels, pocket_blip.word_dim)
    model = query_side.TwoSidedModel(encoder, mapper, pocket_blip).eval()
    x = torch.randn(2, 3, 64, 64)
    U, v, F_v = model(x)
    assert torch.equal(U, isa.QueryModel(encoder, mapper)(x))
    if name == "blip-tuned":
        wanted_v, wanted_F_v = pocket_blip.encode_image(x)
    else:
        pixels = encoder(x).flatten(2).mT  # [B, N, C]
        tokens = pixels @ model.to_tokens.weight.T + model.to_tokens.bias
        wanted_F_v = torch.cat([tokens.mean(1)[:, None], tokens], dim=1)
        projected = pocket_blip.vision_proj(tokens.mean(1))
        wanted_v = projected / projected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(v, wanted_v)
    torch.testing.assert_close(F_v, wanted_F_v)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in pocket_blip.parameters())


@pytest.mark.parametrize("name", MAPPERS)
def test_every_mapper_makes_words_that_blip_can_read(name, pocket_blip):
    """L tokens of BLIP's width; all parameters learn; another image, another sentence."""
    torch.manual_seed(0)
    tokens = 1 if name == "mlp" else 4
    model = build_query_model(SETTINGS | dict(mapper=name, tokens=tokens), pocket_blip).eval()
    images = torch.randn(3, 3, 64, 64)
    U = model(images)
    assert U.shape[:2] == (3, tokens), f"{name} makes {U.shape[1]} tokens, asked for {tokens}"
    assert U.shape[2] == pocket_blip.word_dim, f"{name}: {U.shape[2]} numbers a token"
    assert not torch.allclose(U[0], U[1], atol=1e-7), f"{name} says the same of two images"
    assert tokens == 1 or not torch.equal(U[:, 0], U[:, 1]), f"{name} repeats one token"
    torch.testing.assert_close(U[:1], model(images[:1]), msg=f"{name} mixes the images of a batch")
    model(torch.randn(1, 3, 96, 96))  # a map of another size
    pocket_blip.encode_text(*isa.compose_query(pocket_blip, U, ["is red"] * 3)).square().sum()
    model.train()(torch.randn(3, 3, 64, 64)).square().sum().backward()
    for key, p in model.mapper.named_parameters():
        assert p.grad is not None and p.grad.any(), f"{name}: {key} has no gradient"


def test_names_decide_which_network_it_is(pocket_blip):
    """Which parts it has, wherever its name stands in MAPPERS."""
    parts = {"atl": "Q_r Q_c", "st": "", "atl-no-ca": "Q_r", "atl-no-sa": "Q_c", "mlp": "layers"}
    for name, wanted in parts.items():
        settings = SETTINGS | dict(mapper=name, tokens=1)
        mapper = build_query_model(settings, pocket_blip).mapper
        found = {key for key, _ in mapper.named_children()} & {"Q_r", "Q_c", "layers"}
        assert found == {*wanted.split()}, name
    assert parts.keys() <= {*MAPPERS}
