"""blip_lite against transformers' BLIP, the official checkpoints' keys, torchvision, safetensors.

Weights are made up. Models have the real widths; one, with the official keys, has the real depth.
"""

import hashlib
import io
import json
import re
import string

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, with_large_weights
from made_up import filled, hugging_face, inputs, weights
from PIL import Image, ImageOps
from torchvision import transforms

import blip_lite
from blip_lite.checkpoint import _our_name, read_safetensors
from blip_lite.vit import attention

LETTERS = string.ascii_lowercase
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{c}" for c in LETTERS)]


@pytest.fixture(scope="session")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n")
    return path


def difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@torch.no_grad()
def assert_same_as_transformers(blip, theirs):
    pixels, ids, mask = inputs(blip)
    v, F_v = blip.encode_image(pixels)
    resized = {"interpolate_pos_encoding": True}  # where the image is of another size
    F_v_theirs = theirs.vision_model(pixels, **resized).last_hidden_state
    assert difference(F_v, F_v_theirs) < 2e-5
    assert difference(v, F.normalize(theirs.vision_proj(F_v_theirs[:, 0]), dim=-1)) < 2e-6

    words = blip.embed_words(ids)
    hidden = theirs.text_encoder(ids, mask).last_hidden_state[:, 0]
    t = F.normalize(theirs.text_proj(hidden), dim=-1)
    assert difference(blip.encode_text(words, mask), t) < 2e-6

    enc_ids = ids.clone()
    enc_ids[:, 0] = blip.tokenizer.enc_id  # as the official code does; transformers leaves it to us
    logits = theirs(enc_ids, pixels, attention_mask=mask, use_itm_head=True, **resized).itm_score
    assert difference(blip.match(words, mask, F_v), logits) < 1e-5
    assert logits.std(0).min() > 0.01, "these made-up weights could not tell a wrong matching head"


# ---- the networks ----


@torch.no_grad()
def test_savings_change_no_value(pocket_blip):
    """cls_only is the first row of F^v; texts that share an image get what they would get alone."""
    pixels, ids, mask = inputs(pocket_blip)
    v, F_v = pocket_blip.encode_image(pixels)
    alone, cls = pocket_blip.encode_image(pixels, cls_only=True)
    assert difference(alone, v) < 1e-6 and difference(cls, F_v[:, :1]) < 1e-5
    rows = torch.tensor([2, 0, 2])
    words = pocket_blip.embed_words(ids)
    shared = pocket_blip.match(words, mask, F_v, rows)
    assert difference(shared, pocket_blip.match(words, mask, F_v[rows])) < 1e-5
    assert difference(shared, pocket_blip.match(words, mask, F_v)) > 0.01


