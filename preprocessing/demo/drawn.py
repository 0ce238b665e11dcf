"""Procedurally drawn images: coloured shapes with exact captions, for tests and for machines without network access."""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

COLOURS: Final = {
    "red": (214, 40, 40),
    "blue": (33, 87, 210),
    "green": (36, 148, 64),
    "yellow": (247, 208, 46),
    "purple": (128, 48, 168),
    "orange": (244, 132, 32),
    "pink": (246, 130, 178),
    "brown": (122, 74, 38),
    "black": (24, 24, 28),
    "grey": (140, 144, 150),
}
SHAPES: Final = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "bar")
SIZES: Final = {"small": 0.11, "": 0.17, "large": 0.23}  # radius as a fraction of the image's side
# Position of the first shape relative to the second -> direction (x, y) from the first shape to the second.
PLACES: Final = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}
OVERSAMPLING: Final = 2  # draw at this multiple of the size, to smooth edges


@dataclass(frozen=True)
class Drawing:
    """An image with its caption. Drawings with equal captions differ only slightly, so the caption is their group."""

    caption: str
    image: Image.Image


def draw(seed: int, size: int = 256) -> Drawing:
    """Draw one or two shapes on a pale background. The same seed gives the same image."""
    rng = np.random.default_rng(seed)
    first, second = _pick_shape(rng), _pick_shape(rng)
    is_pair = rng.random() < 0.7 and first[:2] != second[:2]
    side = size * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(232, 256, 3)))
    pen = ImageDraw.Draw(canvas)
    jitter = rng.uniform(-0.04, 0.04, (2, 2))
    if not is_pair:
        _draw_shape(pen, first, 0.5 + jitter[0], side)
        return Drawing(f"a {_name(first)}", canvas.resize((size, size), Image.Resampling.BOX))
    place = list(PLACES)[int(rng.integers(len(PLACES)))]
    step = np.array(PLACES[place]) * 0.23
    _draw_shape(pen, first, 0.5 - step + jitter[0], side)
    _draw_shape(pen, second, 0.5 + step + jitter[1], side)
    return Drawing(f"a {_name(first)} {place} a {_name(second)}", canvas.resize((size, size), Image.Resampling.BOX))


Shape = tuple[str, str, str]  # shape, colour, size word


def _pick_shape(rng: np.random.Generator) -> Shape:
    shape, colour, size_word = (list(names)[int(rng.integers(len(names)))] for names in (SHAPES, COLOURS, SIZES))
    return shape, colour, size_word


def _name(shape: Shape) -> str:
    kind, colour, size_word = shape
    return f"{size_word} {colour} {kind}".strip()


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, centre: np.ndarray, side: int) -> None:
    kind, colour_name, size_word = shape
    colour, radius = COLOURS[colour_name], SIZES[size_word] * side
    x, y = (float(v) for v in centre * side)
    box = (x - radius, y - radius, x + radius, y + radius)
    match kind:
        case "circle":
            pen.ellipse(box, fill=colour)
        case "ring":
            pen.ellipse(box, outline=colour, width=round(radius * 0.36))
        case "square":
            pen.rectangle((x - radius * 0.85, y - radius * 0.85, x + radius * 0.85, y + radius * 0.85), fill=colour)
        case "bar":
            pen.rectangle((x - radius, y - radius * 0.35, x + radius, y + radius * 0.35), fill=colour)
        case "cross":
            arm = radius * 0.33
            pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
            pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
        case _:
            radii = {"triangle": [1.0] * 3, "diamond": [1.0] * 4, "star": [1.0, 0.42] * 5}[kind]
            points = []
            for n, share in enumerate(radii):
                angle = 2 * math.pi * n / len(radii) - math.pi / 2
                points.append((x + radius * share * math.cos(angle), y + radius * share * math.sin(angle)))
            pen.polygon(points, fill=colour)
