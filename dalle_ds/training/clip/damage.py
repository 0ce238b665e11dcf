"""Damaged copies of images: further negatives of their captions, so that CLIP learns to tell a flawed sample from a right one.

A CLIP that has seen only real images gives a sample with a deformed, recoloured or doubled object nearly the score of a right one:
in a batch of real images, nothing but their contents has to be told apart. (Negatives by damage: Sinha et al. 2021, "Negative Data
Augmentation".)
"""

# b images, H and W pixels, C channels, h and w pixels of a piece

import zlib
from itertools import permutations

import numpy as np

MIN_SIDE, MAX_SIDE = 1 / 6, 1 / 2
"""Sides of the damaged piece, as a share of the image's."""
MIN_LEVELS = 30
"""Levels of 255 by which a channel of a pixel must change to count as changed."""
MIN_CHANGED = 0.01
"""Share of the pixels that must change: a piece of sky moved to other sky is no damage."""
TRIES = 8
_RECOLOURINGS = [order for order in permutations(range(3)) if order != (0, 1, 2)]


def damaged(images_bHWC: np.ndarray, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A damaged copy of every image: a piece is copied to another place, or changes its colours.

    The copy depends on `seed` and on the image, not on the others in the batch.

    Returns:
        uint8 (b, H, W, C), and bool (b,): False where no try changed the image, as in one without any contrast.
    """
    copies_bHWC, is_damaged_b = images_bHWC.copy(), np.zeros(len(images_bHWC), dtype=bool)
    for image_HWC, copy_HWC, n in zip(images_bHWC, copies_bHWC, range(len(images_bHWC)), strict=True):
        rng = np.random.default_rng((*seed, zlib.crc32(image_HWC.tobytes())))
        for _ in range(TRIES):
            _damage(image_HWC, copy_HWC, rng)
            changed_HW = (np.abs(image_HWC.astype(np.int16) - copy_HWC) > MIN_LEVELS).any(-1)
            if changed_HW.mean() >= MIN_CHANGED:
                is_damaged_b[n] = True
                break
            copy_HWC[:] = image_HWC
    return copies_bHWC, is_damaged_b


def _damage(image_HWC: np.ndarray, copy_HWC: np.ndarray, rng: np.random.Generator) -> None:
    sides = np.array(image_HWC.shape[:2])
    h, w = np.maximum(1, (sides * rng.uniform(MIN_SIDE, MAX_SIDE, 2)).astype(int))
    (top, left), (new_top, new_left) = rng.integers(0, sides - (h, w), (2, 2), endpoint=True)
    piece_hwC = image_HWC[top : top + h, left : left + w]
    if rng.integers(2):
        piece_hwC = piece_hwC[..., _RECOLOURINGS[rng.integers(len(_RECOLOURINGS))]]
        new_top, new_left = top, left
    copy_HWC[new_top : new_top + h, new_left : new_left + w] = piece_hwC
