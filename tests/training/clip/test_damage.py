"""Damaged copies of images."""

import numpy as np
import pytest

from dalle_ds.training.clip.damage import MIN_LEVELS, damaged_copies
from preprocessing.demo.drawn import draw

IMAGES = np.stack([np.asarray(draw(i, 32).image.convert("RGB")) for i in range(64)])


def changed(images: np.ndarray, copies: np.ndarray) -> np.ndarray:
    return (np.abs(images.astype(int) - copies) > MIN_LEVELS).any(-1)


def is_one_colour(image: np.ndarray) -> bool:
    return len(np.unique(image.reshape(-1, 3), axis=0)) == 1


def test_a_piece_of_every_image_changes_and_the_rest_stays() -> None:
    before = IMAGES.copy()
    copies, differs = damaged_copies(IMAGES, (0, 7))
    assert (before == IMAGES).all() and copies.dtype == np.uint8 and differs.mean() > 0.95
    pairs = [pair for pair in zip(IMAGES[differs], copies[differs], strict=True) if not is_one_colour(pair[1])]
    assert len(pairs) > 40
    for image, copy in pairs:
        rows, columns = np.nonzero((image != copy).any(-1))
        assert changed(image, copy).mean() >= 0.01 and np.ptp(rows) < 16 and np.ptp(columns) < 16
    assert (copies[~differs] == IMAGES[~differs]).all()


def test_a_copy_depends_on_its_image_and_the_seed_alone() -> None:
    copies, differs = damaged_copies(IMAGES, (0, 7))
    some = damaged_copies(IMAGES[40:30:-2], (0, 7))
    assert (some.images_bHWC == copies[40:30:-2]).all() and (some.differs_b == differs[40:30:-2]).all()
    assert (damaged_copies(IMAGES, (0, 8)).images_bHWC != copies).any(axis=(1, 2, 3)).mean() > 0.9


def test_some_copies_have_one_colour_of_their_image_and_nothing_else() -> None:
    n_empty = 0
    for seed in range(8):
        for image, copy in zip(IMAGES, damaged_copies(IMAGES, (seed,)).images_bHWC, strict=True):
            if is_one_colour(copy):
                n_empty += 1
                assert (image == copy).all(-1).any()
    assert 0.1 < n_empty / (8 * len(IMAGES)) < 0.3


@pytest.mark.parametrize("shape", [(3, 9, 9, 3), (2, 1, 5, 3), (0, 8, 8, 3)])
def test_images_of_one_colour_have_no_damaged_copy(shape: tuple[int, ...]) -> None:
    images = np.full(shape, 90, np.uint8)
    copies, differs = damaged_copies(images, (1,))
    assert (copies == images).all() and not differs.any()
