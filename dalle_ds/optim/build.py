"""Build the AdamW optimizer for given settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dalle_ds.optim.adamw import VARIANCE_CLIP, ClippedAdamW, Master, Moments


@dataclass(frozen=True)
class OptimizerSettings:
    """Arguments of torch's AdamW, the clip of the variance, and the formats of moments and weights."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    moments: Moments = "fp32"
    master: Master = "fp32"
    """With "none", the matrices of residual branches are fp16 without an fp32 master copy (`masterless`)."""
    variance_clip: float = VARIANCE_CLIP
    embedding_rate: float = 1.0
    """Learning rate of embeddings, positions, pads and unembeddings, relative to that of the other parameters."""


def build_adamw(groups: Sequence[dict[str, Any]], settings: OptimizerSettings) -> ClippedAdamW:
    """Build the optimizer. `groups` are parameter groups from `decay_groups`."""
    bare = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return ClippedAdamW(
        bare, settings.lr, settings.betas, settings.eps, variance_clip=settings.variance_clip, moments=settings.moments
    )
