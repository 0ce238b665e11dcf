"""Manifests: merging is deterministic, and shards of another data set are refused."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from dalle_ds.data.manifest import (
    BlockColumns,
    BlockTable,
    DatasetInfo,
    InputIdentity,
    Part,
    ShardManifest,
    done_shards,
    load_dataset_info,
    load_manifest,
    manifest_url,
    merge,
)
from dalle_ds.errors import DataError, FingerprintMismatch
from dalle_ds.storage import objects

INFO = DatasetInfo(image_size=32, grid=8, n_codes=4, dvae="d", tokenizer="t", crop="c", validation_fraction=0.1).sealed()


def shard(name: str, n_train: int, fingerprint: str = INFO.fingerprint) -> ShardManifest:
    part = Part(path=f"data/{name}.tar", bytes=10, checksum="x", n_samples=n_train, blocks=BlockColumns.of(name, []))
    return ShardManifest(
        shard=name,
        attempt="a",
        input=InputIdentity(path="p", bytes=1),
        splits={"train": part},
        n_input=n_train + 1,
        dropped={"unreadable": 1},
        dropped_samples=[("k", "unreadable")],
        code_histogram=[n_train, 0, 1, 0],
        caption_lengths={3: n_train},
        fingerprint=fingerprint,
        seconds=1.0,
    )


def write(root: str, *shards: ShardManifest) -> None:
    objects.write_bytes(objects.join(root, "dataset.json"), INFO.to_json())
    for manifest in shards:
        objects.write_bytes(manifest_url(root, manifest.shard), manifest.to_json())


def test_merge_is_independent_of_the_order() -> None:
    shards = [shard("b", 2), shard("a", 3)]
    merged = merge(INFO, shards, complete=True)
    assert merged == merge(INFO, shards[::-1], complete=True)
    assert [part.path for part in merged.parts("train")] == ["data/a.tar", "data/b.tar"]
    assert merged.parts("validation") == []
    assert merged.n_samples == {"train": 5, "validation": 0}
    assert merged.dropped == {"unreadable": 2}
    assert merged.code_histogram == [5, 0, 2, 0]
    assert merged.caption_lengths == {3: 5}


def test_the_encoders_number_format_is_told_apart_and_the_usual_one_stays_as_it_was() -> None:
    marks = {
        INFO.model_copy(update=told).sealed().fingerprint
        for told in ({}, {"precision": "bf16"}, {"tf32": True}, {"precision": "bf16", "tf32": True})
    }
    assert len(marks) == 4
    assert INFO.fingerprint == "e13fdf02acd06b9c498f", "data sets from before `tf32` keep their fingerprints"


def test_json_spells_the_schema(any_root: str) -> None:
    write(any_root, shard("a", 1))
    assert json.loads(objects.read_bytes(objects.join(any_root, "dataset.json")))["schema"] == 1
    assert load_dataset_info(any_root) == INFO
    assert done_shards(any_root) == {"a"}


def test_unfinished_data_sets_are_merged_from_their_shards(any_root: str) -> None:
    write(any_root, shard("a", 1), shard("b", 2))
    merged = load_manifest(any_root)
    assert merged.n_samples["train"] == 3
    assert not merged.complete
    whole = merge(INFO, [shard("a", 1)], complete=True)
    objects.write_bytes(objects.join(any_root, "manifest.json"), whole.to_json())
    assert load_manifest(any_root) == whole


def test_blocks_are_columns() -> None:
    columns = {"name": "a", "bytes": "100 50 70", "n_samples": "4 4 3", "crc32": "00000001 ffffffff 0a0b0c0d"}
    part = {"path": "data/a.tar", "bytes": 1024, "checksum": "x", "n_samples": 11}
    read = Part.model_validate_json(json.dumps({**part, "blocks": columns}))
    assert json.loads(read.to_json())["blocks"] == columns and BlockColumns.of("a", read.blocks) == read.columns
    assert [(block.name, block.offset, block.bytes, block.n_samples, block.crc32) for block in read.blocks] == [
        ("a-00000", 0, 100, 4, "00000001"),
        ("a-00001", 100, 50, 4, "ffffffff"),
        ("a-00002", 150, 70, 3, "0a0b0c0d"),
    ]
    with pytest.raises(ValidationError, match="columns have different lengths"):
        Part.model_validate({**part, "blocks": {**columns, "n_samples": "4 7"}})
    for damage in ({"bytes": "100 5x 70"}, {"n_samples": "4  3"}, {"crc32": "00000001 ffffffff 0a0b0c"}):
        with pytest.raises(ValidationError, match="should match pattern"):
            Part.model_validate({**part, "blocks": {**columns, **damage}})


def test_blocks_of_many_parts_lie_in_one_table() -> None:
    parts = [
        Part(
            path=name,
            bytes=0,
            checksum="x",
            n_samples=0,
            blocks={
                "name": name,
                "bytes": " ".join(map(str, sizes)),
                "n_samples": " ".join(map(str, sizes)),
                "crc32": " ".join(f"{size:08x}" for size in sizes),
            },
        )
        for name, sizes in (("a", [5, 6]), ("b", []), ("c", [7]))
    ]
    table = BlockTable(parts)
    assert [table[i] for i in range(len(table))] == [block for part in parts for block in part.blocks]
    assert table.part.tolist() == [0, 0, 2] and table[2].name == "c-00000" and table[1].offset == 5
    assert len(BlockTable([])) == 0


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    root = str(tmp_path)
    with pytest.raises(DataError, match="dataset.json is missing"):
        load_manifest(root)
    write(root)
    with pytest.raises(DataError, match="has no finished shard"):
        load_manifest(root)
    objects.write_bytes(manifest_url(root, "a"), b'{"shard": "a", "attempt"')
    with pytest.raises(DataError, match=r"a.json: not a valid ShardManifest"):
        load_manifest(root)
    later = INFO.model_copy(update={"schema_version": 9})
    (tmp_path / "dataset.json").write_bytes(later.to_json())
    with pytest.raises(DataError, match="schema 9, expected schema 1"):
        load_manifest(root)


def test_edited_and_foreign_files_are_refused(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(root, shard("a", 1), shard("b", 1, fingerprint="other"))
    with pytest.raises(FingerprintMismatch, match="shard b: expected fingerprint .* found other"):
        load_manifest(root)
    edited = INFO.model_copy(update={"grid": 16})
    (tmp_path / "dataset.json").write_bytes(edited.to_json())
    with pytest.raises(FingerprintMismatch, match="was edited"):
        load_manifest(root)
