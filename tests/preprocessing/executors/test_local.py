"""Shards and workers: a worker that dies or fails costs only time, and what is at fault is told from what is not."""

import errno
import heapq
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dalle_ds.errors import DataError, FingerprintMismatch, StoreUnreachable, WorkersLost
from preprocessing.executors import local, outage
from preprocessing.executors.crew import Report
from preprocessing.executors.local import Run, run_shards
from preprocessing.executors.sharing import AllShards


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
    results, failures = run(Job(tmp_path, always_fatal=3))
    assert list(failures) == ["3"] and "3 worker processes died" in failures["3"]
    assert sorted(results) == [n * n for n in range(12) if n != 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_many_failures_in_a_row_end_it(tmp_path: Path, workers: int) -> None:
    """Unreachable storage is not tried for every one of a thousand shards."""
    results, failures = run(Job(tmp_path, wrong_from=5), n=40, workers=workers)
    assert len(results) + len(failures) == 40
    n_tried = sum("damaged" in why for why in failures.values())
    assert n_tried == 10
    assert failures["39"] == "not tried: 10 consecutive shards failed"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bug_at_one_shard_is_told_with_its_traceback(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    results, failures = run(Job(tmp_path, bug=2), workers=workers)
    assert sorted(results) == [n * n for n in range(12) if n != 2]
    assert failures == {"2": "ZeroDivisionError: a bug of ours"}
    assert 'raise ZeroDivisionError("a bug of ours")' in caplog.text and "shard 2 stays open" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Who is at fault: a crew in virtual time
# ---------------------------------------------------------------------------------------------------------------------

MINUTE = 60.0
FULL_DISK = OSError(errno.ENOSPC, "No space left on device")
Outcome = tuple[float, Exception | None]  # seconds, error


class VirtualCrew:
    """Workers whose every outcome is given by `outcome(worker, shard)`. `None` in place of an outcome: the worker dies."""

    def __init__(self, outcome: Callable[[int, str], Outcome | None]) -> None:
        self._outcome = outcome
        self.now = 0.0
        self.tried: list[tuple[int, str]] = []
        self.stopped: list[int] = []
        self._events: list[tuple[float, int, Report]] = []
        self._number = itertools.count()
        self.idle: set[int] = set()

    def start(self, worker: int) -> None:
        self._report(1, Report(worker, is_start=True, value="virtual"))

    def assign(self, worker: int, shard: str, upcoming: str | None) -> None:
        self.idle.remove(worker)
        self.tried.append((worker, shard))
        outcome = self._outcome(worker, shard)
        seconds, error = outcome or (1.0, None)
        self._report(seconds, Report(worker, value=shard, error=error, is_lost=outcome is None))

    def _report(self, seconds: float, report: Report) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), report))

    def wait(self, seconds: float | None) -> list[Report]:
        assert self._events, "the run waits for nothing"
        self.now, _, report = heapq.heappop(self._events)
        self.idle |= {report.worker} - ({report.worker} if report.is_lost else set())
        return [report]

    def stop(self, worker: int) -> None:
        assert worker not in self._working(), "an actor that is killed at work would be taken for a lost one"
        self.idle.discard(worker)
        self.stopped.append(worker)

    def _working(self) -> set[int]:
        return {report.worker for _, _, report in self._events}

    def close(self) -> None: ...


