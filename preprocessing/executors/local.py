"""Shards over processes on this machine: spawned, restarted when one dies, gone when their parent is. Or over a Ray cluster."""

import logging
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait as wait_for_sentinel
from typing import Any, Protocol

from dalle_ds.console import progress, setup_logging
from dalle_ds.errors import UserError
from preprocessing.configs import Engine
from preprocessing.executors.journal import Journal
from preprocessing.executors.ray_cluster import settle_on_ray

log = logging.getLogger(__name__)

MAX_BROKEN_POOLS = 3  # in a row, without a shard done between them
MAX_FAILURES_IN_A_ROW = 10  # then it is the storage or the set-up, not the shards


class _GiveUp(Exception):
    pass


_work: Callable[[Any], Any] | None = None  # of this worker process


class Job(Protocol):
    """What a worker process does. It is pickled once for each process; `start` loads what is heavy."""

    def start(self, n_threads: int) -> Callable[[Any], Any]: ...


def n_cores() -> int:
    """Cores this process may use: fewer than the machine has, under a container's or Slurm's affinity mask."""
    return len(os.sched_getaffinity(0))


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
    gpus_each: int = 0,
) -> tuple[list[Any], dict[str, str]]:
    """Work on every shard, whatever happens to single ones.

    Args:
        name: of a shard, for messages. size: its samples (or other units), for the progress bar.
        journal: where single failures are written down, for `status`.
        engine: processes of this machine, or actors of a Ray cluster. gpus_each: of a Ray actor.

    Returns:
        (results in order of completion, {name of a failed shard: why}).
    """
    results: list[Any] = []
    failures: dict[str, str] = {}
    settled: set[str] = set()
    if not shards:
        return results, failures
    n_in_a_row = 0
    with progress(total=sum(map(size, shards)), what=what, unit=unit) as bar:

        def settle(shard: Any, outcome: Callable[[], Any]) -> None:
            nonlocal n_in_a_row
            settled.add(name(shard))
            try:
                results.append(outcome())
                n_in_a_row = 0
            except Exception as error:  # a fault of ours too: one shard in a hundred thousand must not end the night's work
                # The other shards go on; this one has no manifest, so the next run takes it up again.
                is_expected = isinstance(error, UserError | OSError)
                failures[name(shard)] = str(error) if is_expected else _last_line(error)
                log.error("shard %s stays open: %s", name(shard), failures[name(shard)], exc_info=not is_expected)
                n_in_a_row += 1
            if journal:
                _note(journal, name(shard), failures.get(name(shard)))
            bar.update(size(shard))
            if n_in_a_row == MAX_FAILURES_IN_A_ROW:
                raise _GiveUp

        try:
            if engine == "ray":
                settle_on_ray(job, shards, n_workers, gpus_each, name, settle)
            else:
                _settle_all(job, shards, n_workers, settle)
        except _GiveUp:
            log.error("%d shards in a row failed: the rest is not tried", MAX_FAILURES_IN_A_ROW)
            untried = f"not tried: {MAX_FAILURES_IN_A_ROW} shards in a row had failed"
            failures |= {name(shard): untried for shard in shards if name(shard) not in settled}
        except BrokenProcessPool:
            died = f"worker processes died {MAX_BROKEN_POOLS} times in a row; try fewer workers (memory?)"
            failures |= {name(shard): died for shard in shards if name(shard) not in settled}
    return results, failures


def _last_line(error: Exception) -> str:
    """What a traceback ends with."""
    return traceback.format_exception_only(error)[-1].strip().rpartition("\n")[2]


def _note(journal: Journal, shard: str, reason: str | None) -> None:
    try:
        if reason is None:
            journal.succeeded(shard)
        else:
            journal.failed(shard, reason)
    except (UserError, OSError) as error:  # a note is no work: storage that is out of reach shows at the next shard
        log.error("cannot note what became of shard %s: %s", shard, error)


Settle = Callable[[Any, Callable[[], Any]], None]


def _settle_all(job: Job, shards: Sequence[Any], n_workers: int, settle: Settle) -> None:
    if n_workers == 1 or len(shards) == 1:
        work = job.start(n_cores())
        for shard in shards:
            settle(shard, partial(work, shard))
        return
    left, n_fruitless = list(shards), 0
    while left:
        n_before = len(left)
        left = _one_pool(job, left, min(n_workers, n_before), settle)
        n_fruitless = n_fruitless + 1 if len(left) == n_before else 0
        if n_fruitless == MAX_BROKEN_POOLS:
            raise BrokenProcessPool
        if left:
            log.warning("a worker process died (killed, or out of memory); %d shards are taken up again", len(left))
            left = left[n_workers:] + left[:n_workers]  # one of the first may be what killed it: the others come before it


def _one_pool(job: Job, shards: list[Any], n_workers: int, settle: Settle) -> list[Any]:
    # Returns the shards that are not settled, if the pool broke.
    # Spawn: a forked child would inherit S3 connections and locks that hang in it.
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    threads = max(1, n_cores() // n_workers)
    executor = ProcessPoolExecutor(n_workers, mp_context=context, initializer=_start_worker, initargs=(job, threads))
    try:
        pending: dict[Future[Any], Any] = {executor.submit(_run, shard): shard for shard in shards}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            is_broken = any(isinstance(future.exception(), BrokenProcessPool) for future in done)
            for future in done:
                if not isinstance(future.exception(), BrokenProcessPool):
                    settle(pending.pop(future), future.result)
            if is_broken:  # what a dead worker had committed is found again by its manifest
                return list(pending.values())
        return []
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:  # don't wait for shards that nobody will count
            process.terminate()
        raise
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _start_worker(job: Job, n_threads: int) -> None:
    global _work
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    setup_logging()
    _work = job.start(n_threads)


def _leave_with(parent: Any) -> None:
    # A killed parent would leave idle workers behind for ever: they hold their own end of the queue open.
    wait_for_sentinel([parent.sentinel])
    os._exit(1)


def _run(shard: Any) -> Any:
    assert _work is not None
    return _work(shard)
