"""Filters: captions and images that they drop, and those that they keep."""

import pytest
from PIL import Image
from pydantic import ValidationError

from dalle_ds.data.images import MAX_PIXELS
from preprocessing.configs import FilterConfig
from preprocessing.filters.rules import Boilerplate, caption_filters, image_filters, judge_caption, judge_image
from tests.support.images import encoded

CONFIG = FilterConfig(min_letters=3, min_side=16)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty caption"),
        (" \n\t", "empty caption"),
        ("7", "short caption"),
        ("ox", "short caption"),
        ("!!! ???", "short caption"),
        ("a \ufffd bear", "damaged caption"),
        ("a\x00bear", "damaged caption"),
        ("word " * 20_000, "long caption"),
        ("photographed on 3 May 2004", "boilerplate"),
        ("Photo taken on 2004-05-03 at 12:30", "boilerplate"),
        ("Taken on May 3rd, 2004", "boilerplate"),
        ("uploaded on 03/05/2004", "boilerplate"),
        ("3.5.2004", "short caption"),
        ("Wed Aug 25 23:35:46 2004", "boilerplate"),
        ("Wed Aug 25 23:35:46 CEST 2004", "boilerplate"),
        ("Sunday, 3rd of May, 2004", "boilerplate"),
        ("DSC_00123.jpg", "boilerplate"),
        ("IMG 4711", "boilerplate"),
        ("December 2012", "boilerplate"),
        ("Created on 21-12-99 by", "boilerplate"),
        ("Photo taken 2004-05-03T12:30:01Z", "boilerplate"),
        ("Uploaded by on 03-May-2004 3:15 pm", "boilerplate"),
        ("Scanned on Monday, June 1 1998", "boilerplate"),
        ("Picture taken on 2004/05/03", "boilerplate"),
        ("Fri, 07 Nov 2008", "boilerplate"),
        ("posted on 12.31.99 at 23:59:59", "boilerplate"),
        ("Nov 7th 2008", "boilerplate"),
        ("\ud83d a bear", "damaged caption"),
        ("a" * 2001, "long caption"),
        ("a" * 2000, None),
        ("abandoned church in Kansas, photographed on 3 May 2004", None),
        ("New Year's Eve 1999 in Times Square", None),
        ("ein roter B\u00e4r im Wald", "other language"),
        ("un chat noir dort sur le canap\u00e9", "other language"),
        ("Cigno di notte nella palude", "other language"),
        ("esta estrela \u00e9 muito alegre", "other language"),
        ("\u718a\u304c\u68ee\u3092\u6b69\u304f", "other language"),
        ("\u4e24\u53ea\u718a\u732b\u5728\u5403\u7af9\u5b50", "other language"),
        ("старый дом у реки зимой", "other language"),
        ("roter B\u00e4r", None),
        ("le chat noir", None),
        ("Kaffee und Kuchen", None),  # too short to identify the language
        ("\u718a", "short caption"),
        ("Mona Lisa by Leonardo da Vinci", None),
        ("tacos al pastor with salsa verde", None),
        ("France - Ile de France", None),
        ("person climbing skin tone", None),
        ("sushi rolls on a plate", None),
        ("Germany - Berlin flag of city", None),
        ("ox cart", None),
        ("a red bear", None),
        ("copyright", None),
        ("three o\u2019clock", None),
        ("may flowers in march rain", None),
        ("keycap 10", None),
        ("marching band of 1976", None),
        ("the eiffel tower at night, taken on 3 May 2004", None),
        ("2nd place medal", None),
        ("mahjong red dragon", None),
        ("Mr. T. in a car from 1984, Los Angeles", None),
        ("saturn and its rings", None),
    ],
)
def test_captions(caption: str, reason: str | None) -> None:
    assert judge_caption(caption, caption_filters(CONFIG)) == reason


def test_another_language_can_be_asked_for_or_all() -> None:
    german, english = "ein roter B\u00e4r im Wald", "a red bear in the forest"
    filters = caption_filters(FilterConfig(language="de"))
    assert [judge_caption(caption, filters) for caption in (german, english)] == [None, "other language"]
    filters = caption_filters(FilterConfig(language=None))
    assert [judge_caption(caption, filters) for caption in (german, english)] == [None, None]
    with pytest.raises(ValueError, match="'klingon': expected one of ar, "):
        FilterConfig(language="klingon")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((64, 64), None),
        ((64, 32), None),
        ((32, 64), None),
        ((65, 32), "aspect ratio"),
        ((32, 65), "aspect ratio"),
        ((16, 16), None),
        ((15, 20), "too small"),
        ((1, 1), "too small"),
        ((200, 300), "too large"),
    ],
)
def test_pictures(size: tuple[int, int], reason: str | None) -> None:
    data = encoded(Image.new("RGB", size))
    assert judge_image(data, image_filters(CONFIG), max_pixels=50_000).reason == reason


def test_unreadable_pictures() -> None:
    data = encoded(Image.effect_noise((64, 64), 50))
    for broken, reason in ((b"", "unreadable"), (data[:100], "truncated"), (b"<html>not found</html>", "unreadable")):
        assert judge_image(broken, image_filters(CONFIG), CONFIG.max_pixels).reason == reason


@pytest.mark.parametrize("caption", [f"may1{' ' * 10**6}x", f"may1{' ' * 10**6},{' ' * 10**6}x", f"mon{' ' * 10**6}x"])
def test_boilerplate_is_found_in_linear_time(caption: str) -> None:
    # With a quadratic expression, the test runs into the time limit of all tests: 100,000 spaces took 40 s.
    assert Boilerplate(0.7)(caption) is None


def test_no_limit_on_pixels_exceeds_that_of_the_readers() -> None:
    assert FilterConfig(max_pixels=MAX_PIXELS).max_pixels == MAX_PIXELS
    with pytest.raises(ValidationError, match=f"{MAX_PIXELS + 1}: expected at most {MAX_PIXELS}"):
        FilterConfig(max_pixels=MAX_PIXELS + 1)
