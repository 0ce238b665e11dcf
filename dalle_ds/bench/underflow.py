"""Which gradients does fp16 lose under one loss scale, and under one gradient scale per residual block?

The gradients of a prior that is small enough for a laptop span few powers of two. So the case is constructed: between layers,
the backward pass multiplies the gradient by a power of two. Nothing else differs from a plain prior. In fp32 AdamW takes the
same steps, since it divides each gradient by its own size. In fp16 the range of gradient sizes matters.

B batch, L slots, D model width, T text slots, N image tokens.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle_ds.bench.harness.loss_scaling import OneScale, ScalePerBlock
from dalle_ds.bench.harness.machine import Machine, machine_for
from dalle_ds.bench.harness.model import WEIGHT_DECAY
from dalle_ds.bench.harness.settings import UnderflowBenchConfig
from dalle_ds.console import progress
from dalle_ds.figures import new_figure
from dalle_ds.models.prior import IMAGE_WEIGHT, TEXT_WEIGHT, Prior, PriorConfig, initialise
from dalle_ds.optim.groups import decay_groups
from dalle_ds.optim.learning_rate import LearningRateConfig
from dalle_ds.precision.fp16_branches import resblocks_of, use_fp16_branches
from dalle_ds.precision.resblock_scaling import CALIBRATION_MARGIN, ResblockScalingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH, VOCABULARY = 16, 32
HEADROOM = 6.0
"""Both ways of scaling start this many powers of two below the highest finite scale, because gradients grow at first."""
LOST = 0.99
"""A block counts as lost if it loses at least this fraction of its gradient entries."""

Batch = tuple[Tensor, Tensor]
Step = Callable[[Tensor, torch.optim.Optimizer], bool]


class _Resized(torch.autograd.Function):
    """Forward: identity. Backward: multiply by a power of two, which is exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, power: float) -> Tensor:
        ctx.power = power
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 2.0**ctx.power, None


@dataclass
class Outcome:
    """Results of the three runs and of the comparison of gradients. Lists by block go from the first to the last block."""

    settings: UnderflowBenchConfig
    device: str
    losses: dict[str, list[float]]
    skipped: dict[str, int]
    sizes: dict[str, list[float]]
    """log2 of the root mean square of each block's weight gradients in fp32, for the plain and for the constructed prior."""
    lost: dict[str, list[float]]
    """Fraction of each block's nonzero fp32 weight gradients that are zero in fp16."""

    def summary(self) -> dict[str, Any]:
        """Returns one JSON object."""
        tail = max(1, len(self.losses["fp32"]) // 10)
        return {
            "bench": "underflow",
            "device": self.device,
            "blocks": len(self.sizes["plain"]),
            **{f"powers_of_two_{name}": max(sizes) - min(sizes) for name, sizes in self.sizes.items()},
            **{f"lost_blocks_{name}": sum(share >= LOST for share in shares) for name, shares in self.lost.items()},
            **{f"largest_loss_of_a_block_{name}": max(shares) for name, shares in self.lost.items()},
            **{f"training_loss_{name}": sum(losses[-tail:]) / tail for name, losses in self.losses.items()},
            **{f"skipped_updates_{name}": n for name, n in self.skipped.items()},
            "chart": self.settings.chart,
        }

    def print_table(self, to_stderr: bool) -> None:
        """Print the table to stdout, or to stderr if stdout is reserved for the JSON line."""
        out = sys.stderr if to_stderr else sys.stdout
        print(f"underflow on {self.device}", file=out)
        print(f"{'block':>5}  {'log2 size':>9}  {'lost, one scale':>15}  {'lost, scale per block':>21}", file=out)
        rows = zip(self.sizes["constructed"], self.lost["one_scale"], self.lost["scale_per_block"], strict=True)
        for block, (size, one, each) in enumerate(rows):
            print(f"{block:>5}  {size:>9.1f}  {one:>15.1%}  {each:>21.1%}", file=out)
        for name, value in list(self.summary().items())[2:]:
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}", file=out, flush=True)


