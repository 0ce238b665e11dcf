"""The AdamW that settings ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dalle_ds.optim.adamw import LowBitAdamW, Master, Moments


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW as torch takes it, and the format of its moments: "low_bit" is `LowBitAdamW`, which also clips the variance."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    moments: Moments = "fp32"
    master: Master = "fp32"
    """ "none": the matrices of residual branches are fp16, and have no fp32 copy (`masterless`)."""


def build_adamw(groups: Sequence[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Of parameter groups as `decay_groups` makes them."""
    bare = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    adamw = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.moments == "low_bit":
        return LowBitAdamW(bare, **adamw)
    return torch.optim.AdamW(bare, **adamw, fused=True)
