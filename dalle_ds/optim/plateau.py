"""Halve the learning rate when the training loss stops falling, as the paper's authors did by hand (appendix B.2).

The loss of a good run falls like a power law until its end, so "no new best" never comes, or comes because of noise. The
paper's authors looked at the curve and knew how long the run would be. `Plateau` does the same. It fits a line to the recent
part of the curve, and forecasts how far the loss would fall at this slope in the rest of the run. The curve has flattened when
the forecast is below the fall that the curve shows, or below a part of the loss that nobody would wait for.

The curve of a rate begins where the loss has settled: a first quarter of its points is left out, in which the loss falls
quickly after the warm-up or a halving. The forecast takes the steepest slope that the noise allows, so noise is not taken for
a plateau. Instead a rate ends, at the latest, after a fixed part of the updates that were left when it began. With a part of
0.6, five halvings end 1 % before the end of the run; the rate then falls as a linear decay to zero does, in steps.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import Field, model_validator

from dalle_ds.recipes import Config

CONFIDENCE = 3.0
"""Standard errors that the forecast adds to the slope."""

MIN_POINTS = 8
"""Points of a rate's curve without its first quarter, from which it can be judged."""


class PlateauConfig(Config):
    """When the training loss counts as flat."""

    points: int = Field(
        430, ge=40, description="points of the smoothed curve: each is the mean loss of this part of the run's updates"
    )
    shortest: float = Field(0.2, gt=0, lt=1, description="a rate lasts for at least this part of the updates that are left")
    longest: float = Field(0.6, gt=0, lt=1, description="and for at most this part, though the loss still falls")
    negligible: float = Field(1e-3, ge=0, lt=1, description="part of the loss; a plateau if the rest of the run promises less")
    max_halvings: int = Field(5, ge=0, description="maximum number of halvings; the paper's run had five")

    @model_validator(mode="after")
    def _check(self) -> "PlateauConfig":
        if self.shortest > self.longest:
            raise ValueError(f"shortest is {self.shortest:g}, expected at most longest, which is {self.longest:g}")
        return self


@dataclass
class PlateauState:
    """State for a resume. It is the same on every rank, since every rank sees the same losses."""

    total: float = 0.0
    count: int = 0
    """Sum and number of the losses since the last point."""
    begin: int | None = None
    """Update at which the present rate began."""
    points: list[tuple[int, float]] = field(default_factory=list)
    """(update, mean loss) of the present rate."""
    halvings: list[int] = field(default_factory=list)
    """Updates at which the rate was halved."""


class Plateau:
    """Detects plateaus in the losses of a run."""

    def __init__(self, config: PlateauConfig, n_updates: int) -> None:
        """`n_updates`: length of the run."""
        self.config, self.n_updates = config, n_updates
        self.state = PlateauState()

    @property
    def factor(self) -> float:
        """Factor to multiply the learning rate by."""
        return 0.5 ** len(self.state.halvings)

    def observe(self, update: int, loss: float) -> bool:
        """Record the loss of an update that took its step. Returns whether this halves the learning rate."""
        state = self.state
        if not math.isfinite(loss):
            return False
        if state.begin is None:
            state.begin = update - 1
        state.total, state.count = state.total + loss, state.count + 1
        if state.count * self.config.points < self.n_updates:
            return False
        state.points.append((update, state.total / state.count))
        state.total, state.count = 0.0, 0
        if len(state.halvings) >= self.config.max_halvings or not self._is_over(update, state.begin):
            return False
        state.halvings.append(update)
        state.begin, state.points = update, []
        return True

    def _is_over(self, update: int, begin: int) -> bool:
        lasted, left = update - begin, self.n_updates - begin
        if lasted < self.config.shortest * left:
            return False
        return lasted >= self.config.longest * left or self._is_flat(update)

    def _is_flat(self, update: int) -> bool:
        curve = self.state.points[len(self.state.points) // 4 :]
        if len(curve) < MIN_POINTS:
            return False
        slope, error = _line(curve[len(curve) // 2 :])
        forecast = (CONFIDENCE * error - slope) * (self.n_updates - update)
        quarter = len(curve) // 4
        first, last = (sum(loss for _, loss in part) / quarter for part in (curve[:quarter], curve[-quarter:]))
        fallen = (first - last) * len(curve) / (len(curve) - quarter)  # the means lie a quarter of the curve inside its ends
        return forecast <= max(fallen, self.config.negligible * abs(last))

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = PlateauState(**{**state, "points": [(int(update), float(loss)) for update, loss in state["points"]]})


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Slope of the line through the points (least squares) per update, and its standard error."""
    n = len(points)
    x_mean, y_mean = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    residuals = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in points)
    return slope, math.sqrt(residuals / (n - 2) / spread)
