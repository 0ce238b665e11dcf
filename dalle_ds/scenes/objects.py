"""The objects that an image shows, found by colour and form: no model, nothing is learned.

1. The ground is the median of the pale pixels.
2. Pixels nearer to a colour of the vocabulary than to the ground (in CIELAB) form connected components.
3. A component's colour is that of its pixels that differ most from the ground; edges are mixtures and don't count.
4. How much of each pixel that colour covers is compared with drawings of every shape and size, at parts of a pixel, sharp and
   blurred; the least squared difference decides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image
from scipy import ndimage

from dalle_ds.errors import DataError
from dalle_ds.scenes.render import MIN_SIDE
from dalle_ds.scenes.shapes import SUBPIXELS, mask_of
from dalle_ds.scenes.vocabulary import COLOURS, SHAPES, SIZES

# B images, S side in pixels, C channels, L CIELAB, K colours, T templates, W side of a window around an object

MAX_SIDE: Final = 64
"""Larger images are reduced: objects are clear at this size, and larger windows only take time."""

_PALE_LIGHTNESS, _PALE_CHROMA = 78.0, 24.0  # of a ground; colours of objects are outside
_MIN_GROUND: Final = 0.1  # share of the pixels that must be ground
_MIN_CONTRAST: Final = 18.0  # CIELAB distance from the ground below which nothing is seen
_STRANGE: Final = 42.0  # CIELAB distance from the ground above which a pixel is an object's, whatever its colour
_MAX_COLOUR_ERROR: Final = 45.0  # CIELAB distance from the nearest colour above which an object has none
_CORE: Final = 0.85  # of a component's contrast, what its core reaches; edges, mixed with the ground, have less
_SPECK: Final = 0.3  # share of the smallest object's area below which a component is no object
_MAX_MISFIT: Final = 0.22  # squared difference from the best drawing in the object's colour, as a share of the object's square
_BLURS: Final = (0.0, 0.6, 1.1)  # standard deviations in pixels of an image of 32
_BATCH: Final = 256


@dataclass(frozen=True)
class FoundObject:
    """One object of an image; x and y (its centroid's) are shares of the side. None: like nothing in the vocabulary."""

    shape: str | None
    colour: str | None
    size: str | None
    x: float
    y: float
    misfit: float


def find_objects(images_BSSC: np.ndarray) -> list[tuple[FoundObject, ...] | None]:
    """What each image shows; None where it has no pale ground.

    Args:
        images_BSSC: uint8 RGB, square, of `MIN_SIDE` pixels a side or more.

    Raises:
        DataError: images of another form.
    """
    shape = images_BSSC.shape
    if images_BSSC.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or shape[1] < MIN_SIDE:
        raise DataError(
            f"images of shape {shape}, {images_BSSC.dtype}: expected square RGB images of {MIN_SIDE} pixels a side or more"
        )
    found: list[tuple[FoundObject, ...] | None] = []
    for start in range(0, len(images_BSSC), _BATCH):
        found += _find(_reduced(images_BSSC[start : start + _BATCH]))
    return found


def _reduced(images_BSSC: np.ndarray) -> np.ndarray:
    if images_BSSC.shape[1] <= MAX_SIDE:
        return images_BSSC
    size = (MAX_SIDE, MAX_SIDE)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images_BSSC])


def _find(images_BSSC: np.ndarray) -> list[tuple[FoundObject, ...] | None]:
    side = images_BSSC.shape[1]
    lab_BSSL = _lab(images_BSSC)
    grounds = [_ground(lab_SSL, image_SSC) for lab_SSL, image_SSC in zip(lab_BSSL, images_BSSC, strict=True)]
    templates = _templates(side)
    components = [
        (b, component)
        for b, ground in enumerate(grounds)
        if ground is not None
        for component in _components(images_BSSC[b], lab_BSSL[b], ground, templates)
    ]
    found: list[list[FoundObject]] = [[] for _ in grounds]
    if components:
        matches = templates.match([component for _, component in components])
        for (b, one), (shape, size, misfit) in zip(components, matches, strict=True):
            is_known = misfit <= _MAX_MISFIT
            found[b].append(
                FoundObject(shape if is_known else None, one.colour, size if is_known else None, one.x, one.y, misfit)
            )
    return [None if ground is None else tuple(objects) for ground, objects in zip(grounds, found, strict=True)]


