"""What does a gradient scale for every residual block cost a training step, against one loss scale for the whole model?"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from dalle_ds.bench.machine import machine_for
from dalle_ds.bench.model import WEIGHT_DECAY, adamw, prior_to_train, random_loss
from dalle_ds.bench.report import Report
from dalle_ds.bench.settings import ScalingSettings
from dalle_ds.bench.timing import take_turns
from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import Prior
from dalle_ds.optim.groups import decay_groups
from dalle_ds.precision.block_scaling import BlockScaler, BlockScalingConfig
from dalle_ds.precision.half import use_fp16_branches


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

    def __init__(self, prior: Prior, config: BlockScalingConfig) -> None:
        self.scaler = BlockScaler(prior, config, prior.embed.row.device)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """Backward and update; whether it was taken."""
        loss.backward()
        self.scaler.unscale()
        is_finite = not self.scaler.found_nonfinite.any()
        if is_finite:
            optimizer.step()
        self.scaler.update(self.scaler.found_nonfinite)
        return is_finite


def run(settings: ScalingSettings) -> Report:
    """Forward, loss, backward and AdamW of the same prior with fp16 branches, scaled in the two ways."""
    config = BlockScalingConfig()
    with machine_for(settings) as machine:
        steps = {}
        for side in ("global", "ours"):
            prior = prior_to_train(settings, machine)
            attention = use_attention(prior, "auto", machine.device)
            scaling = OneScale(prior, config.initial_scale_power) if side == "global" else ScalePerBlock(prior, config)
            steps[side] = scaled_step(prior, scaling, settings.batch)
        turns = take_turns(steps, "global", settings.rounds, machine.clock)
        report = Report("scaling", machine.name)
        report.note(attention=attention, layers=prior.config.n_layers, d_model=prior.config.d_model)
    report.add("step", "global", turns.seconds("ours"), turns.seconds("global"), turns.ratio("ours", "global"))
    return report


def scaled_step(prior: Prior, scaling: OneScale | ScalePerBlock, batch: int) -> Callable[[], None]:
    """Train `prior` on random tokens, a step at each call."""
    loss, optimizer = random_loss(prior, batch, nullcontext()), adamw(decay_groups(prior.named_parameters(), WEIGHT_DECAY))

    def step() -> None:
        scaling.step(loss(), optimizer)
        optimizer.zero_grad()

    return step
