"""The index of raw shards: a listing and one GET give all manifests, and a manifest that is newer than the index counts."""

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from dalle_ds.data.manifest import RawShardManifest, load_shard_manifests, manifest_url
from dalle_ds.data.raw.index import RAW_INDEX, load_raw_manifests, write_raw_index
from dalle_ds.data.raw.shards import list_raw_shards
from dalle_ds.storage import objects
from tests.conftest import S3


def add(root: str, name: str, n_samples: int = 3) -> None:
    manifest = RawShardManifest(
        shard=name,
        attempt="a",
        path=f"data/{name}.tar",
        bytes=100,
        checksum="f" * 64,
        n_input=n_samples,
        n_samples=n_samples,
        dropped={},
        fingerprint="f",
        seconds=1.0,
    )
    objects.write_bytes(manifest_url(root, name), manifest.to_json())


@pytest.mark.s3
def test_all_shards_are_listed_by_few_requests(s3: S3, s3_requests: list[str]) -> None:
    for number in range(6):
        add(s3.url, f"{number:05d}")
    time.sleep(1.1)  # S3 tells times in whole seconds
    write_raw_index(s3.url, load_raw_manifests(s3.url))
    s3_requests.clear()
    shards = list_raw_shards(s3.url)
    assert [shard.name for shard in shards] == [f"{number:05d}" for number in range(6)]
    n_gets = Counter(request.partition(" ")[0] for request in s3_requests)["GET"]
    assert len(s3_requests) <= 6 and n_gets <= 2 and not any("/manifests/0" in request for request in s3_requests)


def test_a_copied_index_that_is_older_than_its_manifests_is_written_again(tmp_path: Path) -> None:
    root, index = str(tmp_path), tmp_path / RAW_INDEX
    add(root, "a")
    write_raw_index(root, load_raw_manifests(root))
    os.utime(manifest_url(root, "a"), (1, 1))
    os.utime(index, (0, 0))
    write_raw_index(root, load_raw_manifests(root))
    written = index.stat().st_mtime_ns
    assert written > 1e9
    write_raw_index(root, load_raw_manifests(root))
    assert index.stat().st_mtime_ns == written, "an index that readers use stays"


@pytest.mark.parametrize("how", ["added", "replaced", "removed", "damaged"])
def test_an_index_that_is_not_of_these_manifests_is_passed_over(tmp_path: Path, how: str) -> None:
    root = str(tmp_path)
    for name in ("a", "a-1", "b"):
        add(root, name)
    write_raw_index(root, load_raw_manifests(root))
    index = tmp_path / RAW_INDEX
    if how == "added":
        add(root, "c")
    elif how == "replaced":
        add(root, "b", n_samples=4)
    elif how == "removed":
        Path(manifest_url(root, "b")).unlink()
    else:
        index.write_bytes(index.read_bytes()[:-9])
    assert load_raw_manifests(root) == load_shard_manifests(root, RawShardManifest)
    n_shards = {"added": 4, "removed": 2}.get(how, 3)
    assert len(load_raw_manifests(root)) == n_shards
