"""How fast this code runs, against a reference and against what the machine could do.

    python tests/speed.py                    # all parts, about 25 minutes on two cores
    python tests/speed.py blip step          # some of them

What is compared takes turns; medians are printed. The *floor* of a computation is its matrix
products and convolutions at the speed of the best large matrix product measured here, or its bytes
at the speed of reading them. Nothing about time is asserted: these figures are to be read.
"""

import argparse
import copy
import io
import os
import resource
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from made_up import filled, hugging_face  # noqa: E402

import benchmarks  # noqa: E402
import blip_lite  # noqa: E402
import isa  # noqa: E402
import query_side  # noqa: E402
from blip_lite.checkpoint import POCKET, _our_name, infer_sizes  # noqa: E402
from plumbing.pieces import InPieces, read_in_pieces  # noqa: E402
from plumbing.precision import (  # noqa: E402
    PackedLinear,
    keep_freed_memory,
    packing_pays,
    round_frozen_weights,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
bf16 = partial(torch.autocast, DEVICE, torch.bfloat16)
finished = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None


# ---- measuring
def measure(functions, repeats=5):
    """{name: function} -> {name: median seconds}, in alternating order after a warm-up round."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    finished()
    for i in range(repeats):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            began = time.perf_counter()
            functions[name]()
            finished()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def peak(dtype):
    """Operations a second of the best large matrix product: those of a ViT-B, and square ones."""
    best = 0
    for m, k, n in ((3152, 768, 3072), (3152, 3072, 768), (2048, 2048, 2048), (4096, 4096, 4096)):
        a = torch.randn(m, k, dtype=dtype, device=DEVICE)
        linear = torch.nn.Linear(k, n, dtype=dtype, device=DEVICE).requires_grad_(False)
        products = {"plain": partial(linear, a)}
        if packing_pays() and DEVICE == "cpu":
            products["packed"] = partial(PackedLinear(linear), a)
        best = max(best, 2 * m * k * n / min(measure(products, repeats=9).values()))
    return best


def operations(function):
    """Operations of function()'s matrix products and convolutions; product and sum are two."""
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


def show(what, seconds, floor=None, against=None, wanted=None):
    line = f"  {what:58s} {1000 * seconds:9.1f} ms"
    line += f"   {floor / seconds:4.0%} of the floor's speed" if floor else ""
    line += f"   {against / seconds:5.2f} x" if against else ""
    print(line + (f"  (wanted: {wanted})" if wanted else ""), flush=True)


# ---- 1. frozen BLIP at full size
def blip_base(device=DEVICE):
    """(ours, transformers'): BLIP ViT-B of 224 px with the same made-up weights, frozen."""
    theirs = filled(hugging_face(224, 12, 30524)).requires_grad_(False)
    state = {_our_name(name): x for name, x in theirs.state_dict().items()
             if not name.endswith("position_ids")}
    state["temp"] = torch.tensor(0.07)
    ours = blip_lite.Blip(infer_sizes(state, 224), blip_lite.Tokenizer(POCKET / "vocab.txt"))
    ours.load_state_dict(state, assign=True)
    return ours.eval().requires_grad_(False).to(device), theirs.to(device)


def other_engines(network, pixels):
    """{"OpenVINO, bf16": function, ...}: a network run by the engines that are installed here."""
    functions = {}
    try:
        import openvino
    except ImportError:
        print("  OpenVINO was skipped: it is not installed (pip install openvino)")
    else:
        network_there = openvino.convert_model(network, example_input=pixels)
        for name, dtype in (("fp32", "f32"), ("bf16", "bf16")):
            settings = {"INFERENCE_PRECISION_HINT": dtype, "PERFORMANCE_HINT": "LATENCY",
                        "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            there = openvino.Core().compile_model(network_there, "CPU", settings)
            functions[f"OpenVINO, {name}"] = partial(there, pixels.numpy())
    try:
        import onnxruntime
    except ImportError:
        print("  ONNX Runtime was skipped: it is not installed (pip install onnxruntime)")
    else:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            torch.onnx.export(network, (pixels,), file.name, input_names=["pixels"],
                              dynamo=False)
            there = onnxruntime.InferenceSession(file.name, settings, ["CPUExecutionProvider"])
        functions["ONNX Runtime, fp32"] = lambda: there.run(None, {"pixels": pixels.numpy()})
    return functions


@torch.no_grad()
def part_blip():
    """The frozen encoders: 16 images, and 48 texts of 16 tokens, three for each image."""
    speed = {"fp32": peak(torch.float32), "bf16": peak(torch.bfloat16)}
    print("  measured peak: " + ", ".join(f"{d} {x / 1e9:.0f} Gop/s" for d, x in speed.items()))
    counted, theirs = blip_base("cpu")  # ours as loaded: the counter of operations knows its layers
    ours = {dtype: copy.deepcopy(counted) for dtype in speed}  # and as commands run it
    for dtype, blip in ours.items():
        round_frozen_weights(blip, dtype)
    pixels, ids = torch.randn(16, 3, 224, 224), torch.randint(5, 400, (48, 16))
    mask, rows = torch.ones_like(ids), torch.arange(48) % 16
    words, F_v = counted.embed_words(ids), counted.encode_image(pixels)[1]

    class TheirV(torch.nn.Module):
        vision, project = theirs.vision_model, theirs.vision_proj

        def forward(self, pixels):
            F_v = self.vision(pixels).last_hidden_state
            return F.normalize(self.project(F_v[:, 0]), dim=-1)

    def their_cls(**image):
        return theirs.text_encoder(ids, mask, **image).last_hidden_state[:, 0]

    their_v = partial(TheirV().eval(), pixels)
    anchors = other_engines(their_v.func, pixels)
    for name, engine in anchors.items():
        found = torch.as_tensor(engine()[0])
        assert torch.allclose(found, their_v(), atol=0.02), f"{name} gives another v"
    goals = {("images -> v", "fp32", "transformers"): "1.5 x",
             ("images -> v", "bf16", "OpenVINO"): "0.92 x"}
    for what, our, their in (
        ("images -> v", lambda blip: blip.encode_image(pixels, cls_only=True), their_v),
        ("images -> v and F^v", lambda blip: blip.encode_image(pixels), their_v),
        ("48 texts -> t", lambda blip: blip.encode_text(words, mask),
         lambda: F.normalize(theirs.text_proj(their_cls()), dim=-1)),
        ("48 texts, 3 an image -> matching logits", lambda blip: blip.match(words, mask, F_v, rows),
         lambda: theirs.itm_head(their_cls(encoder_hidden_states=F_v[rows]))),
    ):
        def run(function, *inputs, dtype):
            with torch.autocast("cpu", torch.bfloat16, dtype == "bf16"):
                function(*inputs)

        variants = {f"transformers, {dtype}": partial(run, their, dtype=dtype) for dtype in speed}
        variants |= {dtype: partial(run, our, blip, dtype=dtype) for dtype, blip in ours.items()}
        seconds = measure(variants | (anchors if what == "images -> v" else {}))
        for name in [name for name in seconds if name not in speed]:
            show(f"{what}, {name}", seconds[name])
        work = operations(partial(our, counted))
        for dtype, rate in speed.items():
            for engine in ("transformers", "OpenVINO"):
                if f"{engine}, {dtype}" in seconds:
                    show(f"{what}, {dtype}, against {engine}", seconds[dtype], work / rate,
                         seconds[f"{engine}, {dtype}"], goals.get((what, dtype, engine)))


# ---- 2. a training step at full size
def part_step():
    """EfficientNet-B2, BLIP-base, stored v and F^v, bf16: ours, and one with transformers."""
    rate, count = peak(torch.bfloat16), 320 if DEVICE == "cuda" else 32
    print(f"  {count} images on {DEVICE}; measured peak {rate / 1e12:.2f} Top/s")
    ours, theirs = blip_base()
    torch.manual_seed(0)
    encoder = query_side.build("efficientnet_b2").to(DEVICE)
    mapper = isa.AdaptiveTokenLearner(encoder.out_channels, 768).to(DEVICE)
    plain_encoder = models.efficientnet_b2().features.to(DEVICE)  # as torchvision builds it
    plain_encoder.load_state_dict(encoder.state_dict())
    model = isa.QueryModel(encoder, mapper).train()
    plain_model = isa.QueryModel(plain_encoder, mapper).train()
    pixels = torch.randn(count, 3, 224, 224, device=DEVICE)
    v = F.normalize(torch.randn(count, 256, device=DEVICE), dim=-1)
    F_v = torch.randn(count, 197, 768, device=DEVICE)

    in_pieces = copy.copy(ours)
    read_in_pieces(in_pieces, count // 4)

    def our_step(speak=model, lar=True, blip=ours):
        torch.manual_seed(1)
        with bf16():
            words, mask = isa.compose_query(blip, speak(pixels))
            t = blip.encode_text(words, mask)
        loss = isa.global_contrastive_distillation(v, t, blip.temperature)
        if lar:
            with bf16():
                loss = loss + isa.local_alignment_regularization(blip, words, mask, F_v, v, t)
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss

    def encode(words, mask, image=None):
        """transformers' text encoder, from word vectors on."""
        hidden = theirs.text_encoder.embeddings(inputs_embeds=words)
        out = theirs.text_encoder(encoder_embeds=hidden, attention_mask=mask,
                                  encoder_hidden_states=image, is_decoder=False)
        return out.last_hidden_state[:, 0]

    def plain_step():
        """As BLIP's own pre-training: a pass for the pairs, one for both kinds of wrong pairs."""
        torch.manual_seed(1)
        with bf16():
            words, mask = isa.compose_query(ours, plain_model(pixels))
            t = F.normalize(theirs.text_proj(encode(words, mask)).float(), dim=-1)
        gcd = isa.global_contrastive_distillation(v, t, ours.temperature)
        image, sentence = isa.sample_hard_negatives(v, t, ours.temperature)
        with bf16():
            enc = ours.embed_words(torch.tensor(ours.tokenizer.enc_id, device=DEVICE))
            words = torch.cat([enc.expand(count, 1, -1), words[:, 1:]], dim=1)
            right = encode(words, mask, F_v)
            wrong = encode(torch.cat([words, words[sentence]]), torch.cat([mask, mask]),
                           torch.cat([F_v[image], F_v]))
            logits = theirs.itm_head(torch.cat([right, wrong])).float()
        labels = torch.cat([mask.new_ones(count), mask.new_zeros(2 * count)])
        loss = gcd + F.cross_entropy(logits, labels)
        plain_model.zero_grad(set_to_none=True)
        loss.backward()
        return loss

    def light(encoder):
        with bf16():
            features = encoder(pixels)
        features.float().sum().backward()

    def frozen_part():
        """Our step from the tokens on; torch overcounts the backward of grouped convolutions."""
        with bf16():
            U = torch.zeros(count, 6, 768, device=DEVICE, requires_grad=True)
            words, mask = isa.compose_query(ours, U)
            t = ours.encode_text(words, mask)
            lar = isa.local_alignment_regularization(ours, words, mask, F_v, v, t)
            (lar + t.sum()).backward()

    differ = abs(our_step().item() - plain_step().item())
    print(f"  the two losses differ by {differ:.1e} (bfloat16)")
    with torch.no_grad():
        forward = operations(partial(encoder, pixels))
    total = 3 * forward + operations(frozen_part)  # the light encoder's backward: twice its forward
    variants = {"plain": plain_step, "ours": our_step, "gcd": partial(our_step, lar=False),
                "plain light": partial(light, plain_encoder), "light": partial(light, encoder),
                "pieces": partial(our_step, InPieces(model, count // 4), blip=in_pieces)}
    if DEVICE == "cuda":
        variants["compiled"] = partial(our_step, torch.compile(model))
    seconds = measure(variants)
    show("a plain step on transformers' modules", seconds["plain"])
    show("  of that, torchvision's EfficientNet-B2", seconds["plain light"])
    show("our step, GCD + LAR", seconds["ours"], total / rate, seconds["plain"], "1.5 x")
    show("  of that, our EfficientNet-B2", seconds["light"], 3 * forward / rate,
         seconds["plain light"])
    show("  the rest", seconds["ours"] - seconds["light"], (total - 3 * forward) / rate,
         seconds["plain"] - seconds["plain light"])
    show("our step, GCD alone", seconds["gcd"])
    show("our step in four pieces, against whole", seconds["pieces"], None, seconds["ours"])
    if DEVICE == "cuda":
        show("our step, torch.compile", seconds["compiled"], total / rate, seconds["plain"])
    else:  # as train.py does; compared with the plain step as it was before
        keep_freed_memory()
        round_frozen_weights(ours, "bf16")
        kept = measure({"plain": plain_step, "ours": our_step})
        show("our step as in train.py: freed memory kept, weights rounded", kept["ours"],
             total / rate, seconds["plain"], "1.5 x")
        show("  the plain step with freed memory kept", kept["plain"])


# ---- 3. the pocket world
def part_pocket():
    """python train.py && python evaluate.py table, from nothing: where the seconds go."""
    with tempfile.TemporaryDirectory() as folder:
        marks = {"start": time.perf_counter()}
        said = {"drawing the pocket world": "python and torch start",
                "24000 images: v": "drawing the world, listing its images",
                "M trained parameters": "storing v and F^v", "wrote runs/pocket": "training"}
        process = subprocess.Popen([sys.executable, "-u", ROOT / "train.py"], cwd=folder,
                                   stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            for words, what in said.items():
                if words in line:
                    marks[what] = time.perf_counter()
        if process.wait() != 0:
            raise SystemExit("train.py failed")
        subprocess.run([sys.executable, ROOT / "evaluate.py", "table"], cwd=folder,
                       stdout=subprocess.DEVNULL, check=True)
        marks["evaluation, with its galleries"] = time.perf_counter()
    names, times = list(marks), list(marks.values())
    spent = {name: after - before
             for name, before, after in zip(names[1:], times, times[1:], strict=False)}
    for name, seconds in spent.items():
        print(f"  {name:58s} {seconds:7.1f} s")
    others = sum(spent.values()) - spent["training"]
    print(f"  all but training: {others / spent['training']:.2f} of training (wanted: at most 1)")


def part_pocket_step():
    """A training step of the pocket world, 256 images, one thread, and what its parts take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    blip = blip_lite.load("pocket")
    encoder = query_side.build("pocketnet")
    mapper = isa.AdaptiveTokenLearner(encoder.out_channels, blip.word_dim)
    model = isa.QueryModel(encoder, mapper).train()
    optimizer = torch.optim.AdamW(model.parameters())
    pixels = torch.randn(256, 3, 64, 64)
    with torch.no_grad():
        v, F_v = blip.encode_image(pixels)

    def step(stop=None):
        """The loop's step, up to a part."""
        with torch.autocast("cpu", torch.bfloat16):
            feature_map = encoder(pixels)
            if stop == "light encoder":
                return
            words, mask = isa.compose_query(blip, model.mapper(feature_map))
            t = blip.encode_text(words, mask)
        loss = isa.global_contrastive_distillation(v, t, blip.temperature)
        if stop == "learner, text encoder, GCD":
            return
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss + isa.local_alignment_regularization(blip, words, mask, F_v, v, t)
        if stop == "LAR":
            return
        optimizer.zero_grad()
        loss.backward()
        if stop != "backward":
            optimizer.step()

    parts = ["light encoder", "learner, text encoder, GCD", "LAR", "backward", "optimizer"]
    seconds = measure({part: partial(step, part) for part in parts}, 9)
    for part, before in zip(parts, [None, *parts], strict=False):
        show(part, seconds[part] - (seconds[before] if before else 0))
    show("whole step", seconds["optimizer"])
    torch.set_num_threads(threads)


# ---- 4. ranking
def unit(rows, seed):
    return F.normalize(torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed)), dim=1)


def cirr_in_public(q, gallery, names, references, groups):
    """CIRR's R@K and Rs@K as published evaluation scripts do: all names sorted, then compared."""
    ranked = names[torch.argsort(1 - q @ gallery.T, dim=-1).numpy()]  # [Q, N]
    ranked = ranked[ranked != references[:, None]].reshape(len(q), -1)  # [Q, N-1]
    labels = ranked == groups[:, 2:3]
    within = (ranked[..., None] == groups[:, None, :]).sum(-1).astype(bool)  # [Q, N-1]
    group_labels = labels[within].reshape(len(q), -1)  # [Q, 5]
    return {f"R@{k}": 100 * labels[:, :k].sum() / len(q) for k in (1, 5, 10, 50)} | {
        f"Rs@{k}": 100 * group_labels[:, :k].sum() / len(q) for k in (1, 2, 3)}


def circo_in_public(q, gallery, names, _, groups):
    """mAP@5 of one target a query; one query at a time, since together they take gigabytes."""
    precision = 0
    for row, target in zip(q, groups[:, 2], strict=True):
        found = np.flatnonzero(names[torch.argsort(1 - row @ gallery.T).numpy()][:5] == target)
        precision += 1 / (found[0] + 1) if len(found) else 0
    return {"mAP@5": 100 * precision / len(q)}


def search_of_faiss(gallery):
    """[N, E] -> a function of queries [Q, E] -> their top 50 by faiss, or None without faiss."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery.numpy())
    return lambda q: index.search(q.numpy(), 50)


def compare_search(what, q, gallery, wanted):
    """top_k alone, against faiss and the plain product with torch.topk."""
    their = search_of_faiss(gallery)
    functions = {"plain": lambda: (q @ gallery.T).topk(50),
                 "ours": partial(benchmarks.top_k, q, gallery, 50)}
    seconds = measure(functions | ({"faiss": partial(their, q)} if their else {}), 5)
    show(f"{what}: product and torch.topk", seconds["plain"])
    show(f"{what}: top_k", seconds["ours"], None, seconds["plain"])
    if their:
        show(f"{what}: faiss", seconds["faiss"])
        ratio = seconds["ours"] / seconds["faiss"]
        print(f"  top_k takes {ratio:.2f} x the time of faiss (wanted: at most {wanted})")
    else:
        print("  faiss was skipped: it is not installed (pip install faiss-cpu)")


def part_rank():
    """From features to metrics at the sizes of CIRR val and CIRCO, against sorting all names."""
    for benchmark, count, size in (("cirr", 4181, 2297), ("circo", 800, 123_403)):
        q, gallery = unit(count, 0), unit(size, 1)
        names = np.array([f"image-{i}" for i in range(size)])
        references = names[np.arange(count) % size]
        groups = names[(np.arange(count)[:, None] + np.arange(1, 6)) % size]
        queries = [benchmarks.Query(str(i), references[i], [""], [groups[i, 2]], groups[i].tolist())
                   for i in range(count)]
        world = benchmarks.Benchmark(benchmark, "val", names.tolist(), {}, queries)

        def ours(world=world, q=q, gallery=gallery):
            cirr = world.name == "cirr"
            subsets = benchmarks.rank_subsets(world, q, gallery) if cirr else None
            return benchmarks.score(world, benchmarks.rank(world, q, gallery), subsets)

        script = cirr_in_public if benchmark == "cirr" else circo_in_public
        public = partial(script, q, gallery, names, references, groups)
        found, wanted = ours(), public()
        assert all(abs(found[metric] - value) < 0.1 for metric, value in wanted.items())
        seconds = measure({"public": public, "ours": ours}, 3)
        show(f"{benchmark}: {count} queries, {size} images, sorting names", seconds["public"])
        wanted = "10 x" if benchmark == "cirr" else "31 x"
        show(f"{benchmark}: ours", seconds["ours"], None, seconds["public"], wanted)
        compare_search(benchmark, q, gallery, 1.6)
    compare_search("100 queries, 1,000,000 images", unit(100, 0), unit(1_000_000, 1), 1)


def part_large():
    """10 million images x 256 in float16: exact top 50 against reading the file of 5 GB once."""
    count = 10_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gallery.npy")
        with open(path, "wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (count, 256)}
            np.lib.format.write_array_header_1_0(file, header)
            offset = file.tell()
            for seed in range(100):
                unit(count // 100, seed).half().numpy().tofile(file)
            os.fsync(file.fileno())

        def forget():
            """So that the file comes from disk, as one that is larger than memory would."""
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def read():
            for start in range(0, count, 4096):
                rows = min(4096, count - start)
                np.fromfile(path, np.float16, 256 * rows, offset=offset + 512 * start)

        for queries in (1, 16, 100):
            q = unit(queries, 1000)
            for where, before in (("disk", forget), ("memory", lambda: None)):
                seconds = measure({
                    "read": lambda b=before: (b(), read()),
                    "ours": lambda q=q, b=before: (b(), benchmarks.top_k(q, path, 50))}, 3)
                read_s, ours_s = seconds["read"], seconds["ours"]
                print(f"  {queries:3d} queries, from {where:6s}: reading {read_s:5.2f} s, "
                      f"top 50 {ours_s:5.2f} s: {ours_s / read_s:.2f} x (wanted: at most 2.5)")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"  peak memory: {memory:.2f} GiB (wanted: at most 1; run this part alone)")


# ---- 6. memory
def part_memory():
    """Peak memory of train.py on 1,000 to 100,000 made-up images in shards, by --cache."""
    picture = io.BytesIO()
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(picture, "JPEG")
    data = picture.getvalue()
    for count in (1_000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            for shard in range(count // 1000):
                with tarfile.open(f"{folder}/{shard:05d}.tar", "w") as tar:
                    for i in range(1000):
                        member = tarfile.TarInfo(f"{shard:05d}{i:04d}.jpg")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            for cache in ("none", "full"):
                command = [sys.executable, ROOT / "train.py", "--images", folder, "--cache", cache]
                command += f"--name {cache} --batch 32 --epochs 1 --threads 1".split()
                process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
                log = Path(folder, "runs", cache, "log.jsonl")
                while not (log.exists() and log.read_text()):  # written after 20 steps
                    if process.poll() is not None:
                        raise SystemExit("train.py failed")
                    time.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                _, _, usage = os.wait4(process.pid, 0)
                files = Path(folder, "cache").rglob("*.npy")
                stored = sum(path.stat().st_size for path in files) / 1e6
                peak_memory = f"peak {usage.ru_maxrss / 1024:6.0f} MiB, {stored:6.0f} MB on disk"
                print(f"  {count:7d} images, --cache {cache}: {peak_memory}", flush=True)


def part_pieces():
    """Peak memory and time of the paper's step of 320 images, whole and by --micro-batch."""
    ours, _ = blip_base("cpu")
    with tempfile.TemporaryDirectory() as folder:
        blip_lite.save(ours, f"{folder}/blip.pth")
        words = (POCKET / "vocab.txt").read_text().splitlines()
        words += [f"[unused{i}]" for i in range(30522 - len(words))]
        Path(folder, "vocab.txt").write_text("\n".join(words))
        random = np.random.default_rng(0)
        for i in range(320):
            image = Image.fromarray(random.integers(0, 255, (256, 256, 3), np.uint8))
            image.save(f"{folder}/{i}.jpg")
        command = [sys.executable, ROOT / "train.py"]
        command += "--preset paper --blip blip.pth --images . --no-pretrained --epochs 1".split()
        command += ["--threads", str(torch.get_num_threads())]
        for piece in (20, 40, 80, None):
            more = ["--name", str(piece), *(["--micro-batch", str(piece)] if piece else [])]
            began = time.perf_counter()
            process = subprocess.Popen(command + more, cwd=folder, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            ended = f"killed by signal {status & 127}" if status else "done"
            print(f"  {piece or 'whole':5}: peak {usage.ru_maxrss / 2**20:5.1f} GiB, "
                  f"{time.perf_counter() - began:4.0f} s, {ended}", flush=True)


PARTS = {"blip": part_blip, "step": part_step, "pocket": part_pocket,
         "pocket_step": part_pocket_step, "rank": part_rank, "large": part_large,
         "memory": part_memory, "pieces": part_pieces}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS],
                        help=f"which parts, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads")
    for name in args.parts or PARTS:
        print(f"\n{name}: {PARTS[name].__doc__.splitlines()[0]}")
        PARTS[name]()


if __name__ == "__main__":
    main()
