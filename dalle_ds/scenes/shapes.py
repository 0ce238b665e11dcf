"""Shapes as soft masks: how much of each pixel a shape covers."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

# h, w pixels of a mask

SUBPIXELS: Final = 4  # places of a shape are rounded to this part of a pixel, so that its mask is drawn once
_OVERSAMPLING: Final = 8

Pen = ImageDraw.ImageDraw
Point = tuple[float, float]


@lru_cache(8192)
def mask_of(shape: str, radius: float, dx: int = 0, dy: int = 0) -> np.ndarray:
    """Coverage uint8 (h, w), h = w odd, of a shape of `radius` pixels; read-only.

    The shape's centre is the middle of the mask's middle pixel, moved by dx and dy `SUBPIXELS`-th pixels.
    """
    half = math.ceil(radius) + 1
    side = 2 * half + 1
    canvas = Image.new("L", (side * _OVERSAMPLING,) * 2, 0)
    centre = [(half + 0.5 + d / SUBPIXELS) * _OVERSAMPLING - 0.5 for d in (dx, dy)]  # Pillow's points are centres of pixels
    _DRAW[shape](ImageDraw.Draw(canvas), (centre[0], centre[1]), radius * _OVERSAMPLING)
    mask_hw = np.asarray(canvas.reduce(_OVERSAMPLING))
    mask_hw.flags.writeable = False
    return mask_hw


def _circle(pen: Pen, centre: Point, radius: float) -> None:
    pen.ellipse(_box(centre, 0.97 * radius, 0.97 * radius), fill=255)


def _ring(pen: Pen, centre: Point, radius: float) -> None:
    pen.ellipse(_box(centre, radius, radius), fill=255)
    pen.ellipse(_box(centre, 0.5 * radius, 0.5 * radius), fill=0)


def _square(pen: Pen, centre: Point, radius: float) -> None:
    pen.rectangle(_box(centre, 0.9 * radius, 0.9 * radius), fill=255)


def _cross(pen: Pen, centre: Point, radius: float) -> None:
    pen.rectangle(_box(centre, radius, 0.34 * radius), fill=255)
    pen.rectangle(_box(centre, 0.34 * radius, radius), fill=255)


def _triangle(pen: Pen, centre: Point, radius: float) -> None:
    corners = ((0, -0.98), (1, 0.88), (-1, 0.88))
    pen.polygon([_at(centre, x * radius, y * radius) for x, y in corners], fill=255)


def _star(pen: Pen, centre: Point, radius: float) -> None:
    points = []
    for n in range(10):
        angle, reach = n * math.pi / 5, radius * (1.1 if n % 2 == 0 else 0.45)
        points.append(_at(centre, reach * math.sin(angle), 0.06 * radius - reach * math.cos(angle)))
    pen.polygon(points, fill=255)


def _heart(pen: Pen, centre: Point, radius: float) -> None:
    points = []
    for n in range(64):
        t = 2 * math.pi * n / 64
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append(_at(centre, radius * x / 15.6, -radius * (y + 2.5) / 15.0))
    pen.polygon(points, fill=255)


def _moon(pen: Pen, centre: Point, radius: float) -> None:
    pen.ellipse(_box(_at(centre, 0.3 * radius, 0), radius, radius), fill=255)
    pen.ellipse(_box(_at(centre, 0.84 * radius, 0), 0.78 * radius, 0.78 * radius), fill=0)


def _box(centre: Point, half_width: float, half_height: float) -> tuple[float, float, float, float]:
    x, y = centre
    return x - half_width, y - half_height, x + half_width, y + half_height


def _at(centre: Point, right: float, down: float) -> Point:
    return centre[0] + right, centre[1] + down


_DRAW: Final[dict[str, Callable[[Pen, Point, float], None]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
}