def run(settings: UnderflowBenchConfig) -> Outcome:
    """Train in the three ways from the same initial weights. Then compare gradients at the final weights of the run with one
    scale per block, and write the chart."""
    with machine_for(settings) as machine:
        data = random_samples(settings.samples, machine.device)
        losses: dict[str, list[float]] = {}
        skipped: dict[str, int] = {}
        bar = progress(total=3 * settings.updates, what="underflow", unit="update")
        first = data[0][:BATCH], data[1][:BATCH]
        for name in ("fp32", "one_scale", "scale_per_block"):
            prior = build(settings, machine, settings.powers)
            step = unscaled if name == "fp32" else SCALED[name](prior, settings, first)
            losses[name], skipped[name] = train(prior, step, settings, data, bar.update)
        bar.close()
        sizes, lost = compare(prior, settings, machine, data)
        outcome = Outcome(settings, machine.name, losses, skipped, sizes, lost)
    draw(outcome).savefig(_writable(settings.chart), dpi=90)
    return outcome


def build(settings: UnderflowBenchConfig, machine: Machine, powers: int) -> Prior:
    """Returns a prior with the same weights at every call. Gradients shrink by a factor of 2^powers from each layer to the
    next; those of the middle layers keep their size."""
    prior = Prior(
        PriorConfig(
            n_layers=settings.n_layers,
            n_heads=settings.n_heads,
            d_head=32,
            text_len=9,
            grid=4,
            conv_kernel=3,
            vocab_size=VOCABULARY,
            n_codes=VOCABULARY,
        )
    ).to(machine.device)
    initialise(prior, torch.Generator(machine.device).manual_seed(0))
    prior.run_layer = lambda layer, x_BLD: layer(_Resized.apply(x_BLD, powers))
    at_the_end = -powers * settings.n_layers / 2
    prior.heads.register_forward_pre_hook(lambda _, args: (_Resized.apply(args[0], at_the_end), *args[1:]))
    return prior


def train(
    prior: Prior, step: Step, settings: UnderflowBenchConfig, data: Batch, tell: Callable[[], object]
) -> tuple[list[float], int]:
    """Returns the training loss before every update, and the number of skipped updates."""
    groups = decay_groups(prior.named_parameters(), WEIGHT_DECAY)
    rate = LearningRateConfig(peak=settings.learning_rate, warmup_updates=settings.updates // 10, shape="cosine")
    # epsilon must be small relative to the smallest gradients: the paper's would stop the last layers, even in fp32
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.96), eps=1e-20)
    generator = torch.Generator().manual_seed(2)
    losses, skipped = [], 0
    for update in range(settings.updates):
        for group in optimizer.param_groups:
            group["lr"] = rate.at(update, settings.updates)
        chosen = torch.randperm(settings.samples, generator=generator)[:BATCH]
        loss = _loss(prior, (data[0][chosen], data[1][chosen]))
        losses.append(loss.item())
        skipped += not step(loss, optimizer)
        optimizer.zero_grad()
        tell()
    return losses, skipped


