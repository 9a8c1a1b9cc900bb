"""From files of weights to a frozen Blip, and back.

Salesforce's .pth, Hugging Face's BlipForImageTextRetrieval and pocket BLIP all become a state dict
in Salesforce's naming.
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
    r"\w+_m\.|"  # momentum copies: the teachers in BLIP's pre-training
    r"(image|text|idx)_queue$|(queue_ptr|ptr_queue)$|"  # its queues of negatives
    r"text_decoder\.|"  # the captioner
    r".*\.position_ids$"  # 0, 1, 2, ..., saved by older transformers
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
OF_CLIP = re.compile(r"(text_model\.embeddings\.)?token_embedding\.weight|"
                     r"text_encoder\.word_embeddings\.weight")
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

    blip.fingerprint: 16 hex digits of the files' SHA-256, "@", S. Raises ValueError, one sentence
    with the file and a remedy, for weights that are missing, damaged, of another model or want to
    run code, a vocabulary that does not fit them and an image size that does not fit the patches.
    """
    files, folder = find_files(source, device)
    state = read_files(files)
    if clips := [name for name in state if OF_CLIP.fullmatch(name)]:
        raise ValueError(f"{files[0]} holds a CLIP ({clips[0]}), not a BLIP; give it with --clip")
    state = {_our_name(name): tensor for name, tensor in state.items() if not UNUSED.match(name)}
    state.setdefault("temp", torch.tensor(0.07))  # Hugging Face has none: BLIP's initial value

    try:
        sizes = infer_sizes(state, image_size)
        pos = state["visual_encoder.pos_embed"].float()
        pos = resize_position_embedding(pos, sizes["image_size"], sizes["patch_size"])
        state["visual_encoder.pos_embed"] = pos
        with torch.device("meta"):  # no memory: the file's tensors become the parameters
            blip = Blip(sizes, None)
        check_keys(state, blip.state_dict(), "a BLIP for image-text retrieval")
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from None
    check_finite(state, files[0], "download or train it again")
    blip.tokenizer = _find_vocabulary(vocab, folder, files[0], sizes["vocab_size"])
    return frozen(blip, state, files, device)


def frozen(model, state, files, device):
    """A model on the meta device -> the same with the state dict of `files`, frozen."""
    for name in state:  # one at a time, so that the model is never in memory twice
        state[name] = state[name].to(device, torch.float32, copy=True)
    model.load_state_dict(state, assign=True)
    model.fingerprint = f"{_sha256(files)[:16]}@{model.image_size}"
    return model.eval().requires_grad_(False)


def save(blip, file):
    """Write {"model": state dict} for `load`, in fp16, to a path or an open file.

    The temperature stays float32: the losses divide by it.
    """
    state = {name: x.detach().cpu() for name, x in blip.state_dict().items()}
    state = {name: x.half().contiguous() if x.dim() else x.float() for name, x in state.items()}
    torch.save({"model": state}, file)


def infer_sizes(state_dict, image_size=None):
    """The shapes of a state dict in Salesforce's naming -> the dict `sizes` that Blip takes.

    image_size: S in pixels; None: that of the position embeddings. ValueError if a tensor that
    shows a size is missing, or if no BLIP has such sizes.
    """
    patches = "visual_encoder.patch_embed.proj.weight"
    stem = patches not in state_dict and "visual_encoder.patch_embed.proj.0.weight" in state_dict
    needed = SIZED_BY if stem else SIZED_BY | {patches: 4}
    missing = [k for k, n in needed.items() if k not in state_dict or state_dict[k].dim() != n]
    if missing:
        raise ValueError(f"not a BLIP for image-text retrieval, {', '.join(missing)} is missing or "
                         "of another kind; use a pre-training, retrieval or ITM checkpoint")
    pos, words, positions, proj = (state_dict[name].shape for name in SIZED_BY)
    patch = 8 if stem else state_dict[patches].shape[-1]
    size = choose_image_size(pos[1], patch, image_size)
    for what, width in (("image", pos[2]), ("text", words[1])):
        if width == 0 or width % HEAD_WIDTH:
            raise ValueError(f"the {what} encoder is {width} wide, not a multiple of {HEAD_WIDTH}, "
                             "the width of a head")

    return dict(image_size=size, patch_size=patch, stem=stem,  # see vit.PatchEmbed
                image_width=pos[2], image_depth=count_layers(state_dict, "visual_encoder.blocks."),
                word_dim=words[1],
                text_depth=count_layers(state_dict, "text_encoder.encoder.layer."),
                vocab_size=words[0], max_positions=positions[0], embed_dim=proj[0])


def choose_image_size(tokens, patch, image_size=None):
    """S in pixels, by default that of the position embeddings of 1+N tokens. ValueError."""
    side = math.isqrt(max(tokens - 1, 0))
    if side * side + 1 != tokens or side == 0 or patch == 0:
        raise ValueError(f"position embeddings for {tokens} tokens are not a square grid and CLS")
    size = side * patch if image_size is None else image_size
    if size != int(size) or size < patch or size % patch:
        near = max(1, round(size / patch)) * patch
        raise ValueError(f"image size {size} is not a multiple of the patch size {patch}; "
                         f"{near} is near")
    if size > MOST_PIXELS:
        raise ValueError(f"image size {size} takes too much memory; give at most {MOST_PIXELS}")
    return int(size)


