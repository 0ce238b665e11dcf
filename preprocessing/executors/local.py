"""Distribute shards over processes on this machine, or over a Ray cluster.

Processes are spawned, restarted when one dies, and exit when their parent dies.
"""

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

MAX_BROKEN_POOLS = 3  # consecutive process pools that broke before they finished a shard
MAX_FAILURES_IN_A_ROW = 10  # this many consecutive failures indicate a fault of storage or set-up, not of the shards


class _GiveUp(Exception):
    pass


_work: Callable[[Any], Any] | None = None  # this worker process's function for one shard


class Job(Protocol):
    """Task of a worker process, pickled once per process. `start` loads models and returns the function for one shard."""

    def start(self, n_threads: int) -> Callable[[Any], Any]: ...


def n_cores() -> int:
    """Number of cores this process may use. The affinity mask of a container or of Slurm may exclude cores."""
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
    """Process every shard. A failed shard does not stop the others, but MAX_FAILURES_IN_A_ROW consecutive failures end the run.

    Args:
        name: Returns a shard's name, for messages.
        size: Returns a shard's number of samples (or other units), for the progress bar.
        what: Name of the stage, for the progress bar.
        unit: Unit of `size`, for the progress bar.
        journal: Records failed shards for `status`.
        engine: Processes on this machine, or actors of a Ray cluster.
        gpus_each: Number of GPUs per Ray actor.

    Returns:
        (results in order of completion, {name of a failed shard: reason}).
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
            except Exception as error:  # bugs too: one bad shard in a hundred thousand must not end a long run
                # The other shards continue. The failed shard has no manifest, so the next run processes it again.
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
            log.error("%d consecutive shards failed: the remaining shards are not tried", MAX_FAILURES_IN_A_ROW)
            untried = f"not tried: {MAX_FAILURES_IN_A_ROW} consecutive shards failed"
            failures |= {name(shard): untried for shard in shards if name(shard) not in settled}
        except BrokenProcessPool:
            died = f"worker processes died {MAX_BROKEN_POOLS} times in a row; if memory ran out, use fewer workers"
            failures |= {name(shard): died for shard in shards if name(shard) not in settled}
    return results, failures


def _last_line(error: Exception) -> str:
    """The last line of the exception's traceback."""
    return traceback.format_exception_only(error)[-1].strip().rpartition("\n")[2]


def _note(journal: Journal, shard: str, reason: str | None) -> None:
    try:
        if reason is None:
            journal.succeeded(shard)
        else:
            journal.failed(shard, reason)
    except (UserError, OSError) as error:  # a record is not essential: unreachable storage also fails the next shard
        log.error("cannot record the result of shard %s: %s", shard, error)


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
            log.warning("a worker process died (killed, or out of memory); %d shards are tried again", len(left))
            left = left[n_workers:] + left[:n_workers]  # one of the first shards may have killed it: try the others first


def _one_pool(job: Job, shards: list[Any], n_workers: int, settle: Settle) -> list[Any]:
    # Returns the unsettled shards; there are none unless the pool broke.
    # Processes are spawned: a forked child would inherit S3 connections and locks, and hang.
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
            if is_broken:  # a retry finds the manifest of a shard that the dead worker had committed
                return list(pending.values())
        return []
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:  # the results of running shards are not needed
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
    # Without this, idle workers would outlive a killed parent forever, because they hold their own end of the queue open.
    wait_for_sentinel([parent.sentinel])
    os._exit(1)


def _run(shard: Any) -> Any:
    assert _work is not None
    return _work(shard)
