"""All that a resumed prior run needs beside the engine's own files."""

from dataclasses import asdict, dataclass
from typing import Any

from dalle_ds.errors import ConfigError


@dataclass
class TrainState:
    """Progress of a run. The position in the data is `update` alone: the reading order is a function of it.

    `update` counts the attempts, `n_skipped` those without a step (a non-finite gradient).
    """

    update: int = 0
    n_skipped: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RunIdentity:
    """What must not change between a checkpoint and its resume, or the result would be of two different runs."""

    model: dict[str, Any]
    data: str
    content: str
    global_batch: int
    seed: int

    def require_same(self, saved: dict[str, Any], folder: str) -> None:
        """Raises ConfigError naming what differs from the checkpoint in `folder`."""
        now = asdict(self)
        different = [f"{key}: checkpoint {saved.get(key)!r}, recipe {now[key]!r}" for key in now if saved.get(key) != now[key]]
        if different:
            raise ConfigError(
                f"{folder} was trained with other settings; use another folder or the old settings:\n  "
                + "\n  ".join(different)
            )
