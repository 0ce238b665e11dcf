"""Image decoding to RGB, and the crops of the paper (listings 1 and 2 of the appendix) and of its release notebook."""

import io
import warnings
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image, ImageOps

from dalle_ds.data.png_chunks import only_pixels
from dalle_ds.data.raw.sample import SampleProblem
from dalle_ds.storage.hashing import hash_to_integer

# H, W source height and width, S side of the square crop, T side after resizing, C channels

MAX_PIXELS: Final = 128 * 2**20  # 134 megapixels; a header with more pixels is treated as a decompression bomb
CROP_RULE: Final = "paper-listing-2/area/v1"  # part of a data set's fingerprint: change it when `prior_crop` changes

# Pillow's other formats are disabled: some start external programs (Ghostscript for EPS), which untrusted images must not do.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value of the second

AnyImage = Image.Image | np.ndarray


class ImageProblem(SampleProblem):
    """An image cannot be used."""


def decode_image(
    data: bytes, background: tuple[int, int, int] = (255, 255, 255), *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode to RGB: apply the EXIF rotation, composite transparency onto `background`, and take the first frame of animations.

    Only the pixels decide: a PNG with damaged or huge metadata is decoded without them.

    Raises:
        ImageProblem: "unreadable"; "truncated": the file ends before its pixels do, as after a download that broke off;
            "too large"; or "unknown pixel range": 32-bit integers, or floats beyond 0 to 1. The size is checked in the header,
            before any pixel is decoded.
    """
    try:
        return _decode(data, background, max_pixels)
    except ImageProblem as problem:
        pixels = only_pixels(data)
        if problem.reason not in ("unreadable", "truncated") or len(pixels) == len(data):
            raise
    return _decode(pixels, background, max_pixels)


def _decode(data: bytes, background: tuple[int, int, int], max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's decompression bomb warning: below, it is an error
            with _open(data) as image:
                if image.width * image.height > max_pixels:
                    raise ImageProblem("too large")
                image.load()
                return _to_rgb(_upright(image, in_place=True), background)
    except ImageProblem:
        raise
    except Image.DecompressionBombError:
        raise ImageProblem("too large") from None
    except Exception as error:  # on malformed bytes, decoders raise any kind: OSError, SyntaxError, struct.error, ...
        raise ImageProblem(_damage(error)) from None


def _damage(error: Exception) -> str:
    # Pillow would fill what is missing with grey, as browsers do; a prior would learn the grey. So no pixel may be missing.
    return "truncated" if "truncated" in str(error).lower() else "unreadable"


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _upright(image: Image.Image, *, in_place: bool) -> Image.Image:
    # `image` is loaded, so what fails here is the EXIF data, which say nothing about the pixels.
    try:
        return ImageOps.exif_transpose(image, in_place=in_place) or image
    except Exception:  # any kind, as in _decode
        return image


def upright_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Convert an open image to the same RGB image that `decode_image` returns for its file. Does not modify `image`.

    Raises:
        ImageProblem: "unreadable" or "truncated", if the file is damaged, or "unknown pixel range".
    """
    try:
        image.load()  # Pillow decodes at the first use
        return _to_rgb(_upright(image, in_place=False), background)
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageProblem(_damage(error)) from None


def extension_of(data: bytes) -> str | None:
    """The file extension of an encoded image's format. None if it is no image in FORMATS. No pixel is decoded."""
    kind = _format_of(data) or _format_of(only_pixels(data))
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(kind, kind) or None


def _format_of(data: bytes) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(data) as image:
                return (image.format or "").lower()
    except Exception:  # as in _decode, which reports the reason
        return ""


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

    The same image and seed give the same crop on any machine. `seed_of(key)` returns a seed for each sample. The paper draws
    another crop each time that it reads an image.

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


def seed_of(key: str, crop: int = 0) -> int:
    """Seed of a crop of a sample: 64 bits of the SHA-256 of its key, and for further crops of the crop's number too."""
    return hash_to_integer(f"{key}\n{crop}" if crop else key, "little")  # no key contains a newline


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
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        image = Image.fromarray(_grey_of(image))  # Pillow would clip instead of scaling
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_of(image: Image.Image) -> np.ndarray:
    # Grey of more than 8 bits as uint8 (H, W), scaled by the range that its mode means.
    grey_HW = np.asarray(image)
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        shift = 4 if tags.get(BITS_PER_SAMPLE) in (12, (12,)) else 8
        grey_HW = (grey_HW >> shift).clip(0, 255).astype(np.uint8)
        return 255 - grey_HW if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey_HW
    # Floats are 0 to 1 by convention. Others write 0 to 255, or radiance without a limit; 32-bit integers may hold 8, 16 or 32
    # bits: a guess would make training images black or white.
    if image.mode == "F" and grey_HW.min(initial=0) >= 0 and grey_HW.max(initial=0) <= 1:  # False for nan
        return np.rint(grey_HW * 255).astype(np.uint8)
    raise ImageProblem("unknown pixel range")
