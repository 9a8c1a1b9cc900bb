"""The query model's checkpoint: what is saved is what is loaded, and nothing else is accepted."""

import copy
import os

import pytest
import torch
from conftest import same

from query_side import MAY_CHANGE, build_query_model, load_query_model
from query_side.query_model import resume_run, save_run

SETTINGS = dict(encoder="pocketnet", query_size=None, mapper="atl", tokens=6, gallery="blip",
                seed=0, lr=1e-3, loss="gcd+lar", precision="fp32", name="a", workers=1)


def begin(blip, steps=0, **changes):
    """Settings, query model and optimizer, as train.py has them after some steps."""
    settings = SETTINGS | changes
    model = build_query_model(settings, blip)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"])
    for _ in range(steps):
        model(torch.randn(2, 3, 64, 64)).square().sum().backward()
        optimizer.step()
    return settings, model, optimizer


@pytest.fixture
def saved(pocket_blip, tmp_path):
    """A folder with isa.pt and last.pt, and the settings, model and optimizer in them."""
    settings, model, optimizer = begin(pocket_blip, steps=2)
    save_run(tmp_path, 5, settings, pocket_blip, 24, model, optimizer)
    return tmp_path, settings, model, optimizer


def test_resuming_gives_back_step_weights_and_optimizer(saved, pocket_blip):
    run, _, model, optimizer = saved
    settings, other, other_optimizer = begin(pocket_blip, name="b", workers=7)
    assert not same(other.state_dict(), model.state_dict())
    settings["skip_bad_images"] = True  # may change
    assert resume_run(run, settings, pocket_blip, 24, other, other_optimizer) == 5
    assert same(other.state_dict(), model.state_dict())
    ours, expected = (o.state_dict() for o in (other_optimizer, optimizer))
    assert ours["param_groups"] == expected["param_groups"] and ours["state"]
    assert all(same(ours["state"][i], x) for i, x in expected["state"].items())


@pytest.mark.parametrize("name, now", [("lr", 0.5), ("tokens", 3), ("seed", 4), ("loss", "gcd"),
                                       ("precision", "bf16"), ("query_size", 32)])
def test_resuming_with_another_setting_is_refused_naming_both(saved, pocket_blip, name, now):
    run, was, *_ = saved
    settings, model, optimizer = begin(pocket_blip)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        resume_run(run, settings | {name: now}, pocket_blip, 24, model, optimizer)
    said = f"{run}/last.pt was trained with --{name.replace('_', '-')} {was[name]}, not {now}; "
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert same(model.state_dict(), before) and name not in MAY_CHANGE


def test_another_blip_or_other_images_are_refused(saved, pocket_blip):
    run, settings, model, optimizer = saved
    other = copy.copy(pocket_blip)  # other weights, or the same ones at another image size
    other.fingerprint = "0123@96"
    trained = f"was trained against BLIP {pocket_blip.fingerprint}, "
    with pytest.raises(ValueError, match=f"last.pt {trained}not 0123@96; give the same --blip"):
        resume_run(run, settings, other, 24, model, optimizer)
    with pytest.raises(ValueError, match=f"isa.pt: {trained}this one is 0123@96;.*--image-size"):
        load_query_model(run / "isa.pt", other)
    with pytest.raises(ValueError, match="last.pt was trained on 24 images, not 23; .*--images"):
        resume_run(run, settings, pocket_blip, 23, model, optimizer)


def without(*names):
    def spoil(checkpoint):
        for name in names[:-1]:
            checkpoint = checkpoint[name]
        del checkpoint[names[-1]]

    return spoil


def reshape(checkpoint):
    checkpoint["query_model"]["mapper.W_p.bias"] = torch.zeros(3)


