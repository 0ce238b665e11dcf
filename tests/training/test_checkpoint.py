"""Checkpoint folders: a half-written checkpoint is never used, and a damaged one falls back to the one before."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dalle_ds.errors import DataError, UserError
from dalle_ds.parallel.ranks import ALONE
from dalle_ds.storage import objects
from dalle_ds.storage.record import Record
from dalle_ds.training.checkpoint import COMMIT_FILE, Checkpoint, CheckpointStore
from tests.conftest import S3


class Said(Record):
    model: str = ""


def save(store: CheckpointStore[Said], update: int, write: Callable[[Path], None], about: Said | None = None) -> None:
    store.begin(update, write, about or Said(), ALONE)
    store.finish(ALONE)


def write(folder: Path, text: str = "state") -> None:
    (folder / "a.bin").write_text(text)
    (folder / "b.bin").write_text("more")


@pytest.fixture
def store(any_root: str) -> CheckpointStore[Said]:
    return CheckpointStore(objects.join(any_root, "checkpoints"), Said, keep=2)


def text_of(checkpoint: Checkpoint[Said]) -> str:
    return objects.read_bytes(objects.join(checkpoint.data, "a.bin")).decode()


def test_saved_is_found_with_what_was_said_of_it(store: CheckpointStore[Said]) -> None:
    save(store, 7, write, Said(model="m"))
    found = store.newest(ALONE)
    assert (found.name, text_of(found)) == ("update_00000007", "state")
    commit = json.loads(objects.read_bytes(objects.join(found.url, COMMIT_FILE)))
    assert commit == found.record.model_dump() and commit["about"] == {"model": "m"}
    assert (commit["update"], commit["world_size"]) == (7, 1)
    assert sorted(name.partition("/")[2] for name in commit["files"]) == ["a.bin", "b.bin"]
    assert store.find("update_00000007") == store.find(None) == found
    with pytest.raises(DataError, match="no checkpoint 'update_8', expected one of update_00000007"):
        store.find("update_8")


def test_only_the_newest_are_kept(store: CheckpointStore[Said]) -> None:
    for update in (1, 2, 10, 30):
        save(store, update, write)
    assert store.committed() == ["update_00000010", "update_00000030"]
    assert {url.split("/")[-3] for url in objects.list_files(store.url, "a.bin")} == set(store.committed())


def test_killed_while_writing_leaves_the_one_before(store: CheckpointStore[Said]) -> None:
    save(store, 1, write)

    def dies(folder: Path) -> None:
        write(folder, "half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(store, 2, dies)
    assert store.newest(ALONE).update == 1


def test_killed_before_the_commit_leaves_the_one_before(store: CheckpointStore[Said]) -> None:
    save(store, 1, write)
    store.begin(2, write, Said(), ALONE)
    killed = CheckpointStore(store.url, Said, keep=2)  # the restarted process
    assert killed.committed() == ["update_00000001"]
    assert len(objects.list_files(store.url, "a.bin")) == 2
    killed.check_disk_space(1, ALONE)
    assert {url.split("/")[-3] for url in objects.list_files(store.url, ".bin")} == {"update_00000001"}, "leftovers are deleted"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "commit"])
def test_damaged_newest_falls_back_loudly(store: CheckpointStore[Said], damage: str, caplog: pytest.LogCaptureFixture) -> None:
    for update in (1, 2):
        save(store, update, write)
    newest = store.newest(ALONE)
    victim = objects.join(newest.data, "a.bin")
    if damage == "delete":
        objects.delete(victim)
    elif damage == "commit":
        objects.write_bytes(objects.join(newest.url, COMMIT_FILE), b"{")
    else:
        objects.write_bytes(victim, b"stAte" if damage == "flip" else b"sta")
    assert store.newest(ALONE).update == 1
    assert "DAMAGED" in caplog.text and newest.name in caplog.text


def test_damaged_one_pushes_out_nothing_that_came_before_it(store: CheckpointStore[Said]) -> None:
    for update in (10, 30):
        save(store, update, write)
    objects.delete(objects.join(store.newest(ALONE).data, "a.bin"))
    for update in (15, 20):  # resumed from 10
        save(store, update, write)
    assert store.committed() == ["update_00000015", "update_00000020", "update_00000030"]


def test_all_damaged_is_an_error_not_a_fresh_start(store: CheckpointStore[Said]) -> None:
    save(store, 1, write)
    objects.delete(objects.join(store.newest(ALONE).data, "a.bin"))
    with pytest.raises(DataError, match="all 1 checkpoints .* are damaged"):
        store.newest(ALONE)


def test_nothing_there_is_a_fresh_start(store: CheckpointStore[Said]) -> None:
    assert store.newest(ALONE) is None


def test_same_update_saved_again_replaces(store: CheckpointStore[Said]) -> None:
    save(store, 5, write)
    save(store, 5, lambda folder: write(folder, "other"))
    assert text_of(store.newest(ALONE)) == "other"
    assert len(objects.list_files(store.url, "a.bin")) == 1, "the first attempt is deleted"


def test_another_format_is_no_damage(store: CheckpointStore[Said]) -> None:
    for update in (1, 2):
        save(store, update, write)
    file = objects.join(store.newest(ALONE).url, COMMIT_FILE)
    objects.write_bytes(file, json.dumps({**json.loads(objects.read_bytes(file)), "format": 1}).encode())
    for read in (lambda: store.newest(ALONE), lambda: store.find(None)):
        with pytest.raises(
            UserError, match=f"{COMMIT_FILE} was written by another version of dalle_ds: format: Input should be 2"
        ):
            read()


def test_damaged_ones_do_not_count_among_those_that_are_kept(store: CheckpointStore[Said]) -> None:
    for update in (9, 12):
        save(store, update, write)
    objects.delete(objects.join(store.newest(ALONE).data, "a.bin"))
    again = CheckpointStore(store.url, Said, keep=2)
    assert again.newest(ALONE).update == 9
    save(again, 14, write)
    assert again.committed() == ["update_00000009", "update_00000012", "update_00000014"]


def test_writing_in_the_background(store: CheckpointStore[Said]) -> None:
    may_write = threading.Event()

    def slowly(folder: Path) -> None:
        assert may_write.wait(20)
        write(folder)

    store.begin(1, slowly, Said(), ALONE, background=True)
    assert store.is_open and store.is_writing and store.committed() == []
    may_write.set()
    store.finish(ALONE)
    assert not store.is_open and store.committed() == ["update_00000001"]


@pytest.mark.parametrize("background", [False, True])
def test_what_could_not_be_written_is_said(store: CheckpointStore[Said], background: bool) -> None:
    save(store, 1, write)

    def fails(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    store.begin(2, fails, Said(), ALONE, background)
    with pytest.raises(UserError, match="checkpoint of update 2 could not be written .*: OSError.*No space left"):
        store.finish(ALONE)
    assert store.committed() == ["update_00000001"]
    save(store, 3, write)


def test_no_room_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, Said, keep=2)
    store.check_disk_space(1000, ALONE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(UserError, match="1.00 GiB free, 3.00 GiB needed for checkpoints of 1.00 GiB, 2 kept"):
        store.check_disk_space(2**30, ALONE)
    store.check_disk_space(2**28, ALONE)


@pytest.mark.s3
def test_place_that_takes_no_writes_is_said_before_training(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CheckpointStore(f"{s3.url}/run", Said, keep=2).check_disk_space(1, ALONE)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="checkpoints cannot be written to s3://.*AWS_SECRET_ACCESS_KEY"):
        CheckpointStore(f"{s3.url}/run", Said, keep=2).check_disk_space(1, ALONE)
    with pytest.raises(UserError, match="checkpoints in s3://.* cannot be listed: .*AWS_SECRET_ACCESS_KEY"):
        CheckpointStore(f"{s3.url}/run", Said, keep=2).newest(ALONE)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="checkpoints cannot be written to .*/file/run"):
        CheckpointStore(tmp_path / "file" / "run", Said, keep=2).check_disk_space(1, ALONE)
