"""Small folders of one's own pictures: refused where they are too small for the demo, else split so that no split is empty."""

from pathlib import Path

import pytest

from dalle_ds.data.raw.shards import split_of
from dalle_ds.errors import DataError
from dalle_ds.recipes import load_recipe
from preprocessing.configs import IngestConfig
from preprocessing.demo.drawn import draw
from preprocessing.stages import ingest
from preprocessing.stages.own_pictures import MIN_PICTURES, fit, fraction_for, main, require_enough
from tests.support.launching import ROOT

RECIPE = ROOT / "launchers" / "recipes" / "emoji.yaml"


def folder_of(n: int, folder: Path) -> Path:
    folder.mkdir()
    for i in range(n):
        draw(i, 48).image.save(folder / f"p{i}.png")
        (folder / f"p{i}.txt").write_text(f"a drawn thing, number {i}")
    return folder


def config_of(images: Path, out: Path, *settings: str) -> IngestConfig:
    return load_recipe(IngestConfig, RECIPE, [f"images={images}", f"out={out}", "workers=1", *settings])


def test_too_few_pictures_are_refused_with_both_numbers_and_what_was_left_out(tmp_path: Path) -> None:
    images = folder_of(MIN_PICTURES, tmp_path / "images")
    require_enough(config_of(images, tmp_path / "raw"))
    (images / "p1.txt").unlink()
    (images / "p2.txt").write_text("ein kleiner Hund schläft auf dem Sofa neben der Katze")
    told = rf"images: {MIN_PICTURES - 2} usable pictures .* expected at least {MIN_PICTURES}; left out: .*'other language': 1"
    with pytest.raises(DataError, match=told):
        require_enough(config_of(images, tmp_path / "raw"))
    (images / "p1.txt").write_text("a drawn thing")
    require_enough(config_of(images, tmp_path / "raw", "filters.language=null"))


@pytest.mark.parametrize("n", [MIN_PICTURES, 25, 30, 100, 1000])
@pytest.mark.parametrize("name", ["p", "IMG_", "holiday/"])
def test_the_split_of_a_small_set_has_enough_on_both_sides(n: int, name: str) -> None:
    groups = [f"{name}{i}" for i in range(n)]
    fraction = fraction_for(groups, 0.05)
    held_out = sum(split_of(group, fraction) == "validation" for group in groups)
    assert min(8, n // 4) <= held_out <= n / 3
    assert (fraction == 0.05) == (sum(split_of(group, 0.05) == "validation" for group in groups) >= min(8, n // 4))


def test_raw_shards_are_counted_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is no image is found when ingest opens it."""
    images, raw = folder_of(MIN_PICTURES + 1, tmp_path / "images"), tmp_path / "raw"
    (images / "p3.png").write_bytes(b"not an image")
    ingest.run(config_of(images, raw))
    fraction, batch = fit(str(raw), 0.05, 96)
    main(["fit", str(RECIPE), str(raw)])
    assert capsys.readouterr().out == f"{fraction} {batch}\n"
    assert 0.05 < fraction < 0.5 and batch == MIN_PICTURES * 3 / 4, "a quarter is held out"
    assert fit(str(raw), 0.05, 8) == (fraction, 8)
    (images / "p4.png").write_bytes(b"not an image either")
    ingest.run(config_of(images, tmp_path / "less"))
    with pytest.raises(SystemExit, match="2"):
        main(["fit", str(RECIPE), str(tmp_path / "less")])
    told = f"error: {tmp_path}/less: {MIN_PICTURES - 1} usable pictures"
    err = capsys.readouterr().err
    assert told in err and f"expected at least {MIN_PICTURES}; left out: {{'unreadable': 2}}" in err


def test_the_minimum_is_told_where_the_demo_is_described() -> None:
    for page in ("README.md", "launchers/demo.sh"):
        assert f"at least {MIN_PICTURES}" in (ROOT / page).read_text(), page
