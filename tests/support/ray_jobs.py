"""Jobs for actors of a Ray cluster. Actors import this file, so it imports nothing heavy."""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dalle_ds.storage import objects


@dataclass(frozen=True)
class OneFull:
    """The first actor that starts has a full disk. Others take longer for a shard than it does to fail. `wrong` has a bug."""

    folder: str
    wrong: int

    def start(self, n_threads: int) -> "Worker":
        return Worker(self.wrong, objects.create_exclusive(f"{self.folder}/full", str(os.getpid()).encode()))


class Worker:
    """Returns (the shard, whether it was told before to expect it)."""

    def __init__(self, wrong: int, is_full: bool) -> None:
        self._wrong, self._is_full = wrong, is_full
        self._expected: set[int] = set()

    def expect(self, shard: int) -> None:
        self._expected.add(shard)

    def __call__(self, shard: int) -> tuple[int, bool]:
        if self._is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.1)
        if shard == self._wrong:
            raise ZeroDivisionError("a bug of ours")
        return shard, shard in self._expected


@dataclass(frozen=True)
class Large:
    """Returns a result that Ray keeps on the actor's node, and leaves a file when it has it."""

    done: str

    def start(self, n_threads: int) -> Callable[[int], bytes]:
        def work(n_bytes: int) -> bytes:
            Path(self.done).touch()
            return bytes(n_bytes)

        return work
