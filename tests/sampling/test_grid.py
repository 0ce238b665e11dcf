"""Image grids: nothing is missing, and nothing overlaps."""

import numpy as np
import pytest
from PIL import Image

from dalle_ds.sampling.grid import MARGIN, PAPER, image_grid


def image(color, side=32):
    return Image.new("RGB", (side, side), color)


def count(sheet, color):
    return int((np.asarray(sheet) == color).all(-1).sum())


def test_every_image_is_there_in_full_and_enlarged():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    sheet = image_grid([[image(colors[0]), image(colors[1])], [image(colors[2]), image(colors[3])]], ["one", "two"])
    assert [count(sheet, color) for color in colors] == [128 * 128] * 4
    assert count(image_grid([[image(colors[0], side=160)]], ["large stays"]), colors[0]) == 160 * 160


def test_captions_are_under_their_images():
    with_text = np.asarray(image_grid([[image("red")], [image("red")]], ["", "some words here"]))
    empty = np.asarray(image_grid([[image("red")], [image("red")]], ["", ""]))
    rows, columns = np.nonzero((with_text != empty[: with_text.shape[0]]).any(-1))
    assert len(rows) > 50
    assert rows.min() >= MARGIN + 128  # below the image
    assert columns.min() >= 128 + 2 * MARGIN  # below the second image
    assert columns.max() < 2 * (128 + MARGIN)


def test_long_captions_and_long_words_stay_inside():
    plain = image_grid([[image("red")]], ["x"])
    sheet = image_grid([[image("red")]], ["word " * 100 + "w" * 300])
    assert sheet.width == plain.width
    assert sheet.height < plain.height + 100  # three lines at most
    margin = np.asarray(sheet)[:, -MARGIN:]
    assert (margin == PAPER).all()


def test_titles_change_only_the_top():
    rows = [[image("red"), image("blue")]]
    plain = np.asarray(image_grid(rows, ["a"]))
    titled = np.asarray(image_grid(rows, ["a"], title="Temperature 1", column_titles=["real", "sample"]))
    added = len(titled) - len(plain)
    assert added > 20
    assert (titled[MARGIN + added :] == plain[MARGIN:]).all()


def test_rows_must_fit():
    for rows, captions in (([], []), ([[image("red")], []], ["a", "b"]), ([[image("red")]], ["a", "b"])):
        with pytest.raises(ValueError, match="expected equal rows"):
            image_grid(rows, captions)
