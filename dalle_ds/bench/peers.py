"""How do training step and sampling compare with the package dalle-pytorch at the same depth, width and sequence?

Its layers differ from ours in more than attention: a gated MLP with half as many parameters again, rotary positions, token
shift. So a ratio shows what a user gets, not what one kernel gains. The report has the number of parameters of both.

The package is measured in two forms. `peer_axial` has axial_row and axial_col where the paper has row and column layers, and
axial_row as its last layer. `peer_conv` has conv_like (5x5) as its last layer, which is very slow.
"""

from collections.abc import Callable

import torch

from dalle_ds.bench.harness.decoding import OurSampler, Sampler, position_weights
from dalle_ds.bench.harness.machine import Machine, in_precision, machine_for
from dalle_ds.bench.harness.memory import in_fresh_process, peak_bytes
from dalle_ds.bench.harness.model import build_prior, prior_step
from dalle_ds.bench.harness.peer_package import PeerSampler, build_peer, import_peer, peer_step
from dalle_ds.bench.harness.report import Report, mixed
from dalle_ds.bench.harness.settings import PeersBenchConfig
from dalle_ds.bench.harness.timing import take_turns
from dalle_ds.console import progress
from dalle_ds.models.attention import use_attention

PEER = "dalle-pytorch 1.6.6"
FORMS = ("peer_axial", "peer_conv")


def run(settings: PeersBenchConfig) -> Report:
    """Compare a training step (forward, loss, backward, AdamW) and its peak memory, and sampling with each side's own cache.

    Raises:
        UserError: the package is not installed.
    """
    import_peer()
    with machine_for(settings) as machine:
        report = Report("peers", machine.name)
        report.note(peer=PEER, n_layers=settings.n_layers, d_model=settings.n_heads * settings.d_head)
        _compare_steps(settings, machine, report)
        _compare_sampling(settings, machine, report)
    for side in ("ours", *FORMS):
        report.note(**{f"step_peak_mib_{side}": in_fresh_process(step_peak_bytes, settings, side) / 2**20})
    return report


def step_peak_bytes(settings: PeersBenchConfig, side: str) -> int:
    """Returns the peak bytes of the first training step above the model's memory: activations, gradients, AdamW's moments."""
    with machine_for(settings) as machine:
        step, _ = _training(settings, machine, side)
        return peak_bytes(step, machine.device)


def _training(settings: PeersBenchConfig, machine: Machine, side: str) -> tuple[Callable[[], None], int]:
    """Returns the training step of one side, and the number of parameters of its layers."""
    if side == "ours":
        model = build_prior(settings, machine, settings.n_layers, settings.n_heads)
        use_attention(model, "auto", machine.device)
        step = prior_step(model, settings.batch, in_precision(model, settings.dtype, machine.device))
        layers = model.layers
    else:
        model = build_peer(settings, machine, conv=side == "peer_conv", cached=False)
        step = peer_step(model, settings.batch, in_precision(model, settings.dtype, machine.device))
        layers = model.transformer
    return step, sum(parameter.numel() for parameter in layers.parameters() if parameter.requires_grad)


def _compare_steps(settings: PeersBenchConfig, machine: Machine, report: Report) -> None:
    steps = {}
    for side in ("ours", *FORMS):
        steps[side], n_parameters = _training(settings, machine, side)
        report.note(**{f"n_parameters_of_layers_{side}": n_parameters})
    turns = take_turns(steps, "ours", settings.rounds, machine.clock)
    for form in FORMS:
        report.add("step", form, turns.seconds("ours"), turns.seconds(form), turns.ratio("ours", form))


@torch.inference_mode()
def _compare_sampling(settings: PeersBenchConfig, machine: Machine, report: Report) -> None:
    prior = build_prior(settings, machine, settings.n_layers, settings.n_heads)
    samplers: dict[str, Sampler] = {"ours": OurSampler(prior, 1, settings.images)}
    for form in FORMS:
        peer = build_peer(settings, machine, conv=form == "peer_conv", cached=True)
        samplers[form] = PeerSampler(peer, settings.images)
    seen = {}
    for position in progress(settings.positions, what="sampling", unit="position"):
        for sampler in samplers.values():
            sampler.go_to(position)
        steps = {side: sampler.step for side, sampler in samplers.items()}
        seen[position] = take_turns(steps, "ours", settings.rounds, machine.clock)
    weights = position_weights(settings.positions, settings.grid**2)
    for form in FORMS:
        ours_seconds, peer_seconds, ratio = mixed(weights, seen, form)
        report.add("token", form, ours_seconds, peer_seconds, ratio)
        report.note(**{f"tokens_per_second_{form}": settings.images / peer_seconds})
        report.note(tokens_per_second_ours=settings.images / ours_seconds)
