"""Time variants in turns: each between two runs of a baseline, so that a busy machine slows both sides alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Clock = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """Speed of one side relative to the other: median, smallest and largest over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Result of `take_turns`: seconds of every run, and per round the speed of every variant relative to the baseline."""

    baseline: str
    runs: dict[str, list[float]]
    rounds: dict[str, list[float]]

    def seconds(self, name: str) -> float:
        """Returns the median seconds of a run of variant `name`."""
        return statistics.median(self.runs[name])

    def ratio(self, ours: str, other: str) -> Ratio:
        """Returns the speed of `ours` relative to `other`, the baseline or another variant. Above 1, `ours` is faster."""
        pairs = zip(self._against_baseline(ours), self._against_baseline(other), strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))

    def _against_baseline(self, name: str) -> list[float]:
        return [1.0] * len(next(iter(self.rounds.values()))) if name == self.baseline else self.rounds[name]


def take_turns(
    variants: Mapping[str, Callable[[], object]], baseline: str, rounds: int, clock: Clock, *, warm_up: bool = True
) -> Comparison:
    """Run all `variants` in turns. A ratio is the mean time of the baseline runs before and after, divided by the variant's.

    Raises:
        ValueError: `baseline` is not among the variants, there is no other variant, or `rounds` is below 1.
    """
    others = [name for name in variants if name != baseline]
    if baseline not in variants or not others or rounds < 1:
        raise ValueError(
            f"baseline {baseline!r} of {list(variants)}, {rounds} rounds: expected the baseline and others, 1 or more rounds"
        )
    if warm_up:
        for run in variants.values():
            run()
    runs: dict[str, list[float]] = {name: [] for name in variants}
    ratios: dict[str, list[float]] = {name: [] for name in others}

    def measure(name: str) -> float:
        start = clock()
        variants[name]()
        runs[name].append(clock() - start)
        return runs[name][-1]

    before = measure(baseline)
    for _ in range(rounds):
        for name in others:
            taken, after = measure(name), measure(baseline)
            ratios[name].append((before + after) / 2 / taken)
            before = after
    return Comparison(baseline, runs, ratios)


def clock_for(device: torch.device, threads: int) -> Clock:
    """Returns the clock. With one CPU thread it is the process's CPU time, which other load hardly disturbs. With more threads
    it is the wall clock; on a GPU, the wall clock after all queued work has finished."""
    if device.type == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronised
    return time.process_time if threads == 1 else time.perf_counter
