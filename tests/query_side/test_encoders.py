"""query_side's encoders against timm, torchvision's classifiers and a small BLIP; no downloads."""

import copy
import io
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

IN_TIMM = {"mobilenet_v2": "mobilenetv2_100"}  # the others have the same name there
WRITTEN_OUT = ["efficientvit_m2", "mobilevitv2_100"]


def pixels(size, count=1, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def liven(module):
    """Statistics, scales and biases that differ from channel to channel: a missed tensor shows."""
    generator = torch.Generator().manual_seed(0)
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


def in_timm(name, size=None):
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    settings = {"img_size": size} if size and name == "efficientvit_m2" else {}
    return liven(timm.create_model(IN_TIMM.get(name, name), **settings))


def assert_same_maps(encoder, theirs, size):
    """In float64, since such deep networks magnify rounding."""
    x = pixels(size, 2).double()
    with torch.no_grad():
        feature_map = encoder.eval().double()(x)
        expected = theirs.double().forward_features(x)
    assert expected.std() > 1e-3
    atol = 1e-11 * expected.abs().max().item()
    torch.testing.assert_close(feature_map, expected, rtol=1e-9, atol=atol)
    return feature_map


def save(content, path):
    torch.save(content, path)
    return path



@pytest.mark.parametrize("name, size, shape", [
    ("efficientnet_b0", 224, (1280, 7, 7)),
    ("efficientnet_b2", 224, (1408, 7, 7)),
    ("mobilenet_v2", 224, (1280, 7, 7)),
    ("efficientvit_m2", 224, (224, 4, 4)),  # windows: 2 x 2 of 7 x 7 pixels, 1 of 7 x 7, 1 of 4 x 4
    ("efficientvit_m2", 128, (224, 2, 2)),  # 2 x 2 of 7 x 7 that 8 x 8 does not fill, 4 x 4, 2 x 2
    ("efficientvit_m2", 64, (224, 1, 1)),
    ("mobilevitv2_100", 256, (512, 8, 8)),
    ("mobilevitv2_100", 224, (512, 8, 8)),  # 7 x 7, stretched
])
def test_feature_maps_are_timms(name, size, shape, tmp_path):
    """timm's weights, for torchvision's networks renamed, give the same feature map."""
    theirs = in_timm(name, size)
    state = theirs.state_dict()
    if name not in WRITTEN_OUT:  # both list layers in one order
        values = [x for key, x in state.items() if not key.startswith("classifier")]
        state = dict(zip(query_side.build(name).state_dict(), values, strict=True))
    path = save(state, tmp_path / "x.pth")
    encoder = query_side.build(name, path, image_size=size)
    assert assert_same_maps(encoder, theirs, size).shape[1:] == shape
    assert encoder.out_channels == shape[0]


def test_efficientvit_of_one_size_takes_pixels_of_another():
    theirs, encoder = in_timm("efficientvit_m2"), query_side.build("efficientvit_m2")
    state = theirs.state_dict()
    encoder.load_state_dict({k: x for k, x in state.items() if not k.startswith("head")})
    assert assert_same_maps(encoder, theirs, 256).shape == (2, 224, 4, 4)


def test_attention_biases_are_resized_as_in_timm(tmp_path):
    """A file for 224 px in an encoder for 128: 7 x 7 pixels in a window become 4 x 4 or 2 x 2."""
    theirs = in_timm("efficientvit_m2").state_dict()
    from timm.layers import resize_rel_pos_bias_table_levit

    path = save(theirs, tmp_path / "x.pth")
    state = query_side.build("efficientvit_m2", path, image_size=128).state_dict()
    for block, side in (("0.blocks.0", 7), ("1.blocks.1", 4), ("2.blocks.2", 2)):
        key = f"stages.{block}.mixer.m.attn.attention_biases"
        biases = theirs[key]
        wanted = resize_rel_pos_bias_table_levit(biases.T, (side**2, len(biases))).T
        assert torch.equal(state[key], wanted)



@pytest.mark.parametrize("name, depthwise", [
    ("efficientnet_b0", 9 + 2),  # 5 x 5; 3 x 3 with a stride of 2
    ("efficientvit_m2", 6 * 2 + 2),  # kernels of 7 and 5 in each attention; strides of 2
    ("mobilevitv2_100", 4),
])
def test_which_depthwise_convolutions_are_ours(name, depthwise):
    with torch.device("meta"):
        encoder = query_side.build(name)
    found = [m for m in encoder.modules() if isinstance(m, query_side.DepthwiseConv2d)]
    assert len(found) == depthwise and all(m.groups > 1 for m in found)


@pytest.mark.parametrize("kernel, stride, size", [
    (3, 2, 14), (5, 1, 14), (5, 2, 15), (5, 2, 14), (7, 1, 7), (7, 2, 9)])
def test_depthwise_convolutions_under_autocast(kernel, stride, size):
    """The gradients of float64, up to the rounding of what goes in and out."""
    torch.manual_seed(4)
    layer = query_side.DepthwiseConv2d(16, 16, kernel, stride, kernel // 2, groups=16, bias=False)
    x = torch.randn(2, 16, size, size).bfloat16()
    x = x.to(memory_format=torch.channels_last).requires_grad_()
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


def test_means_keep_channels_last():
    """Else the gradient joins others of another layout, which takes several times as long."""
    encoder = query_side.build("efficientnet_b0")
    pool = encoder[1][0].block[1].avgpool
    x = torch.randn(2, 32, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    y = pool(x)
    assert torch.allclose(y, x.mean((2, 3), keepdim=True), atol=1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_torchvisions():
    """The layout in memory changes speed alone. In float64."""
    torch.manual_seed(3)
    theirs = models.mobilenet_v2().features.train().double()
    ours = query_side.build("mobilenet_v2").train().double()
    ours.load_state_dict(theirs.state_dict())
    gradients = []
    for network in (ours, theirs):
        feature_map = network(pixels(96, 4).double())
        feature_map.square().mean().backward()
        gradients.append([feature_map.detach(), *(p.grad for p in network.parameters())])
    for a, b in zip(*gradients, strict=True):
        atol = 1e-10 * (1e-3 + b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=1e-8, atol=atol)


@pytest.mark.filterwarnings("ignore")  # the exporter's, of its successor and of fixed sizes
@pytest.mark.parametrize("name", [n for n in query_side.NAMES if not n.startswith("blip")])
def test_an_exported_query_model_takes_any_number_of_images(name):
    """ONNX, traced with a batch of two, run by another engine."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    encoder = query_side.build(name)
    learner = isa.AdaptiveTokenLearner(encoder.out_channels, 768)
    model, file = liven(isa.QueryModel(encoder, learner)), io.BytesIO()
    torch.onnx.export(model, (pixels(encoder.image_size, 2),), file, dynamo=False,
                      input_names=["pixels"], dynamic_axes={"pixels": {0: "batch"}})
    session = onnxruntime.InferenceSession(file.getvalue())
    for count in (1, 7):
        x = pixels(encoder.image_size, count)
        (found,) = session.run(None, {"pixels": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*WRITTEN_OUT, "pocketnet"])
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(6)
    encoder = liven(query_side.build(name, image_size=128)).train()
    encoder(pixels(128, 2)).square().mean().backward()
    for key, p in encoder.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key


def test_efficientvit_starts_with_silent_residuals():
    encoder = query_side.build("efficientvit_m2").eval()
    x = encoder.patch_embed(pixels(224))
    assert torch.equal(encoder.stages[0](x), x)



def test_weights_of_the_whole_classifier_or_of_its_features(tmp_path):
    torch.manual_seed(1)
    classifier, x = liven(models.mobilenet_v2()), pixels(64)
    whole = classifier.state_dict()
    old = {key: x for key, x in whole.items() if not key.endswith("num_batches_tracked")}
    parallel = {f"module.{key}": x for key, x in whole.items()}
    files = [save(state, tmp_path / f"{i}.pth") for i, state in enumerate((
        whole, classifier.features.state_dict(), old, parallel, {"state_dict": parallel}))]
    files.append(tmp_path / "x.safetensors")
    pytest.importorskip("safetensors.torch").save_file(whole, files[-1])
    for file in files:
        encoder = query_side.build("mobilenet_v2", str(file)).eval()
        with torch.no_grad():
            expected = classifier.features(x)
            assert (encoder(x) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["mobilenet_v2", *WRITTEN_OUT, "pocketnet"])
def test_misfits_are_listed_in_one_error(name, tmp_path):
    state = query_side.build(name).state_dict()
    first, second, *_, last = (key for key in state if state[key].dim() == 4)
    del state[first]
    state[second], state["stages.9.weight"] = torch.zeros(2, 2), torch.zeros(1)
    for key in [key for key in state if key.endswith("attention_biases")][:1]:
        state[key] = torch.zeros(4, 48)
    with pytest.raises(ValueError, match=r"x\.pth do not fit this encoder: [^\n]*$") as error:
        query_side.build(name, save(state, tmp_path / "x.pth"))
    said = str(error.value)
    assert f"{first} is missing" in said and "stages.9.weight is unexpected" in said
    assert f"{second} is [2, 2] instead of [" in said and last not in said
    assert ("biases is [4, 48] instead of [4, 49]" in said) == (name == "efficientvit_m2")


def test_damaged_safetensors_are_one_sentence(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x08")
    for name, said in (("x.safetensors", "not a .safetensors file"), ("y.safetensors", "be read")):
        with pytest.raises(ValueError, match=said):
            query_side.build("pocketnet", tmp_path / name)


@pytest.mark.parametrize("content, says", [
    (b"", "is empty; download it again"), (b"PK\x03\x04 cut", "is damaged"),
    ([1, 2], "no state dict"),
    ({"w": {"w": torch.zeros(1)}}, "holds w, not tensors; give a light encoder checkpoint"),
    (nn.Linear(1, 1), "wants to run code .*, which is refused")],
    ids=["empty", "truncated", "list", "nested", "pickled module"])
def test_files_that_are_no_state_dict(content, says, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=rf"x\.pth .*{says}"):
        query_side.build("pocketnet", path)


def test_imagenet_weights_come_from_torchvision(monkeypatch):
    classifier, asked = models.mobilenet_v2(), []

    def fetch(url, **settings):
        asked.append((url, settings["check_hash"]))
        return classifier.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    encoder = query_side.build("mobilenet_v2", "imagenet")
    assert asked == [(models.MobileNet_V2_Weights.IMAGENET1K_V1.url, True)]
    assert torch.equal(encoder[0][0].weight, classifier.features[0][0].weight)


@pytest.mark.parametrize("trouble", [
    URLError("no route"), IncompleteRead(b""), RuntimeError("invalid hash value"),
])
def test_a_failed_download_is_one_sentence(trouble, monkeypatch):
    def fetch(url, **settings):
        raise trouble

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(ValueError, match=r"v2-b0353104\.pth could not be downloaded") as error:
        query_side.build("mobilenet_v2", "imagenet")
    assert "\n" not in str(error.value) and error.value.__suppress_context__


@pytest.mark.parametrize("name", [*WRITTEN_OUT, "pocketnet"])
def test_what_torchvision_has_no_weights_for(name):
    source = "a state dict" if name == "pocketnet" else f"timm's {name} or of the authors' file"
    wanted = f"^{name} has no ImageNet weights in torchvision; give the path of {source}"
    with pytest.raises(ValueError, match=wanted):
        query_side.build(name, "imagenet")



AUTHORS = {  # how they name the parts that timm names otherwise; the order is the same
    "efficientvit_m2": {"stages.0.blocks": "blocks1", "stages.1": "blocks2", "stages.2": "blocks3",
                        ".conv.": ".c.", ".linear": ".l"},
    "mobilevitv2_100": {"stem": "conv_1", **{f"stages.{i}": f"layer_{i + 1}" for i in range(5)},
                        ".bn.": ".block.norm.", "head.fc": "classifier.1"},
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_the_authors_files(name, tmp_path):
    """EfficientViT's lies under "model" and holds its index buffers."""
    theirs = in_timm(name)
    state = {}
    for key, x in theirs.state_dict().items():
        for timms, authors in AUTHORS[name].items():
            key = key.replace(timms, authors)
        state[key] = x
        if key.endswith("attention_biases"):
            state[f"{key[:-2]}_idxs"] = torch.zeros(49, 49, dtype=torch.long)
    file = {"model": state} if name == "efficientvit_m2" else state
    assert_same_maps(query_side.build(name, save(file, tmp_path / "x.pth")), theirs, 128)

    lost = next(key for key in state if key.startswith(("blocks2", "layer_2")))
    del state[lost]
    with pytest.raises(ValueError, match=r"cut\.pth do not fit .* and \d+ more; give its own$"):
        query_side.build(name, save(file, tmp_path / "cut.pth"))
    state[lost] = torch.zeros(3, 5)  # last in order now, with all others moved up
    with pytest.raises(ValueError, match=r"order\.pth do not fit .* instead of .* and \d+ more"):
        query_side.build(name, save(file, tmp_path / "order.pth"))



def test_pocketnet_is_small_and_in_eval_mode_sees_one_image_at_a_time():
    torch.manual_seed(0)
    encoder, x = query_side.build("pocketnet"), pixels(64, 4)
    assert sum(p.numel() for p in encoder.parameters()) == 284_544
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
    """A silent block passes on what it was given."""
    encoder = liven(query_side.build("pocketnet"))
    for block in (encoder.block1, encoder.block2):
        for parameter in block[-1][-1].parameters():  # the last BatchNorm
            nn.init.zeros_(parameter)
    gelu, x = nn.functional.gelu, pixels(64)
    with torch.no_grad():
        expected = gelu(gelu(gelu(encoder.down(gelu(encoder.stem(x))))))
        torch.testing.assert_close(encoder(x), expected)



@pytest.fixture
def blip():
    """A small BLIP that is still in training."""
    sizes = dict(image_size=48, patch_size=16, image_width=128, image_depth=1, vocab_size=20,
                 max_positions=16, word_dim=64, text_depth=1, embed_dim=32)
    torch.manual_seed(0)
    blip = blip_lite.Blip(sizes, SimpleNamespace(enc_id=19))
    for parameter in (blip.visual_encoder.cls_token, blip.visual_encoder.pos_embed):
        nn.init.normal_(parameter)
    return blip


@pytest.mark.parametrize("name", ["blip", "blip-tuned"])
def test_blip_map_is_the_patch_tokens_in_their_places(blip, name):
    encoder = query_side.build(name, blip=blip, image_size=48)
    assert encoder.out_channels == 128 and encoder.image_size == 48
    x = pixels(48, 2)
    feature_map, F_v = encoder(x), blip.encode_image(x)[1]
    assert feature_map.shape == (2, 128, 3, 3)
    for place in range(9):
        assert torch.equal(feature_map[:, :, place // 3, place % 3], F_v[:, 1 + place])


def test_blip_feature_is_v(blip):
    encoder, x = query_side.build("blip-v", blip=blip), pixels(48, 2)
    assert encoder.out_channels == 32 and not encoder.state_dict()
    torch.testing.assert_close(encoder(x), blip.encode_image(x)[0].view(2, 32, 1, 1))


def test_blip_stays_frozen_and_out_of_the_query_model(blip):
    encoder = query_side.build("blip", blip=blip)
    mapper = isa.AdaptiveTokenLearner(encoder.out_channels, 64, width=16)
    model = isa.QueryModel(encoder, mapper)
    assert {id(p) for p in model.parameters()} == {id(p) for p in mapper.parameters()}
    assert set(model.state_dict()) == {f"mapper.{name}" for name in mapper.state_dict()}
    before = {name: x.clone() for name, x in blip.state_dict().items()}
    model.train()
    assert not any(module.training for module in blip.visual_encoder.modules())
    assert not encoder(pixels(48)).requires_grad
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pixels(48, 2)).square().sum().backward()
    optimizer.step()
    assert all(p.grad.any() for p in mapper.parameters())
    assert not any(p.requires_grad for p in blip.visual_encoder.parameters())
    assert all(torch.equal(before[name], x) for name, x in blip.state_dict().items())


def test_blip_needs_a_blip_of_its_size_and_nothing_else(blip):
    for settings in ({}, {"blip": blip, "pretrained": "imagenet"}):
        with pytest.raises(ValueError, match="give blip="):
            query_side.build("blip", **settings)
    wanted = '^image_size 64 is not possible for "blip": the loaded BLIP sees 48 px$'
    with pytest.raises(ValueError, match=wanted):
        query_side.build("blip", blip=blip, image_size=64)



@pytest.mark.parametrize("name", ["EfficientNet_B0", "", None])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ValueError, match=f"choose from {', '.join(query_side.NAMES)}$"):
        query_side.build(name)


@pytest.mark.parametrize("name", query_side.NAMES)
def test_every_encoder_says_how_many_channels_its_map_has(name, pocket_blip):
    """All that a mapper asks of an encoder, and all that preprocessing asks."""
    encoder = query_side.build(name, blip=pocket_blip if name.startswith("blip") else None).eval()
    photo = Image.fromarray(np.full((40, 90, 3), 128, np.uint8))
    seen = query_side.preprocess(encoder, photo)
    assert seen.shape == (3, encoder.image_size, encoder.image_size)
    with torch.no_grad():
        feature_map = encoder(torch.stack([seen, seen]))
    assert feature_map.dim() == 4 and len(feature_map) == 2, f"{name} gives {feature_map.shape}"
    assert encoder.out_channels == feature_map.shape[1], (
        f"{name}.out_channels is {encoder.out_channels}, its map has {feature_map.shape[1]}")
    x = pixels(encoder.image_size, 2)
    with torch.no_grad():
        both, alone = liven(encoder)(x), encoder(x[:1])
        assert not torch.equal(both[0], both[1]), f"{name} makes the same map of two images"
        far = (both[:1] - alone).abs().max() / both.abs().max()
        assert far < 1e-3, f"{name} mixes the images of a batch"
        if not name.startswith("blip"):
            query_side.build(name, image_size=96).eval()(pixels(96))  # --query-size


@pytest.mark.parametrize("image_size", [-224, 31, 1025, 224.0, "224", True])
def test_image_sizes_that_are_not_possible(image_size):
    wanted = f"^image_size {image_size} is not possible; .* 32 or more and at most 1024$"
    with pytest.raises(ValueError, match=wanted):
        query_side.build("efficientvit_m2", image_size=image_size)


BLIPS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENETS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("name, statistics, size, shape", [
    ("mobilenet_v2", IMAGENETS, 224, (1280, 3, 3)),
    ("efficientvit_m2", IMAGENETS, 224, (224, 2, 2)),
    ("mobilevitv2_100", ((0, 0, 0), (1, 1, 1)), 256, (512, 4, 4)),
    ("pocketnet", BLIPS, 64, (96, 12, 12)),
])
def test_preprocess_has_the_encoders_size_and_normalization(name, statistics, size, shape):
    """Its own size, or another, for which the shape is given."""
    pil = Image.new("RGB", (100, 50), (255, 0, 51))
    for given in (None, 96):
        encoder = query_side.build(name, image_size=given).eval()
        x = query_side.preprocess(encoder, pil)
        side = given or size
        assert encoder.image_size == side and x.dtype == torch.float32
        for channel, mean, std, value in zip(x, *statistics, (1.0, 0.0, 0.2), strict=True):
            wanted = np.full((side, side), (value - mean) / std)
            np.testing.assert_allclose(channel.numpy(), wanted, rtol=1e-5)
    assert encoder(x[None]).shape == (1, *shape)


@pytest.mark.parametrize("name", ["blip", "blip-tuned", "blip-v"])
def test_preprocess_for_blip_is_blips_own(blip, name):
    rng = np.random.default_rng(0)
    pil = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    encoder = query_side.build(name, blip=blip)
    assert torch.equal(query_side.preprocess(encoder, pil), blip.preprocess(pil))
