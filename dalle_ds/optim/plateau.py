"""Halve the learning rate when the training loss stops falling, as the paper's authors did by hand (appendix B.2)."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import Field

from dalle_ds.recipes import Config


class PlateauConfig(Config):
    """Definition of a plateau. It uses an exponential moving average of the loss, since the loss of single updates is noisy."""

    smoothing: int = Field(1000, ge=1, description="time constant of the smoothed loss, in updates")
    patience: int = Field(5000, ge=1, description="updates without a new best smoothed loss that count as a plateau")
    min_improvement: float = Field(1e-3, ge=0, lt=1, description="relative improvement that counts as a new best")
    max_halvings: int = Field(5, ge=0, description="maximum number of halvings; the paper's run had five")


@dataclass
class PlateauState:
    """State for a resume. It is the same on every rank, since every rank sees the same losses."""

    smoothed: float | None = None
    best: float = math.inf
    since_best: int = 0
    halvings: list[int] = field(default_factory=list)
    """Updates at which the rate was halved."""


class Plateau:
    """Detects plateaus in the losses of a run."""

    def __init__(self, config: PlateauConfig) -> None:
        self.config = config
        self.state = PlateauState()

    @property
    def factor(self) -> float:
        """Factor to multiply the learning rate by."""
        return 0.5 ** len(self.state.halvings)

    def observe(self, update: int, loss: float) -> bool:
        """Record the loss of an update that took its step. Returns whether this halves the learning rate."""
        config, state = self.config, self.state
        if not math.isfinite(loss):
            return False
        if state.smoothed is None:
            state.smoothed = loss
        state.smoothed += (loss - state.smoothed) / config.smoothing
        if state.smoothed < state.best * (1 - config.min_improvement) or state.best == math.inf:
            state.best, state.since_best = state.smoothed, 0
            return False
        state.since_best += 1
        if state.since_best < config.patience or len(state.halvings) >= config.max_halvings:
            return False
        state.halvings.append(update)
        # after a halving the loss may fall again: restart the full patience, from the current smoothed loss
        state.best, state.since_best = state.smoothed, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = PlateauState(**state)
