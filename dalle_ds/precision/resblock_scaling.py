"""Per-resblock gradient scaling: keep the fp16 gradients of every residual block in range (paper section 2.4, appendix D).

Each block has its own scale. Going backward, the gradient is multiplied by it where it enters the branch and divided where it
leaves. Inf and NaN are taken out of ACTIVATION gradients at both edges ("filter"), so that an event in one block does not reach
the blocks before it; they stay visible in PARAMETER gradients, which is how an event is noticed.

The gradients of a block's parameters are fp32 and stay scaled while ranks and micro-batches are summed: a scale is the same for
all of them, and Inf or NaN in a summand is Inf or NaN in the sum. `unscale` then divides the sums and looks for such values,
once an update and on a rank's shard alone. Norm, clipping and the optimizer work on true gradients.

The paper divides its loss by the global batch and multiplies its scales by M, the number of GPUs. Here a rank's loss is M
times its share of the global mean, since the engine averages over ranks in fp32: M cancels, and fp16 sees the same numbers.
Accumulation divides losses too, so scales are multiplied by the number of micro-batches as well: a run that goes on at another
number of GPUs, with micro-batches of the same size, keeps its scales.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle_ds.models.resblock import ResBlock
from dalle_ds.ops.fused import fused
from dalle_ds.precision.fp16_branches import FP16BranchPrecision, resblocks_of, use_fp16_branches
from dalle_ds.recipes import Config

CALIBRATION_MARGIN = 1.0
"""Powers of two between scales that calibration saw to be finite and the first ones: at the paper's growth, a thousand updates
of room."""


class ResblockScalingConfig(Config):
    """The scale policy; the defaults are the paper's (appendix D item 1), as exponents of two."""

    initial_scale_power: float = 13.0
    min_scale_power: float = 7.0
    max_scale_power: float = 24.0
    growth_interval: int = Field(1000, ge=1, description="finite updates for a scale to double: growth is 2^(1/interval)")
    backoff: float = Field(2**-0.5, gt=0, lt=1, description="factor after a non-finite gradient")
    backoff_window: int = Field(125, ge=0, description="updates after a back-off in which the same scale is not lowered again")
    skip: Literal["update", "block"] = Field("update", description="what a non-finite gradient in a block keeps from stepping")
    calibration_trials: int = Field(0, ge=0, description="halvings of the range in which the first scales are sought; 0: none")

    @model_validator(mode="after")
    def _check(self) -> "ResblockScalingConfig":
        low, start, high = self.min_scale_power, self.initial_scale_power, self.max_scale_power
        if not low <= start <= high:
            raise ValueError(f"scale powers min {low}, initial {start}, max {high} are not in this order")
        return self


def _filtered(grad: Tensor) -> Tensor:
    """Zero in place of every Inf and NaN. A select: multiplying by a mask would keep NaN, as 0 * NaN = NaN."""
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)


