"""From files of weights to a frozen Blip, and back.

Three kinds of source become one state dict in Salesforce's naming: Salesforce's own .pth, Hugging Face's
BlipForImageTextRetrieval (.bin or .safetensors, in one file or in shards), and the pocket BLIP of this repository.
"""

import hashlib
import itertools
import json
import math
import os
import pickle
import re
from pathlib import Path

import torch

from .blip import Blip
from .tokenizer import Tokenizer
from .vit import HEAD_WIDTH, resize_position_embedding

MOST_PIXELS = 1024  # a side of an image; BLIP was made for 224 and 384
POCKET = Path(__file__).resolve().parents[1] / "pocket"
HUGGING_FACE_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip

# What else the official files hold, and why ISA has no use for it
UNUSED = re.compile(
    r"\w+_m\.|"  # the momentum copies of the encoders and projections, teachers of BLIP's own pre-training
    r"(image|text|idx)_queue$|(queue_ptr|ptr_queue)$|"  # its queues of negatives; names differ between the two scripts
    r"text_decoder\.|"  # the captioner
    r".*\.position_ids$"  # 0, 1, 2, ...: a constant that older transformers saved
)
HUGGING_FACE = {  # how Hugging Face names the parts of the visual encoder; its text encoder keeps Salesforce's names
    "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
    "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
    "vision_model.embeddings.patch_embedding.": "visual_encoder.patch_embed.proj.",
    "vision_model.encoder.layers.": "visual_encoder.blocks.",
    "vision_model.post_layernorm.": "visual_encoder.norm.",
    ".self_attn.qkv.": ".attn.qkv.",
    ".self_attn.projection.": ".attn.proj.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
}
SIZED_BY = {  # the tensors that infer_sizes reads, and their number of dimensions
    "visual_encoder.pos_embed": 3,
    "text_encoder.embeddings.word_embeddings.weight": 2,
    "text_encoder.embeddings.position_embeddings.weight": 2,
    "vision_proj.weight": 2,
}


