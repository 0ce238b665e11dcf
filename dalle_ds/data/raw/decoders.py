"""Worker processes that decode and crop images: threads would wait for Python's lock, which training needs too."""

import logging
import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dalle_ds.child_processes import leave_with_parent
from dalle_ds.data.images import ImageProblem
from dalle_ds.errors import UserError

log = logging.getLogger(__name__)

MAX_TRIES = 3  # a process may be killed for memory once; an image that kills each of its decoders ends the run


class Preparation(Protocol):
    """From an encoded image to pixels of the model's size. Its module must be cheap to import, as each process imports it."""

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (H, W, C) of any size. Raises ImageProblem."""
        ...

    def crop(self, pixels_HWC: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """uint8 of the model's size, a function of its arguments. Raises ImageProblem."""
        ...


Prepared = np.ndarray | str
"""Pixels, or the reason why an image is unusable."""


def prepare(preparation: Preparation, data: bytes, seed: tuple[int, ...]) -> Prepared:
    """Decode and crop an image."""
    try:
        return preparation.crop(preparation.decode(data), seed)
    except ImageProblem as problem:
        return problem.reason


@dataclass
class Task:
    """Images that a process prepares."""

    data: Sequence[bytes]
    seeds: Sequence[tuple[int, ...]]
    future: Future[list[Prepared]]
    pool: ProcessPoolExecutor
    n_tries: int = 1


class Decoders:
    """A pool of processes, started at the first task. One that dies is replaced, and its images are prepared again."""

    def __init__(self, preparation: Preparation, n_processes: int) -> None:
        self.n_processes = n_processes
        self._preparation = preparation
        self._pool: ProcessPoolExecutor | None = None
        self._is_closed = False

    def start(self, data: Sequence[bytes], seeds: Sequence[tuple[int, ...]]) -> Task:
        """Begin to prepare images. Raises RuntimeError after `close`."""
        while True:
            pool = self._started()
            try:
                return Task(data, seeds, pool.submit(_prepare_all, self._preparation, data, seeds), pool)
            except BrokenProcessPool:  # a process died since the last result; a new pool is never broken
                self._replace(pool)

    def result(self, task: Task) -> list[Prepared]:
        """Wait for a task.

        Raises:
            UserError: processes died with this task each time.
        """
        while True:
            try:
                return task.future.result()
            except BrokenProcessPool:
                if task.n_tries == MAX_TRIES:
                    raise UserError(
                        f"{MAX_TRIES} processes that decode images died: killed, out of memory, or a damaged image of this "
                        "batch ends its decoder. With data.decoders=0 images are decoded in the training process"
                    ) from None
            self._replace(task.pool)
            again = self.start(task.data, task.seeds)
            task.future, task.pool, task.n_tries = again.future, again.pool, task.n_tries + 1

    def close(self) -> None:
        """End the processes."""
        self._is_closed = True
        self._end()

    def _started(self) -> ProcessPoolExecutor:
        if self._is_closed:
            raise RuntimeError("the processes that decode images are closed")
        if self._pool is None:
            # spawned: a forked child would inherit the locks of the trainer's threads, and S3 connections
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.n_processes, mp_context=context, initializer=_start_process)
        return self._pool

    def _replace(self, broken: ProcessPoolExecutor) -> None:
        if broken is self._pool:
            log.warning("a process that decodes images died (killed, or out of memory); another one takes its place")
            self._end()

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _prepare_all(preparation: Preparation, data: Sequence[bytes], seeds: Sequence[tuple[int, ...]]) -> list[Prepared]:
    return [prepare(preparation, *image) for image in zip(data, seeds, strict=True)]


def _start_process() -> None:
    for stop in (signal.SIGINT, signal.SIGTERM):  # sent to a whole job: the trainer still needs images until it has saved
        signal.signal(stop, signal.SIG_IGN)
    leave_with_parent()
