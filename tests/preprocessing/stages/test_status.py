"""Status: finished, open and failed shards, counted from the files in the output."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from dalle_ds.data.manifest import manifest_url
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from preprocessing.configs import StatusConfig
from preprocessing.executors.journal import Journal
from preprocessing.stages import encode, status
from tests.conftest import S3
from tests.data.manifests import shard, write
from tests.preprocessing.conftest import N_IMAGES, N_SHARDS, World


def told(root: str) -> dict[str, object]:
    return status.run(StatusConfig(root=root)).summary


def test_failures_are_kept_until_a_later_run_mends_them(world: World, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", str(tmp_path / "tokens")
    shutil.copytree(world.raw, raw)
    tar = next((raw / "data").glob("00002-*.tar"))
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1])
    assert not encode.run(world.config(out, raw=str(raw))).is_complete
    seen = told(out)
    assert (seen["kind"], seen["shards"]) == ("tokens", {"all": N_SHARDS, "done": N_SHARDS - 1, "failed": 1, "open": 0})
    assert list(seen["failed_shards"]) == ["00002"]
    assert "truncated" in seen["failed_shards"]["00002"]
    assert seen["samples"] == N_IMAGES - N_IMAGES // N_SHARDS
    assert seen["images_per_second"] > 0
    assert seen["eta_seconds"] > 0
    tar.write_bytes(whole)
    assert encode.run(world.config(out, raw=str(raw))).is_complete
    seen = told(out)
    assert seen["shards"] == {"all": N_SHARDS, "done": N_SHARDS, "failed": 0, "open": 0}
    assert (seen["failed_shards"], seen["eta_seconds"], seen["samples"]) == ({}, 0, N_IMAGES)
    assert objects.list_files(f"{out}/status/failed") == []


def test_open_shards_and_the_time_they_will_take(world: World, tmp_path: Path) -> None:
    root = tmp_path / "raw"
    shutil.copytree(world.raw, root)
    before = told(str(root))
    assert before["shards"] == {"all": N_SHARDS, "done": N_SHARDS, "failed": 0, "open": 0}
    for number in range(3):
        Path(manifest_url(root, f"{number:05d}")).unlink()
    after = told(str(root))
    assert after["shards"] == {"all": N_SHARDS, "done": N_SHARDS - 3, "failed": 0, "open": 3}
    images = 3 * N_IMAGES // N_SHARDS
    assert after["eta_seconds"] == pytest.approx(images / after["images_per_second"])


def test_nothing_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither ingest nor encode has started here"):
        told(str(tmp_path))


@pytest.mark.s3
def test_requests_and_memory_do_not_grow_with_the_data_set(
    s3: S3, s3_requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(s3.url, *(shard(f"{number:05d}", 10 + number) for number in range(12)))
    journal = Journal(s3.url, 20)
    for number in range(12, 16):
        journal.failed(f"{number:05d}", f"reason {number}")
    exact = told(s3.url)
    assert (exact["inputs"], exact["samples"], exact["estimated_from_shards"]) == (198, 186, None)
    monkeypatch.setattr(status, "MAX_READ", 3)
    monkeypatch.setattr(status, "MAX_REASONS", 2)
    s3_requests.clear()
    seen = told(s3.url)
    assert Counter(request.partition(" ")[0] for request in s3_requests) == {"HEAD": 1, "GET": 1 + 3 + 2, "LIST": 2}
    assert seen["shards"] == exact["shards"] == {"all": 20, "done": 12, "failed": 4, "open": 4}
    assert (seen["inputs"], seen["samples"]) == (4 * (11 + 17 + 22), 4 * (10 + 16 + 21)), "of shards 0, 6 and 11, times 4"
    assert (seen["estimated_from_shards"], seen["dropped"]) == (3, {"unreadable": 12})
    reasons = ["reason 12", "reason 13", "see status/failed", "see status/failed"]
    assert seen["failed_shards"] == dict(zip(("00012", "00013", "00014", "00015"), reasons, strict=True))
    assert seen["images_per_second"] > 0 and seen["eta_seconds"] > 0
