"""The code blocks of launchers/PYTHON.md and README.md run unchanged, on a small export in place of the demo's."""

import re
import shutil

import pytest

import dalle_ds
from dalle_ds.tracking.mlflow_sink import read_run
from dalle_ds.tracking.tracker import Tracker
from tests.sampling.exports import make_export
from tests.support import launching
from tests.support.clip_models import make_clip
from tests.support.pages import run_python_page

PAGE, README = launching.ROOT / "launchers" / "PYTHON.md", launching.ROOT / "README.md"


@pytest.fixture(scope="module")
def home(tmp_path_factory, empty_store):
    """A folder with runs/demo, which contains export, tokens, clip/model and mlflow.db."""
    home = tmp_path_factory.mktemp("home")
    demo = home / "runs" / "demo"
    demo.mkdir(parents=True)
    shutil.copy(empty_store, demo / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{demo / 'mlflow.db'}")
        assert Tracker.start(demo / "prior").close()
    run = read_run(demo / "prior")
    make_export(demo, mlflow={"uri": run.uri, "run_id": run.run_id}, grid=8)
    make_clip(demo / "clip" / "model")
    return home


@pytest.mark.parametrize("page", [PAGE, README], ids=lambda page: page.name)
def test_a_page_runs_as_it_stands(home, page):
    printed = run_python_page(page, home, {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/runs/demo/mlflow.db"})
    if page == PAGE:
        assert "16 pixels, 8x8 tokens of 32 codes, on cpu" in printed
        assert "keep 9 of n 4: expected keep to be at most n" in printed
        assert len(list(home.glob("heart_*.png"))) == 4


def test_the_page_names_all_that_is_public():
    text = PAGE.read_text()
    names = {*dalle_ds.__all__, *dalle_ds.data.__all__} - {"__version__"}
    methods = {name for name in vars(dalle_ds.Model) if not name.startswith("_")}
    assert [name for name in sorted(names | methods) if not re.search(rf"\b{name}\b", text)] == []
    assert "private by convention" in text