def test_fused_and_explicit_attention_agree():
    """Without a gradient PyTorch's fused kernel runs, with one the explicit form."""
    q, k, v = torch.randn(3, 2, 5, 128, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    for m in (None, mask):
        with torch.no_grad():
            fused = attention(q, k, v, m)
        assert difference(fused, attention(q.clone().requires_grad_(), k, v, m).detach()) < 1e-6


@pytest.fixture(scope="module")
def small(vocab, tmp_path_factory):
    """transformers' BLIP of two layers at 224 px, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("hugging_face")
    model = filled(hugging_face(224, 2, len(TOKENS) + 2))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_bytes(vocab.read_bytes())
    return model, folder


@pytest.fixture(scope="module")
def blip(small):
    return blip_lite.load(small[1])


def test_384_px_equals_transformers(vocab, tmp_path):
    model = filled(hugging_face(384, 1, len(TOKENS) + 2), seed=3)
    model.save_pretrained(tmp_path)
    blip = blip_lite.load(tmp_path / "model.safetensors", vocab=vocab)
    assert blip.encode_image(torch.zeros(1, 3, 384, 384))[1].shape == (1, 577, 768)
    assert_same_as_transformers(blip, model)


def test_frozen_and_described(blip):
    assert not blip.training and not any(p.requires_grad for p in blip.parameters())
    assert {p.dtype for p in blip.parameters()} == {torch.float32}
    assert (blip.image_size, blip.word_dim, blip.embed_dim) == (224, 768, 256)
    assert blip.temperature == pytest.approx(0.07)  # transformers' file has none


def test_position_zero_of_words_does_not_matter_to_matching(blip):
    pixels, ids, mask = inputs(blip)
    words, F_v = blip.embed_words(ids), blip.encode_image(pixels)[1]
    other = torch.cat([words[:, :1] + 1, words[:, 1:]], dim=1)
    assert torch.equal(blip.match(words, mask, F_v), blip.match(other, mask, F_v))
    assert not torch.equal(blip.encode_text(words, mask), blip.encode_text(other, mask))


def test_padding_does_not_matter(blip):
    (ids, mask), F_v = blip.tokenize(["a b c", "a"]), blip.encode_image(inputs(blip, 2)[0])[1]
    assert ids.tolist()[1] == [2, 4, 3, 0, 0]
    a = blip.embed_words(ids), mask
    b = blip.embed_words(F.pad(ids, (0, 6))), F.pad(mask, (0, 6))
    assert difference(blip.encode_text(*a), blip.encode_text(*b)) < 2e-6
    assert difference(blip.match(*a, F_v), blip.match(*b, F_v)) < 1e-5


def test_gradient_reaches_the_words_and_not_blip(blip):
    pixels, ids, mask = inputs(blip)
    words = blip.embed_words(ids).clone().requires_grad_()
    v, F_v = blip.encode_image(pixels)
    (grad,) = torch.autograd.grad((blip.encode_text(words, mask) * v).sum(), words)
    assert torch.equal(grad.norm(dim=-1) > 0, mask.bool())  # every token, and no padding
    (grad,) = torch.autograd.grad(blip.match(words, mask, F_v)[:, 1].sum(), words)
    mask[:, 0] = 0  # [ENC] has replaced this one
    assert torch.equal(grad.norm(dim=-1) > 0, mask.bool())
    blip.encode_text(words, mask).sum().backward()
    assert all(p.grad is None for p in blip.parameters())


def test_autocast_to_bfloat16(blip):
    pixels, ids, mask = inputs(blip)
    words = blip.embed_words(ids).clone().requires_grad_()
    v, F_v = blip.encode_image(pixels)
    t, logits = blip.encode_text(words, mask), blip.match(words, mask, F_v)
    with torch.autocast("cpu", torch.bfloat16):
        v16, F_v16 = blip.encode_image(pixels)
        t16, logits16 = blip.encode_text(words, mask), blip.match(words, mask, F_v16)
    assert v16.dtype == t16.dtype == logits16.dtype == torch.float32
    assert (v * v16).sum(-1).min() > 0.99 and (t * t16).sum(-1).min() > 0.99
    assert difference(logits, logits16) < 0.1 * logits.abs().max()
    (t16.sum() + logits16.sum()).backward()
    assert words.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_equals_the_cpu(blip, small):
    cuda = blip_lite.load(small[1], device="cuda")
    pixels, ids, mask = inputs(blip)
    v, F_v = blip.encode_image(pixels)
    v_cuda, F_v_cuda = cuda.encode_image(pixels.cuda())
    assert difference(v, v_cuda.cpu()) < 1e-4
    assert all(x.is_cuda for x in cuda.tokenize(["a b"]))
    words = cuda.embed_words(ids.cuda())
    logits = cuda.match(words, mask.cuda(), F_v_cuda)
    assert difference(blip.match(blip.embed_words(ids), mask, F_v), logits.cpu()) < 1e-3


def test_inputs_of_a_wrong_size_are_named(blip):
    with pytest.raises(ValueError, match=r"should be \[B, 3, 224, 224\], not \[1, 3, 384, 384\]"):
        blip.encode_image(torch.zeros(1, 3, 384, 384))
    with pytest.raises(ValueError, match=r"not \[3, 224, 224\]"):
        blip.encode_image(torch.zeros(3, 224, 224))
    ids, mask = blip.tokenize(["a " * 511])
    with pytest.raises(ValueError, match="513 tokens .* 512 positions"):
        blip.encode_text(blip.embed_words(ids), mask)


# ---- the official checkpoints ----


def official(name):
    path = DATA / "blip" / f"keys_{name}.json"
    if not path.is_file() or not (DATA / "bert" / "vocab.txt").is_file():
        pytest.skip(f"no list of the official keys at {path}, or no vocabulary; set ISA_SHARED")
    keys = json.loads(path.read_text())["keys"]
    return {key: (torch.Size(shape), getattr(torch, dtype)) for key, shape, dtype in keys}


@pytest.mark.parametrize("name, wrapped", [("pretrain", True), ("retrieval", False)])
def test_official_keys_at_the_real_size(name, wrapped, tmp_path):
    """The keys, shapes and dtypes of the official file; what ISA ignores is zeros."""
    keys = official(name)
    unused = re.compile(r".*(_m\.|queue|position_ids|text_decoder)")
    used = {key: shape for key, (shape, _) in keys.items() if not unused.match(key)}
    state = weights(used) | {"temp": torch.tensor(0.05)}
    rest = {key: torch.zeros((), dtype=dtype).expand(shape)
            for key, (shape, dtype) in keys.items() if key not in used}
    assert len(state | rest) == len(keys)
    path = tmp_path / f"{name}.pth"
    torch.save({"model": state | rest, "epoch": 19} if wrapped else state | rest, path)

    blip = blip_lite.load(path, vocab=DATA / "bert" / "vocab.txt")
    assert blip.image_size == {"pretrain": 224, "retrieval": 384}[name]
    assert blip.temperature == pytest.approx(0.05)
    assert (len(blip.visual_encoder.blocks), len(blip.text_encoder.encoder.layer)) == (12, 12)
    assert set(blip.state_dict()) == set(used)
    if name == "pretrain":
        theirs = hugging_face(224, 12, 30524)
        renamed = {key: state[_our_name(key)] for key in theirs.state_dict()}
        theirs.load_state_dict(renamed, assign=True)
        theirs.text_encoder.embeddings.position_ids = torch.arange(512)[None]
        theirs.vision_model.embeddings.position_ids = torch.arange(197)[None]
        assert_same_as_transformers(blip, theirs)
    else:
        assert torch.equal(blip.itm_head.weight, state["itm_head.weight"])


def test_large_is_read_off_the_shapes():
    """ViT-L: 24 blocks of width 1024, read by a text encoder of width 768."""
    shapes = {
        "visual_encoder.pos_embed": (1, 197, 1024),
        "visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
        "text_encoder.embeddings.word_embeddings.weight": (30524, 768),
        "text_encoder.embeddings.position_embeddings.weight": (512, 768),
        "vision_proj.weight": (256, 1024),
    } | {f"visual_encoder.blocks.{i}.norm1.bias": (1024,) for i in range(24)}
    shapes |= {f"text_encoder.encoder.layer.{i}.attention.self.key.bias": (768,) for i in range(12)}
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert blip_lite.infer_sizes(state, 384) == {
        "image_size": 384, "patch_size": 16, "stem": False, "image_width": 1024, "image_depth": 24,
        "vocab_size": 30524, "max_positions": 512, "word_dim": 768, "text_depth": 12,
        "embed_dim": 256,
    }
    with torch.device("meta"):
        blip = blip_lite.Blip(blip_lite.infer_sizes(state), None)
    layer = blip.text_encoder.encoder.layer[0]
    assert layer.crossattention.self.key.weight.shape == (768, 1024)
    assert layer.attention.self.key.weight.shape == (768, 768)
    numbers = sum(p.numel() for p in blip.visual_encoder.parameters())
    assert numbers == 303_301_632  # ViT-L/16 without its classifier


# ---- another image size ----


@pytest.mark.parametrize("size", [192, 224, 288])
def test_position_embeddings_are_resized_as_in_transformers(small, size):
    """At 224 px they are as stored."""
    other = blip_lite.load(small[1], image_size=size)
    assert other.visual_encoder.pos_embed.shape == (1, 1 + (size // 16) ** 2, 768)
    assert_same_as_transformers(other, small[0])
    sha256 = hashlib.sha256((small[1] / "model.safetensors").read_bytes()).hexdigest()
    assert other.fingerprint == f"{sha256[:16]}@{size}"


@pytest.mark.parametrize("size", [225, 8, 0, 224.5])
def test_image_size_has_to_fit_the_patches(small, size):
    with pytest.raises(ValueError, match=f"size {size} is not a multiple of the patch size 16"):
        blip_lite.load(small[1], image_size=size)


# ---- files of weights: a tiny BLIP of the pocket's kind ----

SIZES = {
    "image_size": 32, "patch_size": 8, "image_width": 64, "image_depth": 1, "max_positions": 32,
    "vocab_size": len(TOKENS) + 2, "word_dim": 64, "text_depth": 2, "embed_dim": 16,
}


@pytest.fixture(params=[False, True], ids=["patches", "stem"])
def either(vocab, request):
    torch.manual_seed(0)
    return blip_lite.Blip(SIZES | {"stem": request.param}, blip_lite.Tokenizer(vocab)).eval()


@pytest.fixture
def tiny(vocab):
    torch.manual_seed(0)
    return blip_lite.Blip(SIZES, blip_lite.Tokenizer(vocab)).eval()


def assert_same_weights(a, b, tolerance=0.0):
    a, b = a.state_dict(), b.state_dict()
    assert set(a) == set(b)
    for name in a:
        assert difference(a[name], b[name]) <= tolerance, name


def test_save_and_load(either, vocab, tmp_path):
    with torch.no_grad():
        either.temp.fill_(0.02)
    path = tmp_path / "blip.pth"
    blip_lite.save(either, path)
    stored = torch.load(path, weights_only=True)["model"]
    assert {t.dtype for name, t in stored.items() if name != "temp"} == {torch.float16}
    loaded = blip_lite.load(path, vocab=vocab)
    assert_same_weights(either, loaded, tolerance=2e-3)
    assert loaded.temperature == either.temperature
    pixels = inputs(loaded)[0]
    assert difference(loaded.encode_image(pixels)[0], either.encode_image(pixels)[0]) < 0.01
    with open(tmp_path / "again.pth", "wb") as file:
        blip_lite.save(loaded, file)
    assert_same_weights(loaded, blip_lite.load(tmp_path / "again.pth", vocab=vocab))
    parallel = {f"module.{name}": x for name, x in loaded.state_dict().items()}
    for state in ({"state_dict": parallel, "epoch": 3}, {"model": parallel}, parallel):
        torch.save(state, tmp_path / "parallel.pth")
        assert_same_weights(loaded, blip_lite.load(tmp_path / "parallel.pth", vocab=vocab))


def test_all_hugging_face_files_give_the_same_weights(blip, small, vocab, tmp_path):
    model = small[0]
    model.save_pretrained(tmp_path / "shards", max_shard_size="30MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    state = model.state_dict()
    state["text_encoder.embeddings.position_ids"] = torch.arange(512)[None]  # as in older files
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    bins = tmp_path / "bins"
    bins.mkdir()
    shards = {name: f"pytorch_model-{1 + i % 2}.bin" for i, name in enumerate(state)}
    for shard in set(shards.values()):
        torch.save({k: x for k, x in state.items() if shards[k] == shard}, bins / shard)
    index = bins / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)  # PyTorch 1.5
    for source in ("shards", "bin", "bins", "bin/pytorch_model.bin", "old.bin"):
        loaded = blip_lite.load(tmp_path / source, vocab=vocab)
        assert_same_weights(loaded, blip)
        assert loaded.fingerprint != blip.fingerprint
    (bins / "pytorch_model-1.bin").unlink()
    with pytest.raises(ValueError, match="lists pytorch_model-1.bin, which is not there"):
        blip_lite.load(bins, vocab=vocab)
    index.write_text(json.dumps({"weight_map": shards | {"vision_proj.bias": "../old.bin"}}))
    with pytest.raises(ValueError, match="not an index"):
        blip_lite.load(bins, vocab=vocab)


def test_loaded_weights_outlive_their_file(tiny, vocab, tmp_path):
    path = tmp_path / "blip.pth"
    torch.save(tiny.state_dict(), path)
    blip = blip_lite.load(path, vocab=vocab)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_weights(blip, tiny)


def test_wrong_keys_are_listed_in_one_error(tiny, vocab, tmp_path):
    state = tiny.state_dict()
    del state["itm_head.bias"], state["text_encoder.encoder.layer.1.output.dense.weight"]
    state["visual_encoder.norm.bias"] = torch.zeros(65)
    state["classifier.weight"] = torch.zeros(3)
    state |= {f"extra.{i}": torch.zeros(1) for i in range(20)}
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError) as error:
        blip_lite.load(tmp_path / "odd.pth", vocab=vocab)
    message = str(error.value)
    for part in (
        "2 missing: ", "itm_head.bias", "layer.1.output.dense.weight", "21 unexpected: ",
        "classifier.weight", "extra.8", "1 of another shape: ", "norm.bias [65] instead of [64]",
    ):
        assert part in message
    assert "extra.9" not in message


@pytest.mark.parametrize("change, message", [
    ({"visual_encoder.pos_embed": (1, 18, 64)}, "18 tokens are not a square grid"),
    ({"visual_encoder.pos_embed": (1, 17, 96)}, "image encoder is 96 wide, not a multiple of"),
    ({"text_encoder.embeddings.word_embeddings.weight": (58, 99)}, "text encoder is 99 wide"),
    ({"visual_encoder.pos_embed": (17, 64)}, "pos_embed is missing or of another kind"),
    ({"vision_proj.weight": None, "vision_proj_m.weight": (16, 64)}, "proj.weight is missing"),
])
def test_sizes_of_no_blip(tiny, vocab, tmp_path, change, message):
    """The last one has a momentum copy, which does not stand in for the model."""
    state = tiny.state_dict()
    for name, shape in change.items():
        state[name] = shape and torch.zeros(shape)
    torch.save({name: x for name, x in state.items() if x is not None}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=message):
        blip_lite.load(tmp_path / "odd.pth", vocab=vocab)


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("content, message", [
    (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    (b"some text", "damaged or not a file of PyTorch weights"),
    (pickled([1, 2]), "holds no state dict"),
    (pickled({}), "holds no state dict"),
    (pickled({"epoch": 3, "x": torch.zeros(1)}), "holds epoch, not tensors"),
])
def test_what_is_no_file_of_weights_is_one_sentence(vocab, tmp_path, content, message):
    """tests/test_bad_inputs.py has more of them."""
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        blip_lite.load(path, vocab=vocab)
    assert "weights.pth" in str(error.value) and "\n" not in str(error.value)


def test_the_vocabulary_lies_beside_the_weights(tiny, tmp_path):
    path = tmp_path / "blip.pth"
    torch.save(tiny.state_dict(), path)
    (tmp_path / "vocab.txt").write_text("\n".join([*TOKENS, "dog"]))
    with pytest.raises(ValueError, match="vocab.txt has 57 tokens, 59 with .*blip.pth has 58 word"):
        blip_lite.load(path)
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS))
    assert blip_lite.load(path).tokenizer.vocab_size == 58


# ---- safetensors ----


def test_safetensors_equal_the_package(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    tensors = {
        "f32": torch.randn(3, 4, 5), "f64": torch.randn(2).double(), "f16": torch.randn(7).half(),
        "bf16": torch.randn(2, 2).bfloat16(), "i64": torch.arange(5), "i32": torch.arange(5).int(),
        "u8": torch.arange(3).byte(), "flag": torch.tensor([True, False]), "ü": torch.ones(1),
        "empty": torch.zeros(0, 3), "number": torch.tensor(0.07),
    }
    path = tmp_path / "x.safetensors"
    safetensors.save_file(tensors, path, metadata={"format": "pt"})
    ours = read_safetensors(path)
    assert set(ours) == set(tensors)
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def file_of(header, data=b"\0" * 16, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGED = [
    b"\1\2\3", file_of(entry())[:40], file_of(entry(), length=0), file_of(entry(), length=2**63),
    file_of(entry(), data=b"\0" * 15), file_of(entry(dtype="F31")), file_of(entry(dtype=["F32"])),
    *(file_of(entry(shape=shape)) for shape in ((5,), (-4,), (-2, -2), (4.0,), 4, (True, 4))),
    *(file_of(entry(offsets=at)) for at in ((16, 32), (16, 0), (-16, 0), (0, 16, 32))),
    file_of(entry() | {"y": entry(shape=(2,), offsets=(8, 16))["x"]}),
    *map(file_of, ({"x": {"dtype": "F32"}}, {"x": 3}, [1, 2], b"{", b"\xff\xfe{}", b"[" * 100_000)),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_safetensors_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(entry()))
    assert torch.equal(read_safetensors(path)["x"], torch.zeros(4))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.safetensors is damaged or not a .safet") as error:
        read_safetensors(path)
    assert "\n" not in str(error.value)


# ---- preprocessing ----


def picture(width, height, mode="RGB"):
    """Smooth colours, different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + 255 - y) / 2], -1).astype(np.uint8)).convert(mode)


