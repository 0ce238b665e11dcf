"""Near-duplicates: equal to a plain comparison of all pairs; every reader skips them; evaluation sets are respected."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dalle_ds.data.raw import Dropped, RawShard, list_raw_shards, read_raw_shard
from dalle_ds.errors import DataError
from preprocessing.configs import DuplicatesConfig, IngestConfig, VerifyConfig
from preprocessing.demo.drawn import draw
from preprocessing.encoding.encode_shard import _require_health, identity_of
from preprocessing.stages import duplicates, ingest, verify
from preprocessing.stages.duplicates import NOT_COMPARED, find_duplicates, perceptual_hash


def plain_twin(hashes: list[int], n_against: int, max_distance: int) -> list[int]:
    """The definition: compare each image with all kept images before it."""
    earlier = [-1] * len(hashes)
    for i in range(n_against, len(hashes)):
        kept = (j for j in range(i) if earlier[j] < 0 and NOT_COMPARED not in (hashes[i], hashes[j]))
        earlier[i] = next((j for j in kept if (hashes[i] ^ hashes[j]).bit_count() <= max_distance), -1)
    return earlier


@pytest.mark.parametrize("max_distance", [0, 1, 3, 7])
@pytest.mark.parametrize("n_against", [0, 40])
def test_banding_finds_what_all_pairs_find(max_distance: int, n_against: int) -> None:
    rng = np.random.default_rng(max_distance)
    centres = rng.integers(1, 2**64, 30, dtype=np.uint64)
    hashes = [int(centre) for centre in rng.choice(centres, 300)]
    for i in range(300):  # copies at different distances, and some images with too little contrast
        for bit in rng.integers(0, 64, rng.integers(0, 8)):
            hashes[i] ^= 1 << int(bit)
        if i % 17 == 0:
            hashes[i] = NOT_COMPARED
    found = find_duplicates(np.array(hashes, np.uint64), n_against, max_distance)
    # If several kept images are close, any of them may be returned; the dropped images and the reasons are unique.
    expected = plain_twin(hashes, n_against, max_distance)
    assert [i >= 0 for i in found] == [i >= 0 for i in expected]
    assert [0 <= i < n_against for i in found] == [0 <= i < n_against for i in expected]
    assert sum(i >= 0 for i in expected) > 3
    assert all(j < 0 or (hashes[i] ^ hashes[j]).bit_count() <= max_distance for i, j in enumerate(found.tolist()))


def changed(image: Image.Image) -> dict[str, Image.Image]:
    return {
        "small": image.resize((90, 90)),
        "pale": ImageEnhance.Contrast(image).enhance(0.8),
        "grey": image.convert("L").convert("RGB"),
    }


def folder(path: Path, images: dict[str, Image.Image]) -> Path:
    path.mkdir()
    for name, image in images.items():
        image.save(path / f"{name}.jpg", quality=60)
        (path / f"{name}.txt").write_text("an image of shapes")
    return path


def test_what_a_hash_sees() -> None:
    blobs = np.random.default_rng(0).integers(256, size=(20, 20), dtype=np.uint8)
    image = Image.fromarray(blobs).resize((160, 160), Image.Resampling.BICUBIC).convert("RGB")
    others = [perceptual_hash(draw(seed, 128).image) for seed in range(4)]
    mine = perceptual_hash(image)
    assert all((perceptual_hash(copy) ^ mine).bit_count() <= 3 for copy in changed(image).values())
    assert all((other ^ mine).bit_count() > 10 for other in others)
    assert perceptual_hash(Image.new("RGB", (64, 64), "white")) == perceptual_hash(Image.new("RGB", (64, 64))) == NOT_COMPARED


def reasons_of(root: Path) -> dict[str, str | None]:
    found = [sample for shard in list_raw_shards(root) for sample in read_raw_shard(shard)]
    return {sample.key: sample.reason if isinstance(sample, Dropped) else None for sample in found}


def test_the_drop_list_is_respected_and_tells_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    images = {f"{i:02d}": Image.fromarray(pixels).resize((128, 128)) for i, pixels in enumerate(noise)}
    images |= {f"{i:02d}_{name}": copy for i in (1, 2) for name, copy in changed(images[f"{i:02d}"]).items()}
    images |= {f"white{i}": Image.new("RGB", (64, 64 + i), "white") for i in range(2)}
    evaluation = {"copy": images["05"].resize((100, 100)), "other": draw(3, 128).image}
    for root, these in (("raw", images), ("eval", evaluation)):
        image_folder = folder(tmp_path / f"{root}_images", these)
        ingest.run(IngestConfig(images=str(image_folder), out=str(tmp_path / root), samples_per_shard=6, workers=1))
    before = {shard.name: identity_of(shard) for shard in list_raw_shards(tmp_path / "raw")}
    config = DuplicatesConfig(raw=str(tmp_path / "raw"), against=(str(tmp_path / "eval"),), workers=1)
    summary = duplicates.run(config).summary
    assert (summary["images"], summary["evaluation_images"], summary["too_plain_to_compare"]) == (16, 2, 2)
    assert summary["dropped"] == {"in evaluation set": 1, "near duplicate": 6}
    assert summary["groups"] == 3
    found = reasons_of(tmp_path / "raw")
    copies = {f"{i:02d}_{name}": "near duplicate" for i in (1, 2) for name in changed(images["00"])}
    assert found == dict.fromkeys(images) | copies | {"05": "in evaluation set"}
    assert set(reasons_of(tmp_path / "eval").values()) == {None}
    assert Image.open(str(summary["examples"])).width > 500
    # A changed drop list changes the input's identity, so shards that were encoded before do not count as done.
    changed_shards = {shard.name for shard in list_raw_shards(tmp_path / "raw") if identity_of(shard) != before[shard.name]}
    assert changed_shards == set(json.loads((tmp_path / "raw" / "duplicates.json").read_text())["lists"])
    assert verify.run(VerifyConfig(root=str(tmp_path / "raw"), workers=1)).is_complete
    # A second run gives the same result from stored hashes, although readers skip the dropped images.
    monkeypatch.setattr(duplicates, "hash_shard", None)
    assert {**duplicates.run(config).summary, "seconds": 0} == {**summary, "seconds": 0}
    with pytest.raises(DataError, match="both the training data and an evaluation set"):
        duplicates.run(config.model_copy(update={"against": (config.raw,)}))


def test_listed_samples_are_no_failures_of_encode() -> None:
    shard = RawShard("0", "0.tar", 1)
    _require_health(shard, 10, [("a", "near duplicate")] * 5, 0.1)
    with pytest.raises(DataError, match="5 of 10 samples failed"):
        _require_health(shard, 10, [("a", "unreadable")] * 5, 0.1)
