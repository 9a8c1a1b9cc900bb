"""Specs -> images, 64 x 64 pixels, drawn with PIL. What no caption speaks of (jitter, direction, clutter) comes from spec.pose."""

import random

import numpy as np
from PIL import Image, ImageDraw

from .specs import COLOURS, Garment, Scene, Spec, Thing

# A thing is a list of (form, points, fill) in a box from -1 to 1, y downwards; fill None = the thing's colour.
_LINE, _DARK, _CREAM, _TRUNK = (35, 35, 45), (60, 60, 70), (255, 246, 220), (121, 82, 48)
_SHAPES = {
    "cat": [("poly", (-.1, .1, .55, -.3, .95, -.9, 1, -.3, .6, .3), None), ("oval", (-.6, -.05, .7, .95), None),
            ("poly", (-.85, -.95, -.35, -.6, -.8, -.3), None), ("poly", (.15, -.95, -.3, -.6, .15, -.3), None),
            ("oval", (-.9, -.75, .2, .2), None), ("oval", (-.65, -.4, -.5, -.2), _LINE), ("oval", (-.2, -.4, -.05, -.2), _LINE)],
    "dog": [("oval", (-.5, -.1, .95, .5), None), ("rect", (-.4, .2, -.1, .95), None), ("rect", (.5, .2, .8, .95), None),
            ("oval", (-1, -.75, -.1, .1), None), ("oval", (-.4, -.75, 0, .25), _DARK), ("oval", (-1, -.35, -.8, -.1), _LINE),
            ("poly", (.8, 0, 1, -.6, .95, .2), None)],
    "bird": [("poly", (.4, .0, 1, -.35, 1, .3), None), ("oval", (-.6, -.35, .65, .55), None),
             ("oval", (-.95, -.75, -.2, .0), None), ("poly", (-1, -.2, -.7, -.45, -.7, -.1), (247, 160, 30)),
             ("oval", (-.65, -.5, -.5, -.3), _LINE), ("poly", (-.2, .0, .55, -.75, .4, .25), _CREAM),
             ("line", (-.1, .5, -.1, .95), None), ("line", (.2, .5, .2, .95), None)],
    "fish": [("poly", (.35, 0, 1, -.6, 1, .6), None), ("oval", (-1, -.5, .6, .5), None), ("oval", (-.7, -.2, -.5, .05), _LINE),
             ("poly", (-.2, -.4, .2, -.8, .3, -.3), None), ("line", (-.35, -.3, -.35, .3), None)],
    "boat": [("poly", (-1, .3, 1, .3, .6, .9, -.6, .9), None), ("line", (0, -1, 0, .3), None),
             ("poly", (.08, -.95, .08, .15, .8, .15), _CREAM), ("poly", (-.08, -.7, -.08, .15, -.6, .15), _CREAM)],
    "car": [("poly", (-.55, -.1, -.3, -.6, .35, -.6, .65, -.1), _CREAM), ("rect", (-1, -.1, 1, .45), None),
            ("line", (.03, -.6, .03, -.1), None), ("oval", (-.75, .2, -.2, .75), _DARK), ("oval", (.25, .2, .8, .75), _DARK)],
    "house": [("rect", (-.75, -.15, .75, .95), None), ("poly", (-1, -.15, 0, -1, 1, -.15), _DARK),
              ("rect", (-.2, .3, .2, .95), _TRUNK), ("rect", (.35, .1, .6, .4), _CREAM)],
    "tree": [("rect", (-.15, .2, .15, .95), _TRUNK), ("oval", (-.95, -.5, .2, .45), None), ("oval", (-.2, -.5, .95, .45), None),
             ("oval", (-.6, -1, .6, .2), None)],
    "flower": [("line", (0, .1, 0, .95), None), ("poly", (0, .8, .5, .35, .15, .75), (60, 150, 60)),
               *[("oval", (x - .33, y - .33, x + .33, y + .33), None)
                 for x, y in ((-.38, -.5), (.38, -.5), (0, -.8), (-.25, -.05), (.25, -.05))],
               ("oval", (-.25, -.6, .25, -.1), (120, 80, 30))],
    "cup": [("oval", (.2, -.35, 1, .45), None), ("oval", (.42, -.15, .78, .25), _CREAM),
            ("poly", (-.8, -.6, .6, -.6, .4, .8, -.6, .8), None), ("oval", (-.8, -.75, .6, -.4), _CREAM)],
    "ball": [("oval", (-.85, -.85, .85, .85), None), ("arc", (-1.5, -.85, -.1, .85, -60, 60), None),
             ("arc", (.1, -.85, 1.5, .85, 120, 240), None), ("line", (-.85, 0, .85, 0), None)],
    "star": [("poly", tuple(v for i in range(10) for v in (np.sin(i * np.pi / 5) * (1, .42)[i % 2],
                                                          -np.cos(i * np.pi / 5) * (1, .42)[i % 2])), None)],
}  # fmt: skip


