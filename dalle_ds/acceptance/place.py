"""Device and size of a step: full size on a GPU, small on a CPU for a rehearsal."""

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
    """A rehearsal computes everything that a full run does, at sizes that take a CPU seconds."""

    is_rehearsal: bool

    def __post_init__(self) -> None:
        exact_fp32()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.is_rehearsal else torch.device("cuda", 0)

    def pick(self, full: T, small: T) -> T:
        """Returns `small` in a rehearsal, else `full`."""
        return small if self.is_rehearsal else full

    def wait(self) -> None:
        """Wait until the device has finished all queued work."""
        if not self.is_rehearsal:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], rounds: int = 5) -> float:
        """Returns the median wall time in seconds of one run of `work`, including its kernels, after one warm-up run."""
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
        """Returns the GB/s, reads plus writes, of a large copy in the device's memory."""
        source = torch.empty(self.pick(1 << 30, 1 << 20), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source), 3) / 1e9

    def forget_peak(self) -> None:
        """Free cached memory and reset the peak memory statistics."""
        if not self.is_rehearsal:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """Returns the peak of allocated GiB since `forget_peak`. On a CPU, where it isn't measured: 0."""
        return 0.0 if self.is_rehearsal else torch.cuda.max_memory_allocated() / 2**30
