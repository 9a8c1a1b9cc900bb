"""A step in pieces has the gradients of the whole step; what a step needs is told beforehand."""

import copy

import pytest
import torch

import blip_lite
import isa
import query_side
from plumbing import pieces
from plumbing.pieces import InPieces, read_in_pieces
from query_side.mappers import TwoSidedModel

COUNT, SIZE = 10, 4


def query_model(blip, encoder, two_sided=False):
    torch.manual_seed(0)
    encoder = query_side.build(encoder, blip=blip)
    mapper = isa.AdaptiveTokenLearner(encoder.out_channels, blip.word_dim)
    return TwoSidedModel(encoder, mapper, blip) if two_sided else isa.QueryModel(encoder, mapper)


def step(blip, model, speak):
    """A step as in train.py -> loss and {name: gradient}."""
    torch.manual_seed(1)
    side = model.encoder.image_size
    out = speak(torch.randn(COUNT, 3, side, side))
    with torch.no_grad():
        seen = blip.encode_image(torch.randn(COUNT, 3, blip.image_size, blip.image_size))
    U, v, F_v = out if isinstance(out, tuple) else (out, *seen)
    words, mask = isa.compose_query(blip, U)
    t = blip.encode_text(words, mask)
    loss = isa.global_contrastive_distillation(v, t, blip.temperature)
    loss = loss + isa.local_alignment_regularization(blip, words, mask, F_v, v, t)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("encoder, two_sided, train", [
    ("pocketnet", False, False), ("blip-tuned", False, True), ("blip-tuned", True, True),
    ("pocketnet", False, True), ("pocketnet", True, True)])
def test_gradients_are_those_of_the_whole_step(encoder, two_sided, train):
    """With batch norm, of a step whose model sees the pieces one by one and stores everything."""
    blip = blip_lite.load("pocket")
    whole = query_model(blip, encoder, two_sided).train(train)
    split = copy.deepcopy(whole)

    def piece_by_piece(pixels):
        parts = [whole(piece) for piece in pixels.split(SIZE)]
        return tuple(map(torch.cat, zip(*parts, strict=True))) if two_sided else torch.cat(parts)

    batch_norm = train and encoder == "pocketnet"
    loss, expected = step(blip, whole, piece_by_piece if batch_norm else whole)
    read_in_pieces(blip, SIZE)
    found_loss, found = step(blip, split, InPieces(split, SIZE))
    torch.testing.assert_close(found_loss, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5)
    for name, buffer in whole.named_buffers():  # running statistics: each piece is added once
        torch.testing.assert_close(dict(split.named_buffers())[name], buffer)


def test_one_piece_after_the_other():
    events = []

    class Noted(torch.nn.Linear):
        def forward(self, x):
            hidden = super().forward(x)
            hidden.register_hook(lambda _: events.append(f"gradient of {len(x)}"))
            events.append(f"run {len(x)}")
            return hidden.tanh() * torch.nn.functional.dropout(hidden).exp()

    InPieces(Noted(3, 3), 4)(torch.randn(6, 3)).sum().backward()
    assert events == ["run 4", "run 2", "run 2", "gradient of 2", "run 4", "gradient of 4"]


def test_memory_is_compared_before_the_first_step(monkeypatch, capsys):
    blip = blip_lite.load("pocket")
    model, settings = query_model(blip, "pocketnet"), dict(
        micro_batch=None, loss="gcd+lar", gallery="blip", cache="full", workers=1,
        precision="fp32", prompt="a photo of")
    held = pieces.held_bytes(settings, blip, model)
    assert held == 4 * (3 * 3 * 64 * 64 + 65 * 128)  # three batches of pixels, and F^v
    stored = pieces.stored_bytes(settings, blip, model, 3) - pieces.stored_bytes(
        settings, blip, model, 2)
    assert stored > pieces.stored_bytes(settings | dict(loss="gcd"), blip, model, 3) - \
        pieces.stored_bytes(settings | dict(loss="gcd"), blip, model, 2) > held
    state, buffers = torch.random.get_rng_state(), copy.deepcopy(dict(model.named_buffers()))

    def said(free, **options):
        monkeypatch.setattr(pieces, "free_memory", lambda _: free)
        pieces.warn_of_memory(settings | options, blip, model, 1000)
        return capsys.readouterr().err

    need = 1000 * (held + stored)
    assert said(None) == said(1.01 * need) == ""
    line = said(0.99 * need)
    assert f"needs about {need / 1e9:.0f} GB" in line and "--micro-batch 80 would" in line
    assert "lower --batch" in said(1e6)
    assert said(0.99 * need, micro_batch=80) == ""
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, buffers[name]) for name, x in model.named_buffers())


def test_free_memory_is_that_of_the_system_or_the_container(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(pieces, "Path", lambda path: tmp_path / path[1:])
    assert pieces.free_memory(cpu) is None
    for folder in ("proc", "sys/fs/cgroup"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5000 kB\n")
    assert pieces.free_memory(cpu) == 5_120_000
    for limit, free in (("max\n", 5_120_000), ("4096\n", 4096), ("9000000\n", 5_120_000)):
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(limit)
        assert pieces.free_memory(cpu) == free
