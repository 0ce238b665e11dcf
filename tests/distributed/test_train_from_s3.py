"""Training from a real S3 server that is killed and brought back in the middle."""

import time
from pathlib import Path

import pytest

from tests import launching
from tests.conftest import S3
from tests.data.token_sets import make_token_set

pytestmark = [pytest.mark.launch, pytest.mark.s3]

# Few lanes and small blocks: every 32 updates each lane needs blocks that it has not read before.
SMALL = ["model.n_layers=2", "model.n_heads=1", "global_batch=4", "micro_batch=2", "updates=80", "checkpoint.every=5",
         "checkpoint.keep=100", "validation.every=1000", "validation.samples=16", "learning_rate.warmup_updates=2"]  # fmt: skip


def test_training_waits_for_a_lost_store_and_goes_on(s3: S3, tmp_path: Path) -> None:
    tokens = make_token_set(f"{s3.url}/tokens", n_samples=512, block_samples=4)
    folder = tmp_path / "run"
    overrides = [*SMALL, f"folder={folder}", f"data.dataset={tokens}"]
    command = [
        *launching.deepspeed(2),
        launching.TRAIN_PRIOR,
        *launching.TINY,
        *(p for o in overrides for p in ("--set", o)),
        "--json",
    ]
    with launching.started(command, tmp_path) as process:
        launching.wait_for(lambda: list(folder.glob("checkpoints/update_*/checkpoint.json")), "first checkpoint", process=process)
        s3.server.kill()
        time.sleep(15)  # long enough for the blocks at hand to be used up
        trained_alone = len(list(folder.glob("checkpoints/update_*/checkpoint.json")))
        s3.server.start()
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-4000:]
    summary = launching.last_json(out)
    assert summary["updates"] == 80
    assert trained_alone < 16, "training ended before the server was back: the outage tested nothing"
    assert summary["data_wait_seconds"] > 1, "no read fell into the outage"
