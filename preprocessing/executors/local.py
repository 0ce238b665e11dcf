"""Work on shards, each of them once: hand them to workers, settle what the workers report, and go on when a worker fails."""

import logging
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from dalle_ds.console import progress
from dalle_ds.errors import DataError, StoreUnreachable, UserError, WorkersLost
from preprocessing.configs import Engine
from preprocessing.executors.crew import Crew, Job, Report
from preprocessing.executors.journal import Journal
from preprocessing.executors.outage import patiently, wait_for_store
from preprocessing.executors.processes import Processes, ThisProcess
from preprocessing.executors.ray_cluster import Actors, n_of
from preprocessing.executors.sharing import AllShards, Shares
from preprocessing.executors.verdicts import MAX_LOST, Verdicts

log = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW: Final = 10  # this many consecutive failures indicate a fault of storage or set-up, not of the shards
MAX_OUTAGES: Final = 3  # a shard that was interrupted so often by a store that is away has failed
START_SECONDS: Final = 60.0  # how long a failed shard waits for a worker that has not started, if no other can try it


class _GiveUp(Exception):
    pass


def n_cores() -> int:
    """Number of cores this process may use. The affinity mask of a container or of Slurm may exclude cores."""
    return len(os.sched_getaffinity(0))


def n_workers_of(engine: Engine) -> int:
    """Number of workers of a stage that needs no GPU, if none is set: one per core of this machine, or of the Ray cluster."""
    return max(1, n_of("CPU")) if engine == "ray" else n_cores()


