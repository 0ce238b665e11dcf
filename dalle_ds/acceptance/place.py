"""Where a step runs and how large it is: full on a GPU, small on a CPU for a rehearsal."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from dalle_ds.ops.exactness import exact_fp32

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A rehearsal computes all that a full run does, on sizes that a CPU takes seconds for."""

    is_rehearsal: bool

    def __post_init__(self) -> None:
        exact_fp32()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.is_rehearsal else torch.device("cuda", 0)

    def pick(self, full: T, small: T) -> T:
        """The size for this place."""
        return small if self.is_rehearsal else full

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if not self.is_rehearsal:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], rounds: int = 5) -> float:
        """Median wall clock of one run, its kernels included, after a warm-up."""
        work()
        taken = []
        for _ in range(rounds):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def copied_gbps(self) -> float:
        """GB a second that the device's memory gives and takes in a large copy, both counted."""
        source = torch.empty(self.pick(1 << 30, 1 << 20), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source), 3) / 1e9

    def forget_peak(self) -> None:
        """Free what nobody holds, and begin to watch for the highest use of memory."""
        if not self.is_rehearsal:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """The highest use since `forget_peak`; 0 on a CPU, where nobody watches."""
        return 0.0 if self.is_rehearsal else torch.cuda.max_memory_allocated() / 2**30
