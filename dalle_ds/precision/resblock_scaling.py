"""Per-resblock gradient scaling: keep the fp16 gradients of every residual block in range (paper section 2.4, appendix D).

Each block has its own scale. In the backward pass, the activation gradient is multiplied by the scale where it enters the
branch, and divided by it where it leaves. At both points, Inf and NaN in the activation gradient are replaced by zero
("filtered"), so that an overflow in one block does not reach the blocks before it. Gradients of parameters are not filtered:
Inf and NaN in them show that the block has overflowed.

The gradients of a block's parameters are fp32. They stay scaled while they are summed over micro-batches and ranks: all
summands have the same scale, and Inf or NaN in a summand gives Inf or NaN in the sum. Once per update, `unscale` divides the
sums by the scale and checks them for Inf and NaN, on this rank's shards only. Norm, clipping and optimizer see true gradients.

The paper divides its loss by the global batch and multiplies its scales by M, the number of GPUs. Here, the loss of a rank is M
times its contribution to the global mean, since the engine averages over ranks in fp32. M cancels, so fp16 sees the same
numbers. Gradient accumulation divides losses too, so scales are multiplied by the number of micro-batches. A run that resumes
on another number of GPUs, with micro-batches of the same size, therefore keeps its scales.
"""

import math
from collections.abc import Callable, Mapping
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
"""Safety margin in powers of two: the first scales are lower by this than the largest that calibration found finite. At the
paper's growth rate, scales use up the margin in a thousand updates."""


class ResblockScalingConfig(Config):
    """The policy of the gradient scales, which are given as exponents of two. Defaults are the paper's (appendix D item 1)."""

    initial_scale_power: float = 13.0
    min_scale_power: float = 7.0
    max_scale_power: float = 24.0
    growth_interval: int = Field(
        1000, ge=1, description="updates in which a scale doubles: its factor per finite update is 2^(1/interval)"
    )
    backoff: float = Field(2**-0.5, gt=0, lt=1, description="factor of a scale after a non-finite gradient in its block")
    backoff_window: int = Field(
        125, ge=0, description="updates after a back-off during which the same scale is not lowered again"
    )
    skip: Literal["update", "block"] = Field(
        "update", description="after a non-finite gradient in a block, skip the whole update or this block only"
    )
    calibration_trials: int = Field(
        0, ge=0, description="bisection steps of the search for the first scales; 0 starts from initial_scale_power"
    )

    @model_validator(mode="after")
    def _check(self) -> "ResblockScalingConfig":
        low, start, high = self.min_scale_power, self.initial_scale_power, self.max_scale_power
        if not low <= start <= high:
            raise ValueError(f"scale powers are min {low}, initial {start}, max {high}, expected min <= initial <= max")
        return self


def _filtered(grad: Tensor) -> Tensor:
    """Replace every Inf and NaN by zero. Multiplying by a mask would keep NaN, since 0 * NaN = NaN."""
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)