def run_shards(
    job: Job,
    shards: Sequence[Any],
    *,
    n_workers: int,
    name: Callable[[Any], str],
    size: Callable[[Any], int],
    what: str,
    unit: str,
    journal: Journal | None = None,
    engine: Engine = "local",
    cpus_each: int = 1,
    gpus_each: int = 0,
    gpus: Sequence[str] = (),
    shares: Shares | None = None,
    looks_ahead: bool = False,
) -> tuple[list[Any], dict[str, str]]:
    """Process every shard. A failed shard does not stop the others, but MAX_FAILURES_IN_A_ROW consecutive failures end the run.

    Args:
        name: Returns a shard's name, for messages; names are distinct.
        size: Returns a shard's number of samples (or other units), for the progress bar.
        what: Name of the stage, for the progress bar.
        unit: Unit of `size`, for the progress bar.
        journal: Records failed shards for `status`.
        engine: Processes on this machine, or actors of a Ray cluster.
        cpus_each, gpus_each: Number of CPUs, which is that of its threads, and of GPUs of a Ray actor.
        gpus: GPUs that local workers get in turns, as in CUDA_VISIBLE_DEVICES. Empty: all see the same.
        shares: Which of the shards this machine does, if several machines share them.
        looks_ahead: Whether workers are told their next shard while they work on one.

    Returns:
        (results in order of completion, {name of a failed shard: reason}). Keep results small: they stay in this process.

    Raises:
        StoreUnreachable: the store was away for too long.
        WorkersLost: workers died before they took a shard, or this machine fails every shard.
        UserError: a worker's start raised it.
    """
    if not shards:
        return [], {}
    by_name = {name(shard): shard for shard in shards}
    if len(by_name) != len(shards):
        raise ValueError(f"{len(shards)} shards have {len(by_name)} different names")
    crew: Crew
    n_workers = min(n_workers, len(shards))
    if engine == "ray":
        crew = Actors(job, cpus_each, gpus_each)
    elif n_workers == 1:
        crew = ThisProcess(job, n_cores())
    else:
        crew = Processes(job, max(1, n_cores() // n_workers), gpus)
    with progress(total=sum(map(size, shards)), what=what, unit=unit) as bar:
        run = Run(crew, by_name, shares or AllShards(by_name), journal, lambda shard: bar.update(size(shard)), looks_ahead)
        try:
            run.to_the_end(n_workers)
        except _GiveUp:
            log.error("%d consecutive shards failed: the remaining shards are not tried", MAX_FAILURES_IN_A_ROW)
            if _is_of_machine(run.last_error):
                raise WorkersLost(
                    f"{what}: {MAX_FAILURES_IN_A_ROW} consecutive shards failed here, the last: {run.last_error}. The same "
                    "command goes on where this one ended, if need be on another machine"
                ) from None
            untried = f"not tried: {MAX_FAILURES_IN_A_ROW} consecutive shards failed"
            run.failures |= {name: untried for name in by_name if name not in run.settled}
        finally:
            crew.close()
            run.release()
    if lost := by_name.keys() - run.settled - run.failures.keys():
        raise RuntimeError(f"{len(lost)} shards were neither done nor failed, such as {min(lost)}")  # a bug of ours
    return run.results, run.failures


class Run:
    """The state of a run: which worker does what, which shards wait to be tried again, what has come of the others."""

    def __init__(
        self,
        crew: Crew,
        shards: Mapping[str, Any],
        shares: Shares,
        journal: Journal | None,
        update_bar: Callable[[Any], Any],
        looks_ahead: bool,
    ) -> None:
        self._crew, self._shards, self._shares, self._journal = crew, shards, shares, journal
        self._update_bar, self._looks_ahead = update_bar, looks_ahead
        self.results: list[Any] = []
        self.failures: dict[str, str] = {}
        self.settled: set[str] = set()
        self.last_error: Exception | None = None
        self._starting: set[int] = set()
        self._ready: set[int] = set()  # working or idle
        self._retired: set[int] = set()
        self._where: dict[int, str] = {}
        self._busy: dict[int, tuple[str, float]] = {}  # worker -> its shard, since when
        self._reserved: dict[int, str] = {}  # worker -> the shard that it prepares
        self._again: dict[str, Exception] = {}  # shards to be tried again, with their errors
        self._verdicts = Verdicts()
        self._n_outages: Counter[str] = Counter()
        self._n_in_a_row = 0
        self._n_lost_at_start = 0

    def to_the_end(self, n_workers: int) -> None:
        for worker in range(n_workers):
            self._start(worker)
        idle_since = time.monotonic()
        while True:
            self._hand_out()
            self._note_other_machines()
            if self._busy:
                idle_since = time.monotonic()
            elif not self._again and not self._reserved and self._shares.is_over:
                return
            elif (not self._starting or time.monotonic() - idle_since > START_SECONDS) and self._fail_untriable():
                continue
            may_come = self._ready - self._busy.keys() and not self._shares.is_over
            seconds = self._shares.poll_seconds if may_come else None if self._busy else START_SECONDS
            reports = self._crew.wait(seconds)
            for report in reports:
                self._note(report)
            if not reports and not self._ready:
                log.warning("no worker has started for %.0f s; waiting for %d", START_SECONDS, len(self._starting))

    def release(self) -> None:
        with suppress(UserError, OSError):  # others take the shards over when the lease is over
            self._shares.release([*(shard for shard, _ in self._busy.values()), *self._reserved.values(), *self._again])

    # -----------------------------------------------------------------------------------------------------------------
    # Handing out
    # -----------------------------------------------------------------------------------------------------------------

    def _start(self, worker: int) -> None:
        self._crew.start(worker)
        self._starting.add(worker)

    def _hand_out(self) -> None:
        for worker in sorted(self._ready - self._busy.keys()):
            name = self._next(worker)
            if name is None:
                continue
            if self._looks_ahead and worker not in self._reserved and not self._verdicts.is_suspended(worker):
                following = patiently(self._shares.take)
                if following is not None:
                    self._reserved[worker] = following
            upcoming = self._reserved.get(worker)
            self._busy[worker] = name, time.monotonic()
            self._crew.assign(worker, self._shards[name], self._shards[upcoming] if upcoming is not None else None)

    def _next(self, worker: int) -> str | None:
        others = (self._ready | self._starting) - {worker}
        for name in self._again:
            if self._verdicts.may_retry(worker, name, others):
                del self._again[name]
                return name
        if self._verdicts.is_suspended(worker):
            return None
        if worker in self._reserved:
            return self._reserved.pop(worker)
        name = patiently(self._shares.take)
        if name is None and self._reserved:  # one that a busy worker has prepared
            return self._reserved.pop(next(iter(self._reserved)))
        return name

    def _fail_untriable(self) -> bool:
        # Nobody works, so nobody is left who could try these. Returns whether there were any.
        if not self._ready and not self._starting:
            raise WorkersLost("no worker is left: all were retired. The same command goes on, on other machines")
        untriable, self._again = self._again, {}
        for name, error in untriable.items():
            self._verdicts.given_up(name)
            self._fail(name, error)
        return bool(untriable)

    # -----------------------------------------------------------------------------------------------------------------
    # Settling
    # -----------------------------------------------------------------------------------------------------------------

    def _note(self, report: Report) -> None:
        worker = report.worker
        if report.is_start:
            self._note_start(report)
            return
        name, since = self._busy.pop(worker)
        if worker in self._retired:
            self._crew.stop(worker)
        if report.is_lost:
            self._note_loss(worker, name)
        elif report.error is None:
            for bad in self._verdicts.succeeded(worker, name):
                self._retire(bad)
            self.results.append(report.value)
            self._n_in_a_row = 0
            self._settle(name, time.monotonic() - since)
        elif isinstance(report.error, StoreUnreachable) and self._n_outages[name] < MAX_OUTAGES:
            self._n_outages[name] += 1
            wait_for_store(report.error)
            self._again = {name: report.error, **self._again}
        elif self._verdicts.failed(worker, name, self._ready | self._starting):
            self._fail(name, report.error)
        else:
            log.warning("shard %s failed on %s: %s; another worker tries it", name, self._where[worker], report.error)
            self._again[name] = report.error

    def _note_start(self, report: Report) -> None:
        self._starting.discard(report.worker)
        if report.worker in self._retired:
            self._crew.stop(report.worker)
        elif report.is_lost:
            self._n_lost_at_start += 1
            if self._n_lost_at_start == MAX_LOST:
                raise WorkersLost(f"{MAX_LOST} workers died before they had started; if memory ran out, use fewer workers")
            self._start(report.worker)
        elif report.error is not None:
            raise report.error
        else:
            self._n_lost_at_start = 0
            self._ready.add(report.worker)
            self._where[report.worker] = f"worker {report.worker} ({report.value})"

    def _note_loss(self, worker: int, name: str) -> None:
        log.warning("%s died (killed, or out of memory) on shard %s", self._where[worker], name)
        self._ready.discard(worker)
        died = DataError(f"{MAX_LOST} worker processes died while processing it; if memory ran out, use fewer workers")
        is_too_often = self._verdicts.lost(worker, name)
        if worker not in self._retired:
            self._start(worker)
        if is_too_often:
            self._fail(name, died)
        else:
            self._again[name] = died

    def _retire(self, worker: int) -> None:
        if worker in self._retired:
            return
        log.error("%s is retired: it failed shards that other workers then did", self._where[worker])
        self._retired.add(worker)
        is_starting = worker in self._starting
        self._ready.discard(worker)
        self._starting.discard(worker)
        if not is_starting and worker not in self._busy:  # otherwise it is stopped when it has reported
            self._crew.stop(worker)

    def _fail(self, name: str, error: Exception) -> None:
        # The other shards continue. The failed shard has no manifest, so the next run processes it again.
        is_expected = isinstance(error, UserError | OSError)  # bugs too: one bad shard must not end a long run
        self.failures[name] = str(error) if is_expected else _last_line(error)
        log.error("shard %s stays open: %s", name, self.failures[name], exc_info=None if is_expected else error)
        self.last_error = error
        self._n_in_a_row += 1
        self._settle(name)
        if self._n_in_a_row == MAX_FAILURES_IN_A_ROW:
            raise _GiveUp

    def _settle(self, name: str, seconds: float = 0.0) -> None:
        self.settled.add(name)
        reason = self.failures.get(name)
        if self._journal:
            _record(self._journal, name, reason)
        patiently(lambda: self._shares.settle(name, is_done=reason is None, seconds=seconds))
        self._update_bar(self._shards[name])

    def _note_other_machines(self) -> None:
        for name, reason in self._shares.settled_elsewhere().items():
            self.settled.add(name)
            if reason is not None:
                self.failures[name] = reason
            self._update_bar(self._shards[name])


def _is_of_machine(error: Exception | None) -> bool:
    """Whether another machine may well do what failed here: a full disk, a lost mount, a broken GPU."""
    is_of_input = isinstance(error, FileNotFoundError | PermissionError)
    return isinstance(error, OSError | MemoryError | RuntimeError) and not is_of_input


def _last_line(error: Exception) -> str:
    """The last line of the exception's traceback."""
    return traceback.format_exception_only(error)[-1].strip().rpartition("\n")[2]


def _record(journal: Journal, shard: str, reason: str | None) -> None:
    try:
        if reason is None:
            journal.succeeded(shard)
        else:
            journal.failed(shard, reason)
    except (UserError, OSError) as error:  # a record is not essential: unreachable storage also fails the next shard
        log.error("cannot record the result of shard %s: %s", shard, error)
