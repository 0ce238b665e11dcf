"""MLflow's page of a run: a real server with artifacts on S3, the page in a real browser, a model from the registry."""

import io
import os
import subprocess
import sys
import textwrap
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from PIL import Image

from dalle_ds.cli import app
from dalle_ds.models.prior import PriorConfig
from dalle_ds.parallel.engine import UpdateReport
from dalle_ds.parallel.ranks import ALONE
from dalle_ds.recipes import load_recipe
from dalle_ds.storage import objects
from dalle_ds.tracking.tracker import Tracker
from dalle_ds.training.prior.config import PriorRunConfig
from dalle_ds.training.prior.metrics import PriorMetrics, describe
from dalle_ds.training.prior.state import TrainState
from tests.conftest import BUCKET
from tests.sampling.exports import make_export
from tests.support.browser import NEEDS_CHROMIUM, browser_page
from tests.support.mlflow_server import REPOSITORY, MlflowServer

pytestmark = [pytest.mark.s3, pytest.mark.mlflow]

CHARTS = {
    "samples": "samples/validation",
    "loss": "loss/by_position",
    "memory": "cpu_peak_gigabytes",
    "optimizer": "optimizer/gradient_scales",
    "gradient_scale_log2": "layers.0.mlp",
    "speed": "tokens_per_second",
    "time_share": "other",
}
HAS_IMAGE = "[...document.images].some(image => image.src.includes('loss~by_position') && image.naturalWidth > 0)"
HAS_SAMPLES = "[...document.images].some(image => image.src.includes('get-artifact') && image.naturalWidth == 300)"
# errors of MLflow's own page: it requests the user from a server without users, and its charts resize themselves
HARMLESS = ("404 (Not Found)", "ResizeObserver")


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_store, s3_server):
    folder = tmp_path_factory.mktemp("dashboard")
    with pytest.MonkeyPatch.context() as patch:  # only the server has the keys of the store
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        server = MlflowServer(folder / "server", empty_store, "--artifacts", f"s3://{BUCKET}/dashboard")
        server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def run(server, tmp_path_factory):
    """Thirty updates, logged as training logs them."""
    recipe = load_recipe(PriorRunConfig, REPOSITORY / "launchers" / "recipes" / "tiny.yaml", ["tracking.every=1"])
    text = describe(recipe, n_parameters=2_800_000, world_size=2, different=())
    folder = tmp_path_factory.mktemp("run")
    tracker = Tracker.start(folder, uri=server.uri, experiment="dashboard", description=text)
    state, names = TrainState(), ("layers.0.attention", "layers.0.mlp")
    scaler = SimpleNamespace(
        names=names,
        scale=torch.tensor([2.0**13, 2.0**14]),
        at_limits=lambda _: {},
        log2_scales=lambda: dict(zip(names, (13.0, 14.0), strict=True)),
    )
    engine = SimpleNamespace(
        ranks=ALONE, scaler=scaler, phases=SimpleNamespace(take=dict), optimizer_bytes_per_parameter=lambda: 8.0
    )
    stream = SimpleNamespace(wait_seconds=0.1, updates_per_epoch=5, n_truncated=0, n_drawn=[1])
    report = PriorMetrics(recipe, PriorConfig(n_layers=1, grid=8), engine, stream, state, tracker)
    for state.update in range(31):
        loss = 6.0 - state.update / 10
        if state.update:
            report.log(UpdateReport(loss, loss, True, 1.0, (), None, False, 0), lr=1e-3)
        if state.update % 15 == 0:
            report.log_validation(loss, loss, torch.rand(2, 64))
            report.log_samples(partial(Image.new, "RGB", (300, 200), (8 * state.update,) * 3))
    assert tracker.close()
    return tracker.run