@fused(kernels=1)
def norm_to_half(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm in fp32. Returns the result in fp16, and each row's mean and inverse standard deviation, (B, L, 1)."""
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
    """Gradients of x, weight and bias.

    The branch's gradient is filtered and un-scaled in fp32 and added to the identity path's. The parameters' gradients stay
    scaled and unfiltered.
    """
    dx_BLD, dweight_D, dbias_D = torch.ops.aten.native_layer_norm_backward(
        grad_h_BLD.float(), x_BLD, weight_D.shape, mean, inverse, weight_D, bias_D, [True, True, True]
    )
    return grad_x_BLD + _filtered(dx_BLD) / scale, dweight_D, dbias_D


@fused(kernels=1)
def add_half(x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
    """Add an fp16 tensor to an fp32 tensor, in fp32."""
    return x_BLD + y_BLD.float()


@fused(kernels=1)
def scale_to_half(grad_BLD: Tensor, scale: Tensor) -> Tensor:
    """Scale and filter a gradient in fp32, then round it to fp16. The rounding can overflow."""
    return _filtered(grad_BLD * scale).to(torch.float16)


class _Enter(torch.autograd.Function):
    """Start of a branch. Forward: returns x, and norm(x) in fp16.
    Backward: the branch's gradient is filtered and un-scaled in fp32 before it is added to the identity path's."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, scale: Tensor) -> tuple[Tensor, Tensor]:
        h_BLD, mean, inverse = norm_to_half(x_BLD, weight_D, bias_D, eps)
        ctx.save_for_backward(scale, x_BLD, mean, inverse, weight_D, bias_D)
        return x_BLD.view_as(x_BLD), h_BLD

    @staticmethod
    def backward(ctx: Any, grad_x_BLD: Tensor, grad_h_BLD: Tensor) -> tuple[Tensor | None, ...]:
        return *norm_to_half_backward(grad_h_BLD, grad_x_BLD, *ctx.saved_tensors), None, None


class _Leave(torch.autograd.Function):
    """End of a branch. Forward: x + y in fp32. Backward: y's gradient is scaled and filtered in fp32, then rounded to fp16."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, y_BLD: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return add_half(x_BLD, y_BLD)

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_BLD, scale_to_half(grad_BLD, *ctx.saved_tensors), None


class ScaledBranchPrecision(FP16BranchPrecision):
    """Start and end of one block's branch under gradient scaling. `scale` is a 0-d view of `ResblockGradScaler.in_use`."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def to_branch(self, norm: nn.LayerNorm, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        return _Enter.apply(x_BLD, norm.weight, norm.bias, norm.eps, self.scale)

    def from_branch(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        return _Leave.apply(x_BLD, y_BLD, self.scale)


def own_gradients(block: ResBlock) -> AbstractContextManager[list[Tensor]]:
    """The `grad` tensors of the block's parameters."""
    return nullcontext([parameter.grad for parameter in block.parameters() if parameter.grad is not None])


class ResblockGradScaler:
    """The gradient scales of a model's residual blocks, and their policy. It knows nothing of ranks: the caller must combine
    the non-finite flags of all ranks.

    Attributes:
        scale: (n_blocks,) fp32, the scales that the policy moves. They do not depend on the number of micro-batches.
        in_use: (n_blocks,) fp32, the factors that the backward pass applies: `scale` times the number of micro-batches.
        found_nonfinite: (n_blocks,) float, 1 for each block in which `unscale` has found Inf or NaN since the last `update`.
    """

    def __init__(
        self, model: nn.Module, config: ResblockScalingConfig, device: torch.device | str = "cpu", n_micro_batches: int = 1
    ) -> None:
        """Apply fp16 branches with gradient scaling to every residual block of `model`.

        `n_micro_batches` is the number of micro-batches of one rank in one update. The caller divides losses by this number,
        and the scales compensate for it.

        Raises:
            ValueError: the model has no residual blocks.
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
        """Copy `scale` into `in_use`. Call it after writing to `scale`, and never between a forward pass and `unscale`."""
        torch.mul(self.scale, self.n_micro_batches, out=self.in_use)

    @torch.no_grad()
    def unscale(self, gradients: Callable[[ResBlock], AbstractContextManager[list[Tensor]]] = own_gradients) -> None:
        """Un-scale the fp32 gradients of every block's parameters in place, and set `found_nonfinite` for blocks with Inf or
        NaN. Call it once per update, after the backward passes.

        Args:
            gradients: returns a context that yields the gradients of a block's parameters, or this rank's shards of them. They
                are modified within the context.
        """
        inverse = self.in_use.reciprocal()
        for i, block in enumerate(self.blocks):
            with gradients(block) as tensors:
                # from torch's GradScaler: checks and multiplies in one pass, with one kernel for all tensors of a block
                torch._amp_foreach_non_finite_check_and_unscale_(tensors, self.found_nonfinite[i : i + 1], inverse[i : i + 1])

    def update(self, nonfinite: Tensor) -> None:
        """Raise or lower the scales after an update. `nonfinite` (n_blocks,) holds the flags combined over all ranks.

        The scale of a finite block grows, even if another block caused the update to be skipped ("if no parameter gradient in
        that resblock holds a nonfinite value"). The scale of a non-finite block is lowered, unless it was lowered within the
        last `backoff_window` updates.
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
        """Find the first scales in a few passes rather than thousands of updates.

        Each of the `calibration_trials` passes halves the range of exponents of every block (bisection). A block that overflows
        passes on only a part of its gradient, so in the same trial, blocks before it may wrongly look finite. Final passes
        therefore halve the scales of non-finite blocks, until all blocks are finite or the non-finite ones have the smallest
        scale. Then all scales are lowered by `CALIBRATION_MARGIN`.

        Args:
            attempt: runs forward and backward passes with the current scales. Returns the (n_blocks,) non-finite flags,
                combined over all ranks.
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

    def at_limits(self, powers: Mapping[str, float]) -> dict[str, str]:
        """Blocks whose scale is at a limit of the policy, by name: "floor" or "ceiling".
        The policy can't keep their gradients in fp16's range.

        Args:
            powers: `log2_scales()`, which waits for the device.
        """
        low, high = self.config.min_scale_power + 1e-4, self.config.max_scale_power - 1e-4
        return {name: "floor" if power < low else "ceiling" for name, power in powers.items() if not low <= power <= high}

    def log2_scales(self) -> dict[str, float]:
        """log2 of every block's scale, by block name."""
        return dict(zip(self.names, self.scale.log2().tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs, by block name."""
        return {
            "scale": dict(zip(self.names, self.scale.tolist(), strict=True)),
            "since_backoff": dict(zip(self.names, self.since_backoff.tolist(), strict=True)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scales. Raises ValueError if the state belongs to a model with other blocks."""
        if list(state["scale"]) != self.names:
            raise ValueError(f"the saved scales are for blocks {list(state['scale'])}, expected {self.names}")
        self.scale.copy_(torch.tensor(list(state["scale"].values())))
        self.since_backoff.copy_(torch.tensor(list(state["since_backoff"].values())))
        self.begin()
