"""The whole way by its one command, on drawn pictures and a few updates: killed in the middle, started again, then finished."""

import json
import signal
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from tests import launching
from tests.pictures import draw_folder

pytestmark = [pytest.mark.launch, pytest.mark.e2e]

DEMO = str(launching.ROOT / "launchers" / "demo.sh")


@pytest.fixture
def env() -> dict[str, str]:
    """The environment that runs these tests is the demo's too: nothing is installed again."""
    return {"DALLE_DS_VENV": sys.prefix}


def test_killed_demo_goes_on_and_ends_with_pictures(tmp_path: Path, env: dict[str, str]) -> None:
    pictures, out = draw_folder(tmp_path / "pictures", 160), tmp_path / "demo"
    (pictures / "p0007.png").write_bytes(b"not a picture")
    command = ["bash", DEMO, "--quick", "--pictures", "pictures", "--out", "demo"]  # relative to the caller
    with launching.started(command, tmp_path, env) as process:
        launching.wait_for((out / "prior" / "recipe.yaml").exists, "training of the prior", timeout=300, process=process)
        launching.kill_tree(process.pid, signal.SIGKILL)
    dvae_report = (out / "dvae" / "dvae_report.json").read_text()

    done = launching.run(command, tmp_path, env, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (out / "dvae" / "dvae_report.json").read_text() == dvae_report, "a finished stage was repeated"
    assert "Held-out image loss" in done.stderr
    raw = [json.loads(path.read_text()) for path in (out / "raw" / "manifests").glob("*.json")]
    assert sum(shard["n_samples"] for shard in raw) == 159
    assert {reason for shard in raw for reason in shard["dropped"]} == {"unreadable"}
    with Image.open(out / "samples" / "grid.png") as grid:
        assert grid.width > 300 and len(grid.convert("RGB").getcolors(1 << 24)) > 100

    runs = MlflowClient(f"sqlite:///{out}/mlflow.db").search_runs(["1"])
    prior = next(run for run in runs if run.data.tags["stage"] == "train_prior")
    dvae = next(run for run in runs if run.data.tags["stage"] == "dvae")
    assert prior.data.tags["lineage.dvae"] == dvae.data.tags["dvae"], "the lineage leads from samples back to the codebook"
    assert "held_out/caption_gap" in prior.data.metrics

    again = launching.run(command, tmp_path, env)
    assert again.returncode == 0
    assert "up to date" in again.stderr and "7/9" not in again.stderr, "a finished demo does nothing"
