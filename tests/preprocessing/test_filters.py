"""Filters: what they drop, and, as important, what they keep."""

import pytest
from PIL import Image

from preprocessing.filters import FilterConfig, caption_filters, judge_caption, judge_picture, picture_filters
from tests.pictures import encoded

CONFIG = FilterConfig(min_letters=3, min_side=16)


@pytest.mark.parametrize(("caption", "reason"), [
    ("", "empty caption"), (" \n\t", "empty caption"), ("7", "short caption"), ("ox", "short caption"),
    ("!!! ???", "short caption"),
    ("a \ufffd bear", "damaged caption"), ("a\x00bear", "damaged caption"), ("word " * 20_000, "long caption"),
    ("photographed on 3 May 2004", "boilerplate"), ("Photo taken on 2004-05-03 at 12:30", "boilerplate"),
    ("Taken on May 3rd, 2004", "boilerplate"), ("uploaded on 03/05/2004", "boilerplate"), ("3.5.2004", "short caption"),
    ("Wed Aug 25 23:35:46 2004", "boilerplate"), ("Wed Aug 25 23:35:46 CEST 2004", "boilerplate"),
    ("Sunday, 3rd of May, 2004", "boilerplate"), ("DSC_00123.jpg", "boilerplate"), ("IMG 4711", "boilerplate"),
    ("December 2012", "boilerplate"), ("Created on 21-12-99 by", "boilerplate"),
    ("ox cart", None), ("a red bear", None), ("\u718a\u304c\u68ee\u3092\u6b69\u304f", None), ("copyright", None),
    ("three o\u2019clock", None), ("may flowers in march rain", None), ("keycap 10", None), ("marching band of 1976", None),
    ("the eiffel tower at night, taken on 3 May 2004", None), ("2nd place medal", None), ("mahjong red dragon", None),
    ("Mr. T. in a car from 1984, Los Angeles", None), ("saturn and its rings", None),
])
def test_captions(caption: str, reason: str | None) -> None:
    assert judge_caption(caption, caption_filters(CONFIG)) == reason


@pytest.mark.parametrize(("size", "reason"), [
    ((64, 64), None), ((64, 32), None), ((32, 64), None), ((65, 32), "aspect ratio"), ((32, 65), "aspect ratio"),
    ((16, 16), None), ((15, 20), "too small"), ((1, 1), "too small"), ((200, 300), "too large"),
])
def test_pictures(size: tuple[int, int], reason: str | None) -> None:
    data = encoded(Image.new("RGB", size))
    assert judge_picture(data, picture_filters(CONFIG), max_pixels=50_000) == reason


def test_unreadable_pictures() -> None:
    data = encoded(Image.effect_noise((64, 64), 50))
    for broken in (b"", data[:100], b"<html>not found</html>"):
        assert judge_picture(broken, picture_filters(CONFIG), CONFIG.max_pixels) == "unreadable"
