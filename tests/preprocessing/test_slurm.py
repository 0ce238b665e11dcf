"""encode.sbatch: the array's tasks share the shards, and a task is queued again after the exit codes that a new start may mend.

`srun` and `scontrol` are scripts that do what Slurm's would do here; a real Slurm runs the other job file in
tests/distributed/test_multi_node.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_ds.data.manifest import RawShardManifest, done_shards, load_shard_manifests
from preprocessing.configs import IngestConfig
from preprocessing.stages import ingest
from tests.support.images import draw_folder

JOB = Path(__file__).parents[2] / "launchers" / "slurm" / "encode.sbatch"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def run_task(folder: Path, srun: str, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run one task of the array. Returns (exit code, what `scontrol` was called with)."""
    script(folder / "srun", srun)
    script(folder / "scontrol", f'echo "$*" > {folder}/called')
    (folder / "called").write_text("")
    ours = {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    array = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
    done = subprocess.run(["bash", str(JOB), *arguments], env={**os.environ, **ours, **array, **variables}, check=False)
    return done.returncode, (folder / "called").read_text().strip()


@pytest.mark.parametrize(
    ("code", "restarts", "is_requeued"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (143, 99, True), (75, 9, True), (75, 10, False), (137, 0, True)],
)
def test_a_task_is_queued_again_if_that_may_help(tmp_path: Path, code: int, restarts: int, is_requeued: bool) -> None:
    found = run_task(tmp_path, f"exit {code}", SLURM_RESTART_COUNT=str(restarts))
    assert found == (code, "requeue 7" if is_requeued else "")


def test_one_task_of_four_ingests_all_if_no_other_comes(tmp_path: Path) -> None:
    images, out = draw_folder(tmp_path / "images", 24), tmp_path / "raw"
    arguments = [f"images={images}", f"out={out}", "samples_per_shard=3", "workers=1"]
    assert run_task(tmp_path, 'exec "$@"', *arguments, VERB="ingest") == (0, "")
    assert len(done_shards(out)) == 8
    assert not any((out / "claims").iterdir())
    ingest.run(IngestConfig(images=str(images), out=str(tmp_path / "alone"), samples_per_shard=3, workers=1))
    alone = load_shard_manifests(str(tmp_path / "alone"), RawShardManifest)
    assert [(shard.shard, shard.checksum) for shard in load_shard_manifests(str(out), RawShardManifest)] == [
        (shard.shard, shard.checksum) for shard in alone
    ]
