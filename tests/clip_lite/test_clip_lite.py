"""clip_lite against transformers' CLIP, TorchScript, torchvision. Weights are made up."""

import gzip
import json
import math
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from made_up import filled
from PIL import Image
from torch import nn
from torchvision import transforms

import benchmarks
import blip_lite
import clip_lite
import isa

WORDS = "#version: 0.2\nr e\nre d</w>\nc a\nca t</w>\n"
VOCAB_SIZE = 512 + 4 + 2


def config(act="quick_gelu", size=32, patch=8, depth=2, widths=(128, 64), heads=(2, 1), embed=48):
    transformers = pytest.importorskip("transformers")
    shared = {"num_hidden_layers": depth, "hidden_act": act}
    image = transformers.CLIPVisionConfig(
        image_size=size, patch_size=patch, hidden_size=widths[0], intermediate_size=4 * widths[0],
        num_attention_heads=heads[0], **shared)
    text = transformers.CLIPTextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=widths[1], intermediate_size=3 * widths[1],
        num_attention_heads=heads[1], eos_token_id=VOCAB_SIZE - 1, bos_token_id=VOCAB_SIZE - 2,
        **shared)
    return transformers.CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(),
                                   projection_dim=embed)


def hugging_face(folder, **sizes):
    """transformers' CLIP with made-up weights, saved to a folder, with a vocabulary."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.CLIPModel(config(**sizes)).eval()
    filled(model)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(1 / 0.05))
    for part in (model.vision_model, model.text_model):
        part.embeddings.position_ids = torch.arange(part.embeddings.position_ids.shape[-1])[None]
    model.save_pretrained(folder)
    (folder / "merges.txt").write_text(WORDS)
    return model


def openai(model):
    """Their state dict in the naming of OpenAI and open_clip, spelt out here on its own."""
    s, new = model.state_dict(), {}
    for theirs, tower in (("vision", "visual."), ("text", "")):
        for i in range(len(getattr(model, f"{theirs}_model").encoder.layers)):
            a, b = f"{theirs}_model.encoder.layers.{i}.", f"{tower}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                new[f"{b}ln_1.{kind}"] = s[f"{a}layer_norm1.{kind}"]
                new[f"{b}ln_2.{kind}"] = s[f"{a}layer_norm2.{kind}"]
                new[f"{b}attn.in_proj_{kind}"] = torch.cat(
                    [s[f"{a}self_attn.{letter}_proj.{kind}"] for letter in "qkv"])
                new[f"{b}attn.out_proj.{kind}"] = s[f"{a}self_attn.out_proj.{kind}"]
                new[f"{b}mlp.c_fc.{kind}"] = s[f"{a}mlp.fc1.{kind}"]
                new[f"{b}mlp.c_proj.{kind}"] = s[f"{a}mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        new[f"visual.ln_pre.{kind}"] = s[f"vision_model.pre_layrnorm.{kind}"]
        new[f"visual.ln_post.{kind}"] = s[f"vision_model.post_layernorm.{kind}"]
        new[f"ln_final.{kind}"] = s[f"text_model.final_layer_norm.{kind}"]
    image, text = "vision_model.embeddings.", "text_model.embeddings."
    return new | {
        "visual.class_embedding": s[f"{image}class_embedding"],
        "visual.positional_embedding": s[f"{image}position_embedding.weight"],
        "visual.conv1.weight": s[f"{image}patch_embedding.weight"],
        "visual.proj": s["visual_projection.weight"].T.contiguous(),
        "positional_embedding": s[f"{text}position_embedding.weight"],
        "token_embedding.weight": s[f"{text}token_embedding.weight"],
        "text_projection": s["text_projection.weight"].T.contiguous(),
        "logit_scale": s["logit_scale"],
    }


class Holder(nn.Module):
    """Modules and parameters under the dotted names of a state dict, for torch.jit."""

    def forward(self, x):
        return x


def torchscript(state, path):
    root = Holder()
    root.sizes = [3, 4]  # an attribute that is no tensor
    for name, x in state.items():
        *parents, last = name.split(".")
        module = root
        for part in parents:
            if not hasattr(module, part):
                module.add_module(part, Holder())
            module = getattr(module, part)
        if x.is_floating_point():
            module.register_parameter(last, nn.Parameter(x, requires_grad=False))
        else:
            module.register_buffer(last, x)
    torch.jit.script(root).save(str(path))


def difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@torch.no_grad()
def assert_same_as_transformers(clip, theirs, tolerance=1e-5):
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, clip.image_size, clip.image_size, generator=random)
    v, F_v = clip.encode_image(pixels)
    hidden = theirs.vision_model(pixels, interpolate_pos_encoding=True)
    assert difference(v, F.normalize(theirs.visual_projection(hidden.pooler_output))) < tolerance
    norm = theirs.vision_model.post_layernorm
    assert difference(F_v, norm(hidden.last_hidden_state)) < 3 * tolerance
    alone, cls = clip.encode_image(pixels, cls_only=True)
    assert difference(alone, v) < tolerance and difference(cls, F_v[:, :1]) < 3 * tolerance
    ids = torch.randint(0, VOCAB_SIZE - 2, (3, 77), generator=random)
    ids[:, 0] = VOCAB_SIZE - 2
    mask = torch.arange(77)[None] < torch.tensor([77, 5, 2])[:, None]
    ids[mask.sum(1)[:, None] - 1 == torch.arange(77)] = VOCAB_SIZE - 1
    ids = ids.where(mask, VOCAB_SIZE - 1)
    hidden = theirs.text_model(ids, mask.long()).pooler_output
    t = F.normalize(theirs.text_projection(hidden))
    assert difference(clip.encode_text(clip.embed_words(ids), mask.long()), t) < tolerance
    short = clip.encode_text(clip.embed_words(ids[1:, :5]), mask[1:, :5].long())
    assert difference(short, t[1:]) < tolerance, "padding matters"
    assert clip.temperature == pytest.approx(1 / theirs.logit_scale.exp().item(), rel=1e-4)


@pytest.mark.parametrize("sizes", [
    {}, {"act": "gelu"}, {"size": 48, "patch": 16, "widths": (192, 128), "heads": (3, 2)},
    {"widths": (160, 64), "heads": (2, 1), "act": "gelu", "embed": 160},  # heads of 80, as ViT-H
    {"widths": (64, 96), "heads": (1, 3), "depth": 1},
], ids=str)
def test_hugging_face_equals_transformers(tmp_path, sizes):
    model = hugging_face(tmp_path, **sizes)
    clip = clip_lite.load(tmp_path)
    assert_same_as_transformers(clip, model)
    assert (clip.word_dim, clip.embed_dim) == (model.config.text_config.hidden_size,
                                               model.config.projection_dim)
    assert not clip.training and not any(p.requires_grad for p in clip.parameters())
    other = clip_lite.load(tmp_path, image_size=64 if clip.image_size == 32 else 64)
    assert_same_as_transformers(other, model)
    assert other.fingerprint == clip.fingerprint.split("@")[0] + "@64"


def assert_squashed(clip):
    striped = Image.new("RGB", (96, 32), "black")
    striped.paste("white", (0, 0, 24, 32))
    (mean, *_), (std, *_) = clip.normalization
    row = clip.preprocess(striped)[0, 16] * std + mean
    assert row[:7].min() > 0.9 and row[10:].max() < 0.1 and len(row) == clip.image_size == 32


def test_hugging_face_without_center_crop(tmp_path):
    hugging_face(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_center_crop": false}')
    assert_squashed(clip_lite.load(tmp_path))


@pytest.mark.parametrize("act, quick", [("quick_gelu", True), ("gelu", False)])
def test_openclip_files(tmp_path, act, quick):
    from safetensors.torch import save_file

    model = hugging_face(tmp_path, act=act, widths=(160, 64))
    state, folder = openai(model), tmp_path / "open_clip"
    folder.mkdir()
    (folder / "merges.txt").write_text(WORDS)
    model_cfg = {"vision_cfg": {"width": 160, "head_width": 80}, "text_cfg": {"heads": 1}}
    model_cfg |= {"quick_gelu": True} if quick else {}
    look = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5], "resize_mode": None}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": look}))
    save_file(state, folder / "open_clip_model.safetensors")
    training = {"epoch": 3, "name": "x", "state_dict": {f"module.{k}": x for k, x in state.items()}}
    torch.save(training, folder / "epoch_3.pt")
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    for file in ("", "epoch_3.pt", "open_clip_pytorch_model.bin"):
        clip = clip_lite.load(folder / file)
        assert_same_as_transformers(clip, model)
    white = clip.preprocess(Image.new("RGB", (40, 32), "white"))
    assert white.mean((1, 2)).tolist() == pytest.approx([1, 2, 1])
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    other = clip_lite.load(folder / file)  # other statistics, so other features: none is reused
    assert other.fingerprint != clip.fingerprint
    white = other.preprocess(Image.new("RGB", (40, 32), "white"))
    plain = [(1 - m) / s for m, s in zip(blip_lite.MEAN, blip_lite.STD, strict=True)]
    assert white.mean((1, 2)).tolist() == pytest.approx(plain)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"resize_mode": "squash"}}))
    assert_squashed(clip_lite.load(folder))
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"resize_mode": "longest"}}))
    with pytest.raises(ValueError, match="open_clip_config.json is not the configuration"):
        clip_lite.load(folder)
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match="epoch_3.pt: GELU or QuickGELU.*open_clip_config.json"):
        clip_lite.load(folder / "epoch_3.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_openai_torchscript_archive(tmp_path, dtype, monkeypatch):
    model = hugging_face(tmp_path / "hf", widths=(128, 128), heads=(2, 2))
    state = {k: x.to(dtype) for k, x in openai(model).items()}
    extra = {k: torch.tensor(n) for k, n in (("input_resolution", 32), ("context_length", 77),
                                             ("vocab_size", VOCAB_SIZE))}
    path = tmp_path / "ViT.pt"
    torchscript(state | extra, path)
    monkeypatch.setattr(torch.jit, "load", None)  # no code runs
    clip = clip_lite.load(path, vocab=tmp_path / "hf/merges.txt")
    if dtype == torch.float16:
        model.load_state_dict({k: x.half().float() for k, x in model.state_dict().items()})
    assert_same_as_transformers(clip, model)


class Evil:
    def __reduce__(self):
        return open, ("executed", "w")


def test_torchscript_archive_that_wants_more_than_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="x.pt is damaged, or wants to run code"):
        clip_lite.load("x.pt")
    torchscript({"a.b": torch.rand(8, 8)}, "y.pt")
    data = (tmp_path / "y.pt").read_bytes()
    (tmp_path / "y.pt").write_bytes(data[: len(data) // 2] + data[-300:])
    with pytest.raises(ValueError, match="y.pt"):
        clip_lite.load("y.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [(32, 32), (80, 47), (47, 80), (333, 100), (31, 17), (5, 40)])
@pytest.mark.parametrize("side", [32, 47])
def test_preprocess_is_that_of_openai(size, side):
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    pil = small.resize(size, Image.Resampling.BICUBIC)
    theirs = transforms.Compose([
        transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(side), transforms.ToTensor(),
        transforms.Normalize(blip_lite.MEAN, blip_lite.STD)])(pil)
    statistics = blip_lite.MEAN, blip_lite.STD
    ours = blip_lite.to_pixels(pil, side, *statistics, clip_lite.clip.to_square)
    assert ours.dtype == torch.float32 and ours.shape == (3, side, side)
    assert difference(ours, theirs) < 1e-6


def test_preprocess_of_an_endless_strip():
    strip = Image.new("RGB", (60_000, 1), "black")
    strip.paste("white", (29_990, 0, 30_010, 1))
    assert clip_lite.clip.to_square(strip, 224).min() > 200


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    hugging_face(folder)
    return clip_lite.load(folder)


def test_composed_query(small):
    """start prompt u1 u2 that modifier end; t is that of the end token."""
    U = torch.randn(2, 2, small.word_dim, generator=torch.Generator().manual_seed(0))
    words, mask = isa.compose_query(small, U, ["red", "a cat"], prompt="cat")
    ids, _ = small.tokenize(["cat that red", "cat that a cat"])
    rows = small.embed_words(ids)
    assert mask.sum(1).tolist() == [rows.shape[1] + 2 - 1, rows.shape[1] + 2]
    for i, row in enumerate(rows):
        whole = torch.cat([row[:2], U[i], row[2:]])[None]
        whole = whole[:, : mask[i].sum()]
        t = small.encode_text(whole, torch.ones(whole.shape[:2], dtype=torch.int64))
        assert difference(small.encode_text(words, mask)[i], t[0]) < 1e-6


def test_gradient_reaches_the_words_but_not_the_padding(small):
    ids, mask = small.tokenize(["red cat cat", "cat"])
    words = small.embed_words(ids).requires_grad_()
    t = small.encode_text(words, mask)
    (grad,) = torch.autograd.grad(t[:, 0].sum(), words)
    assert torch.equal(grad.norm(dim=-1) > 0, mask.bool())
    with torch.no_grad():
        assert difference(small.encode_text(words, mask), t) < 1e-6  # the other form of attention
    with torch.autocast("cpu", torch.bfloat16):
        half = small.encode_text(words, mask)
    assert half.dtype == torch.float32 and (half * t).sum(1).min() > 0.99


def test_a_longer_text_is_an_error(small):
    for count, error in ((75, False), (76, True)):
        ids, mask = small.tokenize(["red " * count])
        assert ids.shape == (1, count + 2)
        if error:
            with pytest.raises(ValueError, match="78 tokens is longer than CLIP's 77 positions"):
                small.encode_text(small.embed_words(ids), mask)
        else:
            small.encode_text(small.embed_words(ids), mask)


def test_no_matching(small):
    U, v = torch.randn(3, 1, small.word_dim), torch.randn(3, small.embed_dim)
    words, mask = isa.compose_query(small, U)
    t = small.encode_text(words, mask)
    with pytest.raises(ValueError, match="CLIP has no matching encoder.*--loss gcd"):
        isa.local_alignment_regularization(small, words, mask, None, v, t)
    with pytest.raises(ValueError, match="--rerank: Clip has no matching head.*leave --rerank out"):
        benchmarks.check_reranking(small, 5, {"cirr": 100})


def spoilt(change):
    def make(folder):
        state = torch.load(folder / "all.bin", weights_only=True)
        change(state)
        torch.save(state, folder / "all.bin")
    return make


def rewritten(name, change):
    def make(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
    return make


LAYER = "vision_model.encoder.layers.0."


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "config.json").unlink(), "QuickGELU.*config.json"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json is not the configuration"),
    (rewritten("config.json", lambda c: c["vision_config"].update(hidden_act="relu")),
     "config.json is not the configuration"),
    (rewritten("config.json", lambda c: c["vision_config"].update(hidden_act="gelu")),
     "config.json is not the configuration"),  # not the same in both
    (rewritten("config.json", lambda c: c["vision_config"].update(num_attention_heads=3)),
     "all.bin: a width of 128 cannot be shared among 3 heads"),
    (rewritten("config.json", lambda c: c["text_config"].update(num_attention_heads=0)),
     "among 0 heads"),
    (rewritten("config.json", lambda c: c["vision_config"].update(num_attention_heads=1e400)),
     "config.json is not the configuration"),
    (lambda f: (f / "preprocessor_config.json").write_text('{"image_mean": [0.5]}'),
     "config.json is not the configuration"),
    (lambda f: (f / "merges.txt").unlink(), "no bpe_simple_vocab.* or merges.txt beside .*all.bin"),
    (lambda f: (f / "merges.txt").write_text("a b\n"), "515 tokens, but the weights know 518"),
    (spoilt(lambda s: s.pop(LAYER + "mlp.fc1.bias")),
     "all.bin: keys do not fit a CLIP.*1 missing: visual_encoder.blocks.0.fc1.bias"),
    (spoilt(lambda s: s.pop(LAYER + "self_attn.k_proj.bias")), "missing: visual_encoder.*qkv.bias"),
    (spoilt(lambda s: s.update(new=torch.zeros(1))), "1 unexpected: new"),
    (spoilt(lambda s: s.update(logit_scale=torch.zeros(2))), r"another shape: temp \[2\]"),
    (spoilt(lambda s: s[LAYER + "mlp.fc1.bias"].fill_(torch.nan)), "NaN or infinity in visual"),
    (spoilt(lambda s: s.pop("vision_model.embeddings.patch_embedding.weight")), "not a CLIP with"),
    (lambda f: torch.save(torch.load(ROOT / "pocket/blip.pth"), f / "all.bin"),
     "all.bin holds a BLIP, not a CLIP; give it with --blip"),
    (lambda f: (f / "all.bin").write_bytes(b""), "all.bin is empty"),
])
def test_wrong_files_are_one_sentence(small_folder, spoil, message):
    spoil(small_folder)
    with pytest.raises(ValueError, match=message) as error:
        clip_lite.load(small_folder / "all.bin")
    assert "\n" not in str(error.value)


@pytest.fixture
def small_folder(tmp_path):
    model = hugging_face(tmp_path)
    torch.save(model.state_dict(), tmp_path / "all.bin")
    return tmp_path


def test_a_clip_given_as_a_blip(small_folder, tmp_path):
    model = hugging_face(tmp_path)
    torch.save(openai(model), tmp_path / "openai.bin")
    torchscript(openai(model), tmp_path / "script.pt")
    for file in ("all.bin", "openai.bin", ROOT / "pocket/clip.pth"):
        with pytest.raises(ValueError, match="holds a CLIP .* not a BLIP; give it with --clip"):
            blip_lite.load(tmp_path / file)
    with pytest.raises(ValueError, match="script.pt is a TorchScript archive; a CLIP goes to --cl"):
        blip_lite.load(tmp_path / "script.pt")


def test_compressed_and_plain_vocabularies_are_the_same(tmp_path):
    (tmp_path / "merges.txt").write_text(WORDS)
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress((WORDS + "r e</w>\n").encode()))
    a, b = (clip_lite.Tokenizer(tmp_path / name, 518) for name in ("merges.txt", "bpe.txt.gz"))
    assert a.vocab == b.vocab and list(a.vocab)[:512:256] == ["!", "!</w>"]
    assert list(a.vocab)[-3:] == ["cat</w>", "<|startoftext|>", "<|endoftext|>"]


