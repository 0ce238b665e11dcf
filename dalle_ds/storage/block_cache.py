"""Block cache: an in-memory LRU cache of decoded blocks with a size limit; missing blocks are fetched in parallel."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

N_READERS = 8  # latency dominates a ranged GET: tens of milliseconds for half a megabyte


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


class BlockCache(Generic[V]):
    """LRU cache of blocks by number.

    Args:
        load: reads one block. Several threads call it at the same time.
        capacity: maximum size in bytes. A request returns all its blocks, even if they exceed the capacity together.
    """

    def __init__(self, load: Callable[[int], V], capacity: int) -> None:
        self._load, self._capacity = load, capacity
        self._held: OrderedDict[int, V] = OrderedDict()
        self._lock = threading.Lock()
        self._readers: ThreadPoolExecutor | None = None
        self.nbytes = 0
        self.n_loads = 0  # n_loads / number of blocks is the read amplification

    def get(self, numbers: Iterable[int]) -> dict[int, V]:
        """The blocks with these numbers. Raises the exceptions of `load`."""
        wanted = dict.fromkeys(numbers)
        with self._lock:
            found = {number: self._held[number] for number in wanted if number in self._held}
            for number in found:
                self._held.move_to_end(number)
            missing = [number for number in wanted if number not in found]
            if len(missing) > 1 and self._readers is None:
                self._readers = ThreadPoolExecutor(N_READERS, thread_name_prefix="block-reader")
        # Two callers may fetch the same block: this costs a second read, but the result is correct.
        loads = map(self._load, missing) if len(missing) < 2 else self._readers.map(self._load, missing)
        loaded = dict(zip(missing, loads, strict=True))
        with self._lock:
            for number, block in loaded.items():
                self.n_loads += 1
                if number not in self._held:
                    self._held[number] = block
                    self.nbytes += block.nbytes
            while self.nbytes > self._capacity:
                self.nbytes -= self._held.popitem(last=False)[1].nbytes
        return found | loaded
