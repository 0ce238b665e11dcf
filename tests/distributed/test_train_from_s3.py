"""Training with a real S3 server and a real MLflow server. Both are killed during the run and restarted after a minute."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dalle_ds.tracking.mlflow_sink import read_run
from dalle_ds.tracking.tracker import replay
from tests.conftest import S3
from tests.data.token_sets import make_token_set
from tests.support import launching
from tests.support.mlflow_server import MlflowServer

pytestmark = [pytest.mark.launch, pytest.mark.s3, pytest.mark.mlflow]

# Few batch slots and small shard blocks: every 32 updates, each slot needs blocks that it has not read yet.
SMALL = [
    "model.n_layers=2",
    "model.n_heads=1",
    "global_batch=4",
    "micro_batch=2",
    "updates=80",
    "checkpoint.every=5",
    "checkpoint.keep=100",
    "validation.every=1000",
    "validation.samples=16",
    "learning_rate.warmup_updates=2",
    "tracking.every=1",
]


@pytest.fixture
def mlflow_server(tmp_path: Path, empty_store: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "server", empty_store)
    server.start()
    yield server
    server.kill()


def test_training_waits_for_a_lost_store_and_loses_no_record(s3: S3, mlflow_server: MlflowServer, tmp_path: Path) -> None:
    tokens = make_token_set(f"{s3.url}/tokens", n_samples=512, block_samples=4)
    folder = tmp_path / "run"
    overrides = [*SMALL, f"folder={folder}", f"data.dataset={tokens}", f"tracking.uri={mlflow_server.uri}"]
    settings = launching.words(*overrides)
    command = [*launching.deepspeed(2), launching.TRAIN_PRIOR, *launching.TINY, *settings, "--json"]

    def n_checkpoints() -> int:
        return len(list(folder.glob("checkpoints/update_*/checkpoint.json")))

    with launching.started(command, tmp_path) as process:
        launching.wait_for(n_checkpoints, "first checkpoint", process=process)
        s3.server.kill()
        mlflow_server.kill()
        time.sleep(60)
        trained_alone = n_checkpoints()
        s3.server.start()
        mlflow_server.start()
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-4000:]
    summary = launching.last_json(out)
    assert summary["updates"] == 80
    assert trained_alone < 16, "training ended before the server was back: the outage tested nothing"
    assert f"cannot read {tokens}/data" in err, "no read fell into the outage"
    assert "MLflow delivery failed" in err
    assert replay(folder), "what a busy machine did not deliver within the minute that the end waits is still there"
    client, run = MlflowClient(mlflow_server.uri), read_run(folder)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.run_id, "loss/train/total")] == list(range(1, 81))
