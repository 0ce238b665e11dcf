"""Result of a benchmark: a readable table, and the summary that --json prints."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dalle_ds.bench.harness.timing import Comparison, Ratio

Key = TypeVar("Key")


@dataclass
class Report:
    """Rows of one benchmark: what was measured, the other side, seconds of ours, seconds of the other side, ratio."""

    bench: str
    device: str
    rows: list[tuple[str, str, float, float, Ratio]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, other: str, ours_seconds: float, other_seconds: float, ratio: Ratio) -> None:
        """Add one comparison. `ratio` is the speed of ours relative to `other`: above 1, ours is faster."""
        self.rows.append((what, other, ours_seconds, other_seconds, ratio))
        self.seconds.setdefault(f"{what}_ours", ours_seconds)  # with several comparisons, seconds of the first
        self.seconds[f"{what}_{other}"] = other_seconds

    def note(self, **facts: Any) -> "Report":
        """Add facts other than ratios: numbers and names."""
        self.notes.update(facts)
        return self

    def summary(self) -> dict[str, Any]:
        """Returns one JSON object."""
        return {
            "bench": self.bench,
            "device": self.device,
            "ratios": {f"{what}_vs_{other}": ratio.median for what, other, _, _, ratio in self.rows},
            "seconds": self.seconds,
            "spread": {f"{what}_vs_{other}": [ratio.low, ratio.high] for what, other, _, _, ratio in self.rows},
            **self.notes,
        }

    def print_table(self, to_stderr: bool) -> None:
        """Print the table to stdout, or to stderr if stdout is reserved for the JSON line."""
        out = sys.stderr if to_stderr else sys.stdout
        width = max(len(row[0]) for row in self.rows)
        against = max(len(row[1]) for row in self.rows)
        print(f"{self.bench} on {self.device}", file=out)
        print(f"{'':<{width}}  {'against':<{against}}  {'ours':>10}  {'other':>10}  {'times faster (least to most)'}", file=out)
        for what, other, ours, others, ratio in self.rows:
            spread = f"{ratio.median:6.2f}  ({ratio.low:.2f} to {ratio.high:.2f})"
            print(f"{what:<{width}}  {other:<{against}}  {_time(ours):>10}  {_time(others):>10}  {spread}", file=out)
        for name, value in self.notes.items():
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}", file=out)
        out.flush()


def mixed(weights: Mapping[Key, float], seen: Mapping[Key, Comparison], other: str) -> tuple[float, float, Ratio]:
    """Combine comparisons of several cases, such as the patterns of a model, with the given weights.

    Returns (mean seconds of ours, mean seconds of the other side, ratio). For the ratio, the seconds of ours are the other
    side's seconds divided by each case's ratio, so that a slowdown of the machine between two cases has no effect.
    """
    total = sum(weights.values())
    ours, theirs = (sum(weights[key] * seen[key].seconds(side) for key in weights) / total for side in ("ours", other))
    cost = {key: weights[key] * seen[key].seconds(other) for key in weights}
    ratios = {key: seen[key].ratio("ours", other) for key in weights}

    def ratio(which: str) -> float:
        return sum(cost.values()) / sum(cost[key] / getattr(ratios[key], which) for key in cost)

    return ours, theirs, Ratio(ratio("median"), ratio("low"), ratio("high"))


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
