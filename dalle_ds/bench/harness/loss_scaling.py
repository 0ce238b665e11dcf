"""The two ways to scale an fp16 training step: one loss scale for the whole model, or one for every residual block."""

import torch
from torch import Tensor

from dalle_ds.models.prior import Prior
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.precision.resblock_scaling import ResblockGradScaler, ResblockScalingConfig


class OneScale:
    """torch's dynamic loss scale: the loss is multiplied, all gradients are divided and checked in one pass."""

    def __init__(self, prior: Prior, power: float) -> None:
        use_fp16_branches(prior)
        self.scaler = torch.amp.GradScaler(prior.embed.row.device.type, init_scale=2.0**power, growth_interval=1000)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """Backward and update; whether it was taken."""
        before = self.scaler.get_scale()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before


class ScalePerBlock:
    """Ours: scaled edges in every block, one pass over its gradients; a non-finite one in any block skips the update."""

    def __init__(self, prior: Prior, config: ResblockScalingConfig) -> None:
        self.scaler = ResblockGradScaler(prior, config, prior.embed.row.device)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """Backward and update; whether it was taken."""
        loss.backward()
        self.scaler.unscale()
        is_finite = not self.scaler.found_nonfinite.any()
        if is_finite:
            optimizer.step()
        self.scaler.update(self.scaler.found_nonfinite)
        return is_finite
