"""From files of weights to a frozen Blip, and back.

Three kinds of source become one state dict in Salesforce's naming: Salesforce's own .pth, Hugging
Face's BlipForImageTextRetrieval (.bin or .safetensors, one file or several), and pocket BLIP.
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

MOST_PIXELS = 1024  # the largest side of an image; BLIP was trained at 224 and 384
POCKET = Path(__file__).resolve().parents[1] / "pocket"
UNUSED = re.compile(  # what else the official files hold
    r"\w+_m\.|"  # momentum copies of encoders and projections: the teachers in BLIP's pre-training
    r"(image|text|idx)_queue$|(queue_ptr|ptr_queue)$|"  # its queues of negatives
    r"text_decoder\.|"  # the captioner
    r".*\.position_ids$"  # 0, 1, 2, ...: a constant that older transformers saved
)
HUGGING_FACE_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                      "pytorch_model.bin.index.json")
HUGGING_FACE = {  # their names for the visual encoder; the text encoder has Salesforce's names
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
SIZED_BY = {  # the tensors that show the sizes of a BLIP, and their numbers of dimensions
    "visual_encoder.pos_embed": 3,
    "text_encoder.embeddings.word_embeddings.weight": 2,
    "text_encoder.embeddings.position_embeddings.weight": 2,
    "vision_proj.weight": 2,
}


def load(source, vocab=None, image_size=None, device="cpu"):
    """Read BLIP from disk -> a frozen Blip: eval(), requires_grad False, float32, on `device`.

    source: "pocket", or a path: a Salesforce .pth (pre-training, retrieval or ITM), or Hugging
        Face's BlipForImageTextRetrieval, as a folder, a .safetensors, .bin or .index.json file.
    vocab: the path of vocab.txt; by default the one beside the weights.
    image_size: S in pixels, a multiple of the patch size; by default the checkpoint's. For another
        size, position embeddings are resized as in the official code.

    blip.fingerprint identifies weights and image size: 16 hex digits of the files' SHA-256, "@", S.

    Raises ValueError, one sentence with the file and a remedy: for a file that is missing, damaged,
    not weights, or a pickle that wants to run code; for keys that are missing, unexpected or
    mis-shaped (listed); for a vocabulary that is missing or does not fit the word embedding; for an
    image size that does not fit the patches.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if torch.device(device).type == "cuda" and (torch.device(device).index or 0) >= gpus:
        found = f"this PyTorch sees {gpus or 'no'} CUDA GPU"
        raise ValueError(f'device "{device}" was asked for, but {found}; use device="cpu"')
    files, folder = _find(source)
    state = {}
    for file in files:
        state |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    state = {_our_name(name): tensor for name, tensor in state.items() if not UNUSED.match(name)}
    state.setdefault("temp", torch.tensor(0.07))  # Hugging Face has none: BLIP's initial value

    try:
        sizes = infer_sizes(state, image_size)
        pos = state["visual_encoder.pos_embed"].float()
        pos = resize_position_embedding(pos, sizes["image_size"], sizes["patch_size"])
        state["visual_encoder.pos_embed"] = pos
        with torch.device("meta"):  # no memory: the file's tensors become the parameters
            blip = Blip(sizes, None)
        _check_keys(state, blip.state_dict())
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from None
    check_finite(state, files[0], "download or train it again")
    blip.tokenizer = _find_vocabulary(vocab, folder, files[0], sizes["vocab_size"])

    for name in state:  # one at a time, so that the model is never in memory twice
        state[name] = state[name].to(device, torch.float32, copy=True)
    blip.load_state_dict(state, assign=True)
    blip.fingerprint = f"{_sha256(files)[:16]}@{blip.image_size}"
    return blip.eval().requires_grad_(False)


def save(blip, file):
    """Write {"model": state dict} in Salesforce's naming, fp16, to a path or an open file.

    `load` reads it back. The temperature stays float32: the losses divide by it.
    """
    state = {name: x.detach().cpu() for name, x in blip.state_dict().items()}
    state = {name: x.half().contiguous() if x.dim() else x.float() for name, x in state.items()}
    torch.save({"model": state}, file)