@dataclass(frozen=True)
class _Ground:
    rgb_C: np.ndarray
    lab_L: np.ndarray


def _ground(lab_SSL: np.ndarray, image_SSC: np.ndarray) -> _Ground | None:
    is_pale_SS = (lab_SSL[..., 0] > _PALE_LIGHTNESS) & (np.hypot(lab_SSL[..., 1], lab_SSL[..., 2]) < _PALE_CHROMA)
    if is_pale_SS.mean() < _MIN_GROUND:
        return None
    return _Ground(np.median(image_SSC[is_pale_SS], axis=0), np.median(lab_SSL[is_pale_SS], axis=0))


@dataclass(frozen=True)
class _Component:
    """What may be an object: pixels that differ from the ground and touch."""

    cover_V: np.ndarray  # of the window around the centroid, V = W * W: how much of each pixel the colour covers
    other_colours: float  # squared difference from mixtures of ground and colour, in units of their contrast's square
    colour: str | None
    x: float
    y: float


def _components(image_SSC: np.ndarray, lab_SSL: np.ndarray, ground: _Ground, templates: "_Templates") -> Iterator["_Component"]:
    side = len(image_SSC)
    contrast_SS = _distances(lab_SSL, ground.lab_L)
    nearest_SS = np.minimum(_to_nearest_colour(image_SSC), _STRANGE)
    is_object_SS = (contrast_SS > nearest_SS) & (contrast_SS > _MIN_CONTRAST)
    labels_SS, n = ndimage.label(is_object_SS)
    areas = np.bincount(labels_SS.ravel(), minlength=n + 1)
    reach = max(1, round(side / 32))  # pixels around a component that it may cover in part
    for label, box in enumerate(ndimage.find_objects(labels_SS), start=1):
        if areas[label] < _SPECK * templates.smallest_area:
            continue
        near = tuple(slice(max(0, part.start - reach), part.stop + reach) for part in box)
        labels_hw, image_hwC, contrast_hw = labels_SS[near], image_SSC[near], contrast_SS[near]
        own_hw = labels_hw == label
        core_hw = own_hw & (contrast_hw >= _CORE * np.quantile(contrast_hw[own_hw], _CORE))
        core_C = image_hwC[core_hw].mean(axis=0)
        away_C, offset_hwC = core_C - ground.rgb_C, image_hwC - ground.rgb_C
        contrast = away_C @ away_C
        cover_hw = offset_hwC @ away_C / contrast
        other_colours = float(((offset_hwC - cover_hw[..., None] * away_C)[own_hw] ** 2).sum() / contrast)
        cover_hw = np.clip(cover_hw, 0, 1)
        cover_hw *= _widened(own_hw, reach) & ((labels_hw == 0) | own_hw)
        window_WW, row, column = _centred(cover_hw, templates.window)
        y, x = row + near[0].start, column + near[1].start
        yield _Component(
            window_WW.ravel().astype(np.float32), other_colours, _colour(core_C), (x + 0.5) / side, (y + 0.5) / side
        )


