"""dVAE and CLIP on a data set that is streamed: each rank writes what it has read and lost. Killed after the first checkpoint.

python streams.py HOME NAME [UPDATES]       the run HOME/NAME, killed after UPDATES
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pytest import MonkeyPatch

from dalle_ds.commands.job import on_all_ranks
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.tracking.tracker import NullTracker
from dalle_ds.training import run as training_run
from dalle_ds.training.clip.config import ClipRunConfig
from dalle_ds.training.clip.trainer import ClipTrainer, train_clip
from dalle_ds.training.dvae.config import DVAERunConfig
from dalle_ds.training.dvae.trainer import DVAETrainer, train_dvae
from tests.training.dvae.runs import dvae_run

UPDATES, EVERY = 10, 4


def dvae_recipe(home: Path, name: str) -> DVAERunConfig:
    return dvae_run(
        home / "raw",
        home / name / "dvae",
        data={"raw": str(home / "raw"), "validation_fraction": 0.2, "window_mb": 1, "decoders": 0},
        global_batch=6,
        micro_batch=1,
        updates=UPDATES,
        checkpoint={"every": EVERY},
        optimizer={"clip": 1.0, "eps": 1e-3},
    )


def clip_recipe(home: Path, name: str) -> ClipRunConfig:
    return ClipRunConfig(
        folder=str(home / name / "clip"),
        data={
            "raw": str(home / "raw"),
            "validation_fraction": 0.2,
            "window_mb": 1,
            "streams": 6,
            "decoders": 0,
            "damaged_copies": True,
        },
        model={"image_size": 16, "width": 32, "n_heads": 2, "n_image_layers": 1, "n_text_layers": 1, "vocab_size": 600},
        updates=UPDATES,
        global_batch=12,
        device="cpu",
        threads=1,
        checkpoint={"every": EVERY},
    )


class Killed(BaseException):
    """In place of SIGKILL."""


def trained(home: Path, name: str, n_updates: int = UPDATES, ranks: Ranks = ALONE) -> dict[str, list[Any]]:
    """Train both, to the end or until `n_updates`. Returns, by stage: (update, loss, hashes of this rank's images)."""
    seen: dict[str, list[Any]] = {"dvae": [], "clip": []}

    def recording(trainer: Any, stream: str, pixels: str) -> Any:
        step = trainer._step

        def recorded(self: Any, stop_requested: bool) -> Any:
            if self.update == n_updates:
                raise Killed
            batches, last = getattr(self, stream), []

            class Watched:
                wait_seconds = 0.0

                def __next__(self) -> Any:
                    last.append(next(batches))
                    return last[-1]

            setattr(self, stream, Watched())
            metrics, stop_requested = step(self, stop_requested)
            setattr(self, stream, batches)
            images = np.asarray(getattr(last[0], pixels))
            hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
            seen[trainer.stage].append((self.update, float(metrics["loss/train/total"]), hashes))
            return metrics, stop_requested

        return recorded

    with MonkeyPatch.context() as patch:
        patch.setattr(DVAETrainer, "_step", recording(DVAETrainer, "stream", "images_BCHW"))
        patch.setattr(ClipTrainer, "_step", recording(ClipTrainer, "batches", "images_bHWC"))
        patch.setattr(training_run.Tracker, "start", classmethod(lambda *_a, **_k: NullTracker()))
        for train, recipe in ((train_dvae, dvae_recipe), (train_clip, clip_recipe)):
            try:
                train(recipe(home, name), ranks)
            except Killed:
                ranks.barrier()
    return seen


if __name__ == "__main__":
    home, name, n_updates = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

    def run(ranks: Ranks) -> dict[str, Any]:
        seen = trained(home, name, n_updates, ranks)
        (home / f"{name}-{n_updates}-{ranks.rank}.json").write_text(json.dumps(seen))
        return {}

    on_all_ranks(run, as_json=True)
