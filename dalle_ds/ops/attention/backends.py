"""Choose the attention backend: by name, or the fastest one on the device.

L slots, H heads, D head width.
"""

import logging
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from dalle_ds.errors import ConfigError
from dalle_ds.ops.attention.dense import Attention, DenseAttention
from dalle_ds.ops.attention.masks import SparseMask, transpose_grid
from dalle_ds.ops.attention.structured import StructuredAttention, structured_problem

log = logging.getLogger(__name__)

BackendName = Literal["flex", "structured", "dense"]
BACKENDS: tuple[str, ...] = get_args(BackendName)

SMALL_GRID = 16
"""On grids smaller than this, the windows of structured attention cover too much of the sequence to be faster on CPUs: it has
0.7 times the speed of dense attention at grid 8, and 1.6 to 2 times at grid 16."""


@cache
def attention_backend(name: str, mask: SparseMask, device: torch.device) -> Attention:
    """Return the backend `name`, one of BACKENDS, for layers with this mask. All these layers share one cached instance.

    Raises:
        ConfigError: the backend does not exist or can't run on `device`.
    """
    problem = backend_problem(name, device)
    if problem:
        raise ConfigError(f"attention backend {name!r} can't be used: {problem}")
    if name == "structured":
        return StructuredAttention(mask)
    if name == "flex":
        from dalle_ds.ops.attention.flex import FlexAttention  # takes a second to import

        return FlexAttention(mask, device)
    return DenseAttention(mask, device)


def backend_problem(name: str, device: torch.device) -> str | None:
    """Return why backend `name` can't run on `device`. If it can, return None."""
    if name not in BACKENDS:
        return f"no backend has this name; expected one of {', '.join(BACKENDS)}"
    if name == "structured":
        return structured_problem(device)
    if name == "flex":
        from dalle_ds.ops.attention.flex import flex_problem

        return flex_problem(device)
    return None


def choose_backend(device: torch.device, grid: int) -> str:
    """Choose the fastest backend: flex on CUDA, structured on CPUs, dense for small grids on CPUs.

    If that backend can't run, logs a warning and returns "dense".
    """
    if device.type != "cuda" and grid < SMALL_GRID:
        return "dense"
    first = "flex" if device.type == "cuda" else "structured"
    problem = backend_problem(first, device)
    if problem is None:
        return first
    log.warning("attention uses dense instead of %s, which is faster: %s", first, problem)
    return "dense"


def errors_against_dense(
    attend: Attention, mask: SparseMask, n_heads: int, d_head: int, dtype: torch.dtype, device: torch.device, batch: int = 1
) -> dict[str, tuple[float, float]]:
    """Measure the relative errors of a backend and of dense attention, both in `dtype`, against dense attention in fp64.

    Inputs are seeded random numbers with the strides of the model's fused projection. `attend` runs once, with `batch` samples
    of `n_heads` heads, so with the values of training it compiles for the shapes of training. The samples repeat the same two
    heads, so that dense attention only needs to compute these.

    Returns:
        {"out": (error of `attend`, error of dense attention), "grad": (...)}, each of the worst sample.
    """
    generator, n_different = torch.Generator().manual_seed(0), min(2, n_heads)
    qkv_1L3HD = torch.randn(1, mask.n_slots, 3, n_different, d_head, generator=generator).to(device, dtype)
    grad_1LHD = torch.randn(1, mask.n_slots, n_different, d_head, generator=generator).to(device, dtype)
    dense = attention_backend("dense", mask, device)

    def run(attend: Attention, dtype: torch.dtype, heads: Tensor | slice = slice(None), batch: int = 1) -> dict[str, Tensor]:
        qkv = qkv_1L3HD[:, :, :, heads].to(dtype).repeat(batch, 1, 1, 1, 1).requires_grad_()
        ordered = transpose_grid(qkv, mask.n_text, mask.grid) if attend.columns_first else qkv
        out = attend(*(part.transpose(1, 2) for part in ordered.unbind(2))).transpose(1, 2)
        out = transpose_grid(out, mask.n_text, mask.grid) if attend.columns_first else out
        out.backward(grad_1LHD[:, :, heads].to(dtype).repeat(batch, 1, 1, 1))
        return {"out": out.detach(), "grad": qkv.grad}

    def worst(found: Tensor, true_1: Tensor) -> float:
        # One sample at a time, since all samples in fp64 would take four times their memory. torch's max() keeps NaN, which no
        # limit accepts.
        return float(torch.stack([(one.double() - true_1[0]).norm() / true_1.norm() for one in found]).max())

    over_and_over = torch.arange(n_heads, device=device) % n_different
    true, ours, theirs = run(dense, torch.float64), run(attend, dtype, over_and_over, batch), run(dense, dtype)
    return {key: (worst(ours[key], true[key][..., over_and_over, :]), worst(theirs[key], true[key])) for key in true}
