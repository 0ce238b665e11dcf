"""Ingest and encode through kills at random times: the shards are those of an undisturbed run, byte for byte."""

import os
import random
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import psutil
import pytest

from dalle_ds.data.manifest import RawShardManifest, load_shard_manifests
from preprocessing.configs import IngestConfig, VerifyConfig
from preprocessing.stages import ingest, verify
from tests.preprocessing.conftest import N_IMAGES, N_SHARDS, World
from tests.support.images import draw_folder
from tests.support.killing import everything, run_through_kills

pytestmark = pytest.mark.launch

LOOPS = [2, pytest.param(40, marks=pytest.mark.long)]


def a_worker_or_everything(pid: int, draw: random.Random) -> Collection[psutil.Process]:
    return [psutil.Process(pid)] if draw.random() < 0.5 else everything(pid, draw)


def killed_command(verb: str, out: Path, n_kills: int, **settings: object) -> int:
    """Run `dalle-ds data VERB` through kills. Returns their number."""
    command = [sys.executable, "-m", "preprocessing", verb, "--json", f"out={out}"]
    command += [f"{key}={value}" for key, value in settings.items()]
    _, n_killed = run_through_kills(
        command,
        out.parent,
        n_kills,
        random.Random(n_kills),
        seconds=1.5,
        has_begun=out.exists,
        choose=a_worker_or_everything,
        extra_env={"OMP_NUM_THREADS": "1", "TMPDIR": str(out.parent)},
    )
    return n_killed


def content(root: str) -> list[tuple[str, str, int, dict[str, int]]]:
    """Name, checksum, samples and drops of each raw shard."""
    shards = load_shard_manifests(root, RawShardManifest)
    return [(shard.shard, shard.checksum, shard.n_samples, shard.dropped) for shard in shards]


@pytest.mark.parametrize("n_kills", LOOPS)
def test_ingest(tmp_path: Path, n_kills: int) -> None:
    images = draw_folder(tmp_path / "images", 20 * n_kills)
    for number in range(3):
        (images / f"bad{number}.png").write_bytes(os.urandom(100))
        (images / f"bad{number}.txt").write_text("no picture")
    undisturbed = str(tmp_path / "undisturbed")
    assert ingest.run(IngestConfig(images=str(images), out=undisturbed, samples_per_shard=4, workers=1)).is_complete
    killed = tmp_path / "raw"
    assert killed_command("ingest", killed, n_kills, images=images, samples_per_shard=4, workers=2) > 0
    assert content(str(killed)) == content(undisturbed)
    report = verify.run(VerifyConfig(root=str(killed), workers=1, delete_orphans=True)).summary
    assert report["n_problems"] == 0 and report["samples"] == 20 * n_kills
    assert verify.run(VerifyConfig(root=str(killed), workers=1)).summary["orphans"] == 0


@pytest.mark.parametrize("n_kills", LOOPS)
def test_encode(world: World, tmp_path: Path, is_undisturbed: Callable[[str], bool], n_kills: int) -> None:
    config = world.config(tmp_path / "tokens", workers=2)
    keys = ("raw", "dvae", "tokenizer", "workers", "validation_fraction", "block_samples", "batch", "device")
    n_killed = killed_command("encode", tmp_path / "tokens", n_kills, **{key: getattr(config, key) for key in keys})
    assert 0 < n_killed <= n_kills
    assert is_undisturbed(str(tmp_path / "tokens"))
    report = verify.run(VerifyConfig(root=str(tmp_path / "tokens"), workers=1)).summary
    assert (report["n_problems"], report["samples"], report["shards"]) == (0, N_IMAGES, N_SHARDS)