def _draw_thing(pen, thing: Thing, x, y, radius, flip):
    """One thing, centred on (x, y), in pixels of the doubled canvas."""
    sign = -1 if flip else 1
    for form, points, fill in _SHAPES[thing.kind]:
        fill = COLOURS[thing.colour] if fill is None else fill
        angles, points = points[4:] if form == "arc" else None, points[:4] if form == "arc" else points
        xs, ys = [x + sign * v * radius for v in points[::2]], [y + v * radius for v in points[1::2]]
        if form == "poly":
            pen.polygon(list(zip(xs, ys, strict=True)), fill=fill, outline=_LINE, width=2)
        elif form == "line":
            pen.line(list(zip(xs, ys, strict=True)), fill=_LINE, width=3)
        else:
            box = (min(xs), min(ys), max(xs), max(ys))
            if form == "oval":
                pen.ellipse(box, fill=fill, outline=_LINE, width=2)
            elif form == "rect":
                pen.rectangle(box, fill=fill, outline=_LINE, width=2)
            elif not flip:
                pen.arc(box, *angles, fill=_LINE, width=2)
            else:
                pen.arc(box, 180 - angles[1], 180 - angles[0], fill=_LINE, width=2)


_SKY_GROUND = {  # background -> colour above the horizon, colour below it
    "meadow": ((168, 216, 255), (140, 200, 96)), "night": ((22, 26, 62), (38, 56, 50)),
    "snow": ((205, 222, 236), (240, 245, 250)), "beach": ((150, 214, 250), (240, 218, 160)),
    "sea": ((190, 226, 250), (58, 132, 190)), "room": ((236, 216, 196), (158, 110, 76)),
}  # fmt: skip


def _draw_background(pen, background: str, rng: random.Random):
    """Sky, ground, and the clutter that no caption speaks of."""
    top, bottom = _SKY_GROUND[background]
    horizon = rng.randint(62, 84)
    pen.rectangle((0, 0, 128, horizon), fill=top)
    pen.rectangle((0, horizon, 128, 128), fill=bottom)
    x, y = rng.randint(8, 100), rng.randint(6, 20)
    if background == "night":
        pen.ellipse((x, y, x + 16, y + 16), fill=(250, 244, 200))
        for _ in range(9):
            u, v = rng.randint(0, 127), rng.randint(0, horizon - 8)
            pen.ellipse((u, v, u + 2, v + 2), fill=(250, 250, 230))
    elif background == "snow":
        for _ in range(22):
            u, v = rng.randint(0, 127), rng.randint(0, 127)
            pen.ellipse((u, v, u + 4, v + 4), fill=(255, 255, 255))
    elif background == "room":
        pen.rectangle((x - 6, 8, x + 24, 40), fill=(176, 220, 250), outline=(110, 76, 50), width=3)
        pen.line((x + 9, 8, x + 9, 40), fill=(110, 76, 50), width=3)
        for v in range(horizon + 12, 128, 14):
            pen.line((0, v, 128, v), fill=(138, 94, 62), width=2)
    elif background == "sea":
        for _ in range(10):
            u, v = rng.randint(-8, 120), rng.randint(horizon + 4, 124)
            pen.arc((u, v, u + 16, v + 8), 180, 360, fill=(170, 210, 235), width=2)
    else:
        for _ in range(2):
            u, v = rng.randint(-10, 110), rng.randint(0, 26)
            pen.ellipse((u, v, u + 30, v + 12), fill=(245, 250, 255))
        if background == "beach":
            pen.rectangle((0, horizon, 128, horizon + 9), fill=(70, 160, 205))
        for _ in range(9):
            u, v = rng.randint(0, 124), rng.randint(horizon + 12, 124)
            if background == "meadow":
                pen.line((u, v, u + 2, v - 7), fill=(84, 150, 60), width=2)
            else:
                pen.ellipse((u, v, u + 5, v + 3), fill=(206, 180, 120))


def _draw_scene(scene: Scene) -> Image.Image:
    rng = random.Random(scene.pose)
    image = Image.new("RGB", (128, 128))
    pen = ImageDraw.Draw(image)
    _draw_background(pen, scene.background, rng)
    for thing in scene.things:
        radius = (20.5 if thing.size == "big" else 13.5) * rng.uniform(0.93, 1.07)
        x = {"left": 22, "middle": 64, "right": 106}[thing.place] + rng.uniform(-3, 3)
        _draw_thing(pen, thing, x, rng.uniform(62, 98), radius, rng.random() < 0.5)
    return image.reduce(2)


def _pattern_fill(garment: Garment, rng: random.Random) -> Image.Image:
    """The cloth: a 128 x 128 canvas full of colour and pattern."""
    cloth = Image.new("RGB", (128, 128), COLOURS[garment.colour])
    if garment.pattern == "plain":
        return cloth
    pen, second = ImageDraw.Draw(cloth), COLOURS[garment.second]
    shift = rng.randint(0, 11)
    if garment.pattern in ("striped", "checked"):
        for v in range(shift - 12, 128, 12):
            pen.rectangle((0, v, 128, v + 5), fill=second)
    if garment.pattern == "checked":
        for u in range(shift - 12, 128, 12):
            pen.rectangle((u, 0, u + 3, 128), fill=second)
    if garment.pattern == "dotted":
        for row, v in enumerate(range(shift - 12, 128, 12)):
            for u in range(shift - 12 + 6 * (row % 2), 128, 12):
                pen.ellipse((u, v, u + 6, v + 6), fill=second)
    return cloth


