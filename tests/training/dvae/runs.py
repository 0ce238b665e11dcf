"""A small dVAE run and its raw shards, which contain unusable images."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dalle_ds.data.raw.shards import split_of
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.training.dvae.config import DVAERunConfig
from dalle_ds.training.dvae.trainer import DVAETrainer
from dalle_ds.training.image_run import raw_data
from dalle_ds.training.preemption import StopFlag
from dalle_ds.training.run import TrainingRun

KEYS = [f"{shard:02d}{n:03d}" for shard in range(3) for n in range(24)]
TRAIN_KEYS = [key for key in KEYS if split_of(key, 0.2) == "train"]
TOO_SMALL, DAMAGED = TRAIN_KEYS[3], TRAIN_KEYS[30]


def make_raw(root: Path, damaged: tuple[str, ...] = (DAMAGED,), noise: int = 0) -> Path:
    """Write three shards of drawn images, 48 pixels wide: a coloured disc or square on white. Returns the root.

    Args:
        noise: width of random pixels instead. 80: the shards are larger than the smallest window, so they are streamed.
    """
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for shard in range(3):
        with tarfile.open(root / f"{shard:02d}.tar", "w") as tar:
            for n in range(24):
                key = f"{shard:02d}{n:03d}"
                image = _noise(rng, noise) if noise else _draw(rng, side=12 if key == TOO_SMALL else 48)
                _add(tar, f"{key}.png", b"not an image" if key in damaged else image)
                _add(tar, f"{key}.json", json.dumps({"caption": f"thing {key}", "group": key}).encode())
    return root


def _noise(rng: np.random.Generator, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _draw(rng: np.random.Generator, side: int) -> bytes:
    y, x = np.mgrid[:side, :side] / side
    cy, cx, radius = *rng.uniform(0.35, 0.65, 2), rng.uniform(0.15, 0.35)
    inside = np.hypot(y - cy, x - cx) < radius if rng.random() < 0.5 else np.maximum(abs(y - cy), abs(x - cx)) < radius
    pixels = np.where(inside[..., None], rng.integers(0, 256, 3), 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def dvae_run(raw: Path, folder: Path, **changes: Any) -> DVAERunConfig:
    """A recipe that trains in seconds."""
    settings: dict[str, Any] = {
        "folder": str(folder),
        "data": {"raw": str(raw), "validation_fraction": 0.2},
        "model": {"image_size": 16, "n_groups": 2, "n_blk_per_group": 1, "n_hid": 16, "n_init": 16, "n_codes": 32},
        "optimizer": {"clip": 1.0},
        "schedules": {
            "tau": {"start": 1.0, "end": 0.0625, "updates": 60},
            "kl_weight": {"start": 0.0, "end": 0.2, "updates": 5},
        },
        "learning_rate": {"peak": 5e-3, "final": 1e-4, "decay_updates": 120},
        "loss": {"ln_b_min": -1.0, "usage_weight": 1.0},
        "ema": {"start": "warm"},
        "updates": 12,
        "global_batch": 8,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "checkpoint": {"every": 5},
        "validation": {"every": 100, "samples": 4096},
        "tracking": {"uri": f"sqlite:///{folder.parent}/mlflow.db", "every": 1},
    }
    return DVAERunConfig(**{**settings, **changes})


def trainer_of(recipe: DVAERunConfig, ranks: Ranks = ALONE) -> DVAETrainer:
    """A trainer without a run around it: no lock and no tracking."""
    return DVAETrainer(TrainingRun(Path(recipe.folder), ranks, StopFlag()), recipe, "test", raw_data(recipe.data.raw))
