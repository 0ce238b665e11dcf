"""Sample the request of a page in a thread, and show its rows while they are sampled."""

import logging
import threading
import time
from collections.abc import Callable, Iterator

from PIL import Image

from dalle_ds.sampling.decode import partial_images
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.sampler import Candidate, RowsDecoded, Sampler

log = logging.getLogger(__name__)

Shown = list[tuple[Image.Image, str]]
"""Images and the text below each."""

SHORTEST_PAUSE_S, SHARE_FOR_SHOWING = 0.3, 0.2


def draw_rows(sampler: Sampler, request: Request, is_wanted: Callable[[], bool] = lambda: True) -> Iterator[tuple[str, Shown]]:
    """Yields (status, images) while a request is sampled, at last with the kept images. Closing the generator ends sampling.

    Args:
        is_wanted: asked several times a second; when it returns False, sampling ends.

    Raises:
        Exception: any exception of sampling.
    """
    drawing = _Drawing(sampler, request)
    drawing.start()
    try:
        while not drawing.ended.is_set():
            if not is_wanted():
                return
            if drawing.changed.wait(0.1):
                drawing.changed.clear()
                yield drawing.status, drawing.shown
        drawing.join()
        if drawing.error is not None:
            raise drawing.error
        yield drawing.status, drawing.shown
    finally:
        drawing.abandoned = True
        drawing.join()


class _Abandoned(Exception):
    pass


class _Drawing(threading.Thread):
    def __init__(self, sampler: Sampler, request: Request) -> None:
        super().__init__(name="drawing", daemon=True)
        self._sampler, self._request, self._n_batches = sampler, request, len(request.work_items())
        self.changed, self.ended, self.abandoned = threading.Event(), threading.Event(), False
        self.status, self.shown, self.error = "", [], None
        self._next_at = 0.0

    def run(self) -> None:
        began = time.monotonic()
        try:
            chosen = [candidate for row in self._sampler.draw(self._request, self._show) for candidate in row]
            self.shown = list(zip(self._sampler.images(chosen), map(_label, chosen), strict=True))
            self.status = f"{self._request.settings.n} sampled in {time.monotonic() - began:.1f} s"
        except _Abandoned:
            log.info("the client closed the page: sampling was cancelled")
        except Exception as error:  # the page shows any error
            self.error = error
        self.ended.set()

    def _show(self, rows: RowsDecoded) -> None:
        if self.abandoned:
            raise _Abandoned
        began = time.monotonic()
        if began < self._next_at:
            return
        grid = self._sampler.export.dvae.config.grid
        images = partial_images(self._sampler.export.dvae, rows.codes_BN, rows.n_rows)
        batch = f", batch {rows.item.number + 1} of {self._n_batches}" if self._n_batches > 1 else ""
        self.shown = [(image, f"{k + 1}") for k, image in zip(rows.item.candidates, images, strict=True)]
        self.status = f"row {rows.n_rows} of {grid}{batch}"
        self.changed.set()
        # previews take time from sampling: wait, so that they take at most SHARE_FOR_SHOWING of the time
        seconds = time.monotonic() - began
        self._next_at = time.monotonic() + max(SHORTEST_PAUSE_S, seconds * (1 / SHARE_FOR_SHOWING - 1))


def _label(candidate: Candidate) -> str:
    score = "" if candidate.score is None else f", score {candidate.score:.3f}"
    return f"no. {candidate.index.candidate + 1}{score}"