def test_images_go_through_the_server_to_s3(server, run, s3, tmp_path, monkeypatch):
    stored = objects.list_files(f"s3://{BUCKET}/dashboard")
    assert any(url.endswith("/latest_images/samples.png") for url in stored)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = MlflowClient(server.uri).download_artifacts(run.run_id, "latest_images/samples.png", str(tmp_path))
    assert np.asarray(Image.open(file)).mean() == 240, "the newest sheet"


@NEEDS_CHROMIUM
def test_page_tells_the_story(server, run, tmp_path):
    shots = Path(os.environ.get("DALLE_DS_SCREENSHOTS", tmp_path))
    with browser_page(1400, 1600, HARMLESS) as page:
        place = f"{server.uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
        page.goto(f"{place}/overview?workflowType=machine_learning")
        page.get_by_text("Where to look first").wait_for()
        page.wait_for_function(HAS_SAMPLES)
        page.screenshot(path=shots / "mlflow_overview.png")

        page.get_by_role("tab", name="Model metrics").click()
        search = page.get_by_placeholder("Search metric charts")
        for section, chart in CHARTS.items():
            search.fill(chart)
            page.get_by_text(section, exact=True).first.wait_for()
            page.get_by_text(chart, exact=True).first.wait_for()
        search.fill("loss/")
        page.locator(".js-plotly-plot .scatterlayer path").first.wait_for(state="attached")
        page.wait_for_function(HAS_IMAGE)
        page.screenshot(path=shots / "mlflow_charts.png")


def test_registered_model_draws_in_a_fresh_process(server, run, tmp_path, monkeypatch):
    export = make_export(tmp_path / "made", mlflow={"uri": server.uri, "run_id": run.run_id})
    done = CliRunner().invoke(app, ["register", str(export), "drawn", "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    program = textwrap.dedent("""
        import sys
        import mlflow.pyfunc, pandas
        model = mlflow.pyfunc.load_model("models:/drawn/1")
        captions = pandas.DataFrame({"caption": ["A red bar.", "A blue disc."]})
        images = model.predict(captions, params={"n": 3, "seed": 5, "temperature": 0.7})
        sys.stdout.write("".join(f"{row.caption}|{row.candidate}|{row.png.hex()}\\n" for row in images.itertuples()))
    """)
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    made = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    drawn = [line.split("|") for line in made.stdout.splitlines()]

    sample = [
        "sample",
        str(export),
        "--caption",
        "A red bar.",
        "--caption",
        "A blue disc.",
        "--n",
        "3",
        "--seed",
        "5",
        "--temperature",
        "0.7",
        "--out",
        str(tmp_path / "samples"),
    ]
    assert CliRunner().invoke(app, sample).exit_code == 0
    files = sorted((tmp_path / "samples").glob("0*.png"))
    assert [(caption, int(number)) for caption, number, _ in drawn] == list(product(("A red bar.", "A blue disc."), range(3)))
    for file, (*_, png) in zip(files, drawn, strict=True):
        assert (np.asarray(Image.open(file)) == np.asarray(Image.open(io.BytesIO(bytes.fromhex(png))))).all()
    assert len({png for *_, png in drawn}) == 6

    version = MlflowClient(server.uri).get_model_version("drawn", "1")
    assert version.run_id == run.run_id and version.tags["update"] == "7"


def test_server_names_an_option_without_its_value():
    server = REPOSITORY / "launchers" / "mlflow_server.sh"
    for option in ("--host", "--port", "--folder", "--backend", "--artifacts"):
        done = subprocess.run(["bash", server, option], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, f"error: {option} needs a value; see --help\n")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--artifacts", "s3://bucket/x"), "needs the Python package boto3: pip install '.[server]'"),
        (("--backend", "postgresql://host/x"), "needs the Python package psycopg: pip install '.[server]'"),
    ],
)
def test_server_names_the_package_that_is_missing(options, told, tmp_path):
    python = tmp_path / "python"  # a Python without packages
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": ""}
    done = subprocess.run(
        ["bash", REPOSITORY / "launchers" / "mlflow_server.sh", *options, "--folder", tmp_path / "mlflow"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and told in done.stderr