def count_layers(state_dict, prefix):
    """How many different numbers follow the prefix."""
    return len({k[len(prefix) :].split(".")[0] for k in state_dict if k.startswith(prefix)})


def check_finite(state, path, remedy):
    """ValueError that names the tensors of a state dict with NaN or infinity in them."""
    odd = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if odd:
        raise ValueError(f"{path} holds NaN or infinity in {_listed(odd, 3)}; {remedy}")


def _listed(names, most):
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def find_files(source, device="cpu", pocket="blip.pth", names=HUGGING_FACE_FILES):
    """load's source -> the files of weights, in order, and their folder.

    pocket: what "pocket" is. names: files to look for in a folder. ValueError, also for a device
    that is not there, before anything is read.
    """
    gpus = torch.cuda.device_count()
    if torch.device(device).type == "cuda" and (torch.device(device).index or 0) >= gpus:
        raise ValueError(f'device "{device}" was asked for, but this PyTorch sees {gpus or "no"} '
                         'CUDA GPU; use device="cpu"')
    path = POCKET / pocket if source == "pocket" else Path(source)
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            wanted = ", ".join(names)
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
    """The Tokenizer of `vocab`, or of the folder's vocab.txt; it has to have `rows` tokens."""
    if vocab is None:
        vocab = folder / "vocab.txt"
        if not vocab.is_file():
            raise ValueError(f"there is no vocab.txt beside {weights}; put it there or name it "
                             "with --vocab (vocab=); python -m plumbing.download vocab.txt fetches "
                             "BERT's")
    tokenizer = Tokenizer(vocab)
    size = tokenizer.vocab_size
    if size != rows:
        raise ValueError(f"{vocab} has {size - 2} tokens, {size} with [DEC] and [ENC], but "
                         f"{weights} has {rows} word embeddings; give the vocab.txt that belongs "
                         "to it")
    return tokenizer


def _our_name(name):
    if name.startswith("vision_model."):
        for theirs, ours in HUGGING_FACE.items():
            name = name.replace(theirs, ours)
    return name


def check_keys(state, expected, what):
    """ValueError that lists keys of `state` that are missing, unexpected or of another shape."""
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [f"{name} {list(state[name].shape)} instead of {list(x.shape)}"
                             for name, x in expected.items()
                             if name in state and state[name].shape != x.shape],
    }
    listed = [f"{len(x)} {what}: {_listed(x, 10)}" for what, x in problems.items() if x]
    if listed:
        raise ValueError(f"keys do not fit {what}; {'; '.join(listed)}")


def unwrap(state):
    """What torch.load returns -> what is under "model" or "state_dict", if anything.

    The names lose DataParallel's "module.".
    """
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state, dict) and key in state else state
    if isinstance(state, dict) and all(str(name).startswith("module.") for name in state):
        state = {name.removeprefix("module."): x for name, x in state.items()}
    return state


def _sha256(files):
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _first_bytes(path):
    """The first bytes of a file; ValueError for what failed downloads leave."""
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


def read_files(files, what="BLIP"):
    """Files of weights -> one state dict, which may be wrapped (see unwrap). ValueError."""
    state = {}
    for file in files:
        safe = file.suffix == ".safetensors"
        state |= read_safetensors(file) if safe else _read_pickle(file, what)
    return state


def _read_pickle(path, what):
    """torch.save's file -> dict name -> tensor."""
    zipped = _first_bytes(path)[:4] == b"PK\x03\x04"  # since PyTorch 1.6; only this can be mapped
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch.load reports damage in many ways: EOFError, KeyError, ...
        problem, remedy = "is damaged or not a file of PyTorch weights", "download it again"
        code = re.search("unsupported (global|class)|call reduce", str(error), re.IGNORECASE)
        if "TorchScript" in str(error):
            problem, remedy = "is a TorchScript archive", "a CLIP goes to --clip"
        elif isinstance(error, pickle.UnpicklingError) and code:
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            wanted = f" ({wanted[1]})" if wanted else ""
            problem = f"is a pickle that wants to run code{wanted}, which is refused"
            remedy = "get a state dict or .safetensors from a source you trust"
        raise ValueError(f"{path} {problem}; {remedy}") from None
    if isinstance(state, dict) and "query_model" in state:
        raise ValueError(f"{path} is a checkpoint of train.py, for --checkpoint; give a file of "
                         f"{what} weights")
    state = unwrap(state)
    wanted = 'no state dict, bare or under "model" or "state_dict"'
    problem = None if state and isinstance(state, dict) else wanted
    if not problem:
        odd = [str(k) for k, x in state.items() if type(k) is not str or not torch.is_tensor(x)]
        problem = f"{_listed(odd, 10)}, not tensors" if odd else None
    if problem:
        raise ValueError(f"{path} holds {problem}; give a {what} checkpoint")
    return state


SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}


def read_safetensors(path):
    """A .safetensors file -> dict name -> tensor.

    The format: 8 bytes, the length of the header; the header, JSON {name: {"dtype", "shape",
    "data_offsets": [begin, end]}}, counted from its end; the tensors; all little-endian.
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
            raise ValueError(f"{path} is damaged or not a .safetensors file; download it "
                             "again") from None
        state = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = torch.empty(end - begin, dtype=torch.uint8)
            file.seek(start + begin)
            file.readinto(raw.numpy())
            state[name] = raw.view(SAFETENSORS[entry["dtype"]]).view(entry["shape"])
    return state