def load(source, vocab=None, image_size=None, device="cpu"):
    """Read BLIP from disk -> a frozen Blip: eval(), requires_grad False, float32, on `device`.

    source: "pocket" (pocket/blip.pth of this repository), or a path: a Salesforce .pth (pre-training, retrieval or
        ITM), or Hugging Face's BlipForImageTextRetrieval: a folder, a .safetensors or .bin file, or the .index.json of
        several.
    vocab: the path of vocab.txt; by default the one beside the weights.
    image_size: S in pixels, a multiple of the patch size; by default the size that the checkpoint was trained at.
        Position embeddings of another size are resized as in the official code (bicubic).

    blip.fingerprint tells weights and image size apart: 16 hex digits of the files' SHA-256, "@", S.

    Raises ValueError, one sentence that names the file and a remedy, for a file that is missing, damaged, no file of
    weights or a pickle that wants to run code; for keys that are missing, unexpected or mis-shaped (listed); for a
    vocabulary that is missing or does not fit the word embedding; and for an image size that does not fit the patches.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if torch.device(device).type == "cuda" and (torch.device(device).index or 0) >= found:
        raise ValueError(f'device "{device}" was asked for, but this PyTorch sees {found or "no"} CUDA GPU; use device="cpu"')
    files, folder = _find(source)
    state = {}
    for file in files:
        state.update(_read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file))
    state = {_our_name(name): tensor for name, tensor in state.items() if not UNUSED.match(name)}
    state.setdefault("temp", torch.tensor(0.07))  # Hugging Face's class has none: BLIP's initial value

    try:
        sizes = infer_sizes(state, image_size)
        pos = state["visual_encoder.pos_embed"]
        state["visual_encoder.pos_embed"] = resize_position_embedding(
            pos.float(), sizes["image_size"], sizes["patch_size"]
        )
        with torch.device("meta"):  # shapes without memory: the tensors of the file become the parameters
            blip = Blip(sizes, None)
        _check_keys(state, blip.state_dict())
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from None
    check_finite(state, files[0], "download or train it again")
    blip.tokenizer = _find_vocabulary(vocab, folder, files[0], sizes["vocab_size"])

    for name in state:  # one at a time, so that at no time two copies of the model are in memory
        state[name] = state[name].to(device, torch.float32, copy=True)
    blip.load_state_dict(state, assign=True)
    blip.fingerprint = f"{_sha256(files)[:16]}@{blip.image_size}"
    return blip.eval().requires_grad_(False)


def save(blip, path):
    """Write the weights to `path` as {"model": state dict} in Salesforce's naming and fp16; `load` reads them back.

    An older file is replaced only when the new one is complete. The temperature stays float32: the losses divide by it.
    """
    state = {name: tensor.detach().cpu() for name, tensor in blip.state_dict().items()}
    state = {name: tensor.half().contiguous() if tensor.dim() else tensor.float() for name, tensor in state.items()}
    torch.save({"model": state}, path)


def infer_sizes(state_dict, image_size=None):
    """The shapes of a state dict in Salesforce's naming -> the dict `sizes` that Blip takes.

    image_size: S in pixels, or None for the size of the stored position embeddings.
    The keys are image_size, patch_size, stem, image_width, image_depth, vocab_size, max_positions, word_dim, text_depth
    and embed_dim. Raises ValueError where a tensor that tells a size is missing, and where no BLIP has such sizes.
    """
    patches = "visual_encoder.patch_embed.proj.weight"
    stem = patches not in state_dict and "visual_encoder.patch_embed.proj.0.weight" in state_dict  # vit.PatchEmbed
    needed = SIZED_BY if stem else SIZED_BY | {patches: 4}
    missing = [name for name, dims in needed.items() if name not in state_dict or state_dict[name].dim() != dims]
    if missing:
        raise ValueError(
            f"not a BLIP for image-text retrieval, {', '.join(missing)} is missing or of another kind; "
            "use a pre-training, retrieval or ITM checkpoint"
        )
    pos, words, positions, proj = (state_dict[name].shape for name in SIZED_BY)
    side, patch_size = math.isqrt(max(pos[1] - 1, 0)), 8 if stem else state_dict[patches].shape[-1]
    if side * side + 1 != pos[1] or side == 0 or patch_size == 0:
        raise ValueError(f"position embeddings for {pos[1]} tokens are no square grid and one CLS token")
    if image_size is None:
        image_size = side * patch_size
    if image_size != int(image_size) or image_size < patch_size or image_size % patch_size:
        near = max(1, round(image_size / patch_size)) * patch_size
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch_size}; {near} is near")
    if image_size > MOST_PIXELS:
        raise ValueError(f"image size {image_size} would take more memory than there is; give at most {MOST_PIXELS}")
    for what, width in (("image", pos[2]), ("text", words[1])):
        if width == 0 or width % HEAD_WIDTH:
            raise ValueError(f"the {what} encoder is {width} wide, not a multiple of {HEAD_WIDTH}, the width of a head")

    def depth(prefix):  # the numbers that follow the prefix, each once
        return len({name[len(prefix) :].split(".")[0] for name in state_dict if name.startswith(prefix)})

    return {
        "image_size": int(image_size),
        "patch_size": patch_size,
        "stem": stem,
        "image_width": pos[2],
        "image_depth": depth("visual_encoder.blocks."),
        "vocab_size": words[0],
        "max_positions": positions[0],
        "word_dim": words[1],
        "text_depth": depth("text_encoder.encoder.layer."),
        "embed_dim": proj[0],
    }


def _find(source):
    """load's source -> the files that hold the weights (shards in order), and the folder to look for vocab.txt in."""
    path = POCKET / "blip.pth" if source == "pocket" else Path(source)
    if path.is_dir():
        found = [path / name for name in HUGGING_FACE_FILES if (path / name).is_file()]
        if not found:
            raise ValueError(
                f"the folder {path} holds none of {', '.join(HUGGING_FACE_FILES)}; give the path of the weights' file"
            )
        path = found[0]
    if not path.is_file():
        maker = "pocket.pretrain makes" if source == "pocket" else "blip_lite.download fetches"
        raise ValueError(f"{path}: there is no such file; python -m {maker} it")
    if not path.name.endswith(".index.json"):
        return [path], path.parent
    try:
        shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        files = [path.parent / name for name in shards if Path(name).name == name]  # plain names only, never ../
        if not files or len(files) != len(shards):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path} is not an index of weight files; download it again") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{path} lists {', '.join(missing)}, which is not there; download all its files")
    return files, path.parent


