"""The commands as people type them: help, summaries, exit codes, messages instead of tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dalle_ds.recipes import load_recipe
from preprocessing.__main__ import app
from preprocessing.stages import encode, ingest, tokenizer
from tests.support.pictures import draw_folder

VERBS = ("fetch", "ingest", "tokenizer", "encode", "status", "verify", "stats")
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


def test_help_lists_every_verb_and_each_has_examples() -> None:
    told = CliRunner().invoke(app, ["--help"]).stdout
    assert all(verb in told for verb in VERBS)
    for verb in VERBS:
        shown = CliRunner().invoke(app, [verb, "--help"])
        assert shown.exit_code == 0
        assert f"python -m preprocessing {verb} --" in shown.stdout
        assert "--json" in shown.stdout


def test_from_pictures_to_raw_shards(tmp_path: Path) -> None:
    pictures = draw_folder(tmp_path / "pictures", 6)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"ingest:\n  pictures: {pictures}\n  out: {tmp_path / 'raw'}\n  samples_per_shard: 4\n  workers: 1\n")
    done = run("ingest", "--recipe", str(recipe), "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    summary = json.loads(done.stdout)
    assert (summary["samples"], summary["shards"]) == (6, 2)

    next((tmp_path / "raw" / "data").iterdir()).unlink()
    checked = run("verify", "--set", f"verify.root={tmp_path / 'raw'}", "--set", "verify.workers=1", "--json")
    assert checked.returncode == 1
    assert json.loads(checked.stdout.splitlines()[-1])["n_problems"] == 1
    assert "problem: " in checked.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ingest", "--set", "ingest.picturs=x", "--set", "ingest.out=y"), "unknown key 'ingest.picturs'"),
        (("ingest",), "ingest: required, but not set"),
        (("ingest", "--recipe", "missing.yaml"), "recipe missing.yaml cannot be read"),
        (("ingest", "--set", "ingest.pictures=/not/there", "--set", "ingest.out=y"), "/not/there: no such folder"),
        (
            ("ingest", "--set", "ingest.pictures=x", "--set", "ingest.out=y", "--set", "ingest.samples_per_shard=0"),
            "ingest.samples_per_shard = 0",
        ),
        (("stats", "--set", "stats.root=/not/there"), "/not/there: neither"),
    ],
)
def test_errors_that_people_can_mend(arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("setup_logging", "_catch_sigterm"):  # they would change this process for all later tests
        monkeypatch.setattr(f"preprocessing.__main__.{name}", lambda: None)
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("stage", [ingest, tokenizer, encode])
def test_the_tiny_recipes_fit(stage: object) -> None:
    verb = stage.__name__.rpartition(".")[2]
    config = getattr(load_recipe(stage.Recipe, RECIPES / f"tiny_{verb}.yaml"), verb)
    assert config.out.startswith("runs/demo/")
