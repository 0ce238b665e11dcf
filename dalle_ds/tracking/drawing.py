"""A thread that makes the images of a tracker, so that a training loop does not wait for them."""

import logging
import queue
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

MAX_WAITING = 64
"""Maximum number of images that wait to be made. They hold their data in memory."""


class Drawing:
    """Calls functions one after another on a thread, in the order of `add`. The thread starts with the first of them."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self.n_lost = 0
        """Number of images that were left out or could not be made."""

    def add(self, name: str, draw: Callable[[], None]) -> None:
        """Have `draw` called on the thread. Never waits: an image beyond MAX_WAITING is left out, with a warning."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait((name, draw))
        except queue.Full:
            self.n_lost += 1
            log.warning("image %s is left out: %d images still wait to be drawn", name, MAX_WAITING)

    def finish(self, timeout: float) -> None:
        """Wait until all images are made, at most `timeout` seconds, and end the thread."""
        if self._thread is None:
            return
        deadline = time.monotonic() + timeout
        try:
            self._waiting.put(None, timeout=timeout)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        if self._thread.is_alive():
            self.n_lost += self._waiting.qsize() + 1
            log.warning("%d images were not drawn within %g s", self._waiting.qsize() + 1, timeout)
        self._thread = None

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            name, draw = item
            try:
                draw()
            except Exception:  # an error of a chart must not stop training, nor the charts after it
                self.n_lost += 1
                log.warning("image %s could not be drawn", name, exc_info=True)
