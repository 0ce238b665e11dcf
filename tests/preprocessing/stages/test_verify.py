"""Verify of many shards: little comes back from a shard, a part of the shards may be read, equal keys are found."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dalle_ds.data.manifest import RawShardManifest, ShardManifest, load_shard_manifests, spread
from preprocessing.configs import IngestConfig, VerifyConfig
from preprocessing.encoding.reconstruct import Pair
from preprocessing.stages import ingest, verify
from preprocessing.stages.verify import VerifyJob, n_repeated_keys
from tests.support.images import draw_folder

N_SHARDS = 6


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    images = draw_folder(folder / "images", 2 * N_SHARDS)
    for image in images.glob("*.png"):
        image.with_suffix(".txt").write_text(f"a drawing called {image.stem}")
    config = IngestConfig(images=str(images), out=str(folder / "raw"), samples_per_shard=2, workers=1)
    settings = config.filters.model_copy(update={"language": None, "min_side": 8})
    assert ingest.run(config.model_copy(update={"filters": settings})).is_complete
    return folder / "raw"


def test_equal_keys_are_counted_as_in_one_array(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    shards = [np.sort(rng.integers(0, 2**64, 500, dtype=np.uint64)) for _ in range(9)]
    ends = np.array([0, 0, 2**58, 2**58 - 1, 2**63, 2**64 - 1], dtype=np.uint64)  # at the ends of slices
    shards += [np.sort(np.concatenate([shards[0][:40], ends])), np.sort(ends), np.zeros(0, dtype=np.uint64)]
    whole = np.concatenate(shards)
    expected = len(whole) - len(np.unique(whole))
    assert expected == 40 + 1 + 6
    for slices in (64, 1, 7):
        monkeypatch.setattr(verify, "SLICES", slices)
        assert n_repeated_keys(shards) == expected
    assert n_repeated_keys([]) == 0


def test_shards_are_chosen_from_all_over() -> None:
    chosen = spread(range(25_000), 5)
    assert chosen[0] == 0 and chosen[-1] == 24_999 and np.ptp(np.diff(chosen)) <= 1 and len(chosen) == 5
    assert list(spread(range(3), 64)) == [0, 1, 2] and spread([], 64) == []


def test_a_report_has_pixels_only_where_they_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((256, 256, 3), dtype=np.uint8)
    monkeypatch.setattr(verify, "pairs_of", lambda *_: [Pair(str(i), pixels, pixels, 1.0) for i in range(3)])
    monkeypatch.setattr(verify, "_check_tokens", lambda *_: [f"key {i}" for i in range(10_000)])
    manifest = ShardManifest.model_construct(shard="00000", fingerprint="f", n_input=0, dropped={}, splits={})
    job = VerifyJob("nowhere", object(), "f", 3, {"00001": 2})  # type: ignore[arg-type]
    dvae: Any = object()
    hidden = verify.check_shard(job, manifest, dvae)
    assert (
        not hidden.problems and len(hidden.psnrs) == 3 and not hidden.columns and len(pickle.dumps(hidden)) < 8 * 10_000 + 2000
    )
    job.shown[manifest.shard] = 2
    assert [column.shape for column in verify.check_shard(job, manifest, dvae).columns] == [(512, 256, 3)] * 2


def test_some_shards_are_read_and_the_sizes_of_the_others_are_checked(raw: Path) -> None:
    whole = verify.run(VerifyConfig(root=str(raw), workers=1))
    assert whole.is_complete and whole.summary["shards_read"] == N_SHARDS and whole.summary["samples"] == 2 * N_SHARDS
    some = VerifyConfig(root=str(raw), workers=1, shards=3)
    found = verify.run(some)
    assert found.is_complete and found.summary["shards"] == N_SHARDS and found.summary["shards_read"] == 3
    second, fourth = sorted((raw / "data").glob("*.tar"))[1::2][:2]
    (metadata,) = (raw / "metadata").glob(f"{second.stem}.parquet")
    data = {file: file.read_bytes() for file in (second, fourth, metadata)}
    read = {manifest.shard for manifest in spread(load_shard_manifests(str(raw), RawShardManifest), 3)}
    assert not {file.name.partition("-")[0] for file in data} & read, "neither is read"
    second.write_bytes(data[second][:-512])
    fourth.unlink()
    metadata.unlink()
    problems = verify.run(some).problems
    assert len(problems) == 3
    assert f"{second}: {len(data[second]) - 512} bytes, expected {len(data[second])} as in its manifest" in problems[0]
    for file, problem in ((metadata, problems[1]), (fourth, problems[2])):
        assert f"{file}: the manifest names this object, but it does not exist" in problem
    for file, content in data.items():
        file.write_bytes(content)
