"""Images in: bytes to RGB, and the paper's crops (listings 1 and 2 of the appendix, and the release notebook's)."""

import io
import warnings
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image, ImageOps

from dalle_ds.storage.hashing import hash_to_integer

# H, W source height and width, S side of the square crop, T side after resizing, C channels

MAX_PIXELS: Final = 128 * 2**20  # 134 megapixels; a decompression bomb names more in its header
CROP_RULE: Final = "paper-listing-2/area/v1"  # part of a data set's fingerprint: change it when `prior_crop` changes

# Pillow knows more, and some of those start other programs (Ghostscript for EPS): a lying image must not choose.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

AnyImage = Image.Image | np.ndarray


class ImageProblem(Exception):
    """An image that cannot be used; `reason` is the word it is counted under. Never a reason to stop a run."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(
    data: bytes, background: tuple[int, int, int] = (255, 255, 255), *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode to RGB: EXIF rotation applied, transparency laid on `background`, the first frame of an animation.

    Raises:
        ImageProblem: "unreadable" or "too large"; the size is judged from the header, before any pixel is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning; ours is an error
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise ImageProblem("too large")
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image, background)
    except ImageProblem:
        raise
    except Image.DecompressionBombError:
        raise ImageProblem("too large") from None
    except Exception:  # decoders meet hostile bytes with every kind of exception: OSError, SyntaxError, struct.error, ...
        raise ImageProblem("unreadable") from None


def upright_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """An image that is open already, in the RGB that `decode_image` gives for its file; `image` stays as it is.

    Raises:
        ImageProblem: "unreadable", where its file is damaged.
    """
    try:
        return _to_rgb(ImageOps.exif_transpose(image), background)
    except (OSError, SyntaxError, ValueError):  # Pillow decodes at the first use
        raise ImageProblem("unreadable") from None


def extension_of(data: bytes) -> str:
    """The extension of an image's format, told by its first bytes ("jpg" if unknown); nothing is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                kind = (image.format or "").lower()
    except Exception:  # as in decode_image, which will tell the reason
        return "jpg"
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(kind, kind)


def dvae_augment(
    image: AnyImage, target: int, rng: np.random.Generator, *, min_zoom: float = 9 / 8, max_zoom: float = 12 / 8
) -> np.ndarray:
    """Random crop, resize and flip for dVAE training (listing 1, whose zooms are the defaults): uint8 (target, target, 3).

    Raises:
        ImageProblem: "too small", if the short side is under `target`; the paper's rule never enlarges.
    """
    pixels_HWC = _pixels(image)
    height, width = pixels_HWC.shape[:2]
    side = _short_side(height, width, target)
    top = int(rng.integers(0, height - side + 1))
    left = int(rng.integers(0, width - side + 1))
    resized = int(rng.integers(min(side, round(min_zoom * target)), min(side, round(max_zoom * target)) + 1))
    crop_HWC = _resize_and_crop(pixels_HWC[top : top + side, left : left + side], resized, target, rng)
    return np.ascontiguousarray(crop_HWC[:, ::-1]) if rng.integers(2) else crop_HWC


def prior_crop(image: AnyImage, target: int, seed: int) -> np.ndarray:
    """Near-centre crop for the prior's data (listing 2): uint8 (target, target, 3); no flip, since images may hold text.

    The same image and seed give the same crop, on any machine; `seed_of(key)` gives each sample its own.

    Raises:
        ImageProblem: "too small", if the short side is under `target`.
    """
    pixels_HWC = _pixels(image)
    height, width = pixels_HWC.shape[:2]
    side = _short_side(height, width, target)
    rng = np.random.default_rng(seed)
    top, left = (
        int(rng.integers(3 * slack // 8, max(3 * slack // 8 + 1, 5 * slack // 8))) for slack in (height - side, width - side)
    )
    resized = int(rng.integers(target, min(side, round(9 / 8 * target)) + 1))
    return _resize_and_crop(pixels_HWC[top : top + side, left : left + side], resized, target, rng)


def center_crop(image: AnyImage, target: int) -> np.ndarray:
    """The release notebook's rule: short side to `target` by Lanczos, then the middle: uint8 (target, target, 3).

    Raises:
        ImageProblem: "too small", if the short side is under `target`.
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    side = _short_side(image.height, image.width, target)
    width, height = (round(target * length / side) for length in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - target) // 2, (height - target) // 2
    return np.asarray(image.crop((left, top, left + target, top + target)))


def seed_of(key: str) -> int:
    """A seed from a sample's key: 64 bits of its SHA-256."""
    return hash_to_integer(key, "little")


def area_resize(pixels_SSC: np.ndarray, size: int, top: int = 0, left: int = 0, window: int | None = None) -> np.ndarray:
    """Resize a square to (size, size) by area average, and return its (window, window) part at (top, left), uint8.

    It is TensorFlow 1's ResizeArea with align_corners=True, which the listings name: output cell i covers the source
    interval [i * s, (i + 1) * s) with s = (S - 1) / (size - 1), cut at the last pixel. Pillow's BOX filter is not that.
    """
    side = pixels_SSC.shape[0]
    window = size if window is None else window
    rows, row_weights = _area_taps(side, size, top, window)
    columns, column_weights = _area_taps(side, size, left, window)
    # Rows first, tap by tap: few large steps over contiguous memory; of the columns only those that the window is made of.
    first = int(columns[0, 0])
    pixels_SNC = pixels_SSC[:, first : int(columns[-1, -1]) + 1]
    rows_WNC = row_weights[:, 0, None, None] * pixels_SNC[rows[:, 0]]
    for tap in range(1, rows.shape[1]):
        rows_WNC += row_weights[:, tap, None, None] * pixels_SNC[rows[:, tap]]
    columns = columns - first
    cells_WWC = column_weights[None, :, 0, None] * rows_WNC[:, columns[:, 0]]
    for tap in range(1, columns.shape[1]):
        cells_WWC += column_weights[None, :, tap, None] * rows_WNC[:, columns[:, tap]]
    return np.clip(np.rint(cells_WWC), 0, 255).astype(np.uint8)


@lru_cache(1024)  # images of one size are many
def _area_taps(side: int, size: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    # Source index and weight of each tap of output cells start .. start + count - 1: two (count, taps) arrays.
    scale = (side - 1) / (size - 1) if size > 1 else side / size
    begin = (start + np.arange(count)) * scale
    end = begin + scale
    taps = np.floor(begin)[:, None] + np.arange(int(np.ceil(scale)) + 1)
    overlap = np.minimum(end[:, None], taps + 1) - np.maximum(begin[:, None], taps)
    weights = np.maximum(overlap, 0) / scale
    return np.minimum(taps, side - 1).astype(np.int64), weights.astype(np.float32)


def _resize_and_crop(pixels_SSC: np.ndarray, size: int, target: int, rng: np.random.Generator) -> np.ndarray:
    top, left = (int(rng.integers(0, size - target + 1)) for _ in range(2))
    return area_resize(pixels_SSC, size, top, left, target)


def _pixels(image: AnyImage) -> np.ndarray:
    return image if isinstance(image, np.ndarray) else np.asarray(image)


def _short_side(height: int, width: int, target: int) -> int:
    side = min(height, width)
    if side < target:
        raise ImageProblem("too small")
    return side


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would clip instead of scaling
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
