"""Prefetch: run an iterator on a background thread, a few items ahead of its consumer."""

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

WARN_AFTER_S = 60.0
_POLL_SECONDS = 0.1  # interval at which the blocked thread checks whether it should stop
_END = object()


class Prefetch(Generic[T]):
    """Iterate over `source`, which runs on a daemon thread at most `depth` finished items ahead.

    If `source` raises, the consumer gets the items before the error, then the error, and the same error at every later call.
    A thread is used instead of a process: the work is mostly waiting for storage, and a process forked after S3 use hangs.
    The thread ends at `close()`, or when the consumer is garbage-collected.
    If the consumer waits for a minute, a warning names what it waits for (`waiting_for`); the next one follows after twice the
    time.
    """

    def __init__(self, source: Iterator[T], depth: int, name: str, waiting_for: Callable[[], str] = lambda: "an item") -> None:
        if depth < 1:
            raise ValueError(f"prefetch depth is {depth}, expected at least 1")
        self.wait_seconds = 0.0  # total time that the consumer has waited
        self._queue: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)  # taken before an item is made: items may be large
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self._waiting_for = waiting_for
        arguments = (source, self._queue, self._room, self._stop)
        self._thread = threading.Thread(target=_produce, args=arguments, name=name, daemon=True)
        weakref.finalize(self, _shut, self._stop, self._thread)  # also runs when the interpreter exits
        self._thread.start()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        if self._failed is not None:
            raise self._failed
        if self._stop.is_set():
            raise self._closed()
        start = time.monotonic()
        item, error = self._get()
        self.wait_seconds += time.monotonic() - start
        self._room.release()
        if error is None and item is _END:
            error = StopIteration()
        if error is not None:
            self._failed = error
            raise error
        return item

    def _get(self) -> tuple[Any, BaseException | None]:
        pause = WARN_AFTER_S
        waited = 0.0
        while True:
            try:
                return self._queue.get(timeout=pause)
            except queue.Empty:
                waited += pause
                log.warning("%s: no item for %g s, waiting for %s", self._thread.name, waited, self._waiting_for())
                pause = waited

    def close(self, timeout: float = 5.0) -> None:
        """Stop the thread and wait up to `timeout` seconds for its end. It may be blocked in a read that is being retried.

        A consumer on another thread that waits for an item gets a RuntimeError.
        """
        _shut(self._stop, self._thread, timeout)
        self._queue.put((None, self._closed()))

    def _closed(self) -> RuntimeError:
        return RuntimeError(f"{self._thread.name} is closed")


def _shut(stop: threading.Event, thread: threading.Thread, timeout: float = 1.0) -> None:
    stop.set()
    if thread is not threading.current_thread():  # the garbage collector may run this on the thread itself
        thread.join(timeout)


def _produce(source: Iterator[Any], out: queue.SimpleQueue, room: threading.Semaphore, stop: threading.Event) -> None:
    # A plain function: a bound method would keep the consumer alive, so it would never be garbage-collected.
    item, error = None, None
    while not stop.is_set() and error is None and item is not _END:
        if not room.acquire(timeout=_POLL_SECONDS):
            continue
        try:
            item = next(source, _END)
        except BaseException as raised:  # pass every error to the consumer, which would otherwise wait forever
            item, error = None, raised
        out.put((item, error))
