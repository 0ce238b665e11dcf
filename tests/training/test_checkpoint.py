"""Checkpoint folders: nothing half-written is taken for whole, a damaged one gives way to the one before."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dalle_ds.errors import DataError, UserError
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.training.checkpoint import COMMIT_FILE, CheckpointStore, read_commit

ALONE = Ranks(0, 1, torch.device("cpu"))


def write(folder: Path, text: str = "state") -> None:
    (folder / "a.bin").write_text(text)
    (folder / "b.bin").write_text("more")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_saved_is_found_with_what_was_said_of_it(store: CheckpointStore) -> None:
    path = store.save(7, write, {"model": "m"}, ALONE)
    found, commit = store.newest(ALONE)
    assert found == path
    assert (commit["update"], commit["about"], commit["world_size"]) == (7, {"model": "m"}, 1)
    assert set(commit["files"]) == {"a.bin", "b.bin"}


def test_only_the_newest_are_kept(store: CheckpointStore) -> None:
    for update in (1, 2, 10, 30):
        store.save(update, write, {}, ALONE)
    assert [path.name for path in store.committed()] == ["update_00000010", "update_00000030"]


def test_killed_while_writing_leaves_the_one_before(store: CheckpointStore) -> None:
    store.save(1, write, {}, ALONE)

    def dies(folder: Path) -> None:
        write(folder, "half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(2, dies, {}, ALONE)
    assert read_commit(store.newest(ALONE)[0])["update"] == 1
    store.save(3, write, {}, ALONE)  # and what it left behind is in nobody's way
    assert set(read_commit(store.newest(ALONE)[0])["files"]) == {"a.bin", "b.bin"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "commit"])
def test_damaged_newest_falls_back_loudly(store: CheckpointStore, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store.save(1, write, {}, ALONE)
    newest = store.save(2, write, {}, ALONE)
    victim = newest / "a.bin"
    if damage == "flip":
        victim.write_text("stAte")
    elif damage == "truncate":
        victim.write_text("sta")
    elif damage == "delete":
        victim.unlink()
    else:
        (newest / COMMIT_FILE).write_text("{")
    found, commit = store.newest(ALONE)
    assert commit["update"] == 1
    assert "DAMAGED" in caplog.text and newest.name in caplog.text


def test_all_damaged_is_an_error_not_a_fresh_start(store: CheckpointStore) -> None:
    path = store.save(1, write, {}, ALONE)
    (path / "a.bin").unlink()
    with pytest.raises(DataError, match="all 1 checkpoints .* are damaged"):
        store.newest(ALONE)


def test_nothing_there_is_a_fresh_start(store: CheckpointStore) -> None:
    assert store.newest(ALONE) is None


def test_same_update_saved_again_replaces(store: CheckpointStore) -> None:
    store.save(5, write, {}, ALONE)
    store.save(5, lambda folder: write(folder, "other"), {}, ALONE)
    assert (store.newest(ALONE)[0] / "a.bin").read_text() == "other"


def test_no_room_is_said_before_training(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.require_room(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(UserError, match=r"1.00 GiB free, 44\.\d+ GiB needed"):
        store.require_room(10**9)
    store.require_room(2 * 10**7)
    with pytest.raises(UserError, match=r"1.00 GiB free, 1\.\d+ GiB needed"):
        store.require_room(2 * 10**7, more_bytes=8)


def test_commit_file_is_json_for_other_tools(store: CheckpointStore) -> None:
    path = store.save(1, write, {"dvae": "f"}, ALONE)
    assert json.loads((path / COMMIT_FILE).read_text())["files"]["a.bin"]["bytes"] == 5
