"""Metadata of raw shards: equal to what the tars hold, readable without them, added to shards of earlier versions."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dalle_ds.data.images import decode_image
from dalle_ds.data.manifest import RawShardManifest, load_shard_manifests, manifest_url
from dalle_ds.data.raw.metadata import SCHEMA, iterate_sample_rows, read_image, read_metadata, sample_rows
from dalle_ds.data.raw.shards import DROP_LISTS, IN_TRAINING, DropLists, RawSample, RawShard, list_raw_shards, read_raw_shard
from dalle_ds.errors import DataError
from dalle_ds.evaluation.image_sets import open_images
from dalle_ds.storage import objects
from preprocessing.configs import IngestConfig, VerifyConfig
from preprocessing.filters.perceptual_hash import perceptual_hash
from preprocessing.metadata.earlier_shards import add_metadata
from preprocessing.stages import ingest, verify
from preprocessing.stages.stats_page import raw_examples
from tests.support.images import draw_folder, encoded


def ingested(tmp_path: Path, root: str, n: int = 10) -> list[RawShard]:
    images = draw_folder(tmp_path / "images", n)
    (images / "tiny.png").write_bytes(encoded(Image.new("RGB", (5, 5))))
    with (images / "captions.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file": "tiny.png", "caption": "a tiny image"}))
    assert ingest.run(IngestConfig(images=str(images), out=root, samples_per_shard=4, workers=1)).is_complete
    return list_raw_shards(root)


def test_it_holds_what_the_tars_hold(any_root: str, tmp_path: Path) -> None:
    shards = ingested(tmp_path, any_root)
    for shard in shards:
        samples = [sample for sample in read_raw_shard(shard) if isinstance(sample, RawSample)]
        rows = sample_rows(shard, SCHEMA.names).to_pylist()
        assert len(rows) == len(samples) > 0
        for row, sample in zip(rows, samples, strict=True):
            image = decode_image(sample.image)
            assert (row["key"], row["caption"], row["group"]) == (sample.key, sample.caption, sample.group)
            assert (row["width"], row["height"], row["phash"]) == (*image.size, perceptual_hash(image))
            assert read_image(shard, row["offset"], row["bytes"], row["crc32"]) == sample.image
            assert row["language"] == "en" and 0 < row["language_score"] <= 1
    dropped = [row for shard in shards for row in read_metadata(shard, ("key", "reason")).to_pylist() if row["reason"]]
    assert dropped == [{"key": "tiny", "reason": "too small"}]
    assert verify.run(VerifyConfig(root=any_root, workers=1)).is_complete


def test_it_follows_drop_lists_as_the_readers_of_tars_do(tmp_path: Path) -> None:
    root = str(tmp_path / "raw")
    first = ingested(tmp_path, root)[0]
    keys = sample_rows(first, ["key"])["key"].to_pylist()
    listed = [{"key": keys[1], "reason": "near duplicate"}, {"key": keys[2], "reason": IN_TRAINING}]
    objects.write_bytes(objects.join(root, "list-0.jsonl"), "\n".join(map(json.dumps, listed)).encode())
    lists = DropLists(max_distance=2, lists={first.name: "list-0.jsonl"})
    objects.write_bytes(objects.join(root, DROP_LISTS), lists.to_json())
    shards = list_raw_shards(root)
    for with_overlap in (False, True):
        expected = [
            [s.key for s in read_raw_shard(shard, with_overlap=with_overlap) if isinstance(s, RawSample)] for shard in shards
        ]
        found = iterate_sample_rows(shards, ["key"], with_overlap=with_overlap)
        assert [rows["key"].to_pylist() for _, rows in found] == expected
        assert len(expected[0]) == 2 + with_overlap


def test_damage_is_told(tmp_path: Path) -> None:
    root = str(tmp_path / "raw")
    shard = ingested(tmp_path, root)[0]
    row = sample_rows(shard, SCHEMA.names).to_pylist()[0]
    with pytest.raises(DataError, match=f"{shard.url}: {row['bytes']} bytes at offset .* as in its metadata"):
        read_image(shard, row["offset"] + 1, row["bytes"], row["crc32"])
    file = Path(str(shard.metadata))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="SHA-256 .* expected .* as in its manifest"):
        sample_rows(shard, ["key"])
    assert any("SHA-256" in problem for problem in verify.run(VerifyConfig(root=root, workers=1)).problems)
    file.unlink()
    with pytest.raises(DataError, match="the manifest names this object, but it does not exist"):
        sample_rows(shard, ["key"])


def make_earlier(root: str) -> None:
    """Change raw shards to what earlier versions wrote: no metadata, and a file of dropped inputs."""
    for manifest in load_shard_manifests(root, RawShardManifest):
        (shard,) = [shard for shard in list_raw_shards(root) if shard.name == manifest.shard]
        dropped = [row for row in read_metadata(shard, ("key", "reason")).to_pylist() if row["reason"]]
        assert manifest.metadata is not None
        objects.delete(objects.join(root, manifest.metadata.path))
        path = f"dropped/{manifest.shard}-{manifest.attempt}.jsonl" if dropped else None
        if path:
            objects.write_bytes(objects.join(root, path), "\n".join(map(json.dumps, dropped)).encode())
        earlier = manifest.model_copy(update={"metadata": None, "dropped_path": path})
        objects.write_bytes(manifest_url(root, manifest.shard), earlier.to_json())


def test_ingest_adds_it_to_shards_of_earlier_versions(any_root: str, tmp_path: Path) -> None:
    before = {shard.name: read_metadata(shard, SCHEMA.names) for shard in ingested(tmp_path, any_root)}
    make_earlier(any_root)
    shard = list_raw_shards(any_root)[0]
    captions = [row["caption"] for row in before[shard.name].to_pylist() if row["reason"] is None]
    assert sample_rows(shard, ["caption"])["caption"].to_pylist() == captions
    with pytest.raises(DataError, match="has no metadata .* `dalle-ds data ingest` again"):
        sample_rows(shard, ["phash"])
    config = IngestConfig(images=str(tmp_path / "images"), out=any_root, samples_per_shard=4, workers=1)
    summary = ingest.run(config).summary
    assert (summary["shards_made_now"], summary["failed_shards"]) == (0, {})
    assert {shard.name: read_metadata(shard, SCHEMA.names) for shard in list_raw_shards(any_root)} == before
    assert verify.run(VerifyConfig(root=any_root, workers=1)).is_complete


def test_damage_of_earlier_shards_is_told_with_a_remedy(tmp_path: Path) -> None:
    root = str(tmp_path / "raw")
    before = {shard.name: read_metadata(shard, ["key", "phash", "reason"]) for shard in ingested(tmp_path, root)}
    make_earlier(root)
    manifests = load_shard_manifests(root, RawShardManifest)
    (with_dropped,) = [manifest for manifest in manifests if manifest.dropped_path]
    listed = Path(root, str(with_dropped.dropped_path))
    listed.write_text('{"key": "tiny"}')
    (problem,) = verify.run(VerifyConfig(root=root, workers=1)).problems
    assert f"{listed}: the list of dropped inputs is damaged; ingest its input again" in problem
    with pytest.raises(DataError, match=f"{listed}: the list of dropped inputs is damaged; remove .*, and ingest makes"):
        add_metadata(root, with_dropped)
    listed.unlink()
    with pytest.raises(DataError, match=f"{listed}: the list of dropped inputs is missing; remove .*, and ingest makes"):
        add_metadata(root, with_dropped)
    Path(manifest_url(root, with_dropped.shard)).unlink()
    config = IngestConfig(images=str(tmp_path / "images"), out=root, samples_per_shard=4, workers=1)
    assert ingest.run(config).summary["shards_made_now"] == 1
    assert {shard.name: read_metadata(shard, ["key", "phash", "reason"]) for shard in list_raw_shards(root)} == before

    other = next(manifest for manifest in manifests if not manifest.dropped_path)
    tar = Path(root, other.path)
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{tar}: .* bytes, expected {other.bytes}"):
        add_metadata(root, other)
    tar.unlink()
    with pytest.raises(DataError, match=f"{tar}: the shard does not exist"):
        add_metadata(root, other)


def test_references_and_examples_are_read_from_their_places_in_the_tars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "raw")
    shards = ingested(tmp_path, root)
    settings = {"limit": 5, "validation_fraction": 0.7}
    with monkeypatch.context() as patch:
        patch.setattr(objects, "local_copy", None)  # every reader of tars calls it
        chosen = open_images(root, **settings)
        found = list(chosen)
        captions = [caption for _, caption in raw_examples(root, 6)]
    assert captions == [caption for shard in shards for caption in sample_rows(shard, ["caption"])["caption"].to_pylist()][:6]
    make_earlier(root)
    plain = open_images(root, **settings)
    assert list(plain) == found and len(found) == 5
    assert plain.fingerprint == chosen.fingerprint
    assert raw_examples(root, 6) == []
