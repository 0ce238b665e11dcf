"""Batches of decoded images with their captions: unusable images are replaced and counted, later batches are under way."""

# S images of a batch's parts, H and W pixels, C channels

import logging
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dalle_ds.data.images import ImageProblem
from dalle_ds.data.raw.decoders import Decoders, Preparation, Prepared, Task, prepare
from dalle_ds.data.raw.sample import RawSample
from dalle_ds.data.raw.streams import BatchOrder, Cursors, Place
from dalle_ds.errors import DataError

log = logging.getLogger(__name__)

MAX_IMAGES_A_TASK = 8


class DecodedBatch(NamedTuple):
    pixels_SHWC: np.ndarray  # uint8
    samples: list[RawSample]
    cursors: Cursors  # after this batch
    n_unusable: int  # since the start; the sum over ranks counts each image once


class _Pending(NamedTuple):
    places: list[Place]
    tasks: list[Task]  # of the places' images, in order; none: prepared in this thread
    cursors: Cursors
    n_damaged: int


class DecodedBatches:
    """Iterates over the batches of `order`, without end.

    An unusable image is replaced by the next usable image of its window, with the crop of its own place.

    Args:
        n_processes: worker processes. 0: images are prepared by the thread that iterates.
        n_ahead: batches whose images are in work at the same time.
        decoded_bytes: decoded images kept, for an order that comes back to the same samples. They are cropped in the thread. As
            soon as they need more, they are given up, and processes decode.
    """

    def __init__(
        self, order: BatchOrder, preparation: Preparation, *, n_processes: int, n_ahead: int, decoded_bytes: int = 0
    ) -> None:
        self._order, self._preparation, self._n_ahead = order, preparation, n_ahead
        self._decoders = Decoders(preparation, n_processes)
        self._decoded = _DecodedCache(preparation, decoded_bytes, keeps_some=not n_processes)
        self._unusable: Counter[str] = Counter()
        self._pending: deque[_Pending] = deque()

    def __iter__(self) -> Iterator[DecodedBatch]:
        return self

    def __next__(self) -> DecodedBatch:
        while len(self._pending) <= (self._n_ahead if self._decoders.n_processes else 0):
            self._begin()
        return self._finish(self._pending.popleft())

    def close(self) -> None:
        """End threads and processes."""
        self._order.close()
        self._decoders.close()

    def _begin(self) -> None:
        places = self._order.next_batch()
        tasks = []
        if self._decoders.n_processes and not self._decoded.is_used:
            size = min(MAX_IMAGES_A_TASK, -(-len(places) // self._decoders.n_processes))
            for first in range(0, len(places), size):
                chunk = places[first : first + size]
                tasks.append(self._decoders.start([next(p.candidates()).image for p in chunk], [p.seed for p in chunk]))
        self._pending.append(_Pending(places, tasks, self._order.cursors, self._order.unusable.total()))

    def _finish(self, batch: _Pending) -> DecodedBatch:
        prepared = [image for task in batch.tasks for image in self._decoders.result(task)]
        if not batch.tasks:
            prepared = [self._prepare(next(place.candidates()), place.seed) for place in batch.places]
        usable = [self._usable(place, image) for place, image in zip(batch.places, prepared, strict=True)]
        samples, pixels = zip(*usable, strict=True)
        return DecodedBatch(np.stack(pixels), list(samples), batch.cursors, batch.n_damaged + self._unusable.total())

    def _usable(self, place: Place, prepared: Prepared) -> tuple[RawSample, np.ndarray]:
        for step, sample in enumerate(place.candidates()):
            if step:
                prepared = self._prepare(sample, place.seed)
            if not isinstance(prepared, str):
                return sample, prepared
            if step == 0:  # an unusable substitute is counted at its own place
                self._count(sample, prepared)
        raise DataError(f"none of {len(place.order)} images is usable, expected at least one; unusable: {dict(self._unusable)}")

    def _prepare(self, sample: RawSample, seed: tuple[int, ...]) -> Prepared:
        if not self._decoded.is_used:
            return prepare(self._preparation, sample.image, seed)
        try:
            return self._preparation.crop(self._decoded.get(sample), seed)
        except ImageProblem as problem:
            return problem.reason

    def _count(self, sample: RawSample, reason: str) -> None:
        if not self._unusable[reason]:
            log.warning("image %s is unusable and skipped: %s; further such images are only counted", sample.key, reason)
        self._unusable[reason] += 1


class _DecodedCache:
    """Decoded images by key, up to `n_bytes`. Nothing is evicted: every epoch reads each image once, so it would not help.

    Args:
        keeps_some: whether images stay that were decoded before the limit was reached.
    """

    def __init__(self, preparation: Preparation, n_bytes: int, keeps_some: bool) -> None:
        self._preparation, self._room, self._keeps_some = preparation, n_bytes, keeps_some
        self.is_used = n_bytes > 0
        self._images: dict[str, np.ndarray] = {}

    def get(self, sample: RawSample) -> np.ndarray:
        """The decoded image. Raises ImageProblem."""
        found = self._images.get(sample.key)
        if found is None:
            found = self._preparation.decode(sample.image)
            if found.nbytes <= self._room:
                self._images[sample.key] = found
                self._room -= found.nbytes
            elif not self._keeps_some:
                self._images, self._room, self.is_used = {}, 0, False
        return found