def compare(
    trained: Prior, settings: UnderflowBenchConfig, machine: Machine, data: Batch
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Compare the gradients of `trained`, which has a scale per block, with those in fp32 and with those under the highest loss
    scale that overflows nowhere. Returns `sizes` and `lost` of an `Outcome`.
    """
    batch = data[0][:BATCH], data[1][:BATCH]

    def like_trained(powers: int) -> Prior:
        prior = build(settings, machine, powers)
        prior.load_state_dict(trained.state_dict())
        return prior

    def gradients(prior: Prior, scale: float = 1.0) -> list[Tensor]:
        prior.zero_grad()
        (_loss(prior, batch) * scale).backward()
        return [torch.cat([p.grad.flatten() for p in b.branch.parameters() if p.dim() == 2]) for _, b in resblocks_of(prior)]

    exact = {"plain": gradients(like_trained(0)), "constructed": gradients(like_trained(settings.powers))}
    sizes = {name: [float(g.square().mean().sqrt().log2()) for g in grads] for name, grads in exact.items()}
    half = like_trained(settings.powers)
    use_fp16_branches(half)
    rounded = {
        "one_scale": gradients(half, 2.0 ** highest_finite_power(half, settings, batch)),
        "scale_per_block": gradients(trained),
    }
    return sizes, {name: list(map(_lost, grads, exact["constructed"])) for name, grads in rounded.items()}


def _lost(rounded: Tensor, exact: Tensor) -> float:
    return float(((rounded == 0) & (exact != 0)).sum() / (exact != 0).sum())


def highest_finite_power(half: Prior, settings: UnderflowBenchConfig, batch: Batch) -> int:
    """Returns the highest power of two that, as loss scale of a prior with fp16 branches, gives finite gradients."""

    def overflows(power: int) -> bool:
        half.zero_grad()
        (_loss(half, batch) * 2.0**power).backward()
        return not all(p.grad.isfinite().all() for p in half.parameters())

    powers = range(-_reach(settings), _reach(settings))
    return powers[bisect_left(powers, True, key=overflows) - 1]


def draw(outcome: Outcome) -> "Figure":
    """Draw three charts: sizes of gradients, fractions lost, training losses."""
    settings, names = outcome.settings, {"one_scale": "one loss scale", "scale_per_block": "a scale per block"}
    colours = {"fp32": "0.6", "one_scale": "tab:red", "scale_per_block": "tab:blue"}
    figure = new_figure(13, 4.2)
    what = f"fp16 gradients of a prior of {settings.n_layers} layers"
    if settings.powers:
        what += f", CONSTRUCTED: they shrink by a factor of $2^{{{settings.powers}}}$ from each layer to the next"
    figure.suptitle(what)
    size, share, loss = figure.subplots(1, 3)
    for name, values in outcome.sizes.items():
        size.plot(values, label=f"{name} prior", color="black", linestyle="-" if name == "constructed" else ":")
    size.set(title="size of weight gradients, fp32", xlabel="residual block", ylabel="log2(root mean square)")
    chosen = {"one_scale": "the highest finite one", "scale_per_block": "at the end of training"}
    for name, values in outcome.lost.items():
        label = f"{names[name]},\n{chosen[name]}"
        share.plot([100 * value for value in values], label=label, color=colours[name], marker=".")
    share.set(title="gradient entries that fp16 makes zero", xlabel="residual block", ylabel="% of entries", ylim=(-4, 104))
    for name, values in outcome.losses.items():
        width = max(1, len(values) // 30)
        means = torch.tensor(values)[: len(values) // width * width].view(-1, width).mean(1)
        style = {"linestyle": (0, (4, 3)), "zorder": 3} if name == "fp32" else {}
        loss.plot(range(width, len(values) + 1, width), means, label=names.get(name, name), color=colours[name], **style)
    loss.set(title="training loss", xlabel="update", ylabel="nats per token", yscale="log")
    for axes in (size, share, loss):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure


def unscaled(loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    """Backward pass and update. Returns True: the update is always taken."""
    loss.backward()
    optimizer.step()
    return True


# Both ways of scaling start equally far below overflow and follow one policy: an overflow anywhere skips the update and halves
# the scale, and a thousand finite updates double it.


def _one_scale(prior: Prior, settings: UnderflowBenchConfig, batch: Batch) -> Step:
    use_fp16_branches(prior)
    return OneScale(prior, highest_finite_power(prior, settings, batch) - HEADROOM).step


def _scale_per_block(prior: Prior, settings: UnderflowBenchConfig, batch: Batch) -> Step:
    reach = _reach(settings)
    policy = {"growth_interval": 1000, "backoff": 0.5, "backoff_window": 0}
    config = ResblockScalingConfig(min_scale_power=-reach, max_scale_power=reach, calibration_trials=9, **policy)
    scaling = ScalePerBlock(prior, config)

    def attempt() -> Tensor:
        prior.zero_grad()
        _loss(prior, batch).backward()
        scaling.scaler.unscale()
        return scaling.scaler.found_nonfinite.clone()

    scaling.scaler.calibrate(attempt)
    scaling.scaler.scale.div_(2.0 ** (HEADROOM - CALIBRATION_MARGIN))
    scaling.scaler.begin()
    prior.zero_grad()
    return scaling.step


SCALED = {"one_scale": _one_scale, "scale_per_block": _scale_per_block}


def _reach(settings: UnderflowBenchConfig) -> int:
    """Returns the largest absolute power of two in the search for scales."""
    return settings.powers * settings.n_layers // 2 + 40


def _loss(prior: Prior, batch: Batch) -> Tensor:
    nll = prior(*batch)
    return TEXT_WEIGHT * nll.text_sum / nll.n_text + IMAGE_WEIGHT * nll.image_sum / nll.n_image


def random_samples(n: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(1)
    text_BT, image_BN = (torch.randint(VOCABULARY, (n, length), generator=generator) for length in (8, 16))
    return text_BT.to(device), image_BN.to(device)


def _writable(chart: str) -> Path:
    path = Path(chart)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
