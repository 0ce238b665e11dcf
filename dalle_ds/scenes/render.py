"""Scenes to pixels, at any size."""

import math
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image

from dalle_ds.scenes.scene import Ground, Scene, SceneObject
from dalle_ds.scenes.shapes import SUBPIXELS, mask_of
from dalle_ds.scenes.vocabulary import COLOURS, GROUNDS

# S side of the image in pixels

MIN_SIDE: Final = 24
"""Below, small shapes cannot be told apart."""
TEXTURE_DEPTH: Final = 0.06  # how much darker than the ground its stripes, checks and dots are


def render(scene: Scene, side: int) -> np.ndarray:
    """Pixels uint8 (S, S, 3), edges smoothed.

    Raises:
        ValueError: a side under `MIN_SIDE`.
    """
    if side < MIN_SIDE:
        raise ValueError(f"side {side}: expected {MIN_SIDE} pixels or more")
    pixels_SSC = ground_pixels(scene.ground, side).copy()
    for one in scene.objects:
        _lay_on(pixels_SSC, one)
    return pixels_SSC


@lru_cache(256)
def ground_pixels(ground: Ground, side: int) -> np.ndarray:
    """uint8 (S, S, 3), read-only. Patterns repeat four times in an image, in phase with its edges."""
    n = 4 * side  # oversampled
    y_n1, x_1n = ((np.arange(n) + 0.5) * 8 / n).reshape(n, 1), ((np.arange(n) + 0.5) * 8 / n).reshape(1, n)
    match ground.texture:
        case "stripes":
            dark = ((x_1n + y_n1) % 2) < 1
        case "checks":
            dark = ((x_1n // 1 + y_n1 // 1) % 2) < 1
        case "dots":
            dark = (x_1n % 2 - 1) ** 2 + (y_n1 % 2 - 1) ** 2 < 0.4
        case _:
            dark = np.zeros((n, n), bool)
    dark_SS = np.asarray(Image.fromarray(np.uint8(255 * dark)).reduce(4)) / 255
    colour_C = np.array(GROUNDS[ground.colour])
    pixels_SSC = np.rint(colour_C * (1 - TEXTURE_DEPTH * dark_SS[..., None])).astype(np.uint8)
    pixels_SSC.flags.writeable = False
    return pixels_SSC


def _lay_on(pixels_SSC: np.ndarray, one: SceneObject) -> None:
    side = len(pixels_SSC)
    (left, dx), (top, dy) = (_place(share * side) for share in (one.x, one.y))
    mask_hw = mask_of(one.shape, one.radius * side, dx, dy)
    half = len(mask_hw) // 2
    rows, mask_rows = _overlap(top - half, len(mask_hw), side)
    columns, mask_columns = _overlap(left - half, len(mask_hw), side)
    under_hwC = pixels_SSC[rows, columns]
    cover_hw1 = mask_hw[mask_rows, mask_columns, None].astype(np.uint16)  # 255 * 255 + 127 fits
    colour_C = np.array(COLOURS[one.colour], np.uint16)
    under_hwC[...] = (under_hwC * (255 - cover_hw1) + colour_C * cover_hw1 + 127) // 255


def _place(pixels: float) -> tuple[int, int]:
    # The pixel that a point lies in, and the point's distance from that pixel's middle in `SUBPIXELS`-th pixels.
    steps = round((pixels - 0.5) * SUBPIXELS)
    pixel = math.floor(steps / SUBPIXELS + 0.5)
    return pixel, steps - pixel * SUBPIXELS


def _overlap(start: int, length: int, side: int) -> tuple[slice, slice]:
    first, last = max(0, start), min(side, start + length)
    return slice(first, last), slice(first - start, last - start)
