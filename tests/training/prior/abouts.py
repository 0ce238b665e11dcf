"""Checkpoints without tensors: the description of a run and its commit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dalle_ds.models.prior import PriorConfig
from dalle_ds.parallel.checkpoint_layout import FlatGroup, Layout
from dalle_ds.parallel.checkpoint_tensors import ENGINE_FILE
from dalle_ds.storage.hashing import sha256_of_file
from dalle_ds.training.checkpoint_record import CheckpointRecord, CommittedFile
from dalle_ds.training.prior.state import PriorAbout


def about_of(**changes: Any) -> PriorAbout:
    """The description of an arbitrary prior run, with `changes`."""
    said: dict[str, Any] = {
        "model": PriorConfig(n_layers=1),
        "data": "d",
        "content": "c",
        "global_batch": 16,
        "seed": 0,
        "moments": "fp32",
        "master": "fp32",
        "fp16_branches": True,
        "weight_dtype": "float32",
        "caption_dropout": 0.0,
        "dvae": "v",
        "tokenizer": "t",
        "sets": (),
    }
    return PriorAbout(**{**said, **changes})


def commit(
    checkpoints: Path,
    update: int,
    about: PriorAbout,
    world_size: int = 1,
    attempt: str = "attempt",
    shapes: Mapping[str, torch.Size] | None = None,
) -> Path:
    """Commit the files of the attempt's folder, and the state's update. Returns the checkpoint's folder.

    Args:
        shapes: of the parameters in the state files, which are sharded as at ZeRO stage 3.
    """
    folder = checkpoints / f"update_{update:08d}"
    (folder / attempt).mkdir(parents=True, exist_ok=True)
    shapes = shapes or {}
    groups = [FlatGroup(partition=-(-shape.numel() // world_size), offsets={name: 0}) for name, shape in shapes.items()]
    state = {
        "client": {"train_state": {"update": update}},
        "world_size": world_size,
        "layout": Layout(n_shards=world_size, groups=tuple(groups), whole_averages=False).model_dump(),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "steps": {},
    }
    (folder / attempt / ENGINE_FILE).write_text(json.dumps(state))
    files = {
        f"{attempt}/{file.name}": CommittedFile(bytes=file.stat().st_size, sha256=sha256_of_file(file))
        for file in (folder / attempt).iterdir()
    }
    record = CheckpointRecord[PriorAbout](
        format=3, update=update, world_size=world_size, attempt=attempt, about=about, files=files
    )
    (folder / "checkpoint.json").write_bytes(record.to_json())
    return folder
