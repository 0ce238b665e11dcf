"""Whole parameters from a sharded checkpoint, without starting an engine."""

from pathlib import Path

import torch
from torch import Tensor


def whole_parameter(shards: list[Tensor], shape: torch.Size) -> Tensor:
    """Join flat ZeRO-3 shards in rank order; the last ones are padded so that all have one length.

    Raises ValueError where the shards are too short for `shape`.
    """
    flat = torch.cat([shard.flatten() for shard in shards])
    if flat.numel() < shape.numel():
        raise ValueError(f"shards hold {flat.numel()} values, a parameter of shape {tuple(shape)} needs {shape.numel()}")
    return flat[: shape.numel()].view(shape)


def trained_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Name -> fp32 parameter of a DeepSpeed ZeRO checkpoint folder: the weights themselves, not their average."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), checkpoint.name)
