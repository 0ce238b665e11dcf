"""A state.pt that somebody else wrote runs no code; as a damaged one, it gives way to the checkpoint before."""

from pathlib import Path

import pytest
import torch

from dalle_ds.parallel.ranks import ALONE
from dalle_ds.training.image_run import STATE_FILE, ImageCheckpoints
from tests.support.hostile import pickles

STATE = {"update": 3, "model": {"w": torch.arange(3.0)}}
NAMES = list(pickles(Path("unused")))


def checkpoints(folder: Path) -> ImageCheckpoints:
    return ImageCheckpoints(folder, "identity", 3, ALONE)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_states(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = pickles(tmp_path / "owned")[name]
    store = checkpoints(tmp_path)
    store.save(3, STATE)
    with monkeypatch.context() as patch:  # the digests fit: whoever writes the file can write them too
        patch.setattr(torch, "save", lambda _, file: Path(file).write_bytes(hostile))
        store.save(6, STATE)
    found = checkpoints(tmp_path).newest()
    assert not (tmp_path / "owned").exists(), "the file's code ran"
    assert found["update"] == 3 and torch.equal(found["model"]["w"], STATE["model"]["w"])
    assert f"update_00000006 is DAMAGED and skipped: {store.url}/update_00000006/" in caplog.text
    assert f"/{STATE_FILE} is not the state of a run" in caplog.text and "weights_only" not in caplog.text


def test_a_state_of_another_kind_gives_way_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = checkpoints(tmp_path)
    store.save(3, STATE)
    for update, state in ((6, {"update": 7}), (9, {"model": {}})):
        store.save(update, state)
        assert checkpoints(tmp_path).newest()["update"] == 3
    assert "its state is of update 7, expected 6" in caplog.text and "its state cannot be read: KeyError" in caplog.text
