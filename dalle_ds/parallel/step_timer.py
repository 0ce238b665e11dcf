"""Time the phases of an update on this rank without device synchronization, and the fraction of time in collectives."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

KEPT_EVENTS = 1024


class PhaseTimer:
    """Measures the seconds of each phase. On a GPU it uses CUDA events, so nothing waits for kernels before `take`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the work within this context to `phase`."""
        if self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((phase, start, end))
            if len(self._events) > KEPT_EVENTS:  # the older events have passed: this does not wait
                self._add_up(self._events[: -KEPT_EVENTS // 2])
                del self._events[: -KEPT_EVENTS // 2]
            return
        began = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call of `take`."""
        self._add_up(self._events)
        self._events.clear()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _add_up(self, events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]) -> None:
        for phase, start, end in events:
            end.synchronize()
            self._seconds[phase] += start.elapsed_time(end) / 1e3


@dataclass
class CollectiveShare:
    """Fraction of the measured time in which a collective was running on this rank. NaN until the measurement has ended."""

    value: float = math.nan


@contextmanager
def collective_share(device: torch.device) -> Iterator[CollectiveShare]:
    """Measure the work within this context by torch's profiler.

    The fraction includes waiting for slower ranks. On GPUs, collectives may overlap computation. The profiler slows the work
    down somewhat.
    """
    on_gpu, share = device.type == "cuda", CollectiveShare()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        yield share
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    share.value = _covered(_collective_spans(profiler, on_gpu)) / 1e9 / seconds


def _collective_spans(profiler: profile, on_gpu: bool) -> list[tuple[int, int]]:
    """Sorted (start, end) of collectives, in ns.

    Reads the profiler's raw records. An update of a large model has a million events, and `profiler.events()` builds a tree of
    Python objects from them, at 80 us and 3 kB per event, while all other ranks wait. A raw record takes a fiftieth of that.
    """
    # on GPUs these are NCCL's kernels; on CPUs gloo records each collective from start to end
    marks = ("nccldevkernel", "ncclkernel") if on_gpu else ("gloo:",)
    records = profiler.profiler.kineto_results.events()
    return sorted((r.start_ns(), r.start_ns() + r.duration_ns()) for r in records if r.name().lower().startswith(marks))


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Total length of the union of sorted spans."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
