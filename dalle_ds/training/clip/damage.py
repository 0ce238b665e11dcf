"""Damaged copies of images: negatives from which CLIP learns to tell a flawed sample from a right one.

In a batch of real images, CLIP finds the image of a caption by what images show, never by their flaws. So a CLIP that has
seen only such batches scores a sample with a doubled, missing or recoloured object nearly as high as a right one, and an
empty one often higher.
dalle_ds/training/README.md has what the copies change.
(Negatives made by damage: Sinha et al. 2021, "Negative Data Augmentation".)
"""

# b images, H and W pixels, C channels, h and w pixels of a piece

import zlib
from itertools import permutations
from typing import NamedTuple

import numpy as np

MIN_SIDE, MAX_SIDE = 1 / 6, 1 / 2
"""Width and height of the damaged piece, as shares of the image's."""
MIN_LEVELS = 30
"""Levels of 255 by which a channel of a pixel must change to count."""
MIN_CHANGED = 0.01
"""Share of the pixels that must change: a piece of sky copied to other sky is no damage."""
TRIES = 8
EMPTIED = 1 / 8
"""Share of the tries in which nothing is left of the image but one of its colours."""
_RECOLOURINGS = [order for order in permutations(range(3)) if order != (0, 1, 2)]


class DamagedCopies(NamedTuple):
    images_bHWC: np.ndarray  # uint8
    differs_b: np.ndarray  # bool; False where no try changed the image, as in one of a single colour


def damaged_copies(images_bHWC: np.ndarray, seed: tuple[int, ...]) -> DamagedCopies:
    """A copy of every image, in which a piece is copied to another place or its channels change places, or all is one colour.

    A copy depends on `seed` and its image, not on the rest of the batch.

    Args:
        images_bHWC: uint8 RGB.
    """
    copies_bHWC, differs_b = images_bHWC.copy(), np.zeros(len(images_bHWC), dtype=bool)
    for n, image_HWC in enumerate(images_bHWC):
        rng = np.random.default_rng((*seed, zlib.crc32(image_HWC.tobytes())))
        for _ in range(TRIES):
            copy_HWC = _damaged(image_HWC, rng)
            if _share_changed(image_HWC, copy_HWC) >= MIN_CHANGED:
                copies_bHWC[n], differs_b[n] = copy_HWC, True
                break
    return DamagedCopies(copies_bHWC, differs_b)


def _damaged(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    sides = np.array(image_HWC.shape[:2])
    if rng.random() < EMPTIED:
        row, column = rng.integers(0, sides)
        return np.broadcast_to(image_HWC[row, column], image_HWC.shape)
    h, w = np.maximum(1, (sides * rng.uniform(MIN_SIDE, MAX_SIDE, 2)).astype(int))
    (top, left), (new_top, new_left) = rng.integers(0, sides - (h, w), (2, 2), endpoint=True)
    piece_hwC = image_HWC[top : top + h, left : left + w]
    if rng.integers(2):
        piece_hwC, new_top, new_left = piece_hwC[..., _RECOLOURINGS[rng.integers(len(_RECOLOURINGS))]], top, left
    copy_HWC = image_HWC.copy()
    copy_HWC[new_top : new_top + h, new_left : new_left + w] = piece_hwC
    return copy_HWC


def _share_changed(image_HWC: np.ndarray, copy_HWC: np.ndarray) -> float:
    return (np.abs(image_HWC.astype(np.int16) - copy_HWC) > MIN_LEVELS).any(-1).mean()
