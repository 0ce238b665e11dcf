"""Fetched families of emoji: every thing in every style, and pairs of thing and style that no stage trains on."""

import base64
import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from dalle_ds.data.raw.shards import RawSample, list_raw_shards, read_raw_shard, split_of
from dalle_ds.errors import DataError
from preprocessing.configs import FamiliesConfig, FetchConfig, IngestConfig
from preprocessing.demo import families
from preprocessing.stages import fetch, ingest

# code points as files have them, category, subcategory, and which families lack the emoji
EMOJI = {
    "1f34e": ("Food & Drink", "food-fruit", ()),
    "2b50": ("Travel & Places", "sky & weather", ()),
    "2600-fe0f": ("Travel & Places", "sky & weather", ()),
    "1f435": ("Animals & Nature", "monkey-face", ("glossy",)),
    "1f550": ("Travel & Places", "time", ()),
    "1f469": ("People & Body", "person", ()),
}
STYLES = ("glossy", "noto", "flat", "smooth", "outlined")


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small packages in the cache, with checksums of their own."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("DALLE_DS_CACHE", str(cache))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))  # no npm
    made = []
    for n, family in enumerate(families.FAMILIES):
        root = tmp_path / family.style / "package"
        root.mkdir(parents=True)
        if family.files is not None:
            (root.parent / family.files).parent.mkdir(parents=True)
        records, chars, icons = [], {}, {}
        for i, (points, (category, subcategory, missing)) in enumerate(EMOJI.items()):
            records.append({"unified": points.upper(), "category": category, "subcategory": subcategory})
            if family.style in missing:
                continue
            name, colour = points.removesuffix("-fe0f") if family.style == "glossy" else points, (60 * n, 20 * i, 90)
            if family.files is None:  # an icon that overrides the size of its set
                chars[name] = f"thing-{i}"
                body = f'<path fill="rgb{colour}" d="M5,10h10v20h-10z"/>'
                icons[f"thing-{i}"] = {"body": body, "width": 32}
                continue
            image = Image.new("RGBA", (64, 64))
            image.paste((*colour, 255), (10, 20, 30, 60))
            image.save((root.parent / family.files).parent / f"{name}{Path(family.files).suffix}", lossless=True)
        (root / "emoji.json").write_text(json.dumps(records))
        (root / "chars.json").write_text(json.dumps(chars))
        (root / "icons.json").write_text(json.dumps({"prefix": "some", "icons": icons, "width": 64, "height": 32}))
        file = cache / family.package.file_name
        with tarfile.open(file, "w:gz") as tar:
            tar.add(root, "package")
        digest = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
        made.append(replace(family, package=replace(family.package, sha512=digest)))
    monkeypatch.setattr(families, "FAMILIES", tuple(made))
    monkeypatch.setattr(families, "NOTO", next(family for family in made if family.style == families.NOTO.style))


def config(out: Path, **others: object) -> FetchConfig:
    return FetchConfig(out=str(out), source="families", **{"validation_fraction": 0.4, **others})


def test_every_thing_in_every_style_is_a_group_of_its_own(tmp_path: Path) -> None:
    summary = fetch.run(config(tmp_path / "images")).summary
    assert summary["n_images"] == 15 and "CC-BY-4.0" in summary["licence"]
    ingest.run(IngestConfig(images=str(tmp_path / "images"), out=str(tmp_path / "raw"), workers=1))
    shards = list_raw_shards(str(tmp_path / "raw"))
    samples = [sample for shard in shards for sample in read_raw_shard(shard) if isinstance(sample, RawSample)]
    things = ("red apple", "star", "sun")  # no clock, no person, nothing that a family lacks
    assert {sample.caption for sample in samples} == {f"{thing} in {s} style" for thing in things for s in STYLES}
    assert {sample.group for sample in samples} == {sample.caption for sample in samples}


@pytest.mark.parametrize("style", ["flat", "outlined"])
def test_what_is_shown_fills_a_white_square(tmp_path: Path, style: str) -> None:
    fetch.run(config(tmp_path / "images"))
    pixels = np.asarray(Image.open(tmp_path / "images" / f"1f34e-{style}.png"))
    shown = (pixels < 250).any(2)
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    assert pixels.shape == (72, 72, 3)
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (4, 67, 20, 51)  # 20 x 40 pixels, twice enlarged to fit 64


def test_lists_of_captions_keep_to_the_split(tmp_path: Path) -> None:
    summary = fetch.run(config(tmp_path / "images", validation_fraction=0.5)).summary
    seen, zero_shot = ((tmp_path / "images" / name).read_text().splitlines() for name in families.LISTS)
    captions = [json.loads(line)["caption"] for line in (tmp_path / "images" / "captions.jsonl").read_text().splitlines()]
    trained = {caption for caption in captions if split_of(caption, 0.5) == "train"}
    things = {caption.partition(" in ")[0] for caption in trained}
    assert set(seen) <= trained and seen
    assert set(zero_shot) == {
        caption for caption in captions if caption not in trained and caption.partition(" in ")[0] in things
    }
    assert zero_shot and summary["families"] == {"evaluation_captions": 100, "validation_fraction": 0.5}
    with pytest.raises(DataError, match="expected .*'validation_fraction': 0.4"):
        fetch.run(config(tmp_path / "images"))


def test_fewer_things_and_captions_as_asked_for(tmp_path: Path) -> None:
    given = config(tmp_path / "images", limit=2, families=FamiliesConfig(evaluation_captions=1), validation_fraction=0)
    assert fetch.run(given).summary["n_images"] == 10
    seen = (tmp_path / "images" / "seen_captions.txt").read_text().splitlines()
    assert [caption.split()[-2] for caption in seen] == list(STYLES)


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache" / "emoji-datasource-twitter-16.0.0.tgz").unlink()
    with pytest.raises(DataError, match="families: npm is not installed"):
        fetch.run(config(tmp_path / "images"))
    assert not (tmp_path / "images").exists()


def test_keys_of_families_go_with_the_source_families() -> None:
    with pytest.raises(ValidationError, match="fetch.families is set and source is fluent: expected source families"):
        FetchConfig(out="x", source="fluent", families=FamiliesConfig())
