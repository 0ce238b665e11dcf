"""Encode through a proxy that corrupts responses of a real S3 server: the result is correct, or the error names the cause."""

import hashlib
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from dalle_ds.data.manifest import RawShardManifest, done_shards, load_shard_manifests
from dalle_ds.errors import DataError
from dalle_ds.storage import objects, s3_requests
from preprocessing.configs import IngestConfig, VerifyConfig
from preprocessing.stages import encode, ingest, verify
from tests.conftest import S3
from tests.preprocessing.conftest import N_SHARDS, World
from tests.support.fault_proxy import FAULTS, FaultProxy
from tests.support.images import draw_folder

pytestmark = pytest.mark.s3


@pytest.fixture
def raw_on_s3(world: World, s3: S3) -> str:
    for url in objects.list_files(world.raw):
        objects.write_bytes(f"{s3.url}/raw{url.removeprefix(world.raw)}", objects.read_bytes(url))
    return f"{s3.url}/raw"


def test_encode_through_a_faulty_store_is_the_undisturbed_run(
    world: World, s3: S3, raw_on_s3: str, is_undisturbed: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{s3.url}/tokens"
    monkeypatch.setattr(s3_requests, "READ_TIMEOUT_SECONDS", 1)  # for the stalled bodies
    with FaultProxy(s3.server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert encode.run(world.config(out, raw=raw_on_s3)).is_complete
    assert min(proxy.suffered[fault] for fault in FAULTS) >= 3, proxy.suffered
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.server.endpoint)
    assert is_undisturbed(out)
    report = verify.run(VerifyConfig(root=out, workers=1)).summary
    assert (report["n_problems"], report["orphans"]) == (0, 0)


def test_ingest_through_a_faulty_store_is_the_undisturbed_run(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw_folder(tmp_path / "images", 48)
    images, out = f"{s3.url}/images", f"{s3.url}/raw"
    for file in folder.iterdir():
        objects.write_bytes(f"{images}/{file.name}", file.read_bytes())
    undisturbed = ingest.run(IngestConfig(images=images, out=str(tmp_path / "raw"), samples_per_shard=8, workers=1))
    monkeypatch.setattr(s3_requests, "READ_TIMEOUT_SECONDS", 1)  # for the stalled bodies
    with FaultProxy(s3.server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert ingest.run(IngestConfig(images=images, out=out, samples_per_shard=8, workers=1)).is_complete
    assert min(proxy.suffered[fault] for fault in FAULTS) >= 3, proxy.suffered
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.server.endpoint)
    shards = load_shard_manifests(out, RawShardManifest)
    assert sum(shard.n_samples for shard in shards) == undisturbed.summary["samples"] == 48
    local = load_shard_manifests(str(tmp_path / "raw"), RawShardManifest)
    assert [(shard.shard, shard.checksum) for shard in shards] == [(shard.shard, shard.checksum) for shard in local]
    report = verify.run(VerifyConfig(root=out, workers=1)).summary
    assert (report["n_problems"], report["orphans"]) == (0, 0)


def test_a_shard_that_cannot_be_had_is_named_and_the_rest_is_done(
    world: World, s3: S3, raw_on_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{s3.url}/tokens"
    monkeypatch.setenv("DALLE_DS_RETRY_SECONDS", "1")
    with FaultProxy(s3.server.endpoint, every=1_000_000, unreachable="raw/data/00003-") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        outcome = encode.run(world.config(out, raw=raw_on_s3))
        assert not outcome.is_complete
        assert list(outcome.summary["failed_shards"]) == ["00003"]
        assert "00003-" in outcome.summary["failed_shards"]["00003"]
        assert "tried for 1 s" in outcome.summary["failed_shards"]["00003"]
        assert len(done_shards(out)) == N_SHARDS - 1


def test_a_commit_whose_answer_is_lost_does_not_lose_against_itself(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(s3.server.endpoint, faults=["lost"], every=2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert all(objects.create_exclusive(f"{s3.url}/{number}", b"ours") for number in range(3))
        assert not objects.create_exclusive(f"{s3.url}/0", b"theirs")
    assert proxy.suffered["lost"] >= 2


def test_no_part_of_an_object_is_taken_for_all_of_it(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    url, data = f"{s3.url}/object", os.urandom(300_000)
    objects.write_bytes(url, data)
    monkeypatch.setattr(s3_requests, "READ_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setenv("DALLE_DS_RETRY_SECONDS", "0.5")
    with FaultProxy(s3.server.endpoint, faults=["cut", "stalled"], every=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(DataError, match="tried for 0 s"):
            objects.read_bytes(url)
        with pytest.raises(DataError, match="tried for 0 s"):
            objects.read_range(url, 0, len(data))
        with pytest.raises(DataError, match="tried for 0 s"):
            objects.local_copy(url).__enter__()


def test_large_objects_pass_in_bounded_memory(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, url = tmp_path / "large", f"{s3.url}/large"
    large.write_bytes(os.urandom(1 << 20) * 120)
    tracemalloc.start()
    objects.put_file(large, url)
    with objects.local_copy(url) as copy:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert _digest(copy) == _digest(large)
    assert peak < 100 << 20


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
