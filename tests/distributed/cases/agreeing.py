"""Ranks among which one fails: python agreeing.py FOLDER RAW EXPORT"""

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_ds.data.raw.shards import list_raw_shards
from dalle_ds.errors import StoreUnreachable, UserError
from dalle_ds.parallel.ranks import Ranks, join, leave
from dalle_ds.sampling.export import load_export
from dalle_ds.sampling.folder import SampleFolder
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.settings import SamplingConfig
from dalle_ds.storage.hashing import sha256_of_bytes
from dalle_ds.storage.record import Record
from dalle_ds.training import validation_set
from dalle_ds.training.checkpoint import CheckpointStore
from dalle_ds.training.dvae.data import validation_images
from tests.training.dvae.runs import dvae_run

FAILING = 1
AWAY = "cannot read s3://bucket/a: tried for 0 s"


class Said(Record):
    """Of a run's checkpoints."""


@dataclass(frozen=True)
class Counted(Ranks):
    """Ranks that note the bytes of what others sent to this one."""

    received: list[int] = field(default_factory=list)

    def gather_objects(self, value: Any) -> list[Any]:
        return self._noted(super().gather_objects(value))

    def from_main(self, value: Any) -> Any:
        return self._noted(super().from_main(value))

    def _noted(self, found: Any) -> Any:
        self.received.append(len(pickle.dumps(found)))
        return found


def error_of(action: Callable[[], object]) -> list[Any]:
    try:
        action()
    except UserError as error:
        return [type(error).__name__, str(error), error.exit_code]
    return []


def fail_on(ranks: Ranks, rank: int = FAILING) -> None:
    if ranks.rank == rank:
        raise StoreUnreachable(AWAY, url="s3://bucket/a")


def save(ranks: Ranks, folder: Path) -> None:
    store = CheckpointStore(folder, Said, keep=1)
    store.begin(1, lambda _: fail_on(ranks), Said(), ranks)
    store.finish(ranks)


def sample(ranks: Ranks, export: str, out: Path) -> None:
    SampleFolder(load_export(export), Request(("A square.",), SamplingConfig()), out).run(ranks)


def main(folder: Path, raw: Path, export: str) -> None:
    joined = join()
    ranks = Counted(joined.rank, joined.world_size, joined.device)
    run, shards = dvae_run(raw, folder), list_raw_shards(raw)
    told = {
        "each": error_of(lambda: ranks.each(lambda: fail_on(ranks))),
        "save": error_of(lambda: save(ranks, folder / "checkpoints")),
        "finished": error_of(lambda: sample(ranks, export, folder / "finished")),
        "begun": error_of(lambda: sample(ranks, export, folder / "begun")),
    }
    ranks.received.clear()
    images = validation_images(run, shards, folder / "whole", ranks)
    told["images"] = [sha256_of_bytes(images.numpy().tobytes()), images.nbytes, max(ranks.received)]
    held_out = validation_set._held_out

    def failing(*arguments: Any) -> Any:
        fail_on(ranks)
        return held_out(*arguments)

    validation_set._held_out = failing
    told["validation"] = error_of(lambda: validation_images(run, shards, folder / "failed", ranks))
    (folder / f"{ranks.rank}.json").write_text(json.dumps(told))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
