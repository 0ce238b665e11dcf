"""Which image each place of a batch gets: the reading order of raw shards for training, and cursors from which to go on.

A batch has P parts of S images (its micro-batches). What a part reads is a function of the seed and of P, never of the number
of ranks: each rank serves some of the parts, and any number of ranks makes the same batches.

A data set that fits into the window is held whole by every rank (`WholeSet`): an epoch is one permutation of all images, of
which a batch takes the next P * S. A larger one is divided (`PartStreams`). An example: shards 0 to 4 of 4 images each, P = 2,
windows of 5 images.

    1. The shards of an epoch are permuted, end to end:           3 3 3 3 0 0 0 0 4 4 4 4 1 1 1 1 2 2 2 2
    2. Every part takes a run of equal bytes. Both parts read     3 3 3 3 0 0 0 0 4 4
       the shard at the seam, and take different images of it:                        4 4 1 1 1 1 2 2 2 2
    3. Runs are cut into windows, whose images are permuted:      3 0 3 3 3|0 4 0 4 0|1 4 1 4 1|2 2 1 2 2

Properties:
  - An epoch reads every image once. It opens every shard once, and once more for each seam: N + P - 1 shards, over all ranks.
  - A batch mixes P windows of different shards: together as many images as one window of `window_mb`.
  - Each part has its own epochs: parts with fewer usable images begin the next one a little earlier.
  - Memory of a part: the window in use and the next one. Its next shard is fetched while this one is read (on s3://: two local
    copies a part).
"""

import itertools
import logging
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalle_ds.data.raw.sample import Dropped, RawSample
from dalle_ds.data.raw.shards import RawShard, fetched, read_raw_shard, samples_in
from dalle_ds.data.tokens.prefetch import Prefetch
from dalle_ds.errors import DataError

log = logging.getLogger(__name__)

MAX_EMPTY_EPOCHS = 3  # a part that reads few images may find none of the training split in one of them
_ABOUT_HEADERS = 2048  # bytes of a sample's headers and caption in a tar


class Cursor(NamedTuple):
    """The position of the next image of a part. A resumed run starts there without reading earlier windows."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


Cursors = dict[int, Cursor]
"""By part. A data set that is held whole has one cursor, of the whole batch, under 0."""


@dataclass(frozen=True)
class Reading:
    """What decides the order in which images are read."""

    shards: Sequence[RawShard]
    n_parts: int
    part_size: int
    window_bytes: int
    """Encoded bytes of the windows of all parts together. A data set of at most this size is held whole."""
    seed: int
    keeps: Callable[[RawSample], bool]
    """Whether an image is trained on: its split, and a fold."""
    problem_of: Callable[[RawSample], str | None]
    """Why an image is unusable, or None."""

    @property
    def n_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def is_whole(self) -> bool:
        return self.n_bytes <= self.window_bytes

    def start(self, parts: range, cursors: Cursors | None = None) -> "BatchOrder":
        """Start to read for some of the parts.

        Args:
            cursors: of all parts. None: the first epoch begins.

        Raises:
            DataError: the cursors are of another number of parts.
        """
        n_cursors = 1 if self.is_whole else self.n_parts
        cursors = dict.fromkeys(range(n_cursors), Cursor()) if cursors is None else cursors
        if cursors.keys() != set(range(n_cursors)):
            raise DataError(
                f"the checkpoint has the positions of {len(cursors)} streams of images, expected {n_cursors}: it is of an "
                "earlier version, or batch, micro-batch, window or data have changed; start the run anew"
            )
        return WholeSet(self, parts, cursors[0]) if self.is_whole else PartStreams(self, parts, cursors)


class Place(NamedTuple):
    """A place of a batch: an image of a window, and the seed of its crop."""

    samples: Sequence[RawSample]
    order: np.ndarray
    offset: int
    seed: tuple[int, ...]

    def candidates(self) -> Iterator[RawSample]:
        """The image of the place; then those that follow in the window, any of which replaces an unusable one."""
        for step in range(len(self.order)):
            yield self.samples[self.order[(self.offset + step) % len(self.order)]]


class BatchOrder(ABC):
    """The places of one batch after another, for some of its parts."""

    cursors: Cursors
    """After the last batch; those of the other ranks' parts are not in it."""
    unusable: Counter[str]
    """Damaged samples met since the start, by reason. Each is counted by one rank."""

    @abstractmethod
    def next_batch(self) -> list[Place]:
        """The places of the next batch, part by part."""

    def close(self) -> None:  # noqa: B027 (not every order has threads)
        """Stop to read."""


