"""Ranks that are threads of this process, for tests of what ranks tell each other. `tests/distributed` has real ones."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from dalle_ds.parallel.ranks import Ranks

T = TypeVar("T")

WAIT_SECONDS = 120


@dataclass
class _Meeting:
    """Where the threads exchange what they hold."""

    everyone: threading.Barrier
    held: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadRank(Ranks):
    """A rank whose companions are threads. Every method of `Ranks` that uses torch.distributed is replaced."""

    meeting: _Meeting

    def gather_objects(self, value: Any) -> list[Any]:
        self.meeting.held[self.rank] = value
        self.meeting.everyone.wait()
        found = [self.meeting.held[rank] for rank in range(self.world_size)]
        self.meeting.everyone.wait()
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.gather_objects(tensor.clone())).sum(0))

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        total = self.sum(tensor)
        return lambda: total

    def from_main(self, value: Any) -> Any:
        return self.gather_objects(value)[0]

    def _gather_on_main(self, value: Any) -> list[Any]:
        found = self.gather_objects(value)
        return found if self.is_main else []

    def barrier(self) -> None:
        self.meeting.everyone.wait()


def run_ranks(n: int, work: Callable[[Ranks], T]) -> list[T]:
    """Call `work` with each of `n` ranks, each in a thread named by its rank. Returns their results in rank order.

    Raises:
        BaseException: `work` raised it on some rank. It is the first one's that did not merely wait for the others.
    """
    everyone = threading.Barrier(n, timeout=WAIT_SECONDS)
    meeting = _Meeting(everyone)

    def one(rank: int) -> T:
        threading.current_thread().name = str(rank)
        try:
            return work(ThreadRank(rank, n, torch.device("cpu"), meeting))
        except BaseException:
            everyone.abort()
            raise

    with ThreadPoolExecutor(n) as pool:
        futures = [pool.submit(one, rank) for rank in range(n)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]
