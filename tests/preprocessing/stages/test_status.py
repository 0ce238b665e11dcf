"""Status: finished, open and failed shards, counted from the files in the output."""

import shutil
from pathlib import Path

import pytest

from dalle_ds.data.manifest import manifest_url
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from preprocessing.configs import StatusConfig
from preprocessing.stages import encode, status
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
