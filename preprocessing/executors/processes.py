"""Workers on this machine: spawned processes, each with its GPU if there are any; or one worker in this very process.

Processes exit when their parent dies.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from dalle_ds.child_processes import leave_with_parent
from dalle_ds.console import setup_logging
from preprocessing.executors.crew import Job, Report, perform

_work: Callable[[Any], Any] | None = None  # this worker process's function for one shard


class Processes:
    """A process per worker. Each has an executor of its own, so that a dead process takes no other with it."""

    def __init__(self, job: Job, n_threads: int, gpus: Sequence[str] = ()) -> None:
        """`gpus` are the values of CUDA_VISIBLE_DEVICES that the workers get in turns. Empty: all see the same devices."""
        self._job, self._n_threads, self._gpus = job, n_threads, gpus
        self._executors: dict[int, ProcessPoolExecutor] = {}
        self._pending: dict[Future[Any], tuple[int, bool]] = {}  # -> (worker, whether this is its start)
        self._others = set(multiprocessing.active_children())

    def start(self, worker: int) -> None:
        # Processes are spawned: a forked child would inherit S3 connections and locks, and hang.
        context = multiprocessing.get_context("spawn")
        self._executors[worker] = ProcessPoolExecutor(1, mp_context=context, initializer=_start_process)
        gpu = self._gpus[worker % len(self._gpus)] if self._gpus else None
        self._pending[self._executors[worker].submit(_start, self._job, self._n_threads, gpu)] = worker, True

    def assign(self, worker: int, shard: Any, upcoming: Any | None) -> None:
        try:
            future = self._executors[worker].submit(_run, shard, upcoming)
        except BrokenProcessPool as died:  # while it was idle
            future = Future()
            future.set_exception(died)
        self._pending[future] = worker, False

    def wait(self, seconds: float | None) -> list[Report]:
        if not self._pending:
            time.sleep(seconds or 0)
        done, _ = wait(self._pending, timeout=seconds, return_when=FIRST_COMPLETED)
        return [self._report(future) for future in done]

    def _report(self, future: Future[Any]) -> Report:
        worker, is_start = self._pending.pop(future)
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            return Report(worker, is_start, is_lost=True)
        if error is not None:
            assert isinstance(error, Exception)
            return Report(worker, is_start, error=error)
        return Report(worker, is_start, value=future.result())

    def stop(self, worker: int) -> None:
        self._executors[worker].shutdown(wait=False)

    def close(self) -> None:
        if self._pending:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        for executor in self._executors.values():
            executor.shutdown(wait=False, cancel_futures=True)


class ThisProcess:
    """One worker, which works while `wait` is called."""

    def __init__(self, job: Job, n_threads: int) -> None:
        self._job, self._n_threads = job, n_threads
        self._given: tuple[Any, Any | None] | None = None
        self._is_new = False

    def start(self, worker: int) -> None:
        self._work = self._job.start(self._n_threads)
        self._is_new = True

    def assign(self, worker: int, shard: Any, upcoming: Any | None) -> None:
        self._given = shard, upcoming

    def wait(self, seconds: float | None) -> list[Report]:
        if self._is_new:
            self._is_new = False
            return [Report(0, is_start=True, value="this process")]
        if self._given is None:
            time.sleep(seconds or 0)
            return []
        (shard, upcoming), self._given = self._given, None
        try:
            return [Report(0, value=perform(self._work, shard, upcoming))]
        except Exception as error:
            return [Report(0, error=error)]

    def stop(self, worker: int) -> None: ...

    def close(self) -> None: ...


def _start_process() -> None:
    leave_with_parent()
    setup_logging()


def _start(job: Job, n_threads: int, gpu: str | None) -> str:
    global _work
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before CUDA is initialised, which reads it once
    _work = job.start(n_threads)
    return f"process {os.getpid()}" + (f" on GPU {gpu}" if gpu is not None else "")


def _run(shard: Any, upcoming: Any | None) -> Any:
    assert _work is not None
    return perform(_work, shard, upcoming)