def pixels_of(pil, size=48):
    return blip_lite.to_pixels(pil, size, blip_lite.MEAN, blip_lite.STD)


@pytest.mark.parametrize("size", [(100, 60), (30, 31), (48, 48), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA", "CMYK", "P", "LA", "YCbCr", "HSV"])
def test_pixels_equal_torchvision(mode, size):
    pil = picture(*size, mode)
    theirs = transforms.Compose([
        transforms.Resize((48, 48), transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(blip_lite.MEAN, blip_lite.STD),
    ])(pil.convert("RGB"))
    ours = pixels_of(pil)
    assert ours.dtype == torch.float32 and ours.is_contiguous() and torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture(90, 60).save(file, kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(file))
    assert torch.equal(pixels_of(Image.open(file)), pixels_of(Image.fromarray(np.array(upright))))
    again = blip_lite.to_rgb(Image.open(file))  # as search.py and the training images call it
    assert torch.equal(pixels_of(again), pixels_of(Image.open(file)))
    assert again.size == upright.size and again.tobytes() == blip_lite.to_rgb(again).tobytes()
    stored = pixels_of(Image.fromarray(np.array(Image.open(file))))
    assert torch.equal(stored, pixels_of(Image.open(file))) == (orientation == 1)


def test_damaged_exif_is_ignored_and_a_truncated_file_is_not():
    file = io.BytesIO()
    picture(90, 60).save(file, "PNG", exif=b"Exif\0\0II nonsense")
    assert torch.equal(pixels_of(Image.open(file)), pixels_of(picture(90, 60)))
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(file, kind)
        with pytest.raises(OSError):
            pixels_of(Image.open(io.BytesIO(file.getvalue()[:2000])))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode):
    grey = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    pil = Image.open(file) if mode == "I;16" else Image.fromarray(grey.astype(np.int32))
    renamed = tuple(map(int, Image.__version__.split(".")[:2])) >= (10, 3)  # before, "I" for both
    assert pil.mode.startswith(mode if renamed else "I")
    expected = torch.from_numpy(grey / 65535).float().expand(3, -1, -1)
    expected = transforms.functional.normalize(expected, blip_lite.MEAN, blip_lite.STD)
    assert difference(pixels_of(pil), expected) < 0.02
    grey = picture(48, 48, "L")  # 8-bit values in a 32-bit mode stay as they are
    assert torch.equal(pixels_of(grey.convert("I")), pixels_of(grey))


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_grey_of_floats_is_scaled_by_its_range(white):
    grey = np.linspace(0, 1, 48 * 48, dtype=np.float32).reshape(48, 48)
    expected = torch.from_numpy(grey.copy())
    grey = grey * white
    grey[0, :2] = np.nan, np.inf  # become black
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "TIFF")
    expected = transforms.functional.normalize(
        expected.expand(3, -1, -1), blip_lite.MEAN, blip_lite.STD)
    assert difference(pixels_of(Image.open(file)), expected) < 0.02


def test_attention_maps_equal_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=512, attn_implementation="eager", type_vocab_size=1,
    )
    theirs = with_large_weights(transformers.BertModel(config))
    torch.nn.init.zeros_(theirs.embeddings.token_type_embeddings.weight)
    ours = blip_lite.bert.TextEncoder(50, 512, 128, 3, 64)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    words = torch.randn(3, 9, 128)
    mask = (torch.arange(9)[None] < torch.tensor([9, 5, 7])[:, None]).long()
    maps = ours.attention_maps(words, mask)
    want = theirs(inputs_embeds=words, attention_mask=mask, output_attentions=True).attentions
    torch.testing.assert_close(maps, torch.stack(want, dim=1), atol=1e-5, rtol=0)
    assert maps[1, ..., 5:].abs().max() == 0  # padding is not looked at
    assert maps.std(dim=-1).mean() > 0.05  # and they are not flat
