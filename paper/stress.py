"""Beyond the paper: what happens as the gallery grows, and when the query image is damaged."""

import io
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from tqdm import tqdm

import benchmarks
import blip_lite
import evaluate
from paper.beyond import HEADS, SUMS, TEXT, averaged, headline, models_of, options
from paper.costs import machine, median_ms
from paper.numbers import NOTES
from paper.runs import HOME
from paper.tables import cell, markdown
from plumbing.files import replacing
from plumbing.images import open_image
from plumbing.precision import autocast, open_blip
from pocket import drawing, specs

SIZES = 10_000, 100_000  # images in the gallery; --images is the largest
BLOCK, BATCH = 5_000, 125  # images written, and encoded, at once


def distractors(blip, precision, count):
    """v, float16 [count, E], of scenes from the set that ISA trains on. Nothing else is kept.

    A block of images depends on its number alone, so a stopped run resumes at the last whole one.
    """
    path = HOME / "growth" / f"{blip.fingerprint[:16]}-{precision}.f16"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 2 * blip.embed_dim * BLOCK  # bytes of a block
    done = path.stat().st_size // size if path.exists() else 0
    with open(path, "ab") as file:
        file.truncate(done * size)
        for block in tqdm(range(done, -(-count // BLOCK)), "drawing and encoding", unit_scale=BLOCK,
                          unit="img", disable=None):
            rng, rows = specs.Rng(f"distractors {block}"), []
            for _ in range(BLOCK // BATCH):
                drawn = [drawing.draw(specs.sample(rng, "unlabeled", specs.random_scene))
                         for _ in range(BATCH)]
                pixels = torch.stack([blip.preprocess(image) for image in drawn])
                with torch.inference_mode(), autocast("cpu", precision):
                    rows.append(blip.encode_image(pixels, cls_only=True)[0].half())
            file.write(torch.cat(rows).numpy().tobytes())
    v = np.memmap(path, np.float16, "c", shape=(count, blip.embed_dim))
    return torch.from_numpy(v)


def growth_table(seeds, threads, images=1_000_000):
    """CIRR's test queries in larger and larger galleries -> markdown, figures/growth.png."""
    blip, precision = open_blip(options(threads))
    models = models_of(seeds, blip)
    (part,) = evaluate.open_benchmarks("cirr")
    setting, queries = evaluate.Setting(blip, part, precision, workers=0), {}
    for method in (*SUMS, TEXT):
        queries[method] = [setting.query_features(method)]
    queries["isa"] = [setting.query_features("isa", model, s["prompt"]) for model, s in models]
    own = setting.gallery.half()
    sizes = [len(own), *(size for size in SIZES if size < images), images]
    more = distractors(blip, precision, images - len(own))
    exclude, target = setting.references, torch.tensor(
        [setting.place[query.targets[0]] for query in part.queries])
    rows, curves, methods = [], {}, ("isa", *SUMS, TEXT)
    for size in sizes:
        gallery = torch.cat([own, more[: size - len(own)]])  # v alone: 128 bytes an image
        cells = []
        for method in methods:
            places = [benchmarks.top_k(q, gallery, 10, exclude) for q in queries[method]]
            hits = [(p == target[:, None]).float() for p in places]  # [Q, 10]
            first, ten = ([100 * h[:, :k].sum(1).mean().item() for h in hits] for k in (1, 10))
            cells += [cell(first), cell(ten)]
            curves.setdefault(method, []).append((size, np.mean(first)))
        one = partial(benchmarks.top_k, queries["isa"][0][:1], gallery, 10)
        rows.append([f"{size:,}", *cells, f"{median_ms(one, 10):.2f}",
                     f"{gallery.nbytes / 1e6:.1f}"])
    head = [f"{method} {metric}" for method in methods for metric in ("R@1", "R@10")]
    plot(curves, "paper/figures/growth.png")
    note = NOTES["growth"].format(machine=machine(threads))
    return [note, "", *markdown(["images", *head, "search, ms", "MB"], rows), "",
            "![CIRR R@1 over the size of the gallery](figures/growth.png)"]


def plot(curves, path, width=560, height=300, left=46, low=30):
    """{method: [(size, percent)]} -> a picture, sizes on a logarithmic axis, saved at `path`."""
    scale, right, top = 2, 130, 14  # drawn twice as large and reduced: smooth lines
    sheet = Image.new("RGB", (scale * width, scale * height), "white")
    pen, points = ImageDraw.Draw(sheet), [p for curve in curves.values() for p in curve]
    first, last = (np.log10(f(size for size, _ in points)) for f in (min, max))
    most = 10 * np.ceil(max(percent for _, percent in points) / 10 + 0.01)

    def place(size, percent):
        x = left + (width - left - right) * (np.log10(size) - first) / max(last - first, 1e-9)
        return scale * x, scale * (height - low - (height - low - top) * percent / most)

    def write(x, y, text, fill="black", anchor="mm"):
        pen.text((x, y), text, fill, font_size=11 * scale, anchor=anchor)

    for percent in np.arange(0, most + 1, 10):
        (x, y), (end, _) = place(10**first, percent), place(10**last, percent)
        pen.line((x, y, end, y), (225, 225, 225), scale)
        write(x - 5 * scale, y, f"{percent:.0f}", anchor="rm")
    for size, _ in next(iter(curves.values())):
        write(place(size, 0)[0], scale * (height - 16), f"{size:,}")
    colours = ((20, 110, 200), (215, 80, 20), (30, 150, 70), (120, 120, 120))
    for i, ((method, curve), colour) in enumerate(zip(curves.items(), colours, strict=False)):
        line = [place(*point) for point in curve]
        pen.line(line, colour, 2 * scale)
        for x, y in line:
            pen.ellipse((x - 6, y - 6, x + 6, y + 6), colour)
        write(scale * (width - right + 12), scale * (top + 16 * i), method, colour, "lm")
    with replacing(path) as file:
        sheet.reduce(scale).save(file, "PNG", optimize=True)


def compress(image):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=10)
    return Image.open(io.BytesIO(out.getvalue()))


def add_noise(image):
    """Gaussian, of standard deviation 30 of 255; its seed is the image itself."""
    pixels, rng = np.asarray(image), np.random.default_rng(crc32(image.tobytes()))
    noisy = pixels + rng.normal(0, 30, pixels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


DISTORTIONS = {  # name -> function of an RGB image
    "as it is": lambda image: image,
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(max(image.size) / 32)),
    "JPEG, quality 10": compress,
    "a quarter of the light": lambda image: ImageEnhance.Brightness(image).enhance(0.25),
    "noise": add_noise,
}


def distorted(benchmark, distort, out):
    """A benchmark with an empty gallery whose query images, distorted, are in the folder `out`."""
    paths = {}
    for number, name in enumerate(sorted({query.reference for query in benchmark.queries})):
        paths[name] = out / f"{number}.png"
        distort(blip_lite.to_rgb(open_image(benchmark.paths[name]))).save(paths[name])
    return replace(benchmark, gallery=[], paths=paths)


def robustness_table(seeds, threads):
    """Distorted query images against the gallery as it is, on the test sets -> markdown."""
    blip, precision = open_blip(options(threads))
    runs = [(method, None, "") for method in SUMS]
    runs += [("isa", model, settings["prompt"]) for model, settings in models_of(seeds, blip)]
    scores = {}  # {distortion: {method: [[(benchmark, score)] for each seed]}}
    for part in evaluate.open_benchmarks():
        whole = evaluate.Setting(blip, part, precision, workers=0)
        for kind, distort in DISTORTIONS.items():
            with tempfile.TemporaryDirectory() as place:
                damaged = distorted(part, distort, Path(place))
                setting = evaluate.Setting(blip, damaged, precision, Path(place) / "cache", 0)
                for number, (method, model, prompt) in enumerate(runs):
                    best, _ = whole.rank(setting.query_features(method, model, prompt))
                    row = scores.setdefault(kind, {}).setdefault(method, {})
                    row.setdefault(number, []).append((part.name, headline(part, best)))
    methods, rows = ("isa", *SUMS), []
    for kind, row in scores.items():
        found = {m: [averaged(run) for run in row[m].values()] for m in methods}
        rows.append([kind, *(cell([run[name] for run in found[method]])
                             for name in HEADS for method in methods)])
    head = [f"{title}, {method}" for title in HEADS.values() for method in methods]
    return [NOTES["robustness"], "", *markdown(["query image", *head], rows)]
