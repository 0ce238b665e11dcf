"""Image grids: nothing is missing, and nothing overlaps."""

import numpy as np
import pytest
from PIL import Image

from dalle_ds.commands.doctor import examine
from dalle_ds.sampling import lettering
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


@pytest.mark.parametrize("part", ["a", "a ", "?", "\u732b"])
def test_a_caption_of_a_megabyte_is_drawn_as_its_first_lines(part: str) -> None:
    """Wrapping all of it took minutes."""
    image = Image.new("RGB", (128, 128))
    short, long = (image_grid([[image]], [part * n]) for n in (400, 1_000_000))
    assert short.tobytes() == long.tobytes()


def test_titles_change_only_the_top():
    rows = [[image("red"), image("blue")]]
    plain = np.asarray(image_grid(rows, ["a"]))
    titled = np.asarray(image_grid(rows, ["a"], title="Temperature 1", column_titles=["real", "sample"]))
    added = len(titled) - len(plain)
    assert added > 20
    assert (titled[MARGIN + added :] == plain[MARGIN:]).all()


def caption_pixels(text):
    return np.asarray(image_grid([[image("red", side=256)]], [text]))[MARGIN + 256 :]


def test_letters_of_other_scripts_are_drawn_and_not_boxes(caplog):
    box = caption_pixels("\U000f0000")  # of private use: no font has it
    different = [caption_pixels(letter) for letter in ("ж", "я", "λ", "é", "א", "😀", "a")]
    assert all((one != box).any() for one in different) and len({one.tobytes() for one in different}) == 7
    wide = caption_pixels("Кошка ждёт café, naïve " * 3)
    assert (wide[:, -MARGIN:] == PAPER).all(), "wrapped by the width of the letters that are drawn"
    joined = caption_pixels("👩\u200d🚀")
    assert (joined == caption_pixels("👩🚀")).all() or (joined != box).any()


def test_letters_that_no_font_has_are_told_once_with_the_package_that_has_them(monkeypatch, caplog):
    monkeypatch.setattr(lettering, "_installed", lambda: ())
    monkeypatch.setattr(lettering, "_said", set())
    lettering._path_for.cache_clear()
    try:
        for _ in range(2):
            image_grid([[image("red")]], ["猫 on a mat 😀\ufe0f\u200d, ж"])
        assert caplog.text.count("no installed font has 猫 😀 ж") == 1
        assert "apt-get install fonts-noto-cjk fonts-symbola fonts-noto-core" in caplog.text
        assert lettering.missing_letters(["plain", "words\n\t\u200d"]) == ""
        (finding,) = [one for one in examine() if one.name == "fonts"]
        assert not finding.ok and not finding.must and "fonts-noto-cjk" in finding.detail
    finally:
        lettering._path_for.cache_clear()


def test_rows_must_fit():
    for rows, captions in (([], []), ([[image("red")], []], ["a", "b"]), ([[image("red")]], ["a", "b"])):
        with pytest.raises(ValueError, match="expected equal rows"):
            image_grid(rows, captions)
