"""Damaged copies of images."""

import numpy as np
import pytest

from dalle_ds.training.clip.damage import MIN_LEVELS, damaged_copies
from preprocessing.demo.drawn import draw

IMAGES = np.stack([np.asarray(draw(i, 32).image.convert("RGB")) for i in range(64)])


def changed(images: np.ndarray, copies: np.ndarray) -> np.ndarray:
    return (np.abs(images.astype(int) - copies) > MIN_LEVELS).any(-1)


def test_a_piece_of_every_image_changes_and_the_rest_stays() -> None:
    before = IMAGES.copy()
    copies, differs = damaged_copies(IMAGES, (0, 7))
    assert (before == IMAGES).all() and copies.dtype == np.uint8 and differs.mean() > 0.95
    for image, copy in zip(IMAGES[differs], copies[differs], strict=True):
        rows, columns = np.nonzero((image != copy).any(-1))
        assert changed(image, copy).mean() >= 0.01 and np.ptp(rows) < 16 and np.ptp(columns) < 16
    assert (copies[~differs] == IMAGES[~differs]).all()


def test_a_copy_depends_on_its_image_and_the_seed_alone() -> None:
    copies, differs = damaged_copies(IMAGES, (0, 7))
    some = damaged_copies(IMAGES[40:30:-2], (0, 7))
    assert (some.images_bHWC == copies[40:30:-2]).all() and (some.differs_b == differs[40:30:-2]).all()
    assert (damaged_copies(IMAGES, (0, 8)).images_bHWC != copies).any(axis=(1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("shape", [(3, 9, 9, 3), (2, 1, 5, 3), (0, 8, 8, 3)])
def test_images_of_one_colour_have_no_damaged_copy(shape: tuple[int, ...]) -> None:
    images = np.full(shape, 90, np.uint8)
    copies, differs = damaged_copies(images, (1,))
    assert (copies == images).all() and not differs.any()
