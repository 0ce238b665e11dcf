"""How do training step and sampling compare with packages that users might take instead, at the same depth, width and sequence?

- dalle-pytorch, an open DALL-E. Its layers differ from ours in more than attention: a gated MLP with half as many parameters
  again, rotary positions, token shift. It is measured in two forms. `peer_axial` has axial_row and axial_col where the paper
  has row and column layers, and axial_row as its last layer. `peer_conv` has conv_like (5x5) as its last layer: very slow.
- GPT-2 of transformers, `gpt2`: dense causal attention by torch's SDPA, one vocabulary for text and codes, sampling by
  `generate`.

So a ratio shows what a user gets, not what one kernel gains. The report has the number of parameters of all.
"""

from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from dalle_ds.bench.harness.decoding import OurSampler, Sampler, position_weights
from dalle_ds.bench.harness.gpt2 import Gpt2Sampler, build_gpt2, gpt2_step, import_transformers, layers_of
from dalle_ds.bench.harness.machine import Machine, in_precision, machine_for
from dalle_ds.bench.harness.memory import in_fresh_process, peak_bytes
from dalle_ds.bench.harness.model import build_prior, prior_step
from dalle_ds.bench.harness.peer_package import PeerSampler, build_peer, import_peer, peer_step
from dalle_ds.bench.harness.report import Report, mixed
from dalle_ds.bench.harness.settings import PeersBenchConfig
from dalle_ds.bench.harness.timing import take_turns
from dalle_ds.console import progress
from dalle_ds.models.attention import use_attention
from dalle_ds.sampling.generate import generate

FORMS = {"dalle-pytorch": ("peer_axial", "peer_conv"), "gpt2": ("gpt2",)}
"""The sides that each peer is measured in."""


def run(settings: PeersBenchConfig) -> Report:
    """Compare a training step (forward, loss, backward, AdamW) and its peak memory, and sampling with each side's own cache.

    Raises:
        UserError: a package is not installed.
    """
    imports = {"dalle-pytorch": import_peer, "gpt2": import_transformers}
    for peer in settings.peers:
        imports[peer]()
    sides = ("ours", *(form for peer in settings.peers for form in FORMS[peer]))
    with machine_for(settings) as machine:
        report = Report("peers", machine.name)
        report.note(n_layers=settings.n_layers, d_model=settings.n_heads * settings.d_head)
        for package in ("dalle-pytorch", "transformers"):
            with suppress(PackageNotFoundError):
                report.note(**{package: version(package)})
        for grid in progress(settings.grids, what="peers", unit="grid"):
            _compare_steps(settings, machine, report, grid, sides)
            if settings.sampling:
                _compare_tokens(settings, machine, report, grid, [side for side in sides if side.startswith("peer_")])
                _compare_images(settings, machine, report, grid, "gpt2" in sides)
    for grid in settings.grids:
        for side in sides:
            peak = in_fresh_process(step_peak_bytes, settings, grid, side)
            report.note(**{f"step_peak_mib_grid{grid}_{side}": peak / 2**20})
    return report


def step_peak_bytes(settings: PeersBenchConfig, grid: int, side: str) -> int:
    """Returns the peak bytes of the first training step above the model's memory: activations, gradients, AdamW's moments."""
    with machine_for(settings) as machine:
        step, _ = training_of(settings, machine, grid, side)
        return peak_bytes(step, machine.device)


def training_of(settings: PeersBenchConfig, machine: Machine, grid: int, side: str) -> tuple[Callable[[], None], int]:
    """Returns the training step of one side, and the number of parameters of its layers."""
    size, batch, depth = settings.prior_of(grid), settings.batch, (settings.n_layers, settings.n_heads)
    if side == "ours":
        model = build_prior(size, machine, *depth)
        use_attention(model, "auto", machine.device)
        step = prior_step(model, batch, in_precision(model, settings.dtype, machine.device))
        layers = model.layers
    elif side == "gpt2":
        model = build_gpt2(size, machine, *depth)
        step = gpt2_step(model, size, batch, in_precision(model, settings.dtype, machine.device))
        layers = layers_of(model)
    else:
        model = build_peer(size, machine, *depth, conv=side == "peer_conv", cached=False)
        step = peer_step(model, batch, in_precision(model, settings.dtype, machine.device))
        layers = model.transformer
    return step, sum(parameter.numel() for parameter in layers.parameters() if parameter.requires_grad)


def _compare_steps(settings: PeersBenchConfig, machine: Machine, report: Report, grid: int, sides: tuple[str, ...]) -> None:
    steps = {}
    for side in sides:
        steps[side], n_parameters = training_of(settings, machine, grid, side)
        report.note(**{f"n_parameters_of_layers_{side}": n_parameters})
    turns = take_turns(steps, "ours", settings.rounds, machine.clock)
    for side in sides[1:]:
        report.add(f"step_grid{grid}", side, turns.seconds("ours"), turns.seconds(side), turns.ratio("ours", side))


@torch.inference_mode()
def _compare_tokens(settings: PeersBenchConfig, machine: Machine, report: Report, grid: int, forms: list[str]) -> None:
    """Compare single tokens at the start, the middle and the end of an image, because dalle-pytorch takes hours for images."""
    if not forms:
        return
    size, depth = settings.prior_of(grid), (settings.n_layers, settings.n_heads)
    prior = build_prior(size, machine, *depth)
    samplers: dict[str, Sampler] = {"ours": OurSampler(prior, 1, settings.images)}
    for form in forms:
        peer = build_peer(size, machine, *depth, conv=form == "peer_conv", cached=True)
        samplers[form] = PeerSampler(peer, settings.images)
    seen = {}
    positions = positions_in(grid**2, steps=2 + len(forms) * settings.rounds)
    for position in progress(positions, what="sampling", unit="position"):
        for sampler in samplers.values():
            sampler.go_to(position)
        steps = {side: sampler.step for side, sampler in samplers.items()}
        seen[position] = take_turns(steps, "ours", settings.rounds, machine.clock)
    weights = position_weights(positions, grid**2)
    for form in forms:
        ours_seconds, peer_seconds, ratio = mixed(weights, seen, form)
        report.add(f"token_grid{grid}", form, ours_seconds, peer_seconds, ratio)


def positions_in(n_image: int, steps: int) -> list[int]:
    """Returns image positions at the start, the middle and the end, from each of which `steps` tokens can be sampled."""
    last = max(0, n_image - 1 - steps)
    return sorted({min(8, last), last // 2, last})


@torch.inference_mode()
def _compare_images(settings: PeersBenchConfig, machine: Machine, report: Report, grid: int, with_gpt2: bool) -> None:
    """Compare whole images of one caption, the caption included, by both packages' own `generate`."""
    if not with_gpt2:
        return
    size, depth = settings.prior_of(grid), (settings.n_layers, settings.n_heads)
    prior = build_prior(size, machine, *depth)
    text_1T = torch.randint(size.vocab_size, (1, size.text_len - 1), generator=torch.Generator().manual_seed(0))
    sides = {
        "ours": lambda: generate(prior, text_1T, [list(range(settings.images))]),
        "gpt2": Gpt2Sampler(build_gpt2(size, machine, *depth), size, settings.images).sample,
    }
    turns = take_turns(sides, "ours", settings.rounds, machine.clock, warm_up=False)
    report.add(f"images_grid{grid}", "gpt2", turns.seconds("ours"), turns.seconds("gpt2"), turns.ratio("ours", "gpt2"))
