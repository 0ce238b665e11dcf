"""What a prior run's checkpoint says of the run: how far it is, what it is, and what the export of its weights needs."""

from dataclasses import asdict, dataclass
from typing import Any

from dalle_ds.errors import ConfigError
from dalle_ds.models.prior import PriorConfig
from dalle_ds.optim.adamw import Master, Moments
from dalle_ds.sampling.export_record import MlflowRun
from dalle_ds.storage.record import Record


@dataclass
class TrainState:
    """Progress of a run. The position in the data is `update` alone: the reading order is a function of it.

    `update` counts the attempts, `n_skipped` those without a step (a non-finite gradient).
    """

    update: int = 0
    n_skipped: int = 0
    seconds: float = 0.0

    def advance(self, took_step: bool, seconds: float) -> None:
        """Count an update; `seconds` are those of the run in all."""
        self.update += 1
        self.n_skipped += not took_step
        self.seconds = seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TrainedOn(Record):
    """A token data set of a run: where it was, its part of the samples, and its fingerprints."""

    dataset: str
    weight: float
    data: str
    content: str


class PriorAbout(Record):
    """What checkpoint.json says of a prior."""

    model: PriorConfig
    data: str
    """Fingerprint of the data, of a mix with the weights."""
    content: str
    """Fingerprint of the samples alone."""
    global_batch: int
    seed: int
    moments: Moments
    master: Master
    fp16_branches: bool
    weight_dtype: str
    """Format of all weights in the engine, as torch names it."""
    caption_dropout: float
    dvae: str
    tokenizer: str
    sets: tuple[TrainedOn, ...]
    mlflow: MlflowRun | None = None

    def require_same_run(self, saved: "PriorAbout", checkpoint: str) -> None:
        """Raises ConfigError where going on from the checkpoint would make one result of two different runs."""
        different = [
            f"{key}: checkpoint {getattr(saved, key)!r}, recipe {getattr(self, key)!r}"
            for key in ("model", "data", "content", "global_batch", "seed")
            if getattr(saved, key) != getattr(self, key)
        ]
        if different:
            raise ConfigError(
                f"{checkpoint} was trained with other settings; use another folder or the old settings:\n  "
                + "\n  ".join(different)
            )
        if saved.moments != self.moments:
            raise ConfigError(
                f"{checkpoint} has {saved.moments} moments, but the recipe's optimizer.moments is {self.moments}: "
                f"set {saved.moments}"
            )
