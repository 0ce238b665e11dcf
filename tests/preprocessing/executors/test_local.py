"""Process pool: a dead worker costs only time, and workers exit when their parent dies."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dalle_ds.errors import DataError
from preprocessing.executors.local import run_shards


@dataclass(frozen=True)
class Job:
    """Squares numbers. Its process dies once at `fatal`, and raises at `wrong`."""

    folder: Path
    fatal: int = -1
    always_fatal: int = -1
    wrong: int = -1
    wrong_from: int = 1_000_000
    bug: int = -1

    def start(self, n_threads: int) -> Callable[[int], int]:
        return self.work

    def work(self, n: int) -> int:
        mark = self.folder / str(n)
        if n == self.always_fatal or (n == self.fatal and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if n == self.wrong or n >= self.wrong_from:
            raise DataError(f"shard {n} is damaged")
        if n == self.bug:
            raise ZeroDivisionError("a bug of ours")
        return n * n


def run(job: Job, n: int = 12, workers: int = 2) -> tuple[list[int], dict[str, str]]:
    return run_shards(job, list(range(n)), n_workers=workers, name=str, size=lambda _: 1, what="test", unit="shard")


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_of_single_shards_are_told(tmp_path: Path, workers: int) -> None:
    results, failures = run(Job(tmp_path, wrong=3), workers=workers)
    assert sorted(results) == [n * n for n in range(12) if n != 3]
    assert failures == {"3": "shard 3 is damaged"}


def test_a_killed_worker_s_shards_are_redone(tmp_path: Path) -> None:
    results, failures = run(Job(tmp_path, fatal=5))
    assert sorted(results) == [n * n for n in range(12)]
    assert failures == {}


def test_a_shard_that_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    results, failures = run(Job(tmp_path, always_fatal=11))
    assert "11" in failures
    assert "worker processes died" in failures["11"]
    assert len(results) + len(failures) == 12


@pytest.mark.parametrize("workers", [1, 2])
def test_many_failures_in_a_row_end_it(tmp_path: Path, workers: int) -> None:
    """Unreachable storage is not tried for every one of a thousand shards."""
    results, failures = run(Job(tmp_path, wrong_from=5), n=40, workers=workers)
    assert len(results) + len(failures) == 40
    n_tried = sum("damaged" in why for why in failures.values())
    assert n_tried == 10 if workers == 1 else 10 <= n_tried < 35  # processes don't finish in the order of the shards
    assert failures["39"] == "not tried: 10 consecutive shards failed"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bug_at_one_shard_is_told_with_its_traceback(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    results, failures = run(Job(tmp_path, bug=2), workers=workers)
    assert sorted(results) == [n * n for n in range(12) if n != 2]
    assert failures == {"2": "ZeroDivisionError: a bug of ours"}
    assert 'raise ZeroDivisionError("a bug of ours")' in caplog.text and "shard 2 stays open" in caplog.text
