"""What does a gradient scale for every residual block cost a training step, against one loss scale for the whole model?"""

from collections.abc import Callable
from contextlib import nullcontext

import torch

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


def run(settings: ScalingSettings) -> Report:
    """Forward, loss, backward and AdamW of the same prior with fp16 branches, scaled in the two ways."""
    with machine_for(settings) as machine:
        steps = {}
        for side, scaled in (("global", global_step), ("ours", per_resblock_step)):
            prior = prior_to_train(settings, machine)
            attention = use_attention(prior, "auto", machine.device)
            steps[side] = scaled(prior, settings.batch)
        turns = take_turns(steps, "global", settings.rounds, machine.clock)
        report = Report("scaling", machine.name)
        report.note(attention=attention, layers=prior.config.n_layers, d_model=prior.config.d_model)
    report.add("step", "global", turns.seconds("ours"), turns.seconds("global"), turns.ratio("ours", "global"))
    return report


def per_resblock_step(prior: Prior, batch: int) -> Callable[[], None]:
    """Scaled edges and un-scaling hooks in every block; a non-finite gradient of a block skips the update."""
    device = prior.embed.row.device
    scaler = BlockScaler(prior, BlockScalingConfig(), device)
    loss, optimizer = random_loss(prior, batch, nullcontext()), adamw(decay_groups(prior.named_parameters(), WEIGHT_DECAY))

    def step() -> None:
        loss().backward()
        if not scaler.found_nonfinite.any():
            optimizer.step()
        scaler.update(scaler.found_nonfinite)
        optimizer.zero_grad()

    return step


def global_step(prior: Prior, batch: int) -> Callable[[], None]:
    """torch's dynamic loss scale: the loss is multiplied, all gradients are divided and checked in one pass."""
    use_fp16_branches(prior)
    scaler = torch.amp.GradScaler(prior.embed.row.device.type, init_scale=2.0 ** BlockScalingConfig().initial_scale_power)
    loss, optimizer = random_loss(prior, batch, nullcontext()), adamw(decay_groups(prior.named_parameters(), WEIGHT_DECAY))

    def step() -> None:
        scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step
