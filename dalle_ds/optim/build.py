"""Build the AdamW optimizer for given settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dalle_ds.optim.adamw import LowBitAdamW, Master, Moments


@dataclass(frozen=True)
class OptimizerSettings:
    """Arguments of torch's AdamW, and the formats of moments and weights.

    `moments` "low_bit" selects `LowBitAdamW`, which also clips the variance.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    moments: Moments = "fp32"
    master: Master = "fp32"
    """With "none", the matrices of residual branches are fp16 without an fp32 master copy (`masterless`)."""


def build_adamw(groups: Sequence[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Build the optimizer. `groups` are parameter groups from `decay_groups`."""
    bare = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    adamw = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.moments == "low_bit":
        return LowBitAdamW(bare, **adamw)
    return torch.optim.AdamW(bare, **adamw, fused=True)
