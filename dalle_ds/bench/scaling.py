"""How much slower is a training step with one gradient scale per residual block than with one loss scale for the model?"""

from collections.abc import Callable
from contextlib import nullcontext

from dalle_ds.bench.harness.loss_scaling import OneScale, ScalePerBlock
from dalle_ds.bench.harness.machine import machine_for
from dalle_ds.bench.harness.model import WEIGHT_DECAY, adamw, prior_to_train, random_loss
from dalle_ds.bench.harness.report import Report
from dalle_ds.bench.harness.settings import ScalingBenchConfig
from dalle_ds.bench.harness.timing import take_turns
from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import Prior
from dalle_ds.optim.groups import decay_groups
from dalle_ds.precision.resblock_scaling import ResblockScalingConfig


def run(settings: ScalingBenchConfig) -> Report:
    """Compare a training step (forward, loss, backward, AdamW) of the same prior with fp16 branches, scaled in the two ways."""
    config = ResblockScalingConfig()
    with machine_for(settings) as machine:
        steps = {}
        for side in ("global", "ours"):
            prior = prior_to_train(settings, machine)
            attention = use_attention(prior, "auto", machine.device)
            scaling = OneScale(prior, config.initial_scale_power) if side == "global" else ScalePerBlock(prior, config)
            steps[side] = scaled_step(prior, scaling, settings.batch)
        turns = take_turns(steps, "global", settings.rounds, machine.clock)
        report = Report("scaling", machine.name)
        report.note(attention=attention, n_layers=prior.config.n_layers, d_model=prior.config.d_model)
    report.add("step", "global", turns.seconds("ours"), turns.seconds("global"), turns.ratio("ours", "global"))
    return report


def scaled_step(prior: Prior, scaling: OneScale | ScalePerBlock, batch: int) -> Callable[[], None]:
    """Returns a function that trains `prior` on random tokens, one step per call."""
    loss, optimizer = random_loss(prior, batch, nullcontext()), adamw(decay_groups(prior.named_parameters(), WEIGHT_DECAY))

    def step() -> None:
        scaling.step(loss(), optimizer)
        optimizer.zero_grad()

    return step
