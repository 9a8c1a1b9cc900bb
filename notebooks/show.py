"""Drawing that several notebooks share: images in a row, attention maps, what a query retrieves.

    show.images(paths, captions)                     # pictures side by side
    show.maps(paths[0], cross)                       # [L, H, W], one picture for each token
    show.retrieved(benchmark, query, {"ISA": names}) # reference, modifier, best images

An image is a path or a PIL image. Each function draws one figure and shows it. A green frame marks
a target.
"""

import base64
import io
import textwrap

import matplotlib.pyplot as plt
from IPython.display import Image as Png
from IPython.display import display
from PIL import Image, ImageDraw

import blip_lite
from plumbing.pictures import overlay

DPI, SIDE = 75, 1.25  # inches for one image
GREEN = "#1ea03c"


def picture(image):
    """A path or a PIL image -> RGB, enlarged without smoothing if it is small."""
    image = blip_lite.to_rgb(image if isinstance(image, Image.Image) else Image.open(image))
    return image.resize((128, 128), Image.Resampling.NEAREST) if max(image.size) < 128 else image


def canvas(rows, columns, side=SIDE, text=0.35):
    """Bare axes [rows, columns], with `text` inches above each image for its caption."""
    size = columns * side, rows * (side + text)
    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=DPI, squeeze=False,
                                layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False, anchor="S")  # captions use the room above
    return figure, axes


def finish(figure):
    """Show a figure as a PNG of 255 colours: half the size keeps committed notebooks small."""
    plain, small = io.BytesIO(), io.BytesIO()
    figure.savefig(plain, dpi=DPI, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
    method, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    few = Image.open(plain).convert("RGB").quantize(255, method, dither=dither)
    few.save(small, "PNG", optimize=True)
    display(Png(small.getvalue()))


def put(axis, image, caption="", frame=None, width=19):
    """Draw one image, its caption wrapped at `width` letters, and a frame of that colour."""
    axis.imshow(picture(image))
    axis.set_title(textwrap.fill(caption, width), fontsize=8)
    if frame:
        axis.set_frame_on(True)
        for spine in axis.spines.values():
            spine.set(color=frame, linewidth=4)


def images(pictures, captions=None, framed=(), columns=8, title=None, text=0.35, side=SIDE):
    """Draw pictures in rows of `columns`; those whose index is in `framed` get a green frame."""
    pictures, columns = list(pictures), min(columns, len(pictures))
    figure, axes = canvas(-(-len(pictures) // columns), columns, side, text + 0.25 * bool(title))
    for i, image in enumerate(pictures):
        frame = GREEN if i in framed else None
        put(axes.flat[i], image, captions[i] if captions else "", frame, width=int(15 * side))
    figure.suptitle(title, fontsize=10)
    finish(figure)


def maps(image, weights, captions=None, title=None):
    """Draw the image, then a faded copy under each map [H, W] of weights [L, H, W], in red.

    The deepest red is that map's maximum.
    """
    captions = captions or [f"u{i + 1}" for i in range(len(weights))]
    pictures = [overlay(picture(image), w) for w in weights]
    images([image, *pictures], ["image", *captions], columns=len(weights) + 1, title=title)


def retrieved(benchmark, query, rankings, top=6):
    """Draw one query under several methods, {label: names best first}, one row each.

    Reference and modifier are at the left. Each row's title says where the first target is.
    """
    figure, axes = canvas(len(rankings), top + 2, side=1.6, text=0.3)  # large enough to see
    put(axes[0, 0], benchmark.paths[query.reference], "reference")
    modifier = textwrap.fill("that " + " / ".join(query.captions), 16)
    axes[0, 1].text(0.5, 0.5, modifier, ha="center", va="center", fontsize=9)
    for row, (label, names) in zip(axes, rankings.items(), strict=True):
        place = min((names.index(t) + 1 for t in query.targets if t in names), default=None)
        for axis, name in zip(row[2:], names, strict=False):
            put(axis, benchmark.paths[name], frame=GREEN if name in query.targets else None)
        place = place or f"> {len(names)}"
        row[2].set_title(f"{label}: target at {place}", fontsize=8, loc="left")
    finish(figure)


def strip(pictures, caption, side=96):
    """Pictures side by side below a caption -> one image of 64 colours."""
    out = Image.new("RGB", (len(pictures) * (side + 4), side + 18), "white")
    ImageDraw.Draw(out).text((2, 2), caption, "black")
    for i, image in enumerate(pictures):
        out.paste(picture(image).resize((side, side)), (i * (side + 4), 18))
    return out.quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def encoded(frame):
    file = io.BytesIO()
    frame.save(file, "PNG", optimize=True)
    return file.getvalue()


def film(image, moments, captions):
    """Show maps [L, H, W] at several moments as a GIF, one frame for each caption."""
    frames = [strip([image, *(overlay(picture(image), w) for w in maps)], caption)
              for maps, caption in zip(moments, captions, strict=True)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=600, loop=0)
    display({"image/gif": base64.b64encode(file.getvalue()).decode(), "text/plain": "a film",
             "image/png": base64.b64encode(encoded(frames[-1])).decode()}, raw=True)


def slider(frames, start=0):
    """Show one of several images, chosen by a slider; where scripts do not run, the first one."""
    texts = [base64.b64encode(encoded(frame)).decode() for frame in frames]
    uris = ",".join(f"'{text}'" for text in texts)
    page = (f'<div><img src="data:image/png;base64,{texts[start]}"><br><input type="range" min="0" '
            f'max="{len(frames) - 1}" value="{start}" style="width:20em" oninput="this.parentNode.'
            f"firstChild.src='data:image/png;base64,'+[{uris}][this.value]\"></div>")
    display({"text/html": page, "image/png": texts[start], "text/plain": "a slider"}, raw=True)
