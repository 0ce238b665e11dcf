"""All that a resumed prior run needs beside DeepSpeed's own files."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.optim.averaging import WeightAverage
from dalle_ds.parallel.ranks import Ranks


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

    def require_same(self, saved: dict[str, Any], folder: Path) -> None:
        """Raises ConfigError naming what differs from the checkpoint in `folder`."""
        now = asdict(self)
        different = [f"{key}: checkpoint {saved.get(key)!r}, recipe {now[key]!r}" for key in now if saved.get(key) != now[key]]
        if different:
            raise ConfigError(
                f"{folder} was trained with other settings; use another folder or the old settings:\n  "
                + "\n  ".join(different)
            )


def save_average(average: WeightAverage, folder: Path, ranks: Ranks) -> None:
    """This rank's shards of the averaged weights."""
    save_file(
        average.averages, folder / average_file(ranks.rank, ranks.world_size), metadata={"n_updates": str(average.n_updates)}
    )


def load_average(average: WeightAverage, folder: Path, n_updates: int, ranks: Ranks) -> None:
    """Raises DataError where the file is not of this model."""
    saved = load_file(folder / average_file(ranks.rank, ranks.world_size))
    try:
        average.load_state_dict({"n_updates": n_updates, "average": saved})
    except ValueError as error:
        raise DataError(f"averaged weights in {folder}: {error}") from None


def average_file(rank: int, world_size: int) -> str:
    """Name of a rank's file of averaged shards."""
    return f"average-{rank:05d}-of-{world_size:05d}.safetensors"