class WholeSet(BatchOrder):
    """All training images, held in memory and permuted in every epoch."""

    def __init__(self, reading: Reading, parts: range, start: Cursor) -> None:
        self._reading, self._parts = reading, parts
        self.cursors, self.unusable = {0: start}, Counter()
        self._samples: list[RawSample] = []
        self._order_of = lru_cache(2)(self._order)

    def next_batch(self) -> list[Place]:
        if not self._samples:
            self._read()
        reading, n_samples = self._reading, len(self._samples)
        first = self.cursors[0].epoch * n_samples + self.cursors[0].offset
        mine = range(first + self._parts.start * reading.part_size, first + self._parts.stop * reading.part_size)
        epoch, offset = divmod(first + reading.n_parts * reading.part_size, n_samples)
        self.cursors = {0: Cursor(epoch, 0, offset)}
        return [self._place(*divmod(number, n_samples)) for number in mine]

    def _place(self, epoch: int, offset: int) -> Place:
        return Place(self._samples, self._order_of(epoch), offset, (self._reading.seed, epoch, 0, offset))

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._reading.seed, epoch, 0)).permutation(len(self._samples))

    def _read(self) -> None:
        for shard in self._reading.shards:
            for sample in read_raw_shard(shard):
                if not isinstance(sample, RawSample):
                    self.unusable[sample.reason] += 0 in self._parts  # all ranks read it, one counts it
                elif self._reading.keeps(sample):
                    self._samples.append(sample)
        if not self._samples:
            raise _nothing_usable(self._reading, self.unusable)


class PartStreams(BatchOrder):
    """A stream for each of this rank's parts. Windows are read by threads, one a stream."""

    def __init__(self, reading: Reading, parts: range, cursors: Cursors) -> None:
        self._part_size = reading.part_size
        self.unusable = Counter()
        self._streams = {part: _Stream(reading, part, cursors[part], self.unusable) for part in parts}
        self.cursors = {part: cursors[part] for part in parts}

    def next_batch(self) -> list[Place]:
        places = [stream.next_place() for stream in self._streams.values() for _ in range(self._part_size)]
        self.cursors = {part: stream.cursor for part, stream in self._streams.items()}
        return places

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


class _Window(NamedTuple):
    epoch: int
    number: int
    samples: list[RawSample]
    order: np.ndarray
    unusable: Counter[str]  # damaged samples in it and in the windows before that have no usable image


class _Fetched(NamedTuple):
    """A shard of a part's run through an epoch. `file` is local and stays until `held` is closed."""

    epoch: int
    start: int  # of the shard on the line of the epoch's shards, bytes
    shard: RawShard
    file: Path
    held: ExitStack
    is_last: bool  # of the run


class _Stream:
    """The stream of one part: its windows one after the other."""

    def __init__(self, reading: Reading, part: int, start: Cursor, unusable: Counter[str]) -> None:
        self._seed, self._part, self._unusable, self._start = reading.seed, part, unusable, start
        self._shards = Prefetch(_fetch(reading, part, start), 1, f"fetch-{part}", lambda: "a shard")
        self._windows = Prefetch(
            _windows(reading, part, self._shards, start), 1, f"window-{part}", lambda: "a window of images"
        )
        self._window: _Window | None = None
        self._offset = 0

    @property
    def cursor(self) -> Cursor:
        return self._start if self._window is None else Cursor(self._window.epoch, self._window.number, self._offset)

    def next_place(self) -> Place:
        while self._window is None or self._offset == len(self._window.samples):
            self._enter(next(self._windows))
        place = Place(self._window.samples, self._window.order, self._offset, (self._seed, *self.cursor, self._part))
        self._offset += 1
        return place

    def _enter(self, window: _Window) -> None:
        goes_on = self._window is None and (window.epoch, window.number) == self._start[:2]
        self._window, self._offset = window, self._start.offset if goes_on else 0
        self._unusable.update(window.unusable)

    def close(self) -> None:
        self._shards.close(timeout=0)  # may be in the middle of a download
        self._windows.close(timeout=0)


