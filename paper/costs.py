"""Tables 1 and 17: parameters, multiply-adds, latency and bytes at the paper's sizes."""

import io
import os
import platform
import random
import statistics
import timeit
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import benchmarks
import blip_lite
import clip_lite
import isa
import query_side
from paper.numbers import NOTES, NUMBERS
from paper.runs import ROOT
from paper.tables import markdown
from plumbing.precision import cpu_flags
from pocket import drawing, specs

LABELS = {row["encoder"]: label for label, row in NUMBERS["cost"].items() if row["encoder"]}
BLIP_BASE = dict(
    image_size=224, patch_size=16, image_width=768, image_depth=12, vocab_size=30524,
    max_positions=512, word_dim=768, text_depth=12, embed_dim=256,
)
CLIP_LARGE = dict(
    image_size=224, patch_size=14, stem=False, image_width=1024, image_depth=24, image_heads=16,
    image_hidden=4096, vocab_size=49408, max_positions=77, word_dim=768, text_depth=12,
    text_heads=12, text_hidden=3072, embed_dim=768, quick=True,
)


def machine(threads):
    """The machine in words."""
    able = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in cpu_flags()]
    able = ", ".join(able) or torch.backends.cpu.get_cpu_capability()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    count = threads or torch.get_num_threads()
    return (f"{os.cpu_count()} cores ({platform.machine()}, {able}){gpu}, {count} "
            f"thread{'s' * (count > 1)} per process, PyTorch {torch.__version__}")


def blip_base():
    """The paper's BLIP (ViT-B/16) with random weights and pocket BLIP's vocabulary."""
    tokenizer = blip_lite.Tokenizer(ROOT / "pocket/vocab.txt")
    return blip_lite.Blip(BLIP_BASE, tokenizer).eval().requires_grad_(False)


def full_size(name, blip):
    """A query model at the paper's sizes with random weights."""
    encoder = query_side.build(name, blip=blip, image_size=224)
    mapper = isa.AdaptiveTokenLearner(encoder.out_channels, blip.word_dim)
    return isa.QueryModel(encoder, mapper).eval()


def parameters(model, name, blip):
    """Their number, with BLIP's, which its encoder hides from PyTorch."""
    hidden = blip.visual_encoder.parameters() if name == "blip" else ()
    return sum(p.numel() for p in (*model.parameters(), *hidden))


@torch.no_grad()
def products(model):
    """MACs of one image, and attention's part: the products of two activations.

    The model is on the meta device; on a CPU FlopCounterMode misses fused attention.
    """
    side = model.encoder.image_size
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, side, side, device="meta"))
    attention = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    return counter.get_total_flops() / 2, attention / 2  # two FLOPs a product


def costs():
    """{encoder: (parameters, MACs, attention's part of them)} at the paper's sizes."""
    with torch.device("meta"):
        blip = blip_base()
        models = {name: full_size(name, blip) for name in LABELS}
    return {name: (parameters(m, name, blip), *products(m)) for name, m in models.items()}


def cost_table():
    """Table 1 -> lines of markdown."""
    rows, found = [], costs()
    blip_size, blip_macs, attention = found["blip"]
    for name, (size, macs, _) in found.items():
        paper = NUMBERS["cost"][LABELS[name]]
        rows.append([
            LABELS[name],
            f"{macs / 1e9:.2f}", paper["MACs, G"], f"{100 * macs / blip_macs:.1f}",
            f"{size / 1e6:.2f}", paper["parameters, M"], f"{100 * size / blip_size:.1f}",
        ])
    head = ["query model", "MACs, G", "paper", "% of BLIP", "parameters, M", "paper", "% of BLIP"]
    note = NOTES["Table 1"].format(without=(blip_macs - attention) / 1e9)
    return [note, "", *markdown(head, rows)]


def median_ms(function, calls=30):
    """Median time of function() in ms, after three calls to warm up."""
    times = timeit.repeat(function, number=1, repeat=calls + 3)
    return 1000 * statistics.median(times[3:])


@torch.inference_mode()
def latencies(gallery=123_403):
    """Medians in ms: {encoder: a query image}, a composed query's text, ranking the gallery.

    Of CLIP ViT-L/14, "clip", the image's feature, and its text with the ranking of longer features.
    """
    torch.manual_seed(0)
    blip, pixels = blip_base(), torch.randn(1, 3, 224, 224)
    query = {name: median_ms(partial(full_size(name, blip), pixels)) for name in LABELS}
    U = torch.randn(1, 6, blip.word_dim)

    def encode():
        modifier = "shows a red car in the snow instead"
        return blip.encode_text(*isa.compose_query(blip, U, [modifier]))

    features, q = F.normalize(torch.randn(gallery, blip.embed_dim), dim=1), encode()
    text, ranking = median_ms(encode), median_ms(lambda: benchmarks.top_k(q, features, 50))
    clip = clip_lite.Clip(CLIP_LARGE, None).eval()
    sentence = torch.randn(1, 15, clip.word_dim), torch.ones(1, 15, dtype=torch.int64)  # one word
    features = F.normalize(torch.randn(gallery, clip.embed_dim), dim=1)
    image = median_ms(partial(clip.encode_image, pixels, cls_only=True), calls=10)
    find = median_ms(lambda: benchmarks.top_k(clip.encode_text(*sentence), features, 50))
    return query | {"clip": (image, find)}, text, ranking


def jpeg_bytes(image):
    """Size of an image at 224 x 224 as JPEG of quality 75."""
    out = io.BytesIO()
    image.resize((224, 224), Image.Resampling.BICUBIC).save(out, "JPEG", quality=75)
    return len(out.getvalue())


def texture(side=224):
    """PIL image of noise with a photograph's spectrum (1/frequency), mean and spread."""
    noise = np.fft.fft2(np.random.default_rng(0).standard_normal((3, side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    image = np.fft.ifft2(noise / np.maximum(frequency, 1 / side)).real  # [3, S, S]
    image = 118 + 60 * (image - image.mean()) / image.std()
    return Image.fromarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def latency_table(threads):
    """Table 17 -> lines of markdown."""
    if threads:
        torch.set_num_threads(threads)
    rows, (query, text, ranking) = [], latencies()
    for label, row in NUMBERS["cost"].items():
        is_clip = label.startswith("CLIP")
        ms, retrieval = query["clip"] if is_clip else (query[row["encoder"]], text + ranking)
        mine = [f"{x:.2f}" for x in (ms, retrieval, ms + retrieval)]
        rows.append([label, mine[0], row["query, ms"], mine[1], row["retrieval, ms"],
                     mine[2], row["total, ms"]])
    head = ["query model", "query", "paper", "retrieval", "paper", "total", "paper"]
    note = NOTES["Table 17"].format(machine=machine(threads), text=text, ranking=ranking)
    scene = drawing.draw(specs.random_scene(random.Random(0), count=3))
    sent = NOTES["Table 17, bytes"].format(scene=jpeg_bytes(scene), noise=jpeg_bytes(texture()))
    return [note, "", *markdown(head, rows), "", sent]
