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
import query_side

MAPS = {"efficientnet_b0": (1280, 7, 7), "efficientnet_b2": (1408, 7, 7), "mobilenet_v2": (1280, 7, 7)}  # at 224 px
PARAMETERS = {"efficientnet_b0": 4_007_548, "efficientnet_b2": 7_700_994, "mobilenet_v2": 2_223_872}
IN_TIMM = {"mobilenet_v2": "mobilenetv2_100"}  # the others have the same name there


def pixels(size, count=1, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def liven(module, seed=0):
    """Statistics, scales and biases that differ from channel to channel: a missed tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2, generator=generator)
            layer.running_var.uniform_(0.3, 1.0, generator=generator)
        if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(layer.weight, 0.7, 1.3, generator=generator)
            nn.init.normal_(layer.bias, 0, 0.2, generator=generator)
        if hasattr(layer, "attention_biases"):
            nn.init.normal_(layer.attention_biases, generator=generator)
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
    encoder = query_side.build(name, tmp_path / "weights.pth").eval().double()  # so deep a network magnifies rounding
    x = pixels(224).double()
    with torch.no_grad():
        feature_map, expected = encoder(x), theirs.double().forward_features(x)
    assert feature_map.shape == (1, *MAPS[name]) and encoder.out_channels == MAPS[name][0]
    assert expected.std() > 1e-3
    torch.testing.assert_close(feature_map, expected, rtol=1e-9, atol=1e-11 * expected.abs().max().item())


@pytest.mark.parametrize("name", MAPS)
def test_interface_and_parameters(name):
    with torch.device("meta"):
        encoder = query_side.build(name)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == PARAMETERS[name]
    assert encoder.image_size == 224
    assert encoder.normalization == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert encoder(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, *MAPS[name])
    assert encoder(torch.empty(2, 3, 256, 256, device="meta")).shape == (2, MAPS[name][0], 8, 8)


def test_gradients_are_torchvisions():
    """The layout in memory is for speed. In float64: so deep a network magnifies rounding."""
    torch.manual_seed(3)
    theirs = models.mobilenet_v2().features.train().double()
    ours = query_side.build("mobilenet_v2").train().double()
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
    encoder = query_side.build("efficientnet_b0")
    layers = [m for m in encoder.modules() if isinstance(m, query_side.DepthwiseConv2d)]
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
        encoder = query_side.build("mobilenet_v2", str(tmp_path / file)).eval()
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
        query_side.build("mobilenet_v2", tmp_path / "x.pth")
    for part in ("x.pth", "0.1.bias is missing", "99.weight is unexpected",
                 "0.0.weight is [32, 3, 5, 5] instead of [32, 3, 3, 3]"):  # fmt: skip
        assert part in str(error.value)


def test_weights_of_another_network(classifier, tmp_path):
    torch.save(classifier.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"do not fit .* and \d+ more; give its own$"):
        query_side.build("efficientnet_b0", tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"PK\x03\x04 cut", [1, 2], {"w": {"w": torch.zeros(1)}}, nn.Linear(1, 1)],
    ids=["empty", "web page", "truncated", "list", "nested", "pickled module"],
)
def test_files_that_are_no_state_dict(content, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"x\.pth are damaged, or more than a plain state dict"):
        query_side.build("pocketnet", path)


class Payload:
    """Unpickled without care, it makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_wants_to_run_code_does_not(tmp_path):
    torch.save({"stem": Payload(tmp_path / "made")}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="which is refused"):
        query_side.build("pocketnet", tmp_path / "x.pth")
    assert not (tmp_path / "made").exists()


def test_paths_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(ValueError, match=f"{path} cannot be read"):
            query_side.build("pocketnet", path)


def test_imagenet_weights_go_through_torchvision(classifier, monkeypatch):
    asked = []

    def fetch(url, **settings):
        asked.append((url, settings["check_hash"]))
        return classifier.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    encoder = query_side.build("mobilenet_v2", "imagenet")
    assert asked == [(models.MobileNet_V2_Weights.IMAGENET1K_V1.url, True)]
    assert torch.equal(encoder[0][0].weight, classifier.features[0][0].weight)


@pytest.mark.parametrize("trouble", [URLError("no route"), IncompleteRead(b""), RuntimeError("invalid hash value")])
def test_a_failed_download_is_one_sentence(trouble, monkeypatch):
    def fetch(url, **settings):
        raise trouble

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(ValueError, match=r"mobilenet_v2-b0353104\.pth could not be downloaded") as error:
        query_side.build("mobilenet_v2", "imagenet")
    assert "\n" not in str(error.value) and error.value.__suppress_context__


# ------------------------------------------------------------------------------------------------ EfficientViT, MobileViTV2

WRITTEN_OUT = {"efficientvit_m2": (3_962_106, 224, (224, 4, 4)), "mobilevitv2_100": (4_388_841, 256, (512, 8, 8))}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def in_timm(name, size=None):
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    return liven(timm.create_model(name, **({"img_size": size} if size and name == "efficientvit_m2" else {})))


def assert_same_maps(encoder, theirs, size):
    """In float64: so deep a network magnifies rounding."""
    x = pixels(size, 2).double()
    with torch.no_grad():
        feature_map, expected = encoder.eval().double()(x), theirs.double().forward_features(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(feature_map, expected, rtol=1e-9, atol=1e-11 * expected.abs().max().item())
    return feature_map


@pytest.mark.parametrize("name, size, shape", [
    ("efficientvit_m2", 224, (224, 4, 4)),  # windows: 2 x 2 of 7 x 7 pixels, 1 of 7 x 7, 1 of 4 x 4
    ("efficientvit_m2", 128, (224, 2, 2)),  # 2 x 2 of 7 x 7 that the map of 8 x 8 does not fill, 1 of 4 x 4, 1 of 2 x 2
    ("efficientvit_m2", 64, (224, 1, 1)),
    ("mobilevitv2_100", 256, (512, 8, 8)),
    ("mobilevitv2_100", 224, (512, 8, 8)),  # 7 x 7, stretched
])  # fmt: skip
def test_written_out_against_timm(name, size, shape, tmp_path):
    """timm's state dict loads as it is and gives the same feature map."""
    theirs = in_timm(name, size)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    encoder = query_side.build(name, tmp_path / "x.pth", image_size=size)
    assert assert_same_maps(encoder, theirs, size).shape[1:] == shape


def test_efficientvit_of_one_size_takes_pixels_of_another():
    theirs, encoder = in_timm("efficientvit_m2"), query_side.build("efficientvit_m2")
    encoder.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("head")})
    assert assert_same_maps(encoder, theirs, 256).shape == (2, 224, 4, 4)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_interface_and_parameters_of_the_written_out(name):
    count, size, shape = WRITTEN_OUT[name]
    with torch.device("meta"):
        encoder = query_side.build(name)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == count
    assert (encoder.out_channels, encoder.image_size) == (shape[0], size)
    assert encoder(torch.empty(2, 3, size, size, device="meta")).shape == (2, *shape)
    depthwise = {"efficientvit_m2": 6 * 2 + 2, "mobilevitv2_100": 4}[name]  # kernels of 7 and 5 in each attention; strides of 2
    assert sum(isinstance(m, query_side.DepthwiseConv2d) for m in encoder.modules()) == depthwise


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_gradients_reach_every_parameter_of_the_written_out(name):
    torch.manual_seed(6)
    encoder = liven(query_side.build(name, image_size=128)).train()
    encoder(pixels(128, 2)).square().mean().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_efficientvit_starts_with_silent_residuals():
    encoder = query_side.build("efficientvit_m2").eval()
    x = encoder.patch_embed(pixels(224))
    assert torch.equal(encoder.stages[0](x), x)