def _bounds(reading: Reading, part: int) -> list[int]:
    """The start of a part's run on the line of all shards, and the ends of its windows. Bytes."""
    start, end = (reading.n_bytes * n // reading.n_parts for n in (part, part + 1))
    n_windows = max(1, -(-(end - start) * reading.n_parts // reading.window_bytes))
    return [start + (end - start) * n // n_windows for n in range(n_windows + 1)]


def _fetch(reading: Reading, part: int, cursor: Cursor) -> Iterator[_Fetched]:
    """The shards of a part's run, epoch after epoch, without end."""
    bounds = _bounds(reading, part)
    for epoch in itertools.count(cursor.epoch):
        order = np.random.default_rng((reading.seed, epoch)).permutation(len(reading.shards))
        ends = np.cumsum([reading.shards[i].bytes for i in order])
        first = bounds[cursor.window if epoch == cursor.epoch else 0]
        touched = range(np.searchsorted(ends, first, "right"), np.searchsorted(ends, bounds[-1]) + 1)
        for n in touched:
            shard = reading.shards[order[n]]
            with ExitStack() as held:
                file = held.enter_context(fetched(shard))
                yield _Fetched(epoch, int(ends[n]) - shard.bytes, shard, file, held.pop_all(), n == touched[-1])


def _windows(reading: Reading, part: int, shards: Iterator[_Fetched], cursor: Cursor) -> Iterator[_Window]:
    """The windows of a part that have a usable image, epoch after epoch, without end."""
    unusable, useful_epoch, is_told = Counter[str](), cursor.epoch, False
    for (epoch, number), members in itertools.groupby(_members(reading, part, shards, cursor), itemgetter(0, 1)):
        found: list[RawSample] = []
        for *_, sample in members:
            if isinstance(sample, Dropped):
                unusable[sample.reason] += 1
            elif sample is not None and reading.keeps(sample):
                found.append(sample)
        order = np.random.default_rng((reading.seed, epoch, number, part)).permutation(len(found))
        problems = list(itertools.takewhile(bool, (reading.problem_of(found[i]) for i in order)))
        if len(problems) < len(found):
            yield _Window(epoch, number, found, order, unusable)
            unusable, useful_epoch = Counter[str](), epoch + 1
        else:
            unusable.update(problems)
            if problems and not is_told:
                log.warning(
                    "none of the %d images of a window is usable: %s; further such windows of part %d are only counted",
                    *(len(found), dict(Counter(problems)), part),
                )
                is_told = True
            if epoch - useful_epoch >= MAX_EMPTY_EPOCHS:
                raise _nothing_usable(reading, unusable)


def _members(
    reading: Reading, part: int, shards: Iterator[_Fetched], cursor: Cursor
) -> Iterator[tuple[int, int, RawSample | Dropped | None]]:
    """The samples of a part's run, each after its epoch and window. None ends an epoch."""
    bounds = _bounds(reading, part)
    for epoch, start, shard, file, held, is_last in shards:
        with held:
            for offset, sample in _with_offsets(shard, file):
                if start + offset >= bounds[-1]:
                    break  # the rest is the next part's
                window = bisect_right(bounds, start + offset) - 1
                if window >= 0 and (epoch, window) >= cursor[:2]:
                    yield epoch, window, sample
        if is_last:
            yield epoch, len(bounds) - 2, None


def _with_offsets(shard: RawShard, file: Path) -> Iterator[tuple[int, RawSample | Dropped]]:
    """The samples of a shard, each with the byte at which it counts as stored: always the same, and below the shard's size."""
    estimate = 0
    for number, sample in enumerate(samples_in(shard, file)):
        offset = number * shard.bytes // shard.n_samples if shard.n_samples else estimate
        yield min(offset, shard.bytes - 1), sample
        estimate += _ABOUT_HEADERS + (len(sample.image) if isinstance(sample, RawSample) else 0)


def _nothing_usable(reading: Reading, unusable: Counter[str]) -> DataError:
    first = reading.shards[0].url
    where = f"the training split of {len(reading.shards)} raw shards ({first}, ...)"
    if not unusable:
        return DataError(
            f"{where} is empty: it has none of their samples; expected more samples or a smaller validation_fraction"
        )
    return DataError(f"no usable image in {where}; unusable: {dict(unusable)}")
