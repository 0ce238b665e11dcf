"""Near-duplicates: equal to a plain comparison of all pairs; every reader skips them; evaluation sets are respected."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dalle_ds.data.manifest import DatasetInfo
from dalle_ds.data.raw.shards import Dropped, RawShard, list_raw_shards, read_drop_list, read_raw_shard
from dalle_ds.errors import DataError
from dalle_ds.evaluation.image_sets import open_images
from dalle_ds.storage import objects
from preprocessing.configs import DuplicatesConfig, IngestConfig, VerifyConfig
from preprocessing.demo.drawn import draw
from preprocessing.encoding.encode_shard import EncodeJob, _require_health, identity_of
from preprocessing.filters.perceptual_hash import NOT_COMPARED, perceptual_hash
from preprocessing.stages import duplicates, ingest, verify


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


def test_the_drop_list_is_respected_and_tells_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
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
    config = DuplicatesConfig(raw=str(tmp_path / "raw"), against=(str(tmp_path / "eval"),), drop="training", workers=1)
    summary = duplicates.run(config).summary
    assert (summary["images"], summary["evaluation_images"], summary["too_plain_to_compare"]) == (16, 2, 2)
    assert summary["dropped"] == {"in evaluation set": 1, "near duplicate": 6}
    assert summary["groups"] == 3
    found = reasons_of(tmp_path / "raw")
    copies = {f"{i:02d}_{name}": "near duplicate" for i in (1, 2) for name in changed(images["00"])}
    assert found == dict.fromkeys(images) | copies | {"05": "in evaluation set"}
    assert set(reasons_of(tmp_path / "eval").values()) == {None}
    assert Image.open(str(summary["examples"])).width > 500
    after = {shard.name: identity_of(shard) for shard in list_raw_shards(tmp_path / "raw")}
    assert after == before, "a changed drop list does not change the input of encoded shards"
    assert json.loads((tmp_path / "raw" / "duplicates.json").read_text())["lists"]
    assert verify.run(VerifyConfig(root=str(tmp_path / "raw"), workers=1)).is_complete
    # A second run gives the same result, although readers skip the dropped images, and downloads no tar.
    monkeypatch.setattr(objects, "local_copy", None)
    assert {**duplicates.run(config).summary, "seconds": 0} == {**summary, "seconds": 0}
    for tar in (tmp_path / "raw" / "data").glob("*.tar"):
        tar.rename(tar.with_suffix(".away"))
    assert {**duplicates.run(config).summary, "seconds": 0} == {**summary, "seconds": 0, "examples": None}
    assert "no picture of example duplicates" in caplog.text and ".tar: the shard does not exist" in caplog.text
    assert not Path(str(summary["examples"])).exists(), "no picture of another comparison"
    with pytest.raises(DataError, match="both the training data and an evaluation set"):
        duplicates.run(config.model_copy(update={"against": (config.raw,)}))


def test_images_in_both_are_dropped_from_the_evaluation_set_as_in_the_paper(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
    originals = [Image.fromarray(pixels).resize((128, 128)) for pixels in noise]
    sets = {
        "raw": {"0": originals[0], "0_again": changed(originals[0])["pale"], "1": originals[1], "2": originals[2]},
        "other": {"3": originals[3]},
        "eval": {
            "copy0": changed(originals[0])["small"],
            "copy3": originals[3],
            "4": originals[4],
            "4_again": changed(originals[4])["pale"],
        },
    }
    for root, images in sets.items():
        image_folder = folder(tmp_path / f"{root}_images", images)
        ingest.run(IngestConfig(images=str(image_folder), out=str(tmp_path / root), samples_per_shard=2, workers=1))
    roots = {root: str(tmp_path / root) for root in sets}
    duplicates.run(DuplicatesConfig(raw=roots["eval"], workers=1))
    assert reasons_of(tmp_path / "eval") == dict.fromkeys(sets["eval"]) | {"4_again": "near duplicate"}

    summary = duplicates.run(DuplicatesConfig(raw=roots["raw"], against=(roots["eval"],), workers=1)).summary
    assert summary["dropped"] == {"in training set": 1, "near duplicate": 1}
    assert (summary["images"], summary["evaluation_images"]) == (4, 4)
    assert reasons_of(tmp_path / "raw") == dict.fromkeys(sets["raw"]) | {"0_again": "near duplicate"}
    expected = dict.fromkeys(sets["eval"]) | {"4_again": "near duplicate", "copy0": "in training set"}
    assert reasons_of(tmp_path / "eval") == expected, "the set's own near-duplicate stays on its list"
    duplicates.run(DuplicatesConfig(raw=roots["other"], against=(roots["eval"],), workers=1))
    expected["copy3"] = "in training set"
    assert reasons_of(tmp_path / "eval") == expected, "and so does what another training set has"
    duplicates.run(DuplicatesConfig(raw=roots["eval"], workers=1))
    assert reasons_of(tmp_path / "eval") == expected

    used = {entry.key.split("/")[1] for entry in open_images(roots["eval"])}
    assert used == {"4"}
    assert {entry.key.split("/")[1] for entry in open_images(roots["eval"], with_overlap=True)} == {"4", "copy0", "copy3"}
    assert open_images(roots["eval"]).fingerprint != open_images(roots["eval"], with_overlap=True).fingerprint

    with pytest.raises(DataError, match="eval_images has no raw shards, so no list of images in the training data"):
        open_images(tmp_path / "eval_images", with_overlap=True)
    duplicates.run(DuplicatesConfig(raw=roots["raw"], against=(roots["eval"],), drop="training", workers=1))
    del expected["copy0"]
    assert reasons_of(tmp_path / "eval") == {"copy0": None} | expected
    assert reasons_of(tmp_path / "raw")["0"] == reasons_of(tmp_path / "raw")["0_again"] == "in evaluation set"


def test_a_drop_list_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    for root in ("raw", "eval"):
        ingest.run(
            IngestConfig(images=str(folder(tmp_path / f"{root}_images", {"a": image})), out=str(tmp_path / root), workers=1)
        )
    write = objects.write_bytes

    def refusing(url: str, data: bytes) -> None:
        if str(url).startswith(f"{tmp_path}/eval/"):
            raise PermissionError("access denied")
        write(url, data)

    monkeypatch.setattr(objects, "write_bytes", refusing)
    with pytest.raises(DataError, match="eval: its drop list cannot be written .access denied.; --drop training drops"):
        duplicates.run(DuplicatesConfig(raw=str(tmp_path / "raw"), against=(str(tmp_path / "eval"),), workers=1))


def test_an_old_drop_list_that_is_missing_or_damaged_is_named_before_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((128, 128))
    images = folder(tmp_path / "images", {"a": image, "b": changed(image)["pale"]})
    root = tmp_path / "raw"
    ingest.run(IngestConfig(images=str(images), out=str(root), workers=1))
    config = DuplicatesConfig(raw=str(root), workers=1)
    assert duplicates.run(config).summary["dropped"] == {"near duplicate": 1}
    (old,) = (root / "duplicates").glob("*.jsonl")
    monkeypatch.setattr(duplicates, "HashComparison", None)
    for damaged in (b'{"key": "a"', b'{"key": "a"}', b'{"key": ["a"], "reason": "b"}', b"[]", b"\xff"):
        old.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{old}: the drop list is damaged; .* remove {root}/duplicates.json, then run"):
            duplicates.run(config)
        with pytest.raises(DataError, match=f"{old}: the drop list is damaged; run `dalle-ds data dedup` again"):
            read_drop_list(str(old))
    old.unlink()
    with pytest.raises(DataError, match=f"{old}: the drop list is missing; .* remove {root}/duplicates.json, then run"):
        duplicates.run(config)
    monkeypatch.undo()
    (root / "duplicates.json").unlink()
    assert duplicates.run(config).summary["dropped"] == {"near duplicate": 1}, "the advice helps"


def test_listed_samples_are_no_failures_of_encode() -> None:
    shard = RawShard("0", "0.tar", 1)
    info = DatasetInfo(image_size=32, grid=8, n_codes=4, dvae="d", tokenizer="t", crop="c", validation_fraction=0.1)
    job = EncodeJob(out="out", info=info, batch=1, block_samples=1, max_failure_rate=0.1, device="cpu")
    for reason in ("near duplicate", "in evaluation set", "in training set"):
        _require_health(shard, 10, [("a", reason)] * 5, job)
    with pytest.raises(DataError, match="5 of 10 samples failed"):
        _require_health(shard, 10, [("a", "unreadable")] * 5, job)
