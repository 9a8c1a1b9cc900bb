"""From files of weights to a frozen Clip: OpenAI's, open_clip's, Hugging Face's and pocket CLIP."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import torch

from blip_lite.checkpoint import (
    HUGGING_FACE_FILES,
    check_finite,
    check_keys,
    choose_image_size,
    count_layers,
    find_files,
    frozen,
    read_files,
)
from blip_lite.vit import resize_position_embedding

from .clip import Clip
from .tokenizer import FILES, Tokenizer

FOLDER = (*HUGGING_FACE_FILES, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIGS = ("config.json", "open_clip_config.json", "preprocessor_config.json")
UNUSED = re.compile(r".*position_ids|attn_mask|input_resolution|context_length|vocab_size")
NAMES = {  # OpenAI's and open_clip's | Hugging Face's -> ours
    r"^visual\.transformer\.resblocks|^vision_model\.encoder\.layers": "visual_encoder.blocks",
    r"^transformer\.resblocks|^text_model\.encoder\.layers": "text_encoder.blocks",
    r"^visual\.conv1|^vision_model\.embeddings\.patch_embedding": "visual_encoder.patch_embed.proj",
    r"^(visual|vision_model\.embeddings)\.class_embedding": "visual_encoder.cls_token",
    r"^visual\.positional_embedding|^vision_model\.embeddings\.position_embedding\.weight":
        "visual_encoder.pos_embed",
    r"^visual\.ln_pre|^vision_model\.pre_layrnorm": "visual_encoder.norm_pre",  # so they spell it
    r"^visual\.ln_post|^vision_model\.post_layernorm": "visual_encoder.norm",
    r"^(text_model\.embeddings\.)?token_embedding": "text_encoder.word_embeddings",
    r"^positional_embedding|^text_model\.embeddings\.position_embedding\.weight":
        "text_encoder.pos_embed",
    r"^ln_final|^text_model\.final_layer_norm": "text_encoder.norm",
    r"^visual\.proj$|^visual_projection\.weight": "vision_proj.weight",
    r"^text_projection(\.weight)?$": "text_proj.weight",
    r"\.(ln_|layer_norm)": ".norm", r"\.attn\.in_proj_": ".qkv.", r"\.(self_)?attn\.": ".",
    r"\.out_proj\.": ".proj.", r"\.mlp\.(c_fc|fc1)\.": ".fc1.", r"\.mlp\.(c_proj|fc2)\.": ".fc2.",
}
SIZED_BY = {  # the tensors that show the sizes of a CLIP, and their numbers of dimensions
    "visual_encoder.cls_token": 3, "visual_encoder.pos_embed": 3,
    "text_encoder.word_embeddings.weight": 2, "text_encoder.pos_embed": 2, "vision_proj.weight": 2,
    "visual_encoder.blocks.0.fc1.weight": 2, "text_encoder.blocks.0.fc1.weight": 2,
}
DTYPES = {"Float": torch.float32, "Half": torch.float16, "Long": torch.int64, "Int": torch.int32}


def load(source, vocab=None, image_size=None, device="cpu"):
    """Read CLIP from disk -> a frozen Clip: eval(), requires_grad False, float32, on `device`.

    source: "pocket", or a path: OpenAI's .pt (a TorchScript archive, of which no code runs), one
        of open_clip's files with open_clip_config.json beside it, or Hugging Face's CLIPModel with
        its config.json, a folder or one of its files.
    vocab: OpenAI's bpe_simple_vocab_16e6.txt.gz or Hugging Face's merges.txt; by default the one
        beside the weights. The rest, and all errors, as in blip_lite.load.
    """
    files, folder = find_files(source, device, "clip.pth", FOLDER)
    script = is_torchscript(files[0])
    state = read_torchscript(files[0]) if script else read_files(files, "CLIP")
    if any(name.startswith("text_encoder.embeddings.") for name in state):
        raise ValueError(f"{files[0]} holds a BLIP, not a CLIP; give it with --blip")
    try:
        config = {"quick": True} if script or "temp" in state else read_config(folder, state)
        state = in_our_names(state)
        sizes = infer_sizes(state, image_size) | config
        pos = state["visual_encoder.pos_embed"].float()
        pos = resize_position_embedding(pos, sizes["image_size"], sizes["patch_size"])
        state["visual_encoder.pos_embed"] = pos
        with torch.device("meta"):
            clip = Clip(sizes, None)
        check_keys(state, clip.state_dict(), "a CLIP with a vision transformer")
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from None
    check_finite(state, files[0], "download or train it again")
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not vocab and not found:
        raise ValueError(f"there is no {' or '.join(FILES)} beside {files[0]}; put it there or "
                         f"name it with --vocab; python -m plumbing.download {FILES[0]} fetches it")
    clip.tokenizer = Tokenizer(vocab or found[0], sizes["vocab_size"])
    if len(config) > 1:  # it was read: another one makes other features
        files += filter(Path.is_file, (folder / name for name in CONFIGS))
    return frozen(clip, state, files, device)


def read_config(folder, state):
    """What weights do not tell: QuickGELU or GELU, heads, perhaps how images are prepared.

    From Hugging Face's config.json and preprocessor_config.json, or open_clip_config.json.
    """
    theirs = any(name.startswith(("text_model.", "vision_model.")) for name in state)
    file = folder / CONFIGS[0 if theirs else 1]
    if not file.is_file():
        raise ValueError(f"GELU or QuickGELU? {file.name} tells; put it beside the weights")
    try:
        config = json.loads(file.read_bytes())
        if theirs:
            image, text = config.get("vision_config") or {}, config.get("text_config") or {}
            kind, = {part.get("hidden_act", "quick_gelu") for part in (image, text)}
            quick = {"quick_gelu": True, "gelu": False}[kind]
            heads = image.get("num_attention_heads", 12), text.get("num_attention_heads", 8)
            look = folder / CONFIGS[2]
            look = json.loads(look.read_bytes()) if look.is_file() else {}
        else:
            model, look = config["model_cfg"], config.get("preprocess_cfg") or {}
            image, text, quick = model["vision_cfg"], model["text_cfg"], model.get("quick_gelu")
            heads = image["width"] // image.get("head_width", 64), text.get("heads", 8)
        whole = {"shortest": False, "squash": True}[look.get("resize_mode") or "shortest"]
        found = {"quick": bool(quick), "image_heads": int(heads[0]), "text_heads": int(heads[1]),
                 "whole": whole or look.get("do_center_crop") is False}
        look = {k: look.get(k) or look.get(f"image_{k}") for k in ("mean", "std")}
        return found | {k: [float(x) for x, _ in zip(values, "RGB", strict=True)]
                        for k, values in look.items() if values}
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
        raise ValueError(f"{file} is not the configuration of a CLIP; get it again") from None


def in_our_names(state):
    """A state dict of theirs -> in the names and shapes of Clip's; one of ours stays as it is."""
    if "temp" in state:
        return state
    new = {}
    for name, x in state.items():
        x = x.T if name in ("visual.proj", "text_projection") else x  # no nn.Linear's
        for theirs, ours in NAMES.items():
            name = re.sub(theirs, ours, name)
        if name in ("visual_encoder.cls_token", "visual_encoder.pos_embed"):
            x = x[(None,) * (3 - x.dim())]  # [D] -> [1, 1, D]
        if not UNUSED.fullmatch(name):
            new[name] = x
    for q in [name for name in new if ".q_proj." in name]:
        parts = [q.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if all(part in new for part in parts):
            new[q.replace(".q_proj.", ".qkv.")] = torch.cat([new.pop(part) for part in parts])
    if "logit_scale" in new:
        new["temp"] = torch.exp(-new.pop("logit_scale").float())
    if patches := [name for name in new if name.endswith("patch_embed.proj.weight")]:
        new["visual_encoder.patch_embed.proj.bias"] = torch.zeros(len(new[patches[0]]))  # has none
    return new


def infer_sizes(state, image_size=None):
    """The shapes of a state dict in our names -> the dict `sizes` that Clip takes. ValueError."""
    patches = "visual_encoder.patch_embed.proj.weight"
    stem = "visual_encoder.patch_embed.proj.0.weight" in state
    needed = SIZED_BY if stem else SIZED_BY | {patches: 4}
    missing = [k for k, n in needed.items() if k not in state or state[k].dim() != n]
    if missing:
        raise ValueError(f"not a CLIP with a vision transformer, {', '.join(missing)} is missing "
                         "or of another kind; use OpenAI's, open_clip's or Hugging Face's weights")
    _, pos, words, positions, proj, image, text = (state[name].shape for name in SIZED_BY)
    patch = 8 if stem else state[patches].shape[-1]
    return dict(image_size=choose_image_size(pos[1], patch, image_size), patch_size=patch,
                stem=stem, image_width=pos[2], image_hidden=image[0], image_heads=pos[2] // 64,
                image_depth=count_layers(state, "visual_encoder.blocks."), word_dim=words[1],
                text_hidden=text[0], text_heads=words[1] // 64, vocab_size=words[0],
                text_depth=count_layers(state, "text_encoder.blocks."),
                max_positions=positions[0], embed_dim=proj[0])


def is_torchscript(path):
    """Whether a file is a TorchScript archive: a zip with constants, which torch.save has not."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def read_torchscript(path):
    """A TorchScript archive -> its state dict. No code of it runs, nothing of it is imported.

    Its data.pkl is a tree of modules, whose tensors lie in data/0, data/1, ...
    """
    class Module:  # stands for all classes of the archive, which are attributes alone
        pass

    def tensor(storage, offset, shape, stride, *_):
        return storage.as_strided(shape, stride, offset)

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return Module
            if module == "torch.jit._pickle":
                return lambda value, *_: value  # a list that is told its type
            if module == "torch":
                return DTYPES[name.removesuffix("Storage")]
            return {"torch._utils._rebuild_tensor_v2": tensor, "collections.OrderedDict": dict}[
                f"{module}.{name}"]

        def persistent_load(self, key):
            _, dtype, name, *_ = key
            return torch.frombuffer(bytearray(archive.read(f"{root}/data/{name}")), dtype=dtype)

    def tensors(module, prefix=""):
        for name, x in vars(module).items():
            if torch.is_tensor(x):
                yield prefix + name, x
            elif isinstance(x, Module):
                yield from tensors(x, f"{prefix}{name}.")

    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            return dict(tensors(Reader(archive.open(f"{root}/data.pkl")).load()))
    except Exception:  # KeyError for what find_class does not know; damage has many forms
        raise ValueError(f"{path} is damaged, or wants to run code, which is refused; download it "
                         "again") from None
