"""One job at a time in a folder: on a disk, and on s3:// also with holders that are cut off."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from dalle_ds.errors import UserError
from dalle_ds.storage import objects
from dalle_ds.training import folder_lock
from dalle_ds.training.folder_lock import Lease, RunLock
from dalle_ds.training.run import open_run
from tests.conftest import S3

BEAT = 0.5
EXPIRY = folder_lock.EXPIRY_BEATS * BEAT


def test_second_run_in_a_folder_is_told_who_holds_it(tmp_path: Path) -> None:
    holder = "import sys, time; from pathlib import Path; from dalle_ds.training.folder_lock import RunLock\n"
    holder += f"with RunLock(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=str(process.pid)), RunLock(tmp_path, wait_seconds=0.1):
            pass
        process.kill()  # a crash leaves no lock behind
    with RunLock(tmp_path, wait_seconds=5):
        pass


def test_two_run_folders_that_name_the_same_checkpoints(any_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two such jobs would delete what the other is about to commit."""
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(folder_lock, "SPARE_SECONDS", 0.0)
    shared = objects.join(any_root, "checkpoints")
    with open_run(tmp_path / "a", checkpoints=shared):
        with (
            pytest.raises(UserError, match=f"{shared} is in use by .*{os.getpid()}"),
            open_run(tmp_path / "b", checkpoints=shared),
        ):
            pass
        with open_run(tmp_path / "b"):
            pass
    with open_run(tmp_path / "b", checkpoints=shared):
        pass


@pytest.mark.parametrize("name", ["run", "run/", "./other/../run"])
def test_a_run_whose_checkpoints_lie_in_its_own_folder_does_not_shut_itself_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)
    with open_run("run", checkpoints=name) as run:
        run.require_locks()
        with pytest.raises(UserError, match="is in use by"), open_run(tmp_path / "another", checkpoints=tmp_path / "run"):
            pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be written"), RunLock(tmp_path / "file" / "run"):
        pass


# ---- s3 --------------------------------------------------------------------------------------------------------------


def lease(url: str, wait_seconds: float = 0.1, lost: list[str] | None = None) -> Lease:
    return Lease(url, (lost if lost is not None else []).append, wait_seconds, BEAT)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows whether the processes of others have ended."""
    monkeypatch.setattr(folder_lock, "_has_ended", lambda _: False)


@pytest.mark.s3
def test_a_lease_has_one_holder_and_is_released(s3: S3) -> None:
    for _ in range(3):
        with lease(s3.url) as held:
            with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on {os.uname().nodename}"), lease(s3.url):
                pass
            held.require()
    assert len(objects.list_files(s3.url)) == 1, "old numbers are deleted"


@pytest.mark.s3
def test_of_many_that_come_at_once_one_gets_the_lease(s3: S3) -> None:
    n_held, refused, begin = [], [], threading.Barrier(6)

    def try_it() -> None:
        begin.wait()
        try:
            with lease(s3.url) as held:
                n_held.append(held)
                time.sleep(1)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=try_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(n_held), len(refused)) == (1, 5), refused


@pytest.mark.s3
@pytest.mark.parametrize("is_same_machine", [True, False])
def test_a_killed_holder_is_replaced(s3: S3, is_same_machine: bool, request: pytest.FixtureRequest) -> None:
    program = "import sys, time; from dalle_ds.training.folder_lock import Lease\n"
    program += f"with Lease({s3.url!r}, print, beat_seconds={BEAT}): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is in use by process {process.pid} "), lease(s3.url):
            pass
        process.send_signal(signal.SIGKILL)
        if not is_same_machine:  # whether it has ended shows only in the beats
            request.getfixturevalue("elsewhere")
            with pytest.raises(UserError, match=f"is in use by process {process.pid} "), lease(s3.url):
                pass
        with lease(s3.url, wait_seconds=0.1 if is_same_machine else EXPIRY + 20):
            pass


@pytest.mark.s3
def test_beats_keep_the_lease(s3: S3, elsewhere: None) -> None:
    with lease(s3.url) as held:
        with pytest.raises(UserError, match="is in use"), lease(s3.url, wait_seconds=2 * EXPIRY):
            pass
        held.require()


@pytest.mark.s3
def test_a_holder_that_was_cut_off_commits_nothing_more(s3: S3, elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []
    with lease(s3.url, lost=lost) as cut_off:
        writes, reached = objects.write_bytes, threading.Event()

        def stalled(url: str, data: bytes) -> None:  # a beat that arrives only when the other has taken over
            assert reached.wait(60)
            writes(url, data)

        monkeypatch.setattr(objects, "write_bytes", stalled)
        with ExitStack() as other:
            other.enter_context(lease(s3.url, wait_seconds=EXPIRY + 20))
            with pytest.raises(UserError, match="was taken over by process"):
                cut_off.require()
            reached.set()
            deadline = time.monotonic() + 60
            while not lost and time.monotonic() < deadline:
                time.sleep(0.05)
            assert "was taken over by process" in lost[0]
            other.close()
    with lease(s3.url):
        pass
