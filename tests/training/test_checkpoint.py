"""Checkpoint folders: a half-written checkpoint is never used, and a damaged one falls back to the one before."""

import json
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from dalle_ds.errors import DataError, StoreUnreachable, UserError
from dalle_ds.parallel.ranks import ALONE
from dalle_ds.storage import objects
from dalle_ds.storage.record import OtherFormat, Record
from dalle_ds.training.checkpoint import COMMIT_FILE, Checkpoint, CheckpointStore
from tests.conftest import S3
from tests.support.fault_proxy import FaultProxy
from tests.support.sealed import edit_json


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
    assert len(commit.pop("digest")) == 64
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


def test_what_people_put_beside_checkpoints_is_neither_used_nor_deleted(store: CheckpointStore[Said]) -> None:
    save(store, 1, write)
    for url in objects.list_files(objects.join(store.url, "update_00000001")):  # a copy, so that it is kept
        objects.write_bytes(url.replace("update_00000001", "update_00000001_best"), objects.read_bytes(url))
    for name in ("update_notes/why.txt", "update_00000001 (copy)/a.bin", "update_1/a.bin"):
        objects.write_bytes(objects.join(store.url, name), b"mine")
    own = {url for url in objects.list_files(store.url) if "/update_00000001/" not in url}
    for update in (2, 3):
        save(store, update, write)
    assert store.committed() == ["update_00000002", "update_00000003"]
    assert own == {
        url for url in objects.list_files(store.url) if "/update_0000000" not in url or "_best/" in url or "(copy)" in url
    }
    assert store.find(None).name == store.newest(ALONE).name == "update_00000003"


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


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "commit", "list", "no files", "other update"])
def test_damaged_newest_falls_back_loudly(store: CheckpointStore[Said], damage: str, caplog: pytest.LogCaptureFixture) -> None:
    for update in (1, 2):
        save(store, update, write)
    newest = store.newest(ALONE)
    victim, commit = objects.join(newest.data, "a.bin"), objects.join(newest.url, COMMIT_FILE)
    if damage == "delete":
        objects.delete(victim)
    elif damage in ("commit", "list"):
        objects.write_bytes(commit, b"{" if damage == "commit" else b"[1, 2]")
    elif damage == "no files":
        edit_json(commit, files={})
    elif damage == "other update":
        edit_json(commit, update=60)
    else:
        objects.write_bytes(victim, b"stAte" if damage == "flip" else b"sta")
    assert store.newest(ALONE).update == 1
    assert "DAMAGED" in caplog.text and newest.name in caplog.text


def test_every_flipped_bit_of_a_commit_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, Said, keep=2)
    save(store, 20, write, Said(model="m"))
    (commit,) = tmp_path.rglob(COMMIT_FILE)
    whole, written = commit.read_bytes(), store.find(None)
    n_noticed = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        commit.write_bytes(damaged)
        try:  # a flip in white space changes nothing
            assert store.find(None) == written, bytes(damaged)
        except DataError as error:
            assert not isinstance(error, OtherFormat), bytes(damaged)
            n_noticed += 1
    assert n_noticed > 7 * len(whole)
    commit.write_bytes(whole.replace(b'"update": 20', b'"update": 60'))
    save(store, 40, write)
    objects.delete(objects.join(store.find(None).data, "a.bin"))
    with pytest.raises(DataError, match="all 2 checkpoints .* are damaged"):
        store.newest(ALONE)
    assert "update_00000020 is DAMAGED and skipped" in caplog.text and "has changed since it was written" in caplog.text


