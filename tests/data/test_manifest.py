"""Manifests: what is stored, and what is refused."""

import json
import random
from pathlib import Path

import pytest
from pydantic import ValidationError

from dalle_ds.data.manifest import (
    BlockColumns,
    BlockTable,
    Part,
    ShardManifest,
    done_shards,
    load_dataset_info,
    load_shard_manifests,
    manifest_url,
)
from dalle_ds.data.raw.shards import DropLists, list_raw_shards
from dalle_ds.data.tokens.dataset_files import load_index, load_manifest, merge, publish
from dalle_ds.data.tokens.index import TokenIndex
from dalle_ds.errors import DataError, FingerprintMismatch
from dalle_ds.storage import objects
from dalle_ds.storage.record import Record, parse, seal
from dalle_ds.training.checkpoint_record import CheckpointRecord
from tests.data.manifests import INFO, details, shard, write


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


def test_blocks_are_columns() -> None:
    columns = {"name": "a", "bytes": "100 50 70", "n_samples": "4 4 3", "crc32": "00000001 ffffffff 0a0b0c0d"}
    part = {"path": "data/a.tar", "bytes": 1024, "checksum": "x", "n_samples": 11}
    read = Part.model_validate_json(json.dumps({**part, "blocks": columns}))
    assert json.loads(read.to_json())["blocks"] == columns and BlockColumns.of("a", read.blocks) == read.columns
    assert BlockColumns.of_arrays("a", *read.columns.arrays()) == read.columns
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
    table = BlockTable.of(parts)
    assert [table[i] for i in range(len(table))] == [block for part in parts for block in part.blocks]
    assert table.part.tolist() == [0, 0, 2] and table[2].name == "c-00000" and table[1].offset == 5
    assert len(BlockTable.of([])) == 0


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


def test_a_changed_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    """Without digests, other blocks would be read, other samples counted, or other reasons told."""
    root = str(tmp_path)
    write(root, shard("a", 2))
    published = publish(root, *merge(INFO, [(shard("a", 2), details(2))]))
    index = load_index(root)[1]
    for file, read, expected in (
        (tmp_path / "dataset.json", lambda: load_dataset_info(root), INFO),
        (tmp_path / "manifests" / "a.json", lambda: load_shard_manifests(root, ShardManifest), [shard("a", 2)]),
        (tmp_path / "manifest.json", lambda: load_manifest(root), published),
        (tmp_path / published.index.path, lambda: load_index(root)[1], index),
    ):
        whole, n_refused = file.read_bytes(), 0
        for bit in random.Random(0).sample(range(8 * len(whole)), 400):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            try:
                assert read() == expected, bytes(damaged)
            except DataError:
                n_refused += 1
        assert n_refused > 300, file
        file.write_bytes(whole)


OUT = ["../owned", "/tmp/owned", "a/../../owned", "s3://bucket/owned", "..", ""]
"""Names that lead out of the folder of the record that has them."""


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("field", ["shard", "attempt", "path", "metadata", "dropped_path"])
def test_raw_manifests_of_others_lead_nowhere(tmp_path: Path, field: str, name: str) -> None:
    """Encode, dedup and ingest copy the name of a raw shard into the names of their outputs."""
    sums = {"n_input": 1, "n_samples": 1, "dropped": {}, "fingerprint": "f", "seconds": 1.0}
    tree = {"schema": 1, "shard": "a", "attempt": "0", "path": "data/a.tar", "bytes": 10240, "checksum": "x", **sums}
    value = {"path": name, "bytes": 1, "checksum": "x"} if field == "metadata" else name
    objects.write_bytes(manifest_url(tmp_path, "a"), seal({**tree, field: value}))
    with pytest.raises(DataError, match=rf"a.json: not a valid RawShardManifest: {field}.*expected a path below the folder"):
        list_raw_shards(tmp_path)


@pytest.mark.parametrize("name", OUT)
def test_token_manifests_drop_lists_and_commits_of_others_lead_nowhere(tmp_path: Path, name: str) -> None:
    token_shard = json.loads(shard("a", 1).to_json())
    token_shard.pop("digest")
    token_shard["splits"]["train"]["path"] = name
    commit = {
        "format": 3,
        "update": 1,
        "world_size": 1,
        "attempt": "a",
        "about": {},
        "files": {name: {"bytes": 1, "sha256": "x"}},
    }
    for record_class, tree in (
        (ShardManifest, token_shard),
        (DropLists, {"max_distance": 1, "lists": {"a": name}}),
        (CheckpointRecord[Record], commit),
    ):
        with pytest.raises(DataError, match="expected a path below the folder"):
            parse(record_class, seal(tree), "it")
    index = TokenIndex.of([shard("a", 1)])
    index.paths[0] = name
    with pytest.raises(DataError, match="not an index of token shards.*expected a path below the folder"):
        TokenIndex.unpack(index.pack(), "it")


def test_a_copy_of_a_manifest_does_not_double_its_samples(any_root: str) -> None:
    write(any_root, shard("a", 1))
    objects.write_bytes(manifest_url(any_root, "b"), objects.read_bytes(manifest_url(any_root, "a")))
    with pytest.raises(DataError, match="b.json is the manifest of shard a, expected shard b"):
        load_shard_manifests(any_root, ShardManifest)
