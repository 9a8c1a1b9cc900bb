"""Specs -> images of 64 x 64 pixels, drawn with PIL.

What no caption mentions (jitter, direction, clutter) comes from spec.pose. Everything is drawn on a
canvas of 128 x 128 pixels and reduced, which smooths the edges.
"""

import random
from math import cos, pi, sin

from PIL import Image, ImageDraw

from .specs import COLOURS, Garment, Scene, Spec

LINE, DARK, CREAM, TRUNK = (35, 35, 45), (60, 60, 70), (255, 246, 220), (121, 82, 48)
SKIN, GOLD, SILVER = (233, 190, 160), (240, 200, 60), (190, 190, 200)

# A thing is a list of (form, points, fill) in a box from -1 to 1, y downwards. fill None = the
# thing's colour; an arc has its two angles there.
SHAPES = {
    "cat": [
        ("poly", (-.1, .1, .55, -.3, .95, -.9, 1, -.3, .6, .3), None),
        ("oval", (-.6, -.05, .7, .95), None), ("poly", (-.85, -.95, -.35, -.6, -.8, -.3), None),
        ("poly", (.15, -.95, -.3, -.6, .15, -.3), None), ("oval", (-.9, -.75, .2, .2), None),
        ("oval", (-.65, -.4, -.5, -.2), LINE), ("oval", (-.2, -.4, -.05, -.2), LINE)],
    "dog": [
        ("oval", (-.5, -.1, .95, .5), None), ("rect", (-.4, .2, -.1, .95), None),
        ("rect", (.5, .2, .8, .95), None), ("oval", (-1, -.75, -.1, .1), None),
        ("oval", (-.4, -.75, 0, .25), DARK), ("oval", (-1, -.35, -.8, -.1), LINE),
        ("poly", (.8, 0, 1, -.6, .95, .2), None)],
    "bird": [
        ("poly", (.4, .0, 1, -.35, 1, .3), None), ("oval", (-.6, -.35, .65, .55), None),
        ("oval", (-.95, -.75, -.2, .0), None),
        ("poly", (-1, -.2, -.7, -.45, -.7, -.1), (247, 160, 30)),
        ("oval", (-.65, -.5, -.5, -.3), LINE), ("poly", (-.2, .0, .55, -.75, .4, .25), CREAM),
        ("line", (-.1, .5, -.1, .95), None), ("line", (.2, .5, .2, .95), None)],
    "fish": [
        ("poly", (.35, 0, 1, -.6, 1, .6), None), ("oval", (-1, -.5, .6, .5), None),
        ("oval", (-.7, -.2, -.5, .05), LINE), ("poly", (-.2, -.4, .2, -.8, .3, -.3), None),
        ("line", (-.35, -.3, -.35, .3), None)],
    "boat": [
        ("poly", (-1, .3, 1, .3, .6, .9, -.6, .9), None), ("line", (0, -1, 0, .3), None),
        ("poly", (.08, -.95, .08, .15, .8, .15), CREAM),
        ("poly", (-.08, -.7, -.08, .15, -.6, .15), CREAM)],
    "car": [
        ("poly", (-.55, -.1, -.3, -.6, .35, -.6, .65, -.1), CREAM),
        ("rect", (-1, -.1, 1, .45), None), ("line", (.03, -.6, .03, -.1), None),
        ("oval", (-.75, .2, -.2, .75), DARK), ("oval", (.25, .2, .8, .75), DARK)],
    "house": [
        ("rect", (-.75, -.15, .75, .95), None), ("poly", (-1, -.15, 0, -1, 1, -.15), DARK),
        ("rect", (-.2, .3, .2, .95), TRUNK), ("rect", (.35, .1, .6, .4), CREAM)],
    "tree": [
        ("rect", (-.15, .2, .15, .95), TRUNK), ("oval", (-.95, -.5, .2, .45), None),
        ("oval", (-.2, -.5, .95, .45), None), ("oval", (-.6, -1, .6, .2), None)],
    "flower": [
        ("line", (0, .1, 0, .95), None), ("poly", (0, .8, .5, .35, .15, .75), (60, 150, 60)),
        *[("oval", (x - .33, y - .33, x + .33, y + .33), None)
          for x, y in ((-.38, -.5), (.38, -.5), (0, -.8), (-.25, -.05), (.25, -.05))],
        ("oval", (-.25, -.6, .25, -.1), (120, 80, 30))],
    "cup": [
        ("oval", (.2, -.35, 1, .45), None), ("oval", (.42, -.15, .78, .25), CREAM),
        ("poly", (-.8, -.6, .6, -.6, .4, .8, -.6, .8), None), ("oval", (-.8, -.75, .6, -.4), CREAM)],
    "ball": [
        ("oval", (-.85, -.85, .85, .85), None), ("arc", (-1.5, -.85, -.1, .85), (-60, 60)),
        ("arc", (.1, -.85, 1.5, .85), (120, 240)), ("line", (-.85, 0, .85, 0), None)],
    "star": [
        ("poly", [r * way(i * pi / 5) for i, r in enumerate((1, .42) * 5)
                  for way in (sin, lambda a: -cos(a))], None)],
}  # fmt: skip