def authors_efficientvit():
    """The names in the file of EfficientViT's authors, in its order, each with timm's for the same tensor."""

    def block(theirs, timms, modules):
        for module in modules:
            if module.endswith("attn"):
                yield f"{theirs}.{module}.attention_biases", f"{timms}.{module}.attention_biases"
                yield f"{theirs}.{module}.attention_bias_idxs", None
            elif module.startswith("se."):
                yield from ((f"{theirs}.{module}.{x}", f"{timms}.{module}.{x}") for x in ("weight", "bias"))
            else:
                yield f"{theirs}.{module}.c.weight", f"{timms}.{module}.conv.weight"
                yield from ((f"{theirs}.{module}.bn.{x}", f"{timms}.{module}.bn.{x}") for x in BATCH_NORM)

    def sandwich(heads):
        qkvs, dws = ([f"mixer.m.attn.{x}.{head}" for head in range(heads)] for x in ("qkvs", "dws"))
        return ["dw0.m", "ffn0.m.pw1", "ffn0.m.pw2", "mixer.m.attn", *qkvs, *dws, "mixer.m.attn.proj.1",
                "dw1.m", "ffn1.m.pw1", "ffn1.m.pw2"]  # fmt: skip

    for i in range(4):
        yield f"patch_embed.{2 * i}.c.weight", f"patch_embed.conv{i + 1}.conv.weight"
        yield from ((f"patch_embed.{2 * i}.bn.{x}", f"patch_embed.conv{i + 1}.bn.{x}") for x in BATCH_NORM)
    yield from block("blocks1.0", "stages.0.blocks.0", sandwich(heads=4))
    for stage, heads, depth in ((1, 3, 2), (2, 2, 3)):
        theirs, timms = f"blocks{stage + 1}", f"stages.{stage}.downsample"
        yield from block(f"{theirs}.0", f"{timms}.res1", ["0.m", "1.m.pw1", "1.m.pw2"])
        yield from block(f"{theirs}.1", f"{timms}.patchmerge", ["conv1", "conv2", "se.fc1", "se.fc2", "conv3"])
        yield from block(f"{theirs}.2", f"{timms}.res2", ["0.m", "1.m.pw1", "1.m.pw2"])
        for i in range(depth):
            yield from block(f"{theirs}.{3 + i}", f"stages.{stage}.blocks.{i}", sandwich(heads))
    yield from ((f"head.bn.{x}", f"head.bn.{x}") for x in BATCH_NORM)
    yield from ((f"head.l.{x}", f"head.linear.{x}") for x in ("weight", "bias"))


