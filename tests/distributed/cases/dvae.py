"""dVAE test cases that run on every rank: a whole run, and the rest of a run that was stopped and killed."""

import sys
from pathlib import Path
from typing import Any

from pytest import MonkeyPatch

from dalle_ds.commands.job import on_all_ranks
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.tracking.tracker import NullTracker
from dalle_ds.training import run as training_run
from dalle_ds.training.dvae.config import DVAERunConfig
from dalle_ds.training.dvae.trainer import DVAETrainer, train_dvae
from tests.training.dvae.runs import dvae_run


def recipe(home: Path, name: str) -> DVAERunConfig:
    """A run with four micro-batches per update. eps is large, since Adam
    would turn gradients that are only rounding errors into full steps."""
    return dvae_run(
        home / "raw",
        home / name,
        micro_batch=2,
        updates=40,
        checkpoint={"every": 4},
        validation={"every": 15, "samples": 4096},
        optimizer={"clip": 1.0, "eps": 1e-3},
        tracking={"uri": "http://127.0.0.1:9", "every": 1},
    )


def from_clusters(home: Path, name: str) -> DVAERunConfig:
    """The same, but the codebook starts from clusters after six updates."""
    settings = {**recipe(home, name).model_dump(), "updates": 10, "codebook_start": {"updates": 6, "cells": 1000}}
    return DVAERunConfig(**settings)


def trained(run: DVAERunConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Train without MLflow. Returns the report, and (update, loss, gradient norm, unusable images so far) of every update."""
    seen: list[tuple[int, float, float, float]] = []
    step = DVAETrainer._step

    def recording(self: DVAETrainer, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        metrics, stop_requested = step(self, stop_requested)
        names = ("loss/train/total", "optimizer/gradient_norm", "data/unusable_images")
        seen.append((self.update, *(float(metrics[name]) for name in names)))
        return metrics, stop_requested

    with MonkeyPatch.context() as patch:
        patch.setattr(DVAETrainer, "_step", recording)
        patch.setattr(training_run.Tracker, "start", classmethod(lambda *_a, **_k: NullTracker()))
        return {**train_dvae(run, ranks), "seen": seen}


if __name__ == "__main__":
    home = Path(sys.argv[1])

    def runs(ranks: Ranks) -> dict[str, Any]:
        done = {name: trained(recipe(home, name), ranks) for name in ("whole", "killed")}
        return {**done, "clusters": trained(from_clusters(home, "clusters"), ranks)}

    on_all_ranks(runs, as_json=True)