def draw_shapes(pen, shapes, colour, x, y, scale=1, sign=1, width=2):
    """Shapes as in SHAPES, in units of `scale` pixels around (x, y); sign = -1 mirrors them."""
    for form, points, fill in shapes:
        xs, ys = [x + sign * v * scale for v in points[::2]], [y + v * scale for v in points[1::2]]
        corners, box = list(zip(xs, ys, strict=True)), (min(xs), min(ys), max(xs), max(ys))
        if form == "line":
            pen.line(corners, fill=LINE, width=3)
        elif form == "arc":
            start, end = fill if sign == 1 else (180 - fill[1], 180 - fill[0])
            pen.arc(box, start, end, fill=LINE, width=width)
        else:
            paint = {"poly": pen.polygon, "oval": pen.ellipse, "rect": pen.rectangle}[form]
            paint(corners if form == "poly" else box, colour if fill is None else fill, LINE, width)


# --------------------------------------------------------------------------------------- scenes
SKY_GROUND = {  # background -> colour above the horizon, colour below it
    "meadow": ((168, 216, 255), (140, 200, 96)), "night": ((22, 26, 62), (38, 56, 50)),
    "snow": ((205, 222, 236), (240, 245, 250)), "beach": ((150, 214, 250), (240, 218, 160)),
    "sea": ((190, 226, 250), (58, 132, 190)), "room": ((236, 216, 196), (158, 110, 76)),
}  # fmt: skip


def draw_background(pen, background: str, rng: random.Random):
    """Sky, ground and clutter."""
    top, bottom = SKY_GROUND[background]
    horizon = rng.randint(62, 84)
    pen.rectangle((0, 0, 128, horizon), fill=top)
    pen.rectangle((0, horizon, 128, 128), fill=bottom)
    x, y = rng.randint(8, 100), rng.randint(6, 20)

    def spots(count, us, vs, width, height):
        """Boxes with their upper left corner anywhere in the ranges us x vs."""
        for _ in range(count):
            u, v = rng.randint(*us), rng.randint(*vs)
            yield u, v, u + width, v + height

    if background == "night":
        pen.ellipse((x, y, x + 16, y + 16), fill=(250, 244, 200))
        for star in spots(9, (0, 127), (0, horizon - 8), 2, 2):
            pen.ellipse(star, fill=(250, 250, 230))
    elif background == "snow":
        for flake in spots(22, (0, 127), (0, 127), 4, 4):
            pen.ellipse(flake, fill=(255, 255, 255))
    elif background == "room":
        pen.rectangle((x - 6, 8, x + 24, 40), fill=(176, 220, 250), outline=(110, 76, 50), width=3)
        pen.line((x + 9, 8, x + 9, 40), fill=(110, 76, 50), width=3)
        for v in range(horizon + 12, 128, 14):
            pen.line((0, v, 128, v), fill=(138, 94, 62), width=2)
    elif background == "sea":
        for wave in spots(10, (-8, 120), (horizon + 4, 124), 16, 8):
            pen.arc(wave, 180, 360, fill=(170, 210, 235), width=2)
    else:
        for cloud in spots(2, (-10, 110), (0, 26), 30, 12):
            pen.ellipse(cloud, fill=(245, 250, 255))
        if background == "meadow":
            for blade in spots(9, (0, 124), (horizon + 12, 124), 2, -7):
                pen.line(blade, fill=(84, 150, 60), width=2)
        else:
            pen.rectangle((0, horizon, 128, horizon + 9), fill=(70, 160, 205))
            for stone in spots(9, (0, 124), (horizon + 12, 124), 5, 3):
                pen.ellipse(stone, fill=(206, 180, 120))


def draw_scene(pen, scene: Scene, rng: random.Random):
    draw_background(pen, scene.background, rng)
    for thing in scene.things:
        radius = (20.5 if thing.size == "big" else 13.5) * rng.uniform(0.93, 1.07)
        x = {"left": 22, "middle": 64, "right": 106}[thing.place] + rng.uniform(-3, 3)
        y, sign = rng.uniform(62, 98), -1 if rng.random() < 0.5 else 1
        draw_shapes(pen, SHAPES[thing.kind], COLOURS[thing.colour], x, y, radius, sign)