def authors_mobilevitv2():
    """The same for MobileViTV2."""

    def conv_norm(theirs, timms):
        yield f"{theirs}.block.conv.weight", f"{timms}.conv.weight"
        yield from ((f"{theirs}.block.norm.{x}", f"{timms}.bn.{x}") for x in BATCH_NORM)

    def affine(theirs, timms):
        yield from ((f"{theirs}.{x}", f"{timms}.{x}") for x in ("weight", "bias"))

    yield from conv_norm("conv_1", "stem")
    for stage, residuals, depth in ((0, 1, 0), (1, 2, 0), (2, 1, 2), (3, 1, 4), (4, 1, 3)):
        theirs, timms = f"layer_{stage + 1}", f"stages.{stage}"
        for i in range(residuals):
            for a, b in (("exp_1x1", "conv1_1x1"), ("conv_3x3", "conv2_kxk"), ("red_1x1", "conv3_1x1")):
                yield from conv_norm(f"{theirs}.{i}.block.{a}", f"{timms}.{i}.{b}")
        if depth:
            yield from conv_norm(f"{theirs}.1.local_rep.0", f"{timms}.1.conv_kxk")
            yield f"{theirs}.1.local_rep.1.block.conv.weight", f"{timms}.1.conv_1x1.weight"
            for i in range(depth):
                for a, b in (("attn.0", "norm1"), ("attn.1.qkv_proj.block.conv", "attn.qkv_proj"),
                             ("attn.1.out_proj.block.conv", "attn.out_proj"), ("ffn.0", "norm2"),
                             ("ffn.1.block.conv", "mlp.fc1"), ("ffn.3.block.conv", "mlp.fc2")):  # fmt: skip
                    yield from affine(f"{theirs}.1.global_rep.{i}.pre_norm_{a}", f"{timms}.1.transformer.{i}.{b}")
            yield from affine(f"{theirs}.1.global_rep.{depth}", f"{timms}.1.norm")
            yield from conv_norm(f"{theirs}.1.conv_proj", f"{timms}.1.conv_proj")
    yield from affine("classifier.1", "head.fc")


