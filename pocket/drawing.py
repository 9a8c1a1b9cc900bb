"""Specs -> images of 64 x 64 pixels, drawn at twice the size and reduced: smooth edges."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

from .specs import COLOURS, Garment, Spec

LINE, DARK, CREAM = (35, 35, 45), (60, 60, 70), (255, 246, 220)
SKIN, GOLD, SILVER = (233, 190, 160), (240, 200, 60), (190, 190, 200)

# A shape is [form, points x y x y .., fill], y downwards; an arc has two angles for a fill, and
# without a fill a shape has its thing's colour. Things fit a box from -1 to 1; parts of garments
# are in pixels from the neck.
SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text())
# Clutter: [number, area, range of x, width, height, form, what its drawing function takes].
BACKGROUNDS = json.loads(Path(__file__).with_name("backgrounds.json").read_text())
CUTS = {"dress": (72, 98, 15), "shirt": (50, 76, 1), "toptee": (42, 66, -3)}  # short, long, flare


def draw_shapes(pen, shapes, colour, x, y, scale=1, sign=1, width=2):
    """Draw SHAPES in units of `scale` pixels around (x, y); sign = -1 mirrors them."""
    for form, points, *fill in shapes:
        xs, ys = [x + sign * v * scale for v in points[::2]], [y + v * scale for v in points[1::2]]
        corners, box = list(zip(xs, ys, strict=True)), (min(xs), min(ys), max(xs), max(ys))
        fill = tuple(fill[0]) if fill else colour
        if form == "line":
            pen.line(corners, LINE, width=3)
        elif form == "arc":
            pen.arc(box, *(fill if sign == 1 else (180 - fill[1], 180 - fill[0])), LINE, width)
        elif form == "poly":
            pen.polygon(corners, fill, LINE, width)
        else:
            {"oval": pen.ellipse, "rect": pen.rectangle}[form](box, fill, LINE, width)


def draw_background(pen, background, rng):
    backdrop, horizon = BACKGROUNDS[background], rng.randint(62, 84)
    pen.rectangle((0, 0, 128, horizon), backdrop["sky"])
    pen.rectangle((0, horizon, 128, 128), backdrop["ground"])
    x, y = rng.randint(8, 100), rng.randint(6, 20)
    if background == "night":
        pen.ellipse((x, y, x + 16, y + 16), (250, 244, 200))
    elif background == "beach":
        pen.rectangle((0, horizon, 128, horizon + 9), (70, 160, 205))
    elif background == "room":
        pen.rectangle((x - 6, 8, x + 24, 40), (176, 220, 250), (110, 76, 50), 3)
        pen.line((x + 9, 8, x + 9, 40), (110, 76, 50), 3)
        for v in range(horizon + 12, 128, 14):
            pen.line((0, v, 128, v), (138, 94, 62), 2)
    areas = {"clouds": (0, 26), "sky": (0, horizon - 8), "ground": (horizon + 12, 124),
             "water": (horizon + 4, 124), "image": (0, 127)}  # -> range of y
    for number, area, xs, width, height, form, *style in backdrop["clutter"]:
        for _ in range(number):
            u, v = rng.randint(*xs), rng.randint(*areas[area])
            getattr(pen, form)((u, v, u + width, v + height), *style)


def cloth(garment, rng):
    """A canvas full of the garment's colours and pattern."""
    image = Image.new("RGB", (128, 128), COLOURS[garment.colour])
    if garment.pattern == "plain":
        return image
    pen, second = ImageDraw.Draw(image), COLOURS[garment.second]
    first = rng.randint(0, 11) - 12
    for row, v in enumerate(range(first, 128, 12)):
        if garment.pattern == "dotted":
            for u in range(first + 6 * (row % 2), 128, 12):
                pen.ellipse((u, v, u + 6, v + 6), second)
        else:
            pen.rectangle((0, v, 128, v + 5), second)
        if garment.pattern == "checked":
            pen.rectangle((v, 0, v + 3, 128), second)
    return image


def draw_garment(image, pen, garment, rng):
    tint = rng.randint(222, 244)
    image.paste((tint, tint - rng.randint(0, 8), tint - rng.randint(0, 12)), (0, 0, 128, 128))
    x, top = 64 + rng.randint(-6, 6), 14 + rng.randint(-4, 4)
    width = 21 + rng.randint(-2, 2)
    short, long, flare = CUTS[garment.kind]
    length = short if garment.length == "short" else long
    waist = {"dress": [(width - 4, 40)], "shirt": [], "toptee": [(width - 4, length)]}[garment.kind]
    right = [(width, 0), *waist, (width + flare, length)]  # relative to the neck, downwards
    outlines = [right + [(-u, v) for u, v in reversed(right)]]
    if garment.sleeves != "no":
        reach, drop = (14, 20) if garment.sleeves == "short" else (22, 58)
        sleeve = [(width - 8, 0), (width, 0), (width + reach, drop), (width + reach - 11, drop + 3),
                  (width - 4, 18)]
        outlines += [[(side * u, v) for u, v in sleeve] for side in (-1, 1)]
    outlines = [[(x + u, top + v) for u, v in outline] for outline in outlines]
    shape = Image.new("L", image.size)
    for outline in outlines:
        ImageDraw.Draw(shape).polygon(outline, 255)
    image.paste(cloth(garment, rng), mask=shape)
    for outline in reversed(outlines):
        pen.line([*outline, outline[0]], LINE, 2)
    belt = min(38, length - 10)
    thin = {  # with a thinner outline; `width` is half the chest's
        "belt": [("rect", (2 - width, belt, width - 2, belt + 6), DARK),
                 ("rect", (-4, belt - 1, 4, belt + 7), GOLD)],
        "buttons": [("oval", (-3, y, 3, y + 6), CREAM) for y in range(24, min(length - 4, 60), 9)],
        "zip": [("rect", (-2, 18, 2, length), SILVER)], "bow": SHAPES["bow"]}
    for name in (garment.neckline, garment.detail):
        if name == "round neck":
            pen.pieslice((x - 11, top - 11, x + 11, top + 11), 0, 180, SKIN, LINE, 2)
        elif name == "star":
            draw_shapes(pen, SHAPES["star"], COLOURS["white"], x, top + 30, scale=10)
        elif name in thin:
            draw_shapes(pen, thin[name], None, x, top, width=1)
        elif name != "none":
            draw_shapes(pen, SHAPES[name], None, x, top)


def draw(spec: Spec) -> Image.Image:
    """RGB, 64 x 64 pixels."""
    image, rng = Image.new("RGB", (128, 128)), random.Random(spec.pose)
    pen = ImageDraw.Draw(image)
    if isinstance(spec, Garment):
        draw_garment(image, pen, spec, rng)
        return image.reduce(2)
    draw_background(pen, spec.background, rng)
    for thing in spec.things:
        radius = (20.5 if thing.size == "big" else 13.5) * rng.uniform(0.93, 1.07)
        x = {"left": 22, "middle": 64, "right": 106}[thing.place] + rng.uniform(-3, 3)
        y, sign = rng.uniform(62, 98), -1 if rng.random() < 0.5 else 1
        draw_shapes(pen, SHAPES[thing.kind], COLOURS[thing.colour], x, y, radius, sign)
    return image.reduce(2)
