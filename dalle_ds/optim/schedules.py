"""Schedules: pure functions of the update number, so that a resumed run needs no state to go on with them."""

import math

from pydantic import field_validator

from dalle_ds.recipes import Config


class HalfCosineConfig(Config):
    """From `start` to `end` along half a cosine over `updates`; after that `end` holds (paper, appendix A: no restarts)."""

    start: float
    end: float
    updates: int

    @field_validator("updates")
    @classmethod
    def _check_updates(cls, updates: int) -> int:
        if updates < 0:
            raise ValueError(f"{updates} updates, expected 0 (constant at `end`) or more")
        return updates

    def at(self, update: int) -> float:
        """The value for update number `update`, counted from 0."""
        return half_cosine(update, self.start, self.end, self.updates)


def half_cosine(update: int, start: float, end: float, updates: int) -> float:
    """end + (start - end) (1 + cos(pi min(t, T) / T)) / 2."""
    if update >= updates:
        return end
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * update / updates))


def linear_warmup(update: int, updates: int) -> float:
    """Factor for a step size: 1/updates at update 0, 1 from update `updates` - 1 on. Never 0: that would waste an update."""
    return min(1.0, (update + 1) / updates) if updates > 0 else 1.0