@pytest.mark.parametrize("state", ["1", "x"])
def test_a_state_of_another_update_is_damage(any_root: str, state: str, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(any_root, Said, 2, lambda data: int(objects.read_bytes(objects.join(data, "a.bin"))))
    save(store, 1, lambda folder: write(folder, "1"))
    save(store, 2, lambda folder: write(folder, state))
    assert store.newest(ALONE).update == 1
    expected = "its state is of update 1, expected 2" if state == "1" else "its state cannot be read: ValueError"
    assert f"update_00000002 is DAMAGED and skipped: {expected}" in caplog.text


def test_a_save_whose_files_are_gone_is_no_commit(store: CheckpointStore[Said]) -> None:
    """Another program, or a job that took the folder for its own, has deleted them: the older checkpoint must stay."""
    for update in (1, 2):
        save(store, update, write)
    store.begin(3, write, Said(), ALONE)
    (file,) = (url for url in objects.list_files(store.url, "a.bin") if "update_00000003" in url)
    objects.delete(file)
    with pytest.raises(UserError, match="update 3 could not be written to .*a.bin was written but is gone"):
        store.finish(ALONE)
    assert store.committed() == ["update_00000001", "update_00000002"]


def test_a_job_that_may_no_longer_write_commits_nothing(store: CheckpointStore[Said]) -> None:
    save(store, 1, write)

    def refuse() -> None:
        raise UserError("taken over")

    store.before_commit = refuse
    with pytest.raises(UserError, match="update 2 could not be written to .*: taken over"):
        save(store, 2, write)
    assert store.committed() == ["update_00000001"]


def test_a_checkpoint_that_was_asked_for_is_verified(store: CheckpointStore[Said]) -> None:
    for update in (1, 2):
        save(store, update, write)
    found = store.find(None)
    store.require_whole(found, ["a.bin", "b.bin"])
    objects.write_bytes(objects.join(found.data, "b.bin"), b"mOre")
    store.require_whole(found, ["a.bin"])
    with pytest.raises(DataError, match="b.bin has changed since .*; other checkpoints: update_00000001"):
        store.require_whole(found, ["b.bin"])
    objects.write_bytes(objects.join(found.data, "b.bin"), b"mor")
    with pytest.raises(DataError, match="b.bin has 3 bytes, expected 4; other checkpoints: update_00000001"):
        store.require_whole(found, [])


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
    without_digest = {key: value for key, value in json.loads(objects.read_bytes(file)).items() if key != "digest"}
    for rewritten in (
        lambda: objects.write_bytes(file, json.dumps({**without_digest, "format": 2}).encode()),  # earlier ones
        lambda: edit_json(file, format=4),
    ):
        rewritten()
        for read in (lambda: store.newest(ALONE), lambda: store.find(None)):
            with pytest.raises(
                UserError, match=f"{COMMIT_FILE} was written by another version of dalle_ds: format: Input should be 3"
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


@pytest.mark.s3
@pytest.mark.parametrize("place", ["update_00000002/checkpoint.json", ".bin"])
def test_a_checkpoint_that_cannot_be_reached_is_not_damaged(s3: S3, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Otherwise the run would go on from an older checkpoint."""
    store = CheckpointStore(f"{s3.url}/run", Said, keep=2, update_in=lambda data: len(objects.read_bytes(f"{data}/b.bin")) - 2)
    for update in (1, 2):
        save(store, update, partial(write, text="x" * update))
    monkeypatch.setenv("DALLE_DS_RETRY_SECONDS", "0")
    with FaultProxy(s3.server.endpoint, every=0, unreachable=place) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(StoreUnreachable, match="checkpoint s3://.*/update_00000002 cannot be read: .*tried for 0 s"):
            store.newest(ALONE)


@pytest.mark.s3
def test_a_store_that_cannot_be_reached_is_a_temporary_failure(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(f"{s3.url}/run", Said, keep=2)
    monkeypatch.setenv("DALLE_DS_RETRY_SECONDS", "0")
    for what, call in (
        ("checkpoints cannot be written to", lambda: store.check_disk_space(1, ALONE)),
        ("the checkpoint of update 1 could not be written to", lambda: save(store, 1, write)),
        ("checkpoints in", lambda: store.newest(ALONE)),
    ):
        with FaultProxy(s3.server.endpoint, every=0, unreachable="/") as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            with pytest.raises(StoreUnreachable, match=f"^{what} .*tried for 0 s") as caught:
                call()
        assert caught.value.exit_code == 75