def run_virtually(crew: VirtualCrew, n_shards: int, n_workers: int, looks_ahead: bool = False) -> Run:
    names = [f"{n:03d}" for n in range(n_shards)]
    run = Run(crew, {name: name for name in names}, AllShards(names), None, lambda _: None, looks_ahead)
    run.to_the_end(n_workers)
    assert sorted([*run.results, *run.failures]) == names
    return run


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("n_workers", [2, 8, 12])
def test_one_bad_worker_costs_the_retries_of_its_shards(n_workers: int, looks_ahead: bool) -> None:
    """A full disk fails a shard in milliseconds, a healthy shard takes a minute."""
    crew = VirtualCrew(lambda worker, _: (0.01, FULL_DISK) if worker == 1 else (MINUTE, None))
    run = run_virtually(crew, 400, n_workers, looks_ahead)
    assert not run.failures
    assert len(crew.tried) == 403 and crew.stopped == [1]
    assert crew.now <= MINUTE * -(-400 // (n_workers - 1)) + 2 * MINUTE


def test_a_gpu_that_kills_its_processes_is_retired() -> None:
    crew = VirtualCrew(lambda worker, _: None if worker == 5 else (MINUTE, None))
    run = run_virtually(crew, 200, 8)
    assert not run.failures
    assert len(crew.tried) == 203


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_bad_shards_are_told_from_bad_workers(looks_ahead: bool) -> None:
    """Forty damaged shards, two in a row: each is tried by two workers, and no worker is retired for them."""
    damaged = {f"{n:03d}" for n in range(400) if n % 20 < 2}
    crew = VirtualCrew(lambda _, shard: (0.01, DataError(f"shard {shard} is damaged")) if shard in damaged else (MINUTE, None))
    run = run_virtually(crew, 400, 8, looks_ahead)
    assert set(run.failures) == damaged
    assert len(crew.tried) == 400 + len(damaged) and not crew.stopped


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_a_run_ends_whatever_its_workers_do(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that fail at random, that die at random, and that never start, as actors beyond a cluster's room."""
    monkeypatch.setattr(local, "START_SECONDS", -1.0)
    for seed in range(first, first + 100):
        draw = random.Random(seed)
        n_workers, n_shards = draw.randint(2, 6), draw.randint(5, 40)
        fails = [draw.choice([0, 0.1, 0.5, 0.9, 1]) for _ in range(n_workers)]
        dies = [draw.choice([0, 0, 0.05, 0.3]) for _ in range(n_workers)]
        n_that_start = draw.choice([n_workers, n_workers, 1])

        def outcome(worker: int, _: str, draw: random.Random = draw, fails: list[float] = fails, dies: list[float] = dies):
            seconds = draw.choice([0.01, 1, MINUTE])
            return None if draw.random() < dies[worker] else (seconds, FULL_DISK if draw.random() < fails[worker] else None)

        crew = VirtualCrew(outcome)
        start = crew.start
        crew.start = lambda worker, start=start, n=n_that_start: start(worker) if worker < n else None
        try:
            run_virtually(crew, n_shards, n_workers, looks_ahead=draw.random() < 0.5)
        except (local._GiveUp, WorkersLost):
            continue


def test_a_machine_that_fails_every_shard_asks_for_another_start(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Full:
        def start(self, n_threads: int) -> Callable[[int], int]:
            def work(n: int) -> int:
                raise FULL_DISK

            return work

    with pytest.raises(WorkersLost, match="10 consecutive shards failed here, the last: .*No space left on device") as caught:
        run_shards(Full(), range(40), n_workers=1, name=str, size=lambda _: 1, what="test", unit="shard")
    assert caught.value.exit_code == 75


def test_a_worker_that_cannot_start_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(FingerprintMismatch, match="dVAE: expected fingerprint a, found b"):
        run_shards(Unstartable(), range(4), n_workers=2, name=str, size=lambda _: 1, what="test", unit="shard")


@dataclass(frozen=True)
class Unstartable:
    def start(self, n_threads: int) -> Callable[[int], int]:
        raise FingerprintMismatch("dVAE", "a", "b")


def test_an_outage_fails_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """All eight workers give up on the store at the same time. The run waits once, then goes on."""
    away = StoreUnreachable("cannot read s3://bucket/raw/a: tried for 120 s", url="s3://bucket/raw/a")
    answers = iter([away, away, False])
    asked: list[str] = []

    def exists(url: str) -> bool:
        asked.append(url)
        answer = next(answers, False)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(outage.objects, "exists", exists)
    met: set[str] = set()

    def outcome(_: int, shard: str) -> Outcome:
        if shard < "008" and shard not in met:
            met.add(shard)
            return 120.0, away
        return MINUTE, None

    crew = VirtualCrew(outcome)
    run = run_virtually(crew, 40, 8, looks_ahead=True)
    assert not run.failures and len(crew.tried) == 48
    assert asked[:3] == ["s3://bucket/raw/probe"] * 3

    monkeypatch.setenv("DALLE_DS_OUTAGE_SECONDS", "0")
    answers, met = iter([away, away]), set()
    with pytest.raises(StoreUnreachable) as caught:
        run_virtually(VirtualCrew(outcome), 40, 8)
    assert caught.value.exit_code == 75


@dataclass(frozen=True)
class GpuOfWorker:
    """Each shard waits for the other, so that two workers take one each."""

    folder: Path

    def start(self, n_threads: int) -> Callable[[int], str]:
        return self.work

    def work(self, n: int) -> str:
        (self.folder / str(n)).touch()
        deadline = time.monotonic() + 120
        while len(list(self.folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return os.environ["CUDA_VISIBLE_DEVICES"]


def test_each_local_worker_has_its_gpu(tmp_path: Path) -> None:
    found, failures = run_shards(
        GpuOfWorker(tmp_path), range(2), n_workers=2, name=str, size=lambda _: 1, what="t", unit="shard", gpus=["3", "GPU-5ea"]
    )
    assert not failures and sorted(found) == ["3", "GPU-5ea"]
