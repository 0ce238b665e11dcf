"""Image decoding to RGB, and the crops of the paper (listings 1 and 2 of the appendix) and of its release notebook."""

import io
import warnings
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image, ImageOps

from dalle_ds.storage.hashing import hash_to_integer

# H, W source height and width, S side of the square crop, T side after resizing, C channels

MAX_PIXELS: Final = 128 * 2**20  # 134 megapixels; a header with more pixels is treated as a decompression bomb
CROP_RULE: Final = "paper-listing-2/area/v1"  # part of a data set's fingerprint: change it when `prior_crop` changes

# Pillow's other formats are disabled: some start external programs (Ghostscript for EPS), which untrusted images must not do.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

AnyImage = Image.Image | np.ndarray


class ImageProblem(Exception):
    """An image cannot be used. `reason` is the reason under which it is counted. A run must not stop because of it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(
    data: bytes, background: tuple[int, int, int] = (255, 255, 255), *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode to RGB: apply the EXIF rotation, composite transparency onto `background`, and take the first frame of animations.

    Raises:
        ImageProblem: "unreadable" or "too large". The size is checked in the header, before any pixel is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's decompression bomb warning: below, it is an error
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
    except Exception:  # on malformed bytes, decoders raise any kind of exception: OSError, SyntaxError, struct.error, ...
        raise ImageProblem("unreadable") from None


def upright_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Convert an open image to the same RGB image that `decode_image` returns for its file. Does not modify `image`.

    Raises:
        ImageProblem: "unreadable", if the file is damaged.
    """
    try:
        return _to_rgb(ImageOps.exif_transpose(image), background)
    except (OSError, SyntaxError, ValueError):  # Pillow decodes at the first use
        raise ImageProblem("unreadable") from None


def extension_of(data: bytes) -> str:
    """The file extension of an encoded image's format, "jpg" if unknown. No pixel is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                kind = (image.format or "").lower()
    except Exception:  # as in decode_image, which later reports the reason
        return "jpg"
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(kind, kind)


def dvae_augment(
    image: AnyImage, target: int, rng: np.random.Generator, *, min_zoom: float = 9 / 8, max_zoom: float = 12 / 8
) -> np.ndarray:
    """Random crop, resize and flip for dVAE training (listing 1; the defaults are its zooms): uint8 (target, target, 3).

    Raises:
        ImageProblem: "too small", if the shorter side is under `target`, since the paper's rule never enlarges.
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
    """Crop near the centre for the prior's data (listing 2): uint8 (target, target, 3). No flip, since images may show text.

    The same image and seed give the same crop on any machine. `seed_of(key)` returns a seed for each sample.

    Raises:
        ImageProblem: "too small", if the shorter side is under `target`.
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
    """The release notebook's rule: resize the shorter side to `target` with Lanczos, then crop the centre.

    Returns:
        uint8 (target, target, 3).

    Raises:
        ImageProblem: "too small", if the shorter side is under `target`.
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    side = _short_side(image.height, image.width, target)
    width, height = (round(target * length / side) for length in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - target) // 2, (height - target) // 2
    return np.asarray(image.crop((left, top, left + target, top + target)))


def seed_of(key: str) -> int:
    """A sample's seed: 64 bits of the SHA-256 of its key."""
    return hash_to_integer(key, "little")


def area_resize(pixels_SSC: np.ndarray, size: int, top: int = 0, left: int = 0, window: int | None = None) -> np.ndarray:
    """Resize a square to (size, size) by area averaging, and return its (window, window) part at (top, left), uint8.

    This is TensorFlow 1's ResizeArea with align_corners=True, as named in the listings: output cell i covers the source
    interval [i * s, (i + 1) * s) with s = (S - 1) / (size - 1), clipped at the last pixel. Pillow's BOX filter differs.
    """
    side = pixels_SSC.shape[0]
    window = size if window is None else window
    rows, row_weights = _area_taps(side, size, top, window)
    columns, column_weights = _area_taps(side, size, left, window)
    # Resize rows first, tap by tap, in a few large operations on contiguous memory. Use only the columns that the window needs.
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


@lru_cache(1024)  # many images have the same size
def _area_taps(side: int, size: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    # Source index and weight of each tap of the output cells start .. start + count - 1: two arrays (count, taps).
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
