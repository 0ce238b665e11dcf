"""Schedules: pure functions of the update number, so that a resume needs no state of them."""

import math

from pydantic import Field, field_validator

from dalle_ds.recipes import Config


class HalfCosineConfig(Config):
    """Moves from `start` to `end` along half a cosine over `updates`, then stays at `end` (paper, appendix A: no restarts)."""

    start: float = Field(description="value at update 0")
    end: float = Field(description="value from update `updates` on")
    updates: int = Field(description="updates of the half cosine; 0: constant at `end`")

    @field_validator("updates")
    @classmethod
    def _check_updates(cls, updates: int) -> int:
        if updates < 0:
            raise ValueError(f"updates is {updates}, expected 0 (constant at `end`) or more")
        return updates

    def at(self, update: int) -> float:
        """Value at update number `update`, counted from 0."""
        return half_cosine(update, self.start, self.end, self.updates)


def half_cosine(update: int, start: float, end: float, updates: int) -> float:
    """end + (start - end) (1 + cos(pi min(t, T) / T)) / 2 with t = `update` and T = `updates`."""
    if update >= updates:
        return end
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * update / updates))


def linear_warmup(update: int, updates: int) -> float:
    """Factor of the learning rate: 1/updates at update 0, and 1 from update `updates` - 1 on.
    It is never 0, which would waste an update."""
    return min(1.0, (update + 1) / updates) if updates > 0 else 1.0
