"""Prepare images given by a program for the dVAE: check them, convert them to RGB, and crop them as preprocessing does.

B images, H and W pixels of any size, S side of the square crop.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from dalle_ds.data.images import ImageProblem, prior_crop, seed_of, upright_rgb
from dalle_ds.errors import DataError

Images = Image.Image | Sequence[Image.Image | np.ndarray] | np.ndarray | Tensor
"""A PIL image, a sequence of PIL images or uint8 arrays (H, W, 3), a uint8 array (B, H, W, 3), a uint8 tensor (B, 3, H, W)."""

EXPECTED = "expected PIL images, a numpy array uint8 (B, H, W, 3) or a torch tensor uint8 (B, 3, H, W)"


def crops_of(images: Images, size: int, keys: Sequence[str] | None = None) -> np.ndarray:
    """Crop images. Returns uint8 (B, S, S, 3) with S = `size`.

    Args:
        keys: one seed per image for the position of its crop: preprocessing uses the key of the sample. If None, the pixels of
            the image are the seed.

    Raises:
        DataError: not images, images that are too small, no images, or not one key per image.
    """
    pixels = _pixels_of(images)
    if keys is not None and len(keys) != len(pixels):
        raise DataError(f"{len(keys)} keys for {len(pixels)} images: expected one key per image")
    return np.stack([_crop(i, image_HWC, size, keys[i] if keys else None) for i, image_HWC in enumerate(pixels)])


def _pixels_of(images: Images) -> list[np.ndarray]:
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, np.ndarray | Tensor):
        found = f"images are a {type(images).__name__}, {images.dtype} {tuple(images.shape)}"
        if isinstance(images, Tensor):
            images = images.detach().cpu().numpy()
            images = images.transpose(0, 2, 3, 1) if images.ndim == 4 else images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise DataError(f"{found}: {EXPECTED}")
    elif isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise DataError(f"images are a {type(images).__name__}: {EXPECTED}")
    if len(images) == 0:
        raise DataError(f"no images: {EXPECTED}")
    return [_pixels(i, image) for i, image in enumerate(images)]


def _pixels(i: int, image: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, Image.Image):
        try:
            return np.asarray(upright_rgb(image))
        except ImageProblem as problem:
            raise DataError(f"image {i} is {problem.reason}: expected an image that Pillow can decode") from None
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    shape = f", {image.dtype} {tuple(image.shape)}" if isinstance(image, np.ndarray | Tensor) else ""
    raise DataError(f"image {i} is a {type(image).__name__}{shape}: expected a PIL image or a numpy array uint8 (H, W, 3)")


def _crop(i: int, image_HWC: np.ndarray, size: int, key: str | None) -> np.ndarray:
    seed = seed_of(digest_of(image_HWC) if key is None else key)
    try:
        return prior_crop(image_HWC, size, seed)
    except ImageProblem as problem:
        height, width = image_HWC.shape[:2]
        raise DataError(f"image {i} is {problem.reason}, {width}x{height} pixels: expected at least {size} per side") from None


def digest_of(image_HWC: np.ndarray) -> str:
    """SHA-256 of an image's pixels and shape."""
    return hashlib.sha256(f"{image_HWC.shape}\0".encode() + image_HWC.tobytes()).hexdigest()
