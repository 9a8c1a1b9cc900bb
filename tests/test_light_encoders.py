"""light_encoders.py against timm, torchvision's own classifiers and a small BLIP; nothing is downloaded."""

import copy
from http.client import IncompleteRead
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

import blip_lite
import isa
import light_encoders

MAPS = {"efficientnet_b0": (1280, 7, 7), "efficientnet_b2": (1408, 7, 7), "mobilenet_v2": (1280, 7, 7)}  # at 224 px
PARAMETERS = {"efficientnet_b0": 4_007_548, "efficientnet_b2": 7_700_994, "mobilenet_v2": 2_223_872}
IN_TIMM = {"mobilenet_v2": "mobilenetv2_100"}  # the others have the same name there


def pixels(size, count=1, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def liven(module, seed=0):
    """Statistics and scales that differ from channel to channel: a missed BatchNorm tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2, generator=generator)
            layer.running_var.uniform_(0.3, 1.0, generator=generator)
            nn.init.uniform_(layer.weight, 0.7, 1.3, generator=generator)
            nn.init.normal_(layer.bias, 0, 0.2, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def blip():
    sizes = dict(image_size=48, patch_size=16, image_width=128, image_depth=1, vocab_size=20, max_positions=16,
                 word_dim=64, text_depth=1, embed_dim=32)  # fmt: skip
    torch.manual_seed(0)
    blip = blip_lite.Blip(sizes, SimpleNamespace(enc_id=19))
    for parameter in (blip.visual_encoder.cls_token, blip.visual_encoder.pos_embed):
        nn.init.normal_(parameter)
    return blip.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ torchvision


@pytest.mark.parametrize("name", MAPS)
def test_against_timm(name, tmp_path):
    """The weights of timm's implementation, renamed to torchvision's, give the same feature map."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = liven(timm.create_model(IN_TIMM.get(name, name)))
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("classifier")}
    ours = [k for k in getattr(models, name)().state_dict() if not k.startswith("classifier")]
    torch.save(dict(zip(ours, state.values(), strict=True)), tmp_path / "weights.pth")  # both list layers in one order
    encoder = light_encoders.build(name, tmp_path / "weights.pth").eval().double()  # so deep a network magnifies rounding
    x = pixels(224).double()
    with torch.no_grad():
        feature_map, expected = encoder(x), theirs.double().forward_features(x)
    assert feature_map.shape == (1, *MAPS[name]) and encoder.out_channels == MAPS[name][0]
    assert expected.std() > 1e-3
    torch.testing.assert_close(feature_map, expected, rtol=1e-9, atol=1e-11 * expected.abs().max().item())


@pytest.mark.parametrize("name", MAPS)
def test_interface_and_parameters(name):
    with torch.device("meta"):
        encoder = light_encoders.build(name)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == PARAMETERS[name]
    assert encoder.image_size == 224
    assert encoder.normalization == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert encoder(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, *MAPS[name])
    assert encoder(torch.empty(2, 3, 256, 256, device="meta")).shape == (2, MAPS[name][0], 8, 8)