@fused(kernels=1)
def norm_to_half(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm in fp32 -> its result in fp16, and per row, (B, L, 1), the mean and the inverse of the deviation."""
    h_BLD, mean, inverse = torch.native_layer_norm(x_BLD, weight_D.shape, weight_D, bias_D, eps)
    return h_BLD.to(torch.float16), mean, inverse


@fused(kernels=4, passes=2)
def norm_to_half_backward(
    grad_h_BLD: Tensor,
    grad_x_BLD: Tensor,
    scale: Tensor,
    x_BLD: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias. x has that of the identity path, plus its own of the branch, filtered and un-scaled in
    fp32; those of the parameters stay scaled and unfiltered."""
    dx_BLD, dweight_D, dbias_D = torch.ops.aten.native_layer_norm_backward(
        grad_h_BLD.float(), x_BLD, weight_D.shape, mean, inverse, weight_D, bias_D, [True, True, True]
    )
    return grad_x_BLD + _filtered(dx_BLD) / scale, dweight_D, dbias_D


@fused(kernels=1)
def add_half(x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
    """fp32 + fp16 -> fp32"""
    return x_BLD + y_BLD.float()


@fused(kernels=1)
def scale_to_half(grad_BLD: Tensor, scale: Tensor) -> Tensor:
    """Scaled and filtered in fp32, then rounded to fp16, which can overflow."""
    return _filtered(grad_BLD * scale).to(torch.float16)


class _Enter(torch.autograd.Function):
    """Forward: x, and its norm in fp16. Backward: the branch's gradient is filtered and un-scaled, in fp32, before it joins the
    identity path's."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, scale: Tensor) -> tuple[Tensor, Tensor]:
        h_BLD, mean, inverse = norm_to_half(x_BLD, weight_D, bias_D, eps)
        ctx.save_for_backward(scale, x_BLD, mean, inverse, weight_D, bias_D)
        return x_BLD.view_as(x_BLD), h_BLD

    @staticmethod
    def backward(ctx: Any, grad_x_BLD: Tensor, grad_h_BLD: Tensor) -> tuple[Tensor | None, ...]:
        return *norm_to_half_backward(grad_h_BLD, grad_x_BLD, *ctx.saved_tensors), None, None


class _Leave(torch.autograd.Function):
    """Forward: x + y, fp32. Backward: y's gradient is scaled and filtered in fp32, then rounded to fp16."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, y_BLD: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return add_half(x_BLD, y_BLD)

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_BLD, scale_to_half(grad_BLD, *ctx.saved_tensors), None


class ScaledBranchPrecision(FP16BranchPrecision):
    """The edges of one block under gradient scaling. `scale` is a 0-d view into the scaler's vector of scales in use."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def to_branch(self, norm: nn.LayerNorm, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        return _Enter.apply(x_BLD, norm.weight, norm.bias, norm.eps, self.scale)

    def from_branch(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        return _Leave.apply(x_BLD, y_BLD, self.scale)


def own_gradients(block: ResBlock) -> AbstractContextManager[list[Tensor]]:
    """The gradients that a backward pass left at the block's parameters."""
    return nullcontext([parameter.grad for parameter in block.parameters() if parameter.grad is not None])


class ResblockGradScaler:
    """The scales of a model's residual blocks and their policy. Knows nothing of ranks: the caller agrees the flags.

    `scale` (n_blocks,) fp32 is the policy's, per micro-batch of the same size; the edges multiply by `in_use`, which is `scale`
    times the number of micro-batches. `found_nonfinite` (n_blocks,) float: 1 where `unscale` met Inf or NaN since the last
    update.
    """

    def __init__(
        self, model: nn.Module, config: ResblockScalingConfig, device: torch.device | str = "cpu", n_micro_batches: int = 1
    ) -> None:
        """Apply fp16 branches with scaled edges to every residual block of `model`.

        Losses are divided by `n_micro_batches`, of one rank in one update; the scales make up for it.
        """
        use_fp16_branches(model)
        named_blocks = resblocks_of(model)
        if not named_blocks:
            raise ValueError(f"{type(model).__name__} has no residual blocks to scale")
        self.config = config
        self.n_micro_batches = n_micro_batches
        self.names = [name for name, _ in named_blocks]
        self.blocks = [block for _, block in named_blocks]
        n = len(self.names)
        self.scale = torch.full((n,), 2.0**config.initial_scale_power, device=device)
        self.in_use = self.scale * n_micro_batches
        self.since_backoff = torch.full((n,), config.backoff_window, dtype=torch.int64, device=device)
        self.found_nonfinite = torch.zeros(n, device=device)
        for i, block in enumerate(self.blocks):
            block.precision = ScaledBranchPrecision(self.in_use[i])

    def begin(self) -> None:
        """Take the scales as they are into use. After writing to `scale`, and never between a forward pass and `unscale`."""
        torch.mul(self.scale, self.n_micro_batches, out=self.in_use)

    @torch.no_grad()
    def unscale(self, gradients: Callable[[ResBlock], AbstractContextManager[list[Tensor]]] = own_gradients) -> None:
        """Un-scale the fp32 gradients of every block's parameters in place, once after the backward passes of an update, and
        note in `found_nonfinite` which blocks hold Inf or NaN.

        Args:
            gradients: of a block's parameters, or of this rank's shards of them; written to within its context.
        """
        inverse = self.in_use.reciprocal()
        for i, block in enumerate(self.blocks):
            with gradients(block) as tensors:
                # of torch's GradScaler: check and product in one pass, all tensors of a block in one kernel
                torch._amp_foreach_non_finite_check_and_unscale_(tensors, self.found_nonfinite[i : i + 1], inverse[i : i + 1])

    def update(self, nonfinite: Tensor) -> None:
        """Move the scales after an update. `nonfinite` (n_blocks,): the flags agreed by all ranks.

        Finite blocks grow, also when another block made the update be skipped ("if no parameter gradient in that resblock
        holds a nonfinite value"); the others back off unless they did so within the window.
        """
        c = self.config
        bad = nonfinite > 0
        self.since_backoff.add_(1)
        lower = bad & (self.since_backoff >= c.backoff_window)
        factor = torch.where(bad, 1.0, 2.0 ** (1.0 / c.growth_interval))
        factor = torch.where(lower, c.backoff, factor)
        self.scale.mul_(factor).clamp_(2.0**c.min_scale_power, 2.0**c.max_scale_power)
        self.since_backoff.masked_fill_(lower, 0)
        self.found_nonfinite.zero_()
        self.begin()

    def calibrate(self, attempt: Callable[[], Tensor]) -> None:
        """Find first scales in a few passes rather than thousands of updates.

        Args:
            attempt: runs forward and backward passes with the scales as they are -> (n_blocks,) flags agreed by all ranks.

        Each of `calibration_trials` passes halves the range of exponents of every block. A block that overflows does not hand
        on all of its gradient, so in that trial blocks before it may look finite where they are not: closing passes halve the
        scales of those that are non-finite, until none is, or those that are have the smallest scale. From there all are
        lowered by `CALIBRATION_MARGIN`.
        """
        c = self.config
        low, high = torch.full_like(self.scale, c.min_scale_power), torch.full_like(self.scale, c.max_scale_power)

        def nonfinite_at(powers: Tensor) -> Tensor:
            self.scale.copy_(torch.exp2(powers))
            self.begin()
            bad = attempt() > 0
            self.found_nonfinite.zero_()
            return bad

        for _ in range(c.calibration_trials):
            middle = (low + high) / 2
            bad = nonfinite_at(middle)
            low, high = torch.where(bad, low, middle), torch.where(bad, middle, high)
        for _ in range(math.ceil(c.max_scale_power - c.min_scale_power) + 1):
            lower = nonfinite_at(low) & (low > c.min_scale_power)
            if not lower.any():
                break
            low = (low - 1.0 * lower).clamp(min=c.min_scale_power)
        self.scale.copy_(torch.exp2((low - CALIBRATION_MARGIN).clamp(min=c.min_scale_power)))
        self.begin()

    def at_limits(self) -> dict[str, str]:
        """Name -> "floor" or "ceiling", of blocks whose scale is there: what fp16 loses is out of the policy's hands."""
        powers, low, high = self.log2_scales(), self.config.min_scale_power + 1e-4, self.config.max_scale_power - 1e-4
        return {name: "floor" if power < low else "ceiling" for name, power in powers.items() if not low <= power <= high}

    def log2_scales(self) -> dict[str, float]:
        """Name of block -> log2 of its scale."""
        return dict(zip(self.names, self.scale.log2().tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, by block name."""
        return {
            "scale": dict(zip(self.names, self.scale.tolist(), strict=True)),
            "since_backoff": dict(zip(self.names, self.since_backoff.tolist(), strict=True)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state is of a model with other blocks."""
        if list(state["scale"]) != self.names:
            raise ValueError(f"scales are of blocks {list(state['scale'])}, the model has {self.names}")
        self.scale.copy_(torch.tensor(list(state["scale"].values())))
        self.since_backoff.copy_(torch.tensor(list(state["since_backoff"].values())))
        self.begin()
