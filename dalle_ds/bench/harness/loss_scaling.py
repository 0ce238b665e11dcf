"""Two ways to scale an fp16 training step: one loss scale for the whole model, or one gradient scale per residual block."""

import torch
from torch import Tensor

from dalle_ds.models.prior import Prior
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.precision.resblock_scaling import ResblockGradScaler, ResblockScalingConfig


class OneScale:
    """torch's dynamic loss scale: the loss is multiplied by it, and one pass divides and checks all gradients."""

    def __init__(self, prior: Prior, power: float) -> None:
        use_fp16_branches(prior)
        self.scaler = torch.amp.GradScaler(prior.embed.row.device.type, init_scale=2.0**power, growth_interval=1000)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """Backward pass and update. Returns whether the update was taken."""
        before = self.scaler.get_scale()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before


class ScalePerBlock:
    """Ours: gradients are scaled on entering a block's branch and un-scaled on leaving it, and one pass un-scales and checks
    parameter gradients. A non-finite gradient in any block skips the update."""

    def __init__(self, prior: Prior, config: ResblockScalingConfig) -> None:
        self.scaler = ResblockGradScaler(prior, config, prior.embed.row.device)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """Backward pass and update. Returns whether the update was taken."""
        loss.backward()
        self.scaler.unscale()
        is_finite = not self.scaler.found_nonfinite.any()
        if is_finite:
            optimizer.step()
        self.scaler.update(self.scaler.found_nonfinite)
        return is_finite
