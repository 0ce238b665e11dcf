"""Sampling and export through kills at random times: the files are those of an undisturbed command."""

import random
import sys
from pathlib import Path

import pytest

from dalle_ds.cli import app
from dalle_ds.errors import DataError
from dalle_ds.sampling.export import load_export
from tests.sampling.exports import make_export
from tests.support.killing import run_through_kills
from tests.training.prior.checkpoints import make_checkpoint

pytestmark = pytest.mark.launch

LOOPS = [1, pytest.param(20, marks=pytest.mark.long)]
VERB = [sys.executable, "-m", "dalle_ds.cli"]


def run_undisturbed(*arguments: str) -> None:
    """In this process: a process of its own would take seconds to start."""
    with pytest.raises(SystemExit) as ended:
        app.main(args=list(arguments))
    assert ended.value.code == 0


def contents(folder: Path) -> dict[str, bytes]:
    """All files, without the time that a command took."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}


@pytest.mark.parametrize("n_kills", LOOPS)
def test_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_kills: int) -> None:
    export = make_export(tmp_path)
    n_captions = 10 + 10 * n_kills
    (tmp_path / "captions.txt").write_text("\n".join(f"A red square, number {i}." for i in range(n_captions)))
    monkeypatch.chdir(tmp_path)
    options = ["--captions", "captions.txt", "n=4", "--batch", "2"]
    run_undisturbed("sample", str(export), *options, "--out", "whole")
    parts = tmp_path / "killed" / ".parts"
    _, n_killed = run_through_kills(
        [*VERB, "sample", str(export), *options, "--out", "killed"],
        tmp_path,
        n_kills,
        random.Random(0),
        seconds=1.0,
        has_begun=parts.exists,
    )
    assert n_killed > 0, "it was faster than the kills"
    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert whole.keys() == killed.keys() and len(whole) > 4 * n_captions
    assert {name for name in whole if whole[name] != killed[name]} <= {"samples.json"}, "which names its folder and the time"
    assert not parts.exists()


@pytest.mark.parametrize("n_kills", LOOPS)
def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_kills: int) -> None:
    make_checkpoint(tmp_path, n_layers=8, n_heads=4, d_head=32)
    monkeypatch.chdir(tmp_path)
    options = ["export", "run", "--max-file-gb", "0.001", "--out"]
    run_undisturbed(*options, "whole")
    whole, out = contents(tmp_path / "whole"), tmp_path / "killed"

    def is_whole_or_none() -> None:
        try:
            load_export(out)
        except DataError as error:
            assert "not an export folder" in str(error)
        else:
            assert contents(out) == whole

    _, n_killed = run_through_kills(
        [*VERB, *options, "killed"],
        tmp_path,
        n_kills,
        random.Random(0),
        seconds=0.5,
        has_begun=lambda: out.exists() and any(out.iterdir()),
        after_kill=is_whole_or_none,
    )
    assert n_killed > 0, "it was faster than the kills"
    assert contents(out) == whole
