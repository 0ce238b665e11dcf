"""The driver of a run keeps little of each shard: 25,000 shards must not fill the memory of a login node."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dalle_ds.data import manifest
from dalle_ds.data.manifest import RawShardManifest, ShardDetails, StoredFile, manifest_url
from dalle_ds.data.raw.index import RAW_INDEX, write_raw_index
from dalle_ds.data.raw.shards import RawShard, list_raw_shards, shard_of
from preprocessing.encoding.publication import publish_shards
from preprocessing.stages import encode
from tests.data import manifests
from tests.preprocessing.conftest import World
from tests.support.memory import names_below, peak_of

N_SHARDS = 25_000  # of 10,000 images each: the paper's 250 million
LOOP_BYTES, MAX_BYTES = 1_000, 5_000  # a shard, at the peak: of the loop, and of what lists and publishes


@dataclass(frozen=True)
class NothingToEncode:
    """In place of `EncodeJob`: the driver alone remains."""

    out: str
    info: object
    batch: int
    block_samples: int
    max_failure_rate: float
    device: str
    precision: str

    def start(self, n_threads: int) -> Callable[[RawShard], int]:
        return lambda shard: 5


def raw_manifest(number: int) -> RawShardManifest:
    name, attempt, digest = f"{number:05d}", f"{number:032x}", f"{number:064x}"
    metadata = StoredFile(path=f"metadata/{name}-{attempt}.parquet", bytes=500_000, checksum=digest)
    tar = {"path": f"data/{name}-{attempt}.tar", "bytes": 1000, "checksum": digest, "n_input": 5, "n_samples": 4}
    about = {"dropped": {"too small": 1}, "fingerprint": digest[:20], "seconds": 60.5, "finished": 1.8e9}
    return RawShardManifest(shard=name, attempt=attempt, metadata=metadata, **tar, **about)


def test_the_loop_of_encode(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = shard_of("s3://bucket/raw", raw_manifest(0))
    monkeypatch.setattr(encode, "EncodeJob", NothingToEncode)
    monkeypatch.setattr(encode, "list_raw_shards", lambda _: [replace(like, name=f"{n:05d}") for n in range(N_SHARDS)])

    def loop() -> None:
        summary = encode.run(world.config(tmp_path / "tokens")).summary
        assert summary["shards_made_now"] == N_SHARDS and not summary["failed_shards"]

    assert peak_of(loop) / N_SHARDS < LOOP_BYTES


def test_to_list_raw_shards(tmp_path: Path) -> None:
    n_shards = 2000
    (tmp_path / "manifests").mkdir()
    for number in range(n_shards):
        (tmp_path / "manifests" / f"{number:05d}.json").touch()
    write_raw_index(tmp_path, [raw_manifest(number) for number in range(n_shards)])
    os.utime(tmp_path / RAW_INDEX, (2e9, 2e9))  # younger than the manifests
    names = names_below(tmp_path)
    assert peak_of(lambda: list_raw_shards(tmp_path)) / n_shards < MAX_BYTES
    assert len(list_raw_shards(tmp_path)) == n_shards <= len(names)


def test_to_publish_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the names of dropped samples nor the counts of codes are kept: 60 kB a shard, in memory."""
    monkeypatch.setattr(manifest, "READ_AHEAD", 8)  # those wait in memory, sometimes all of them
    root = tmp_path / "tokens"
    dropped = [(f"{number:030x}", "too small") for number in range(500)]
    packed = ShardDetails(code_histogram=[1, 2, 3, 4], caption_lengths={3: 10}, dropped_samples=dropped).pack()
    for folder in ("manifests", "details"):
        (root / folder).mkdir(parents=True)
    (root / "details" / "all").write_bytes(packed)
    stored = StoredFile.of("details/all", packed)
    shards: list[RawShard] = []

    def publish(n_shards: int) -> int:
        for number in range(len(shards), n_shards):
            name = f"{number:05d}"
            made = manifests.shard(name, 10_000).model_copy(update={"details": stored})
            Path(manifest_url(root, name)).write_bytes(made.to_json())
            shards.append(RawShard(name, made.input.path, made.input.bytes))
        return peak_of(lambda: publish_shards(str(root), manifests.INFO, shards))

    few, many = 100, 500
    first = publish(few)
    assert (publish(many) - first) / (many - few) < MAX_BYTES
