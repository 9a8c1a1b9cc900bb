"""Tables 1 and 17: parameters, multiply-adds, latency."""

import io
import os
import platform
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import benchmarks
import blip_lite
import isa
import query_side
from paper.numbers import LABELS, NO_CLIP, PAPER_COSTS
from paper.runs import ROOT
from paper.tables import markdown
from pocket import drawing, specs


def machine(threads):
    """The machine in words: cores, what its CPU can do, versions."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    able = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    able = able or [torch.backends.cpu.get_cpu_capability()]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    count = threads or torch.get_num_threads()
    used = "1 thread a process" if count == 1 else f"{count} threads a process"
    return f"{os.cpu_count()} cores ({platform.machine()}, {', '.join(able)}){gpu}, {used}, PyTorch {torch.__version__}"


BLIP_BASE = dict(image_size=224, patch_size=16, image_width=768, image_depth=12, vocab_size=30524, max_positions=512, word_dim=768,
                 text_depth=12, embed_dim=256)  # fmt: skip


def blip_base():
    """The paper's BLIP, ViT-B/16 at 224 px, with random weights and the pocket world's short vocabulary."""
    return blip_lite.Blip(BLIP_BASE, blip_lite.Tokenizer(ROOT / "pocket/vocab.txt")).eval().requires_grad_(False)


def full_size(name, blip):
    """The query side at the paper's sizes, with random weights: all see 224 px, as BLIP does; six words of 768."""
    encoder = query_side.build(name, blip=blip if name == "blip" else None, image_size=224)
    return isa.QueryModel(encoder, isa.AdaptiveTokenLearner(encoder.out_channels, blip.word_dim)).eval()


def parameters(model, name, blip):
    """Encoder and learner; BLIP's encoder is hidden from PyTorch (query_side.BlipEncoder), so it is added."""
    hidden = blip.visual_encoder.parameters() if name == "blip" else ()
    return sum(p.numel() for p in (*model.parameters(), *hidden))


@torch.no_grad()
def products(model):
    """MACs of one image: convolutions and matrix products, FlopCounterMode's FLOPs halved; and how many of them are products of two
    activations, as in attention.

    On the meta device, where nothing is computed and attention is written out in products: on a CPU the counter passes the fused
    kernel over (PyTorch 2.x).
    """
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, model.encoder.image_size, model.encoder.image_size, device="meta"))
    return counter.get_total_flops() / 2, counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0) / 2


def costs():
    """{encoder: (parameters, MACs, attention's part of them)} at the real sizes; nothing is computed, so it takes seconds."""
    with torch.device("meta"):
        blip = blip_base()
        models = {name: full_size(name, blip) for name in PAPER_COSTS}
    return {name: (parameters(model, name, blip), *products(model)) for name, model in models.items()}


def cost_table():
    rows, found = [], costs()
    whole_size, whole_macs, attention = found["blip"]
    for name, (size, macs, _) in found.items():
        rows.append([LABELS[name], f"{macs / 1e9:.2f}", PAPER_COSTS[name][0], f"{100 * macs / whole_macs:.1f}",
                     f"{size / 1e6:.2f}", PAPER_COSTS[name][1], f"{100 * size / whole_size:.1f}"])  # fmt: skip
    return [
        "**Table 1: cost of encoder and adaptive token learner (L = 6, d_w = 768), without classifier, at 224 px.** What the paper",
        "calls FLOPs are multiply-adds (MACs); ours are those of convolutions and matrix products, attention's included. Without",
        f"attention BLIP's would be {(whole_macs - attention) / 1e9:.2f} G: the paper's tool seems to have passed it over.",
        "",
        *markdown(["query model", "MACs, G", "paper", "% of BLIP", "parameters, M", "paper", "% of BLIP"], rows),
    ]


def median_ms(function, seconds=2.0, least=7):
    """Median time of function() in milliseconds, over `seconds` and at least `least` calls, after three that do not count."""
    for _ in range(3):
        function()
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


@torch.inference_mode()
def latencies(gallery=123_403):
    """-> {encoder: ms for one query image}, ms of the text encoder for one composed query, ms of ranking the gallery [N, 256]."""
    torch.manual_seed(0)
    blip, query = blip_base(), {}
    for name in PAPER_COSTS:
        model, pixels = full_size(name, blip), torch.randn(1, 3, 224, 224)
        query[name] = median_ms(lambda model=model, pixels=pixels: model(pixels))
    U = torch.randn(1, 6, blip.word_dim)

    def encode():
        return blip.encode_text(*isa.compose_query(blip, U, ["shows a red car in the snow instead"]))

    features, q = torch.nn.functional.normalize(torch.randn(gallery, blip.embed_dim), dim=1), encode()
    return query, median_ms(encode), median_ms(lambda: benchmarks.top_k(q, features, 50))


def jpeg_bytes(image, side=224):
    """Size of an image at side x side as JPEG of quality 75."""
    out = io.BytesIO()
    image.resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=75)
    return len(out.getvalue())


def texture(side=224, seed=0):
    """Noise with the spectrum of photographs (amplitude falls as 1/frequency), grey mean and spread as theirs. -> PIL image."""
    noise = np.fft.fft2(np.random.default_rng(seed).standard_normal((3, side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    image = np.fft.ifft2(noise / np.maximum(frequency, 1 / side)).real  # [3, S, S]
    image = 118 + 60 * (image - image.mean()) / image.std()
    return Image.fromarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def drawn(seed=0):
    """A scene of the pocket world."""
    return drawing.draw(specs.random_scene(random.Random(seed), count=3))


def latency_table(threads):
    if threads:
        torch.set_num_threads(threads)
    query, text, ranking = latencies()
    rows = []
    for name, ms in query.items():
        numbers = f"{ms:.2f}", PAPER_COSTS[name][2], f"{text + ranking:.2f}", "3.58", f"{ms + text + ranking:.2f}"
        rows.append([LABELS[name], *numbers, f"{float(PAPER_COSTS[name][2]) + 3.58:.2f}"])
    rows.append(["CLIP ViT-L/14", NO_CLIP, "24.44", "", "3.60", "", "15.38"])  # printed so; 24.44 + 3.60 is 28.04
    sent = 6 * 768 * 2
    return [
        "**Table 17: latency of one query in ms.** Ours: batch 1, 224 px, float32, random weights; medians after a warm-up on",
        f"{machine(threads)}. Retrieval: BLIP's text encoder on the composed query ({text:.2f} ms) and the exact 50 best of",
        f"123,403 x 256 features, CIRCO's gallery ({ranking:.2f} ms). The paper does not name this table's machine.",
        "",
        *markdown(["query model", "query", "paper", "retrieval", "paper", "total", "paper"], rows),
        "",
        f"Sent for a query image: 6 words of 768 numbers in float16, {sent:,} bytes. The image itself, as a JPEG of 224 x 224",
        f"pixels and quality 75: {jpeg_bytes(drawn()):,} bytes for a drawn scene of the pocket world, enlarged;",
        f"{jpeg_bytes(texture()):,} bytes for coloured noise with the spectrum of photographs (1/f).",
    ]
