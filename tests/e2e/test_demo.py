"""The demo command on drawn images with a few updates: killed in the middle, restarted, then finished. Afterwards, the commands
on the pages for each role."""

import json
import re
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from tests.support import launching
from tests.support.images import draw_folder
from tests.support.pages import run_python_page

pytestmark = [pytest.mark.launch, pytest.mark.e2e]

DEMO = str(launching.ROOT / "launchers" / "demo.sh")


@pytest.fixture(scope="module")
def env() -> dict[str, str]:
    """The demo uses the environment that runs these tests, so that nothing is installed again."""
    return {"DALLE_DS_VENV": sys.prefix}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for the project's folder. The demo writes to runs/demo in it."""
    home = tmp_path_factory.mktemp("home")
    for room in ("launchers", "ds_configs"):
        (home / room).symlink_to(launching.ROOT / room)
    return home


def test_killed_demo_goes_on_and_ends_with_images(home: Path, env: dict[str, str]) -> None:
    out = home / "runs" / "demo"
    images = draw_folder(out / "images", 160)
    (images / "p0007.png").write_bytes(b"not an image")
    command = ["bash", DEMO, "--quick", "--pictures", "runs/demo/images", "--out", "runs/demo"]  # relative to the caller
    with launching.started(command, home, env) as process:
        launching.wait_for((out / "prior" / "recipe.yaml").exists, "training of the prior", timeout=900, process=process)
        launching.kill_tree(process.pid, signal.SIGKILL)
    dvae_report = (out / "dvae" / "dvae_report.json").read_text()

    done = launching.run(command, home, env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (out / "dvae" / "dvae_report.json").read_text() == dvae_report, "a finished stage was repeated"
    assert "Validation image loss" in done.stderr
    raw = [json.loads(path.read_text()) for path in (out / "raw" / "manifests").glob("*.json")]
    assert sum(shard["n_samples"] for shard in raw) == 159
    assert {reason for shard in raw for reason in shard["dropped"]} == {"unreadable"}
    record = json.loads((out / "samples" / "samples.json").read_text())
    assert record["scorer"] == json.loads((out / "clip" / "clip_report.json").read_text())["clip"]
    assert len(record["images"]) == 8 * 6 and all(len(scores) == 16 for scores in record["scores"])
    with Image.open(out / "samples" / "grid.png") as grid:
        assert grid.width > 300 and len(grid.convert("RGB").getcolors(1 << 24)) > 100

    runs = MlflowClient(f"sqlite:///{out}/mlflow.db").search_runs(["1"])
    prior = next(run for run in runs if run.data.tags["stage"] == "prior")
    dvae = next(run for run in runs if run.data.tags["stage"] == "dvae")
    assert prior.data.tags["provenance.dvae"] == dvae.data.tags["fingerprint.dvae"], (
        "provenance leads from samples back to the dVAE"
    )
    assert "caption_gap" in prior.data.metrics
    pipeline = next(run for run in runs if run.data.tags["stage"] == "pipeline")
    assert {run.data.tags["mlflow.parentRunId"] for run in (prior, dvae)} == {pipeline.info.run_id}

    trained = (out / "prior" / "summary.json").stat().st_mtime_ns
    again = launching.run(command, home, env)
    assert again.returncode == 0
    assert (out / "prior" / "summary.json").stat().st_mtime_ns == trained
    assert again.stderr.count("is up to date") == 4 and "=== 6/10" in again.stderr, "a finished demo repeats no stage"


@pytest.mark.parametrize("page", ["INFRA.md", "DATA.md", "RESEARCH.md"])
def test_what_a_page_says_works(home: Path, env: dict[str, str], page: str) -> None:
    """Run every block of a page in order, after the demo and with the same MLflow store."""
    env = {**env, "MLFLOW_TRACKING_URI": f"sqlite:///{home}/runs/demo/mlflow.db"}
    text = (launching.ROOT / "launchers" / page).read_text()
    blocks = re.findall(r"^```bash( server)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    for kind, block in blocks:
        command = ["bash", "-euo", "pipefail", "-c", block]
        if kind:
            with launching.started(command, home, env) as process:
                port = int(re.search(r"--port (\d+)", block)[1])
                launching.wait_for(lambda port=port: _answers(port), "server", process=process)
        else:
            done = launching.run(command, home, env)
            assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_the_page_for_programs_works(home: Path, env: dict[str, str]) -> None:
    page = launching.ROOT / "launchers" / "PYTHON.md"
    run_python_page(page, home, {**env, "MLFLOW_TRACKING_URI": f"sqlite:///{home}/runs/demo/mlflow.db"})


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