def authors_file(name, state):
    """What the authors would have saved for timm's state dict: for EfficientViT under "model", and with its index buffers."""
    names = {"efficientvit_m2": authors_efficientvit, "mobilevitv2_100": authors_mobilevitv2}[name]()
    renamed = {theirs: state[timms] if timms else torch.zeros(49, 49, dtype=torch.long) for theirs, timms in names}
    return {"model": renamed} if name == "efficientvit_m2" else renamed


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_the_authors_files(name, tmp_path):
    theirs = in_timm(name)
    file = authors_file(name, theirs.state_dict())
    state = file.get("model", file)
    assert len([key for key in state if "bias_idxs" not in key]) == len(theirs.state_dict())
    torch.save(file, tmp_path / "x.pth")
    assert_same_maps(query_side.build(name, tmp_path / "x.pth"), theirs, 128)

    lost = next(key for key in state if key.startswith(("blocks2", "layer_2")))
    del state[lost]
    torch.save(file, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"cut\.pth do not fit this encoder: .* and \d+ more; give its own$"):
        query_side.build(name, tmp_path / "cut.pth")
    state[lost] = torch.zeros(3, 5)  # last in order now, with all others moved up
    torch.save(file, tmp_path / "order.pth")
    with pytest.raises(ValueError, match=r"order\.pth do not fit this encoder: .* instead of .* and \d+ more; give its own$"):
        query_side.build(name, tmp_path / "order.pth")


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_misfits_of_the_written_out(name, tmp_path):
    state = query_side.build(name).state_dict()
    first, second, *_, last = (key for key in state if key.endswith("conv.weight"))
    del state[first]
    state[second], state["stages.9.weight"] = torch.zeros(2, 2), torch.zeros(1)
    for key in [key for key in state if key.endswith("attention_biases")][:1]:
        state[key] = torch.zeros(4, 48)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth do not fit this encoder: [^\n]*$") as error:
        query_side.build(name, tmp_path / "x.pth")
    message = str(error.value)
    assert f"{first} is missing" in message and "stages.9.weight is unexpected" in message and last not in message
    assert f"{second} is [2, 2] instead of [" in message
    assert ("attention_biases is [4, 48] instead of [4, 49]" in message) == (name == "efficientvit_m2")


def test_attention_biases_are_resized_as_in_timm(tmp_path):
    """A file of 224 px in an encoder of 128: its second stage has windows of 4 x 4 instead of 7 x 7 pixels."""
    theirs = in_timm("efficientvit_m2")
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    from timm.layers import resize_rel_pos_bias_table_levit

    state = query_side.build("efficientvit_m2", tmp_path / "x.pth", image_size=128).state_dict()
    for key, side in (("stages.0.blocks.0", 7), ("stages.1.blocks.1", 4), ("stages.2.blocks.2", 2)):
        before = theirs.state_dict()[f"{key}.mixer.m.attn.attention_biases"]
        after = resize_rel_pos_bias_table_levit(before.T, (side**2, len(before))).T
        assert torch.equal(state[f"{key}.mixer.m.attn.attention_biases"], after)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_torchvision_has_no_weights_for_the_written_out(name):
    with pytest.raises(ValueError, match=f"^{name} has no ImageNet weights in torchvision; give the path of timm's {name} or"):
        query_side.build(name, "imagenet")


# ------------------------------------------------------------------------------------------------ PocketNet


def test_pocketnet():
    torch.manual_seed(0)
    encoder = query_side.build("pocketnet")
    assert 0.25e6 < sum(parameter.numel() for parameter in encoder.parameters()) < 0.35e6
    assert encoder.image_size == 64 and encoder.normalization == (blip_lite.MEAN, blip_lite.STD)
    feature_map = encoder(pixels(64, 4))
    assert feature_map.shape == (4, encoder.out_channels, 8, 8)
    feature_map.square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in encoder.parameters())


def test_pocketnet_in_eval_mode_looks_at_one_image_at_a_time():
    torch.manual_seed(0)
    encoder = query_side.build("pocketnet")
    x = pixels(64, 4)
    encoder(x)  # BatchNorm gathers statistics
    assert not torch.allclose(encoder(x)[:1], encoder(x[:1]), atol=1e-3)
    encoder.eval()
    torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]), rtol=0, atol=1e-5)


def test_pocketnet_sees_every_pixel_and_keeps_places():
    """Each pixel matters, and what changes in a corner changes the map most in that corner."""
    encoder = liven(query_side.build("pocketnet"))
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
    encoder = liven(query_side.build("pocketnet"))
    for block in (encoder.block1, encoder.block2):
        nn.init.zeros_(block[-1][-1].weight), nn.init.zeros_(block[-1][-1].bias)  # the last BatchNorm
    gelu, x = nn.functional.gelu, pixels(64)
    with torch.no_grad():
        expected = gelu(gelu(gelu(encoder.down(gelu(encoder.stem(x))))))
        torch.testing.assert_close(encoder(x), expected)


