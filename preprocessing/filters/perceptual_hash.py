"""Perceptual hash of an image: 64 bits, of which near-duplicates share nearly all."""

from typing import Final

import imagehash
import numpy as np
from PIL import Image

MIN_CONTRAST: Final = 2.0  # standard deviation of 32x32 grey levels; below it a hash carries no information
NOT_COMPARED: Final = 0


def perceptual_hash(image: Image.Image) -> int:
    """64-bit pHash, nearly invariant to size, format, colours and sharpness. NOT_COMPARED if the contrast is too low."""
    grey = image.convert("L")
    if np.asarray(grey.resize((32, 32), Image.Resampling.BOX)).std() < MIN_CONTRAST:
        return NOT_COMPARED
    return int(str(imagehash.phash(grey)), 16)