OTHER = "was written by another version of this program; train again, with --overwrite or"
SPOILT = {
    "no optimizer": without("optimizer"), "no step": without("step"), "no count": without("images"),
    "an option less": without("settings", "lr"), "another shape": reshape,
    "a tensor less": without("query_model", "mapper.W_p.bias"),
    "no groups": without("optimizer", "param_groups"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_resuming_from_another_version_is_refused(saved, pocket_blip, how):
    run, settings, model, optimizer = saved
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    SPOILT[how](checkpoint)
    torch.save(checkpoint, run / "last.pt")
    with pytest.raises(ValueError, match=f"{run}/last.pt: {OTHER}"):
        resume_run(run, settings, pocket_blip, 24, model, optimizer)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_what_is_no_checkpoint_is_refused_and_executes_nothing(tmp_path, pocket_blip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "isa.pt"
    for content in (b"", b"text", [1, 2], {"query_model": {}, "blip": ""},
                    {"query_model": Evil(), "settings": {}, "blip": ""}):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match="isa.pt: is damaged or was not written by train.py"):
            load_query_model(path, pocket_blip)
    assert not (tmp_path / "executed").exists()
    for name, said in (("none.pt", "there is no such file"), ("", "is a folder; name the isa.pt")):
        with pytest.raises(ValueError, match=said):
            load_query_model(tmp_path / name, pocket_blip)


def test_isa_pt_holds_the_query_side_alone_and_is_what_was_trained(trained, pocket_blip):
    checkpoint = torch.load(trained.isa, weights_only=True)
    last = torch.load(trained.last, weights_only=True)
    assert set(checkpoint) == {"query_model", "settings", "blip", "images", "step"}
    assert set(last) == {*checkpoint, "optimizer"}
    assert same(checkpoint.pop("query_model"), last["query_model"])
    assert all(last[name] == x for name, x in checkpoint.items())
    assert (checkpoint["step"], checkpoint["images"]) == (4, 160)
    assert checkpoint["blip"] == pocket_blip.fingerprint
    assert checkpoint["settings"]["batch"] == 40 and checkpoint["settings"]["precision"] == "fp32"

    model, settings = load_query_model(trained.isa, pocket_blip)
    assert settings == checkpoint["settings"] and not model.training
    assert same(model.state_dict(), last["query_model"])
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 6, pocket_blip.word_dim)
    assert {name.split(".")[0] for name in last["query_model"]} == {"encoder", "mapper"}
    assert trained.isa.stat().st_size < 50_000 + 4 * sum(x.numel() for x in model.parameters())


# ---- the networks that SEARLE's authors publish


def phi(E, d_w, hidden=12):
    random = torch.Generator().manual_seed(0)
    shapes = {"0": (hidden, E), "3": (hidden, hidden), "6": (d_w, hidden)}
    return {f"layers.{i}.{kind}": torch.randn(shape if kind == "weight" else shape[:1],
                                              generator=random)
            for i, shape in shapes.items() for kind in ("weight", "bias")}


@pytest.mark.parametrize("wrapped", [True, False])
def test_searles_published_network(pocket_clip, tmp_path, wrapped):
    """GELU between its layers, no dropout, and v before it is normalised."""
    clip, path = pocket_clip, tmp_path / "SEARLE.pt"
    weights = phi(clip.embed_dim, clip.word_dim, 4 * clip.embed_dim)
    torch.save({"Phi": weights} if wrapped else weights, path)
    model, settings = load_query_model(path, clip)
    assert (settings["prompt"], settings["tokens"]) == ("a photo of", 1) and not model.training
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        U = model(pixels)
        x = clip.visual_encoder(pixels)[:, 0] @ clip.vision_proj.weight.T
    assert (x.norm(dim=1) - 1).abs().min() > 0.1
    for i in (0, 3, 6):
        x = x @ weights[f"layers.{i}.weight"].T + weights[f"layers.{i}.bias"]
        x = x if i == 6 else 0.5 * x * (1 + torch.erf(x / 2**0.5))
    assert U.shape == (3, 1, clip.word_dim) and torch.allclose(U[:, 0], x, atol=1e-3, rtol=1e-3)


def test_searles_network_for_another_clip_is_refused(pocket_clip, pocket_blip, tmp_path):
    torch.save({"Phi": phi(768, 768)}, tmp_path / "SEARLE.pt")
    for model in (pocket_clip, pocket_blip):
        with pytest.raises(ValueError, match="SEARLE.pt: SEARLE's network for features and words "
                           "of 768 and 768 numbers, not 64 and 128; give its CLIP with --clip"):
            load_query_model(tmp_path / "SEARLE.pt", model)
    torch.save({"Phi": phi(64, 128)}, tmp_path / "SEARLE.pt")  # 12 hidden units, not 256
    with pytest.raises(ValueError, match="SEARLE.pt: was written by another version"):
        load_query_model(tmp_path / "SEARLE.pt", pocket_clip)