# ------------------------------------------------------------------------------------- garments
LENGTHS = {  # garment -> pixels from the neck to a short and to a long one's hem
    "dress": {"short": 72, "long": 98}, "shirt": {"short": 50, "long": 76},
    "toptee": {"short": 42, "long": 66},
}  # fmt: skip
NECKS = {  # but for the round one, which is no shape of draw_shapes; relative to the neck
    "square neck": [("rect", (-10, 0, 10, 12), SKIN)],
    "v neck": [("poly", (-11, 0, 11, 0, 0, 21), SKIN)],
    "collar": [("poly", (0, 2, side * 16, -4, side * 12, 12), CREAM) for side in (-1, 1)],
}


def cloth(garment: Garment, rng: random.Random) -> Image.Image:
    """A canvas full of the garment's colours and pattern."""
    image = Image.new("RGB", (128, 128), COLOURS[garment.colour])
    if garment.pattern == "plain":
        return image
    pen, second = ImageDraw.Draw(image), COLOURS[garment.second]
    lines = range(rng.randint(0, 11) - 12, 128, 12)
    for row, v in enumerate(lines):
        if garment.pattern == "dotted":
            for u in range(lines[0] + 6 * (row % 2), 128, 12):
                pen.ellipse((u, v, u + 6, v + 6), fill=second)
        else:
            pen.rectangle((0, v, 128, v + 5), fill=second)
        if garment.pattern == "checked":
            pen.rectangle((v, 0, v + 3, 128), fill=second)
    return image


def details(width: int, length: int) -> dict[str, list]:
    """Detail -> shapes in pixels, relative to the neck; width: of half the chest."""
    belt = min(38, length - 10)
    return {
        "belt": [("rect", (2 - width, belt, width - 2, belt + 6), DARK),
                 ("rect", (-4, belt - 1, 4, belt + 7), GOLD)],
        "buttons": [("oval", (-3, y, 3, y + 6), CREAM) for y in range(24, min(length - 4, 60), 9)],
        "bow": [("poly", (0, 26, side * 11, 19, side * 11, 33), DARK) for side in (-1, 1)],
        "pocket": [("rect", (4, 22, 16, 35), CREAM)],
        "zip": [("rect", (-2, 18, 2, length), SILVER)],
        "heart": [("poly", (0, 40, -10, 29, -5, 22, 0, 26, 5, 22, 10, 29), (250, 90, 120))],
    }  # fmt: skip


def draw_garment(image, pen, garment: Garment, rng: random.Random):
    tint = rng.randint(222, 244)
    image.paste((tint, tint - rng.randint(0, 8), tint - rng.randint(0, 12)), (0, 0, 128, 128))
    x, top = 64 + rng.randint(-6, 6), 14 + rng.randint(-4, 4)
    width = 21 + rng.randint(-2, 2)
    length = LENGTHS[garment.kind][garment.length]
    hem = {"dress": width + 15, "shirt": width + 1, "toptee": width - 3}[garment.kind]
    waist = {"dress": [(width - 4, 40)], "shirt": [], "toptee": [(width - 4, length)]}[garment.kind]
    right = [(width, 0), *waist, (hem, length)]  # relative to the neck, from the shoulder down
    outlines = [[(-width, 0), *right, *((-u, v) for u, v in right[:0:-1])]]
    if garment.sleeves != "no":
        reach, drop = {"short": (14, 20), "long": (22, 58)}[garment.sleeves]
        sleeve = [(width - 8, 0), (width, 0), (width + reach, drop), (width + reach - 11, drop + 3),
                  (width - 4, 18)]  # fmt: skip
        outlines += [[(side * u, v) for u, v in sleeve] for side in (-1, 1)]
    outlines = [[(x + u, top + v) for u, v in outline] for outline in outlines]
    shape = Image.new("L", (128, 128))
    for outline in outlines:
        ImageDraw.Draw(shape).polygon(outline, fill=255)
    image.paste(cloth(garment, rng), mask=shape)
    for outline in reversed(outlines):
        pen.line([*outline, outline[0]], fill=LINE, width=2)
    if garment.neckline == "round neck":
        pen.pieslice((x - 11, top - 11, x + 11, top + 11), 0, 180, SKIN, LINE, 2)
    else:
        draw_shapes(pen, NECKS[garment.neckline], None, x, top)
    if garment.detail == "star":
        draw_shapes(pen, SHAPES["star"], COLOURS["white"], x, top + 30, scale=10)
    elif garment.detail != "none":
        line = 2 if garment.detail in ("pocket", "heart") else 1
        draw_shapes(pen, details(width, length)[garment.detail], None, x, top, width=line)


def draw(spec: Spec) -> Image.Image:
    """RGB, 64 x 64 pixels."""
    image, rng = Image.new("RGB", (128, 128)), random.Random(spec.pose)
    pen = ImageDraw.Draw(image)
    if isinstance(spec, Scene):
        draw_scene(pen, spec, rng)
    else:
        draw_garment(image, pen, spec, rng)
    return image.reduce(2)