def infer_sizes(state_dict, image_size=None):
    """The shapes of a state dict in Salesforce's naming -> the dict `sizes` that Blip takes.

    image_size: S in pixels, or None for the size of the stored position embeddings. Keys:
    image_size, patch_size, stem (whether vit.PatchEmbed has one), image_width, image_depth,
    vocab_size, max_positions, word_dim, text_depth and embed_dim. Raises ValueError if a tensor
    that shows a size is missing, or if no BLIP has such sizes.
    """
    patches = "visual_encoder.patch_embed.proj.weight"
    stem = patches not in state_dict and "visual_encoder.patch_embed.proj.0.weight" in state_dict
    needed = SIZED_BY if stem else SIZED_BY | {patches: 4}
    missing = [k for k, n in needed.items() if k not in state_dict or state_dict[k].dim() != n]
    if missing:
        raise ValueError(
            f"not a BLIP for image-text retrieval, {', '.join(missing)} is missing or of another "
            "kind; use a pre-training, retrieval or ITM checkpoint"
        )
    pos, words, positions, proj = (state_dict[name].shape for name in SIZED_BY)
    patch = 8 if stem else state_dict[patches].shape[-1]
    side = math.isqrt(max(pos[1] - 1, 0))
    if side * side + 1 != pos[1] or side == 0 or patch == 0:
        raise ValueError(f"position embeddings for {pos[1]} tokens are not a square grid and CLS")
    size = side * patch if image_size is None else image_size
    if size != int(size) or size < patch or size % patch:
        near = max(1, round(size / patch)) * patch
        problem = f"image size {size} is not a multiple of the patch size {patch}"
        raise ValueError(f"{problem}; {near} is near")
    if size > MOST_PIXELS:
        raise ValueError(f"image size {size} takes too much memory; give at most {MOST_PIXELS}")
    for what, width in (("image", pos[2]), ("text", words[1])):
        if width == 0 or width % HEAD_WIDTH:
            problem = f"{width} wide, not a multiple of {HEAD_WIDTH}, the width of a head"
            raise ValueError(f"the {what} encoder is {problem}")

    def depth(prefix):  # how many different numbers follow the prefix
        return len({k[len(prefix) :].split(".")[0] for k in state_dict if k.startswith(prefix)})

    return {
        "image_size": int(size),
        "patch_size": patch,
        "stem": stem,
        "image_width": pos[2],
        "image_depth": depth("visual_encoder.blocks."),
        "vocab_size": words[0],
        "max_positions": positions[0],
        "word_dim": words[1],
        "text_depth": depth("text_encoder.encoder.layer."),
        "embed_dim": proj[0],
    }


def check_finite(state, path, remedy):
    """ValueError that names the tensors of a state dict with NaN or infinity in them."""
    odd = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if odd:
        raise ValueError(f"{path} holds NaN or infinity in {_listed(odd, 3)}; {remedy}")


def _listed(names, most):
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _find(source):
    """load's source -> the files with the weights, in order, and the folder that has vocab.txt."""
    path = POCKET / "blip.pth" if source == "pocket" else Path(source)
    if path.is_dir():
        found = [path / name for name in HUGGING_FACE_FILES if (path / name).is_file()]
        if not found:
            wanted = ", ".join(HUGGING_FACE_FILES)
            raise ValueError(f"the folder {path} holds none of {wanted}; give the path of a file")
        path = found[0]
    if not path.is_file():
        maker = "pocket.pretrain makes" if source == "pocket" else "plumbing.download fetches"
        raise ValueError(f"{path}: there is no such file; python -m {maker} it")
    if not path.name.endswith(".index.json"):
        return [path], path.parent
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):  # never ../
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path} is not an index of weight files; download it again") from None
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        missing = ", ".join(missing)
        raise ValueError(f"{path} lists {missing}, which is not there; download all its files")
    return [path.parent / name for name in names], path.parent


def _find_vocabulary(vocab, folder, weights, rows):
    """The Tokenizer of `vocab`, or of the folder's vocab.txt; ValueError unless it has `rows`."""
    if vocab is None and not (folder / "vocab.txt").is_file():
        raise ValueError(
            f"there is no vocab.txt beside {weights}; put it there or name it with --vocab "
            "(vocab=); python -m plumbing.download vocab.txt fetches BERT's"
        )
    vocab = folder / "vocab.txt" if vocab is None else vocab
    tokenizer = Tokenizer(vocab)
    size = tokenizer.vocab_size
    if size != rows:
        raise ValueError(
            f"{vocab} has {size - 2} tokens, {size} with [DEC] and [ENC], but {weights} has {rows} "
            "word embeddings; give the vocab.txt that belongs to it"
        )
    return tokenizer


