"""The sheet of pictures: everything is on it, nothing overlaps."""

import numpy as np
import pytest
from PIL import Image

from dalle_ds.sampling.grid import MARGIN, PAPER, picture_grid


def picture(color, side=32):
    return Image.new("RGB", (side, side), color)


def count(sheet, color):
    return int((np.asarray(sheet) == color).all(-1).sum())


def test_every_picture_is_there_in_full_and_enlarged():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    sheet = picture_grid([[picture(colors[0]), picture(colors[1])], [picture(colors[2]), picture(colors[3])]], ["one", "two"])
    assert [count(sheet, color) for color in colors] == [128 * 128] * 4
    assert count(picture_grid([[picture(colors[0], side=160)]], ["large stays"]), colors[0]) == 160 * 160


def test_captions_are_under_their_pictures():
    with_text = np.asarray(picture_grid([[picture("red")], [picture("red")]], ["", "some words here"]))
    empty = np.asarray(picture_grid([[picture("red")], [picture("red")]], ["", ""]))
    rows, columns = np.nonzero((with_text != empty[: with_text.shape[0]]).any(-1))
    assert len(rows) > 50
    assert rows.min() >= MARGIN + 128  # below the picture
    assert columns.min() >= 128 + 2 * MARGIN  # of the second one
    assert columns.max() < 2 * (128 + MARGIN)


def test_long_captions_and_long_words_stay_inside():
    plain = picture_grid([[picture("red")]], ["x"])
    sheet = picture_grid([[picture("red")]], ["word " * 100 + "w" * 300])
    assert sheet.width == plain.width
    assert sheet.height < plain.height + 100  # three lines at most
    margin = np.asarray(sheet)[:, -MARGIN:]
    assert (margin == PAPER).all()


def test_titles_change_only_the_top():
    rows = [[picture("red"), picture("blue")]]
    plain = np.asarray(picture_grid(rows, ["a"]))
    titled = np.asarray(picture_grid(rows, ["a"], title="Temperature 1", column_titles=["real", "sample"]))
    added = len(titled) - len(plain)
    assert added > 20
    assert (titled[MARGIN + added :] == plain[MARGIN:]).all()


def test_rows_must_fit():
    for rows, captions in (([], []), ([[picture("red")], []], ["a", "b"]), ([[picture("red")]], ["a", "b"])):
        with pytest.raises(ValueError, match="expected equal rows"):
            picture_grid(rows, captions)