def _draw_garment(garment: Garment) -> Image.Image:
    rng = random.Random(garment.pose)
    tint = rng.randint(222, 244)
    image = Image.new("RGB", (128, 128), (tint, tint - rng.randint(0, 8), tint - rng.randint(0, 12)))
    shape = Image.new("L", (128, 128))
    ink, pen = ImageDraw.Draw(shape), ImageDraw.Draw(image)
    x, top = 64 + rng.randint(-6, 6), 14 + rng.randint(-4, 4)
    width = 21 + rng.randint(-2, 2)  # half the chest
    length = {"dress": {"short": 72, "long": 98}, "shirt": {"short": 50, "long": 76}, "toptee": {"short": 42, "long": 66}}
    bottom = top + length[garment.kind][garment.length]
    hem = {"dress": width + 15, "shirt": width + 1, "toptee": width - 3}[garment.kind]
    waist = top + 40 if garment.kind == "dress" else bottom
    body = [(x - width, top), (x + width, top), (x + width - 4, waist), (x + hem, bottom), (x - hem, bottom),
            (x - width + 4, waist)]  # fmt: skip
    if garment.kind == "shirt":
        body[2:4], body[4:] = [(x + hem, bottom)], [(x - hem, bottom)]
    outlines = [body]
    if garment.sleeves != "no":
        reach, drop = {"short": (14, 20), "long": (22, 58)}[garment.sleeves]
        for side in (-1, 1):
            shoulder, out = x + side * width, x + side * (width + reach)
            outlines.append([(shoulder - side * 8, top), (shoulder, top), (out, top + drop), (out - side * 11, top + drop + 3),
                             (shoulder - side * 4, top + 18)])  # fmt: skip
    for outline in outlines:
        ink.polygon(outline, fill=255)
    image.paste(_pattern_fill(garment, rng), mask=shape)
    for outline in reversed(outlines):
        pen.line([*outline, outline[0]], fill=_LINE, width=2)
    skin = (233, 190, 160)
    if garment.neckline == "round neck":
        pen.pieslice((x - 11, top - 11, x + 11, top + 11), 0, 180, fill=skin, outline=_LINE, width=2)
    elif garment.neckline == "square neck":
        pen.rectangle((x - 10, top, x + 10, top + 12), fill=skin, outline=_LINE, width=2)
    elif garment.neckline == "v neck":
        pen.polygon([(x - 11, top), (x + 11, top), (x, top + 21)], fill=skin, outline=_LINE, width=2)
    else:
        for side in (-1, 1):
            pen.polygon([(x, top + 2), (x + side * 16, top - 4), (x + side * 12, top + 12)], fill=_CREAM, outline=_LINE, width=2)
    _draw_detail(pen, garment.detail, x, top, bottom, width)
    return image.reduce(2)


def _draw_detail(pen, detail, x, top, bottom, width):
    if detail == "belt":
        y = min(top + 38, bottom - 10)
        pen.rectangle((x - width + 2, y, x + width - 2, y + 6), fill=_DARK, outline=_LINE)
        pen.rectangle((x - 4, y - 1, x + 4, y + 7), fill=(240, 200, 60), outline=_LINE)
    elif detail == "buttons":
        for y in range(top + 24, min(bottom - 4, top + 60), 9):
            pen.ellipse((x - 3, y, x + 3, y + 6), fill=_CREAM, outline=_LINE, width=1)
    elif detail == "bow":
        y = top + 26
        for side in (-1, 1):
            pen.polygon([(x, y), (x + side * 11, y - 7), (x + side * 11, y + 7)], fill=_DARK, outline=_LINE)
    elif detail == "pocket":
        pen.rectangle((x + 4, top + 22, x + 16, top + 35), fill=_CREAM, outline=_LINE, width=2)
    elif detail == "zip":
        pen.rectangle((x - 2, top + 18, x + 2, bottom), fill=(190, 190, 200), outline=_LINE, width=1)
    elif detail == "star":
        _draw_thing(pen, Thing("star", "white"), x, top + 30, 10, flip=False)
    elif detail == "heart":
        pen.polygon([(x, top + 40), (x - 10, top + 29), (x - 5, top + 22), (x, top + 26), (x + 5, top + 22), (x + 10, top + 29)],
                    fill=(250, 90, 120), outline=_LINE, width=2)  # fmt: skip


def draw(spec: Spec) -> Image.Image:
    """RGB, 64 x 64 px; drawn twice as large and reduced, which smooths the edges."""
    return (_draw_scene if isinstance(spec, Scene) else _draw_garment)(spec)