def test_gradients_are_torchvisions():
    """The layout in memory is for speed. In float64: so deep a network magnifies rounding."""
    torch.manual_seed(3)
    theirs = models.mobilenet_v2().features.train().double()
    ours = light_encoders.build("mobilenet_v2").train().double()
    ours.load_state_dict(theirs.state_dict())
    gradients = []
    for network in (ours, theirs):
        feature_map = network(torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0)).double())
        feature_map.square().mean().backward()
        gradients.append([feature_map.detach(), *(parameter.grad for parameter in network.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * (1e-3 + b.abs().max().item()))


def test_depthwise_convolutions_under_autocast():
    """Strided or large ones run in float32 even then, up to the rounding of what goes in and out."""
    torch.manual_seed(4)
    encoder = light_encoders.build("efficientnet_b0")
    layers = [m for m in encoder.modules() if isinstance(m, light_encoders.DepthwiseConv2d)]
    assert len(layers) == 11 and all(m.groups > 1 for m in layers)  # 9 of 5 x 5, 2 of 3 x 3 with stride 2
    for layer in (layers[0], layers[-1]):
        x = torch.randn(2, layer.in_channels, 14, 14).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        (y.float() ** 2).sum().backward()
        exact = copy.deepcopy(layer).double()
        x64 = x.detach().double().requires_grad_()
        y64 = exact(x64)
        (y64**2).sum().backward()
        assert y.dtype == torch.bfloat16
        for a, b in ((y, y64), (x.grad, x64.grad), (layer.weight.grad, exact.weight.grad)):
            assert (a.double() - b).norm() < 0.01 * b.norm()


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(1)
    return liven(models.mobilenet_v2())


def test_weights_of_the_whole_classifier_or_of_its_features(classifier, tmp_path):
    torch.save(classifier.state_dict(), tmp_path / "whole.pth")
    torch.save(classifier.features.state_dict(), tmp_path / "features.pth")
    old = {name: x for name, x in classifier.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    x = pixels(64)
    for file in ("whole.pth", "features.pth", "old.pth"):
        encoder = light_encoders.build("mobilenet_v2", str(tmp_path / file)).eval()
        with torch.no_grad():
            expected = classifier.features(x)
            assert (encoder(x) - expected).abs().max() < 1e-4 * expected.abs().max(), file


def test_misfits_are_listed_in_one_error(classifier, tmp_path):
    state = dict(classifier.state_dict())
    del state["features.0.1.bias"]
    state["features.0.0.weight"] = torch.zeros(32, 3, 5, 5)
    state["features.99.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        light_encoders.build("mobilenet_v2", tmp_path / "x.pth")
    for part in ("x.pth", "0.1.bias is missing", "99.weight is unexpected",
                 "0.0.weight is [32, 3, 5, 5] instead of [32, 3, 3, 3]"):  # fmt: skip
        assert part in str(error.value)


def test_weights_of_another_network(classifier, tmp_path):
    torch.save(classifier.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"do not fit .* and \d+ more$"):
        light_encoders.build("efficientnet_b0", tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"PK\x03\x04 cut", [1, 2], {"model": {"w": torch.zeros(1)}}, nn.Linear(1, 1)],
    ids=["empty", "web page", "truncated", "list", "nested", "pickled module"],
)
def test_files_that_are_no_state_dict(content, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"x\.pth are damaged, or more than a plain state dict"):
        light_encoders.build("pocketnet", path)


class Payload:
    """Unpickled without care, it makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_wants_to_run_code_does_not(tmp_path):
    torch.save({"stem": Payload(tmp_path / "made")}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="which is refused"):
        light_encoders.build("pocketnet", tmp_path / "x.pth")
    assert not (tmp_path / "made").exists()


def test_paths_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(ValueError, match=f"{path} cannot be read"):
            light_encoders.build("pocketnet", path)


def test_imagenet_weights_go_through_torchvision(classifier, monkeypatch):
    asked = []

    def fetch(url, **settings):
        asked.append((url, settings["check_hash"]))
        return classifier.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    encoder = light_encoders.build("mobilenet_v2", "imagenet")
    assert asked == [(models.MobileNet_V2_Weights.IMAGENET1K_V1.url, True)]
    assert torch.equal(encoder[0][0].weight, classifier.features[0][0].weight)


@pytest.mark.parametrize("trouble", [URLError("no route"), IncompleteRead(b""), RuntimeError("invalid hash value")])
def test_a_failed_download_is_one_sentence(trouble, monkeypatch):
    def fetch(url, **settings):
        raise trouble

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(ValueError, match=r"mobilenet_v2-b0353104\.pth could not be downloaded") as error:
        light_encoders.build("mobilenet_v2", "imagenet")
    assert "\n" not in str(error.value) and error.value.__suppress_context__


# ------------------------------------------------------------------------------------------------ PocketNet


def test_pocketnet():
    torch.manual_seed(0)
    encoder = light_encoders.build("pocketnet")
    assert 0.25e6 < sum(parameter.numel() for parameter in encoder.parameters()) < 0.35e6
    assert encoder.image_size == 64 and encoder.normalization == (blip_lite.MEAN, blip_lite.STD)
    feature_map = encoder(pixels(64, 4))
    assert feature_map.shape == (4, encoder.out_channels, 8, 8)
    feature_map.square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in encoder.parameters())


def test_pocketnet_in_eval_mode_looks_at_one_image_at_a_time():
    torch.manual_seed(0)
    encoder = light_encoders.build("pocketnet")
    x = pixels(64, 4)
    encoder(x)  # BatchNorm gathers statistics
    assert not torch.allclose(encoder(x)[:1], encoder(x[:1]), atol=1e-3)
    encoder.eval()
    torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]), rtol=0, atol=1e-5)


def test_pocketnet_sees_every_pixel_and_keeps_places():
    """Each pixel matters, and what changes in a corner changes the map most in that corner."""
    encoder = liven(light_encoders.build("pocketnet"))
    x = pixels(64).requires_grad_()
    encoder(x).square().sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()
    changed = x.detach().clone()
    changed[:, :, :8, 56:] += 1  # top right
    with torch.no_grad():
        change = (encoder(changed) - encoder(x)).abs().sum((0, 1))  # [8, 8]
    assert change.argmax().item() in (6, 7, 14, 15)
    assert change[4:, :4].max() < 0.2 * change.max()


def test_pocketnet_blocks_are_residual():
    """A silent block hands on what it was given."""
    encoder = liven(light_encoders.build("pocketnet"))
    for block in (encoder.block1, encoder.block2):
        nn.init.zeros_(block[-1][-1].weight), nn.init.zeros_(block[-1][-1].bias)  # the last BatchNorm
    gelu, x = nn.functional.gelu, pixels(64)
    with torch.no_grad():
        expected = gelu(gelu(gelu(encoder.down(gelu(encoder.stem(x))))))
        torch.testing.assert_close(encoder(x), expected)


def test_pocketnet_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    first = liven(light_encoders.build("pocketnet"))
    torch.save(first.state_dict(), tmp_path / "x.pth")
    second = light_encoders.build("pocketnet", tmp_path / "x.pth").eval()
    with torch.no_grad():
        assert torch.equal(first(pixels(64)), second(pixels(64)))
    with pytest.raises(ValueError, match="pocketnet has no ImageNet weights"):
        light_encoders.build("pocketnet", "imagenet")


# ------------------------------------------------------------------------------------------------ BLIP's own encoder


def test_blip_map_is_the_patch_tokens_in_their_places(blip):
    encoder = light_encoders.build("blip", blip=blip)
    assert encoder.out_channels == 128 and encoder.image_size == 48
    assert encoder.normalization == (blip_lite.MEAN, blip_lite.STD)
    x = pixels(48, 2)
    feature_map = encoder(x)
    assert feature_map.shape == (2, 128, 3, 3)
    _, F_v = blip.encode_image(x)
    for row in range(3):
        for column in range(3):
            assert torch.equal(feature_map[:, :, row, column], F_v[:, 1 + 3 * row + column])  # 0 is CLS


def test_blip_stays_frozen_and_out_of_the_query_model(blip):
    encoder = light_encoders.build("blip", blip=blip)
    mapper = isa.AdaptiveTokenLearner(encoder.out_channels, 64, width=16)
    model = isa.QueryModel(encoder, mapper)
    assert {id(p) for p in model.parameters()} == {id(p) for p in mapper.parameters()}
    assert set(model.state_dict()) == {f"mapper.{name}" for name in mapper.state_dict()}
    before = {name: x.clone() for name, x in blip.state_dict().items()}
    model.train()
    assert not any(module.training for module in blip.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pixels(48, 2)).square().sum().backward()
    optimizer.step()
    assert all(p.grad.any() for p in mapper.parameters()) and all(p.grad is None for p in blip.parameters())
    assert all(torch.equal(before[name], x) for name, x in blip.state_dict().items())

    again = isa.QueryModel(light_encoders.build("blip", blip=blip), isa.AdaptiveTokenLearner(128, 64, width=16))
    again.load_state_dict(model.state_dict())  # strict: what was saved is all that has to come back
    assert torch.equal(again(pixels(48, 2)), model(pixels(48, 2)))


def test_a_blip_in_training_is_frozen_first(blip):
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=16, image_width=64, image_depth=1, vocab_size=20, max_positions=16,
                 word_dim=64, text_depth=1, embed_dim=32)  # fmt: skip
    loose = blip_lite.Blip(sizes, SimpleNamespace(enc_id=19)).train()
    encoder = light_encoders.build("blip", blip=loose)
    assert not loose.visual_encoder.training
    assert not any(parameter.requires_grad for parameter in loose.visual_encoder.parameters())
    assert not encoder(pixels(32)).requires_grad


def test_blip_needs_a_blip_and_nothing_else(blip):
    for settings in ({}, {"blip": blip, "pretrained": "imagenet"}, {"blip": blip, "pretrained": "x.pth"}):
        with pytest.raises(ValueError, match="give blip="):
            light_encoders.build("blip", **settings)


# ------------------------------------------------------------------------------------------------ names and photos


@pytest.mark.parametrize("name", ["resnet50", "EfficientNet_B0", "", None])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ValueError, match="efficientnet_b0, efficientnet_b2, mobilenet_v2, pocketnet, blip"):
        light_encoders.build(name)


@pytest.mark.parametrize("name, mean, std, size", [
    ("mobilenet_v2", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224),
    ("pocketnet", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 64),
])  # fmt: skip
def test_preprocess_has_the_encoders_size_and_normalization(name, mean, std, size):
    pil = Image.new("RGB", (100, 50), (255, 0, 51))
    x = light_encoders.preprocess(light_encoders.build(name), pil)
    assert x.shape == (3, size, size) and x.dtype == torch.float32
    for channel, value in enumerate((1.0, 0.0, 0.2)):
        expected = (value - mean[channel]) / std[channel]
        np.testing.assert_allclose(x[channel].numpy(), np.full((size, size), expected), rtol=1e-5)


def test_preprocess_for_blip_is_blips_own(blip):
    rng = np.random.default_rng(0)
    pil = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    assert torch.equal(light_encoders.preprocess(light_encoders.build("blip", blip=blip), pil), blip.preprocess(pil))