def _our_name(name):
    if name.startswith("vision_model."):
        for theirs, ours in HUGGING_FACE.items():
            name = name.replace(theirs, ours)
    return name


def _check_keys(state, expected):
    """ValueError that lists keys of `state` that are missing, unexpected or of another shape."""
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    listed = [f"{len(x)} {what}: {_listed(x, 10)}" for what, x in problems.items() if x]
    if listed:
        keys = "keys do not fit a BLIP for image-text retrieval"
        raise ValueError(f"{keys}; {'; '.join(listed)}")


def _sha256(files):
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _first_bytes(path):
    """The first bytes of a file; ValueError for what failed downloads leave instead of weights."""
    with open(path, "rb") as file:
        head = file.read(512)
    problem = None
    if not head:
        problem = "is empty"
    elif head.startswith(b"version https://git-lfs"):
        problem = "is a git-lfs pointer, not the file it points to"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        problem = "is a web page, not weights"
    if problem:
        raise ValueError(f"{path} {problem}; download it again")
    return head


def _read_pickle(path):
    """torch.save's file -> dict name -> tensor. Only tensors and plain containers are unpickled."""
    zipped = _first_bytes(path)[:4] == b"PK\x03\x04"  # since PyTorch 1.6; only this can be mapped
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch.load reports damage in many ways: EOFError, KeyError, ...
        problem, remedy = "is damaged or not a file of PyTorch weights", "download it again"
        code = re.search("unsupported (global|class)|call reduce", str(error), re.IGNORECASE)
        if isinstance(error, pickle.UnpicklingError) and code:
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            wanted = f" ({wanted[1]})" if wanted else ""
            problem = f"is a pickle that wants to run code{wanted}, which is refused"
            remedy = "get a state dict or .safetensors from a source you trust"
        raise ValueError(f"{path} {problem}; {remedy}") from None
    if isinstance(state, dict) and "query_model" in state:
        problem = "is a checkpoint of train.py, for --checkpoint"
        raise ValueError(f"{path} {problem}; give BLIP's own weights, as in training")
    state = state.get("model", state) if isinstance(state, dict) else state
    problem = None if state and isinstance(state, dict) else 'no state dict, bare or under "model"'
    if not problem:
        odd = [str(k) for k, x in state.items() if type(k) is not str or not torch.is_tensor(x)]
        problem = f"{_listed(odd, 10)}, not tensors" if odd else None
    if problem:
        raise ValueError(f"{path} holds {problem}; give a BLIP checkpoint")
    return state


SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}


def _read_safetensors(path):
    """A .safetensors file -> dict name -> tensor.

    The format: 8 bytes, the length of the header (little-endian); the header, JSON {name: {"dtype",
    "shape", "data_offsets": [begin, end]}}; then the tensors, little-endian, where begin and end
    count from the end of the header.
    """
    _first_bytes(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            start = 8 + int.from_bytes(file.read(8), "little")
            if not 8 < start <= size:
                raise ValueError
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            for entry in header.values():
                dtype, shape = SAFETENSORS[entry["dtype"]], entry["shape"]
                begin, end = entry["data_offsets"]
                plain = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
                fits = plain and end - begin == math.prod(shape) * dtype.itemsize
                if not fits or end > size - start:
                    raise ValueError
            places = sorted(entry["data_offsets"] for entry in header.values())
            if any(end > begin for (_, end), (begin, _) in itertools.pairwise(places)):
                raise ValueError  # tensors overlap
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            problem = "is damaged or not a .safetensors file"
            raise ValueError(f"{path} {problem}; download it again") from None
        state = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = torch.empty(end - begin, dtype=torch.uint8)
            file.seek(start + begin)
            file.readinto(raw.numpy())
            state[name] = raw.view(SAFETENSORS[entry["dtype"]]).view(entry["shape"])
    return state