def test_pocketnet_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    first = liven(query_side.build("pocketnet"))
    torch.save(first.state_dict(), tmp_path / "x.pth")
    second = query_side.build("pocketnet", tmp_path / "x.pth").eval()
    with torch.no_grad():
        assert torch.equal(first(pixels(64)), second(pixels(64)))
    with pytest.raises(ValueError, match="pocketnet has no ImageNet weights"):
        query_side.build("pocketnet", "imagenet")


# ------------------------------------------------------------------------------------------------ BLIP's own encoder


def test_blip_map_is_the_patch_tokens_in_their_places(blip):
    encoder = query_side.build("blip", blip=blip)
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
    encoder = query_side.build("blip", blip=blip)
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

    again = isa.QueryModel(query_side.build("blip", blip=blip), isa.AdaptiveTokenLearner(128, 64, width=16))
    again.load_state_dict(model.state_dict())  # strict: what was saved is all that has to come back
    assert torch.equal(again(pixels(48, 2)), model(pixels(48, 2)))


def test_a_blip_in_training_is_frozen_first(blip):
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=16, image_width=64, image_depth=1, vocab_size=20, max_positions=16,
                 word_dim=64, text_depth=1, embed_dim=32)  # fmt: skip
    loose = blip_lite.Blip(sizes, SimpleNamespace(enc_id=19)).train()
    encoder = query_side.build("blip", blip=loose)
    assert not loose.visual_encoder.training
    assert not any(parameter.requires_grad for parameter in loose.visual_encoder.parameters())
    assert not encoder(pixels(32)).requires_grad


def test_blip_needs_a_blip_and_nothing_else(blip):
    for settings in ({}, {"blip": blip, "pretrained": "imagenet"}, {"blip": blip, "pretrained": "x.pth"}):
        with pytest.raises(ValueError, match="give blip="):
            query_side.build("blip", **settings)


# ------------------------------------------------------------------------------------------------ names, sizes, photos


@pytest.mark.parametrize("name", ["resnet50", "EfficientNet_B0", "", None])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ValueError, match="efficientnet_b0, .* efficientvit_m2, mobilevitv2_100, pocketnet, blip"):
        query_side.build(name)


@pytest.mark.parametrize("name, shape", [("mobilenet_v2", (1280, 3, 3)), ("efficientvit_m2", (224, 2, 2)),
                                         ("mobilevitv2_100", (512, 4, 4)), ("pocketnet", (96, 12, 12))])  # fmt: skip
def test_another_image_size(name, shape):
    encoder = query_side.build(name, image_size=96).eval()
    assert encoder.image_size == 96
    x = query_side.preprocess(encoder, Image.new("RGB", (100, 50)))
    assert x.shape == (3, 96, 96)
    with torch.no_grad():
        assert encoder(x[None]).shape == (1, *shape)


@pytest.mark.parametrize("image_size", [0, -224, 31, 224.0, "224", True])
def test_image_sizes_that_are_not_possible(image_size):
    with pytest.raises(ValueError, match=f"^image_size {image_size} is not possible; give a whole number of pixels, 32 or more$"):
        query_side.build("efficientvit_m2", image_size=image_size)


def test_blips_encoder_has_blips_size(blip):
    assert query_side.build("blip", blip=blip, image_size=48).image_size == 48
    with pytest.raises(ValueError, match='^image_size 64 is not possible for "blip": the loaded BLIP sees 48 px$'):
        query_side.build("blip", blip=blip, image_size=64)


@pytest.mark.parametrize("name, mean, std, size", [
    ("mobilenet_v2", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224),
    ("mobilevitv2_100", (0, 0, 0), (1, 1, 1), 256),
    ("pocketnet", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 64),
])  # fmt: skip
def test_preprocess_has_the_encoders_size_and_normalization(name, mean, std, size):
    pil = Image.new("RGB", (100, 50), (255, 0, 51))
    x = query_side.preprocess(query_side.build(name), pil)
    assert x.shape == (3, size, size) and x.dtype == torch.float32
    for channel, value in enumerate((1.0, 0.0, 0.2)):
        expected = (value - mean[channel]) / std[channel]
        np.testing.assert_allclose(x[channel].numpy(), np.full((size, size), expected), rtol=1e-5)


def test_preprocess_for_blip_is_blips_own(blip):
    rng = np.random.default_rng(0)
    pil = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    assert torch.equal(query_side.preprocess(query_side.build("blip", blip=blip), pil), blip.preprocess(pil))
