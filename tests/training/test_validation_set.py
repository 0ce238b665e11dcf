"""Validation images of shards with metadata: the same images, by ranged reads instead of whole tars."""

import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle_ds.data.raw.metadata import SCHEMA, write_metadata
from dalle_ds.data.raw.shards import RawSample, RawShard, list_raw_shards, read_raw_shard
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.training.dvae.data import validation_images
from tests.training.dvae.runs import dvae_run, make_raw


def with_metadata(shard: RawShard, file: Path) -> RawShard:
    """The shard with a metadata file beside it, as ingest writes it."""
    with tarfile.open(shard.url) as tar:
        offsets = {member.name.partition(".")[0]: member.offset_data for member in tar if not member.name.endswith(".json")}
    rows: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for sample in read_raw_shard(shard):
        assert isinstance(sample, RawSample)
        row = {
            "key": sample.key,
            "caption": sample.caption,
            "group": sample.group,
            "offset": offsets[sample.key],
            "bytes": len(sample.image),
            "crc32": zlib.crc32(sample.image),
        }
        for name, column in rows.items():
            column.append(row.get(name))
    return replace(shard, metadata=str(file), metadata_checksum=write_metadata(rows, file, file.name).checksum)


def test_metadata_finds_the_same_images_without_reading_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dvae_run(make_raw(tmp_path / "raw"), tmp_path)
    plain = list_raw_shards(tmp_path / "raw")
    shards = [with_metadata(shard, tmp_path / f"{shard.name}.parquet") for shard in plain]
    expected = validation_images(run, plain, tmp_path / "plain")
    read: list[int] = []
    read_range = objects.read_range

    def counting(url: str, offset: int, length: int) -> bytes:
        read.append(length)
        return read_range(url, offset, length)

    monkeypatch.setattr(objects, "read_range", counting)
    monkeypatch.setattr("dalle_ds.training.validation_set.read_raw_shard", lambda _: pytest.fail("a tar was read"))
    assert torch.equal(validation_images(run, shards, tmp_path / "with"), expected)
    assert len(read) == len(expected) and sum(read) < sum(shard.bytes for shard in shards) / 20


def test_an_empty_split_is_told_apart_from_unusable_images(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw")
    shards = list_raw_shards(raw)
    run = dvae_run(raw, tmp_path, data={"raw": str(raw), "validation_fraction": 1e-9})
    with pytest.raises(DataError, match="the validation split is empty: validation_fraction 1e-09 holds out none of "):
        validation_images(run, shards, tmp_path / "none")
    size = {"n_groups": 2, "n_blk_per_group": 1, "n_hid": 16, "n_init": 16, "n_codes": 32, "image_size": 4096}
    with pytest.raises(DataError, match="no usable image in the validation split .*; images must be at least 4096 pixels"):
        validation_images(dvae_run(raw, tmp_path, model=size), shards, tmp_path / "small")
