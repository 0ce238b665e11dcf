"""Download the next raw shard while the current one is encoded."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from dalle_ds.data.raw.shards import Dropped, RawSample, RawShard, fetched, read_raw_shard, samples_in

Copy = Future[tuple[ExitStack, Path]]  # a checked local file, and what deletes it


class ReadAhead:
    """Reads shards, of which some were expected: their files are here or on their way."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._copies: dict[RawShard, Copy] = {}
        self._next: RawShard | None = None

    def expect(self, shard: RawShard) -> None:
        """Begin to download and check a shard that will probably be read."""
        self._next = shard
        if shard not in self._copies:
            self._copies[shard] = self._thread.submit(_fetch, shard)

    def samples(self, shard: RawShard) -> Iterator[RawSample | Dropped]:
        """As `read_raw_shard`."""
        copy = self._copies.pop(shard, None)
        for other in self._copies.keys() - {self._next}:  # another worker got it
            self._copies.pop(other).add_done_callback(_discard)
        if copy is None:
            yield from read_raw_shard(shard)
            return
        stack, file = copy.result()
        with stack:
            yield from samples_in(shard, file)


def _fetch(shard: RawShard) -> tuple[ExitStack, Path]:
    stack = ExitStack()
    return stack, stack.enter_context(fetched(shard))


def _discard(copy: Copy) -> None:
    if copy.exception() is None:
        copy.result()[0].close()
