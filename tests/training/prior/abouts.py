"""Checkpoints without tensors: the description of a run and its commit."""

from pathlib import Path
from typing import Any

from dalle_ds.models.prior import PriorConfig
from dalle_ds.training.checkpoint import CheckpointRecord
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


def commit(checkpoints: Path, update: int, about: PriorAbout, world_size: int = 1, attempt: str = "attempt") -> Path:
    """Write a checkpoint that contains only its commit. Returns its folder."""
    folder = checkpoints / f"update_{update:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    record = CheckpointRecord[PriorAbout](
        format=2, update=update, world_size=world_size, attempt=attempt, about=about, files={}
    )
    (folder / "checkpoint.json").write_bytes(record.to_json())
    return folder