def _widened(mask_hw: np.ndarray, reach: int) -> np.ndarray:
    wide_hw = mask_hw
    for _ in range(reach):
        padded = np.pad(wide_hw, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        wide_hw = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return wide_hw


def _centred(values_hw: np.ndarray, window: int) -> tuple[np.ndarray, float, float]:
    """The window around the centroid, which falls into its middle pixel; and the centroid, as row and column of `values_hw`."""
    height, width = values_hw.shape
    total = values_hw.sum()
    row = float(values_hw.sum(1) @ np.arange(height) / total)
    column = float(values_hw.sum(0) @ np.arange(width) / total)
    top, left = round(row) - window // 2, round(column) - window // 2
    window_WW = np.zeros((window, window))
    rows, columns = slice(max(0, top), top + window), slice(max(0, left), left + window)
    part = values_hw[rows, columns]
    window_WW[max(0, -top) :, max(0, -left) :][: part.shape[0], : part.shape[1]] = part
    return window_WW, row, column


def _colour(rgb_C: np.ndarray) -> str | None:
    distances_K = _distances(_lab(np.rint(rgb_C).astype(np.uint8)), _palette())
    nearest = int(distances_K.argmin())
    return list(COLOURS)[nearest] if distances_K[nearest] <= _MAX_COLOUR_ERROR else None


# ---- templates -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Templates:
    """Drawings of all shapes and sizes, at all parts of a pixel, sharp and blurred."""

    window: int
    drawings_TV: np.ndarray  # V = W * W
    squares_T: np.ndarray
    names: tuple[tuple[str, str], ...]  # shape and size of each template
    smallest_area: float

    def match(self, components: Sequence[_Component]) -> list[tuple[str, str, float]]:
        """Shape, size and misfit of each component."""
        covers_MV = np.stack([component.cover_V for component in components])
        squares_M = (covers_MV**2).sum(1)
        differences_MT = squares_M[:, None] - 2 * covers_MV @ self.drawings_TV.T + self.squares_T
        best_M = differences_MT.argmin(1)
        others_M = np.array([component.other_colours for component in components])
        misfits_M = (differences_MT[np.arange(len(best_M)), best_M] + others_M) / np.maximum(squares_M, 1e-6)
        return [(*self.names[best], float(misfit)) for best, misfit in zip(best_M, misfits_M, strict=True)]


@lru_cache(8)
def _templates(side: int) -> _Templates:
    half = int(np.ceil(1.2 * max(SIZES.values()) * side)) + 1
    window = 2 * half + 1
    drawings, names, areas = [], [], []
    steps = range(-(SUBPIXELS // 2), SUBPIXELS - SUBPIXELS // 2)
    for shape in SHAPES:
        for size, radius in SIZES.items():
            for dx in steps:
                for dy in steps:
                    sharp_WW, _, _ = _centred(mask_of(shape, radius * side, dx, dy) / 255, window)
                    areas.append(sharp_WW.sum())
                    for blur in _BLURS:
                        drawings.append(ndimage.gaussian_filter(sharp_WW, blur * side / 32).ravel())
                        names.append((shape, size))
    drawings_TV = np.stack(drawings).astype(np.float32)
    return _Templates(window, drawings_TV, (drawings_TV**2).sum(1), tuple(names), min(areas))


# ---- colours -------------------------------------------------------------------------------------------------------------


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) float32 (..., 3) of uint8 sRGB (..., 3), to 2 of 255 steps."""
    return _lab_table()[_index(rgb)]


def _to_nearest_colour(rgb: np.ndarray) -> np.ndarray:
    """CIELAB distance float32 (...) of uint8 sRGB (..., 3) from the nearest colour of the vocabulary."""
    return _nearest_table()[_index(rgb)]


def _index(rgb: np.ndarray) -> np.ndarray:
    steps = (rgb >> 2).astype(np.int32)
    return (steps[..., 0] << 12) | (steps[..., 1] << 6) | steps[..., 2]


def _distances(lab: np.ndarray, others: np.ndarray) -> np.ndarray:
    away = lab - others
    return np.sqrt(np.einsum("...l,...l->...", away, away))


@lru_cache(1)
def _lab_table() -> np.ndarray:
    levels = (np.arange(64) * 4 + 2) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    rgb = np.stack(np.meshgrid(linear, linear, linear, indexing="ij"), axis=-1).reshape(-1, 3)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = rgb @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1)
    return lab.astype(np.float32)


@lru_cache(1)
def _nearest_table() -> np.ndarray:
    return np.min([_distances(_lab_table(), colour_L) for colour_L in _palette()], axis=0)


@lru_cache(1)
def _palette() -> np.ndarray:
    return _lab(np.array(list(COLOURS.values()), np.uint8))
