"""The commands as users run them: help, summaries, exit codes, error messages instead of tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dalle_ds.cli import app
from dalle_ds.recipes import load_recipe
from preprocessing.configs import EncodeConfig, FetchConfig, IngestConfig, TokenizerConfig
from tests.support.images import draw_folder

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "preprocessing", *arguments],
        text=True,
        capture_output=True,
        timeout=900,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_from_images_to_raw_shards(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", 6)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"ingest:\n  images: {images}\n  out: {tmp_path / 'raw'}\n  samples_per_shard: 4\n  workers: 1\n")
    done = run("ingest", "--recipe", str(recipe), "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    summary = json.loads(done.stdout)
    assert (summary["samples"], summary["shards"]) == (6, 2)

    next((tmp_path / "raw" / "data").iterdir()).unlink()
    checked = run("verify", str(tmp_path / "raw"), "workers=1", "--json")
    assert checked.returncode == 1
    assert json.loads(checked.stdout.splitlines()[-1])["n_problems"] == 1
    assert "problem: " in checked.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ingest", "picturs=x", "out=y"), "unknown key 'picturs'"),
        (("ingest",), "images: required, but not set"),
        (("ingest", "missing.yaml"), "recipe missing.yaml cannot be read"),
        (("ingest", "/not/there", "y"), "/not/there: the folder does not exist"),
        (("ingest", "x", "y", "z"), "'z', neither RECIPE.yaml nor KEY=VALUE: expected at most IMAGES OUT"),
        (("ingest", "x", "y", "--samples-per-shard", "0"), "samples_per_shard = 0"),
        (("stats", "/not/there"), "/not/there: neither"),
    ],
)
def test_errors_that_people_can_mend(arguments: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(app, ["data", *arguments])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("config_class", [FetchConfig, IngestConfig, TokenizerConfig, EncodeConfig])
@pytest.mark.parametrize(
    ("recipe", "folder", "fraction"),
    [("tiny.yaml", "runs/demo/", 0.05), ("emoji.yaml", "runs/emoji/", 0.05), ("families.yaml", "runs/families/", 0.12)],
)
def test_the_recipes_of_the_demo_fit(config_class: type[Any], recipe: str, folder: str, fraction: float) -> None:
    config = load_recipe(config_class, RECIPES / recipe)
    assert config.out.startswith(folder)
    assert getattr(config, "validation_fraction", fraction) == fraction
