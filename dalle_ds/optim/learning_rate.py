"""Learning rate of the prior: linear warm-up, then either constant with halvings or half a cosine."""

from typing import Literal

from pydantic import Field, model_validator

from dalle_ds.optim.plateau import PlateauConfig
from dalle_ds.optim.schedules import half_cosine, linear_warmup
from dalle_ds.recipes import Config


class LearningRateConfig(Config):
    """Learning rate schedule. The paper's rate rose to 4.5e-4 over 5,000 updates.
    It was then halved five times, each time when the training loss stopped falling."""

    peak: float = Field(4.5e-4, gt=0, description="learning rate after the warm-up; the paper's")
    warmup_updates: int = Field(5000, ge=0, description="updates of the linear warm-up; the paper's")
    shape: Literal["constant", "cosine"] = Field(
        "constant",
        description="after the warm-up; constant: as in the paper, with halvings; cosine: half a cosine over the run",
    )
    halve_at: tuple[int, ...] = Field((), description="constant only: updates at which the rate is halved")
    plateau: PlateauConfig | None = Field(None, description="constant only: halve when the training loss flattens")
    final_fraction: float = Field(0.03125, ge=0, le=1, description="cosine only: last rate as a fraction of the peak")

    @model_validator(mode="after")
    def _check(self) -> "LearningRateConfig":
        if self.shape == "cosine" and self.halve_at:
            raise ValueError(f"halve_at is {list(self.halve_at)}, but shape is 'cosine': halve_at needs shape 'constant'")
        if self.shape == "cosine" and self.plateau is not None:
            raise ValueError("plateau is set, but shape is 'cosine': plateau needs shape 'constant'")
        return self

    def at(self, update: int, n_updates: int) -> float:
        """Learning rate for update number `update`, counted from 0, in a run of `n_updates`.
        Halvings by `plateau` are not included."""
        if update < self.warmup_updates:
            return self.peak * linear_warmup(update, self.warmup_updates)
        if self.shape == "constant":
            return self.peak * 0.5 ** sum(update >= at for at in self.halve_at)
        return half_cosine(
            update - self.warmup_updates, self.peak, self.peak * self.final_fraction, max(1, n_updates - self.warmup_updates)
        )