def _find_vocabulary(vocab, folder, weights, rows):
    """The Tokenizer of vocab.txt, given or beside the weights; ValueError where the word embedding has other `rows`."""
    if vocab is None and not (folder / "vocab.txt").is_file():
        raise ValueError(
            f"there is no vocab.txt beside {weights}; put it there or name it with --vocab (vocab=) "
            "(python -m blip_lite.download vocab.txt fetches BERT's)"
        )
    vocab = folder / "vocab.txt" if vocab is None else vocab
    tokenizer = Tokenizer(vocab)
    if tokenizer.vocab_size != rows:
        raise ValueError(
            f"{vocab} has {tokenizer.vocab_size - 2} tokens, {tokenizer.vocab_size} with [DEC] and [ENC], but "
            f"{weights} has {rows} word embeddings; give the vocab.txt that belongs to it"
        )
    return tokenizer


def _our_name(name):
    if name.startswith("vision_model."):
        for theirs, ours in HUGGING_FACE.items():
            name = name.replace(theirs, ours)
    return name


def _check_keys(state, expected):
    """ValueError that lists what is missing from `state`, what it should not hold, and what has another shape."""
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        listed = (
            f"{len(names)} {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
            for what, names in problems.items()
            if names
        )
        raise ValueError(f"keys do not fit a BLIP for image-text retrieval; {'; '.join(listed)}")


def check_finite(state, path, remedy):
    """ValueError that names the tensors of a state dict which hold NaN or infinity."""
    odd = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if odd:
        raise ValueError(f"{path} holds NaN or infinity in {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}; {remedy}")


def _sha256(files):
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _refuse_text(path):
    """ValueError for what a failed download leaves in place of weights; otherwise the file's first bytes."""
    with open(path, "rb") as file:
        head = file.read(512)
    kind = None
    if not head:
        kind = "is empty"
    elif head.startswith(b"version https://git-lfs"):
        kind = "is a git-lfs pointer, not the file it points to"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        kind = "is a web page, not weights"
    if kind:
        raise ValueError(f"{path} {kind}; download it again")
    return head


def _read_pickle(path):
    """torch.save's file -> dict name -> tensor. Only tensors and plain containers are unpickled: no code runs."""
    zipped = _refuse_text(path)[:4] == b"PK\x03\x04"  # since PyTorch 1.6; only this format can be memory-mapped
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch.load tells damage in many ways: EOFError, RuntimeError, KeyError, ...
        wants_code = re.search("unsupported (global|class)|call reduce", str(error), re.IGNORECASE)
        if isinstance(error, pickle.UnpicklingError) and wants_code:
            wants = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(
                f"{path} is a pickle that wants to run code{f' ({wants[1]})' if wants else ''}, which is refused; "
                "get the weights as a state dict or .safetensors from a source you trust"
            ) from None
        raise ValueError(f"{path} is damaged or not a file of PyTorch weights; download it again") from None
    if isinstance(state, dict) and "query_model" in state:
        raise ValueError(f"{path} is a checkpoint of train.py, for --checkpoint; give BLIP's own weights, as in training")
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not state:
        raise ValueError(f'{path} holds no state dict, bare or under "model"; give a BLIP checkpoint')
    odd = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if odd:
        raise ValueError(f"{path} holds {', '.join(odd[:10])}, not tensors; give a BLIP checkpoint")
    return state


SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _read_safetensors(path):
    """A .safetensors file -> dict name -> tensor.

    The format: 8 bytes, the header's length (little-endian); the header, JSON {name: {"dtype", "shape", "data_offsets":
    [begin, end]}}; the raw tensors, little-endian. Offsets count from the header's end.
    """
    _refuse_text(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            start = 8 + int.from_bytes(file.read(8), "little")
            if not 8 < start <= size:
                raise ValueError
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            for entry in header.values():
                dtype, shape, (begin, end) = SAFETENSORS[entry["dtype"]], entry["shape"], entry["data_offsets"]
                plain = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
                if not plain or end - begin != math.prod(shape) * dtype.itemsize or end > size - start:
                    raise ValueError
            places = sorted(entry["data_offsets"] for entry in header.values())
            if any(end > begin for (_, end), (begin, _) in itertools.pairwise(places)):  # no tensor shares bytes with another
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f"{path} is damaged or not a .safetensors file; download it again") from None
        state = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = torch.empty(end - begin, dtype=torch.uint8)
            file.seek(start + begin)
            file.readinto(raw.numpy())
            state[name] = raw.view(SAFETENSORS[entry["dtype"]]).view(entry["shape"])
    return state
