"""Halve the learning rate where the training loss stops falling, as the paper's authors did by hand (appendix B.2)."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import Field

from dalle_ds.recipes import Config


class PlateauConfig(Config):
    """When a plateau is one. The loss of single updates is noise; an exponential mean of it is watched."""

    smoothing: int = Field(1000, ge=1, description="updates over which the loss is averaged (time constant)")
    patience: int = Field(5000, ge=1, description="updates without a new best smoothed loss that make a plateau")
    min_improvement: float = Field(1e-3, ge=0, lt=1, description="a new best is lower by this share of the old one")
    max_halvings: int = Field(5, ge=0, description="the paper's run had five")


@dataclass
class PlateauState:
    """What a resume needs. The same on every rank, since every rank sees the same losses."""

    smoothed: float | None = None
    best: float = math.inf
    since_best: int = 0
    halvings: list[int] = field(default_factory=list)
    """Updates at which the rate was halved."""


class Plateau:
    """Watches the losses of a run."""

    def __init__(self, config: PlateauConfig) -> None:
        self.config = config
        self.state = PlateauState()

    @property
    def factor(self) -> float:
        """Of the learning rate."""
        return 0.5 ** len(self.state.halvings)

    def observe(self, update: int, loss: float) -> bool:
        """Take in the loss of an update that took its step; whether the rate has just been halved."""
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
        # a lower rate starts a new slope: it gets the full patience again, measured from where the loss is now
        state.best, state.since_best = state.smoothed, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = PlateauState(**state)
