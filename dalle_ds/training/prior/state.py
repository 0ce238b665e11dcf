"""Description of a prior run in its checkpoints: progress, identity, and what an export of the weights needs."""

from dataclasses import asdict, dataclass
from typing import Any

from dalle_ds.errors import ConfigError
from dalle_ds.models.prior import PriorConfig
from dalle_ds.optim.adamw import Master, Moments
from dalle_ds.parallel.saved_state import open_state
from dalle_ds.recipes import differing
from dalle_ds.sampling.export_record import MlflowRun
from dalle_ds.sampling.settings import PriorSamplingConfig
from dalle_ds.storage.record import Record


@dataclass
class TrainState:
    """Progress of a run. `update` is also the position in the data, because the reading order is a function of it.

    `update` counts all updates; `n_skipped` counts those without an optimizer step (a non-finite gradient). `seconds` is the
    training time over all starts.
    """

    update: int = 0
    n_skipped: int = 0
    seconds: float = 0.0

    def advance(self, took_step: bool, seconds: float) -> None:
        """Count an update. `seconds` is the training time of the run so far, over all starts."""
        self.update += 1
        self.n_skipped += not took_step
        self.seconds = seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def saved_update(folder: str) -> int:
    """The update of the state in the folder of a checkpoint's files."""
    return open_state(folder).state["client"]["train_state"]["update"]


class TrainedOn(Record):
    """A token data set of a run: its root, its weight in the mix, and its fingerprints."""

    dataset: str
    """URL, or absolute path: an export may run in another folder than the training."""
    weight: float
    data: str
    content: str


_IDENTITY = {  # of PriorAbout: what must not change in a run, and what a difference means
    "model": "model",
    "data": "data (dVAE, tokenizer, crops, or the weights of a mix)",
    "content": "content (samples of the data set were added, masked or encoded again)",
    "global_batch": "global_batch",
    "seed": "seed",
}


_SINCE_EARLIER_VERSIONS = ("weight_dtype", "fp16_branches", "caption_dropout", "master")
"""Fields of `PriorAbout` that are compared where a checkpoint has no `settings`."""


class PriorAbout(Record):
    """Description of a prior run in checkpoint.json."""

    model: PriorConfig
    data: str
    """Fingerprint of the data set. For a mix it includes the weights."""
    content: str
    """Fingerprint of the samples alone."""
    global_batch: int
    seed: int
    moments: Moments
    master: Master
    fp16_branches: bool
    weight_dtype: str
    """torch dtype of the weights in the engine, without "torch."."""
    caption_dropout: float
    dvae: str
    tokenizer: str
    sets: tuple[TrainedOn, ...]
    mlflow: MlflowRun | None = None
    sampling: PriorSamplingConfig | None = None
    """Settings that samples are meant for, which an export of the checkpoint carries. None: an earlier version's checkpoint."""
    settings: dict[str, Any] | None = None
    """The settings that a restart may change, although they change the numbers, by recipe key: `settings_of`. None: the
    checkpoint is of an earlier version."""

    def changes_since(self, saved: "PriorAbout") -> list[str]:
        """The settings that differ from those of a checkpoint, as "learning_rate.peak: before 0.005, now 0.001"."""
        if self.settings is None or saved.settings is None:
            before, now = ({key: getattr(one, key) for key in _SINCE_EARLIER_VERSIONS} for one in (saved, self))
        else:
            before, now = saved.settings, self.settings
        return [f"{key}: before {there}, now {here}" for key, there, here in differing(before, now)]

    def require_same_run(self, saved: "PriorAbout", checkpoint: str) -> None:
        """Raises ConfigError if `saved`, the description in the checkpoint, is of another run than this one."""
        different = [
            f"{what}: checkpoint {getattr(saved, key)!r}, recipe {getattr(self, key)!r}"
            for key, what in _IDENTITY.items()
            if getattr(saved, key) != getattr(self, key)
        ]
        if different:
            raise ConfigError(
                f"{checkpoint} was trained with other settings; use another folder, or restore what differs:\n  "
                + "\n  ".join(different)
            )
        if saved.moments != self.moments:
            raise ConfigError(
                f"{checkpoint} has {saved.moments} moments, but the recipe's optimizer.moments is {self.moments}: "
                f"set it to {saved.moments}"
            )
