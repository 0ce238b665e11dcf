"""Shipped files are found by their names, from any folder, and never in place of a file that was meant."""

import json
import logging
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from dalle_ds import cli, project_files
from dalle_ds.training.prior.config import PriorRunConfig
from tests.support.launching import ROOT

TINY = ROOT / "launchers" / "recipes" / "tiny.yaml"


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """`dalle-ds ARGUMENTS` in an empty folder -> click's result."""
    monkeypatch.setattr(cli, "setup_logging", lambda: None)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli.app, arguments)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("tiny.yaml", "launchers/recipes/tiny.yaml"),
        ("recipes/tiny.yaml", "launchers/recipes/tiny.yaml"),
        ("launchers/recipes/tiny.yaml", "launchers/recipes/tiny.yaml"),
        ("zero3_fp16.json", "ds_configs/zero3_fp16.json"),
        ("train_prior.sh", "launchers/train_prior.sh"),
        ("iny.yaml", None),
        ("./tiny.yaml", None),
        ("/data/tiny.yaml", None),
        ("runs/tiny.yaml", None),
        ("demo.sh", None),
        ("", None),
    ],
)
def test_a_shipped_file_is_found_by_the_end_of_its_path(name, expected):
    assert project_files.find(name) == (None if expected is None else ROOT / expected)


def test_names_are_unique_in_every_folder():
    """So that the bare name is enough."""
    bare = [Path(name).name for name in project_files.names()]
    assert len(bare) == len(set(bare)) > 10


def test_every_pattern_finds_a_file():
    for pattern in project_files.SHIPPED:
        assert any(ROOT.glob(pattern)), pattern


def test_path_prints_one_file_or_all(typed):
    assert typed("path", "tiny.yaml").stdout == f"{TINY}\n"
    assert typed("path").stdout.split() == [str(ROOT / name) for name in project_files.names()]
    assert json.loads(typed("path", "tiny.yaml", "--json").stdout.splitlines()[-1]) == {"path": str(TINY)}


def test_path_of_an_unknown_name_is_a_mistake(typed):
    done = typed("path", "coffee.yaml")
    assert done.exit_code == 2 and done.stdout == ""
    assert "no shipped file 'coffee.yaml'; there are launchers/train_prior.sh, " in done.stderr


def test_a_recipe_in_the_folder_goes_before_the_shipped_one(typed, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    command = ("sample", "tiny.yaml", "--show-config")
    assert "export: runs/demo/export" in typed(*command).stdout
    assert f"no tiny.yaml in this folder: the recipe is {TINY}" in caplog.text
    caplog.clear()
    (tmp_path / "tiny.yaml").write_text("sample: {export: mine}\n")
    assert "export: mine" in typed(*command).stdout
    assert "tiny.yaml" not in caplog.text


@pytest.mark.parametrize("name", ["./tiny.yaml", "/nowhere/tiny.yaml"])
def test_a_recipe_with_a_path_is_that_file(typed, name):
    done = typed("sample", name, "--show-config")
    assert done.exit_code == 2 and "cannot be read" in done.stderr


def test_a_deepspeed_json_in_the_folder_goes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = PriorRunConfig.model_validate({"folder": "f", "data": {"dataset": "d"}, "deepspeed_config": "zero3_fp32.json"})
    assert run.deepspeed_path == ROOT / "ds_configs" / "zero3_fp32.json"
    Path("zero3_fp32.json").write_text("{}")
    assert run.deepspeed_path == Path("zero3_fp32.json")


def test_the_demo_installs_what_its_next_steps_need():
    """`dalle-ds sample --clip` and `dalle-ds serve`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [Requirement(text) for text in extras["demo"]]
    own = set().union(*(requirement.extras for requirement in asked if requirement.name == "dalle-ds"))
    assert own == {"clip", "page"} <= set(extras)


def test_a_wheel_tells_the_commit_it_was_built_from(tmp_path, monkeypatch):
    """Not that of a repository which its environment lies in."""
    monkeypatch.setattr(project_files, "PACKAGE", tmp_path / "dalle_ds")
    (tmp_path / "dalle_ds").mkdir()
    assert project_files.checkout() is None and project_files.commit() is None
    (tmp_path / "dalle_ds" / "commit.txt").write_text("abc\n")
    assert project_files.commit() == "abc"
    assert any(line.startswith("torch") for line in project_files.requirements())
