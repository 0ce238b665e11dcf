"""fp32 matrix products by the library that is faster on this CPU, and the number format in which it multiplies faster.

M rows, K summed, N columns of a product; I input width, O output width of a layer.
"""

import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU_FACTS = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, bias_O: Tensor | None, *, inputs_first: bool = False) -> Tensor:
    """F.linear: x (..., I) -> x @ weight.T + bias (..., O); weight (O, I), or (I, O) with `inputs_first`."""
    by_onednn = x.ndim > 1 and _by_onednn(x, weight) and not torch.compiler.is_compiling()
    if not (by_onednn or inputs_first):
        return F.linear(x, weight, bias_O)
    rows = x.flatten(0, -2)
    if by_onednn:
        return _Linear.apply(rows, weight, bias_O, inputs_first).unflatten(0, x.shape[:-1])
    # Not F.linear of the transpose: autograd would save that view, which keeps a weight alive that ZeRO-3 has freed.
    return (rows @ weight if bias_O is None else torch.addmm(bias_O, rows, weight)).unflatten(0, x.shape[:-1])


def product(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """a @ b + bias (M, N), without gradients. The result may be in `out`, memory that is lent for it."""
    if _by_onednn(a_MK, b_KN):
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), bias_N, "none", [], "")
    return torch.mm(a_MK, b_KN, out=out) if bias_N is None else torch.addmm(bias_N, a_MK, b_KN, out=out)


def add_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """Add a @ b to a sum in place."""
    if _by_onednn(a_MK, b_KN):
        sum_MN.add_(product(a_MK, b_KN))
    else:
        sum_MN.addmm_(a_MK, b_KN)


@cache
def onednn_is_faster() -> bool:
    """Whether this is one of AMD's CPUs with AVX-512, where oneDNN's fp32 products are twice as fast as MKL's.

    torch multiplies fp32 matrices by Intel's MKL, which uses AVX-512 on Intel's CPUs only: a core of Zen 5 reaches 100 GFLOP/s
    by MKL, and 230 by oneDNN. Both sum in fp32. The many small products of attention are faster by MKL there too.

    The speed is not measured: two runs of one command could differ in their last digits.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    return _is_amd() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # private, may be missing in other versions of torch


def fastest_cpu_format() -> str:
    """Return "bf16" or "fp32": the format in which this CPU multiplies small matrices faster. It is measured, which takes less
    than a second: some CPUs with instructions for bf16 are half as fast in it as in fp32."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32"  # torch would compute bf16 without such instructions, several times slower
    return "bf16" if _product_seconds(torch.bfloat16) < _product_seconds(torch.float32) else "fp32"


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    if not (a.device.type == b.device.type == "cpu" and a.dtype is b.dtype is torch.float32):
        return False
    is_empty = not (a.numel() and b.numel())  # which the operator rejects
    return not is_empty and not torch.is_autocast_enabled("cpu") and onednn_is_faster()


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in _CPU_FACTS.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False


def _product_seconds(dtype: torch.dtype) -> float:
    """Seconds of CPU time for a product of a small prior's size; the shortest of several, since other work disturbs some."""
    a, b = torch.ones(1280, 128, dtype=dtype), torch.ones(128, 512, dtype=dtype)
    seconds = []
    for _ in range(20):
        began = time.process_time()
        for _ in range(4):
            product(a, b)
        seconds.append(time.process_time() - began)
    return min(seconds)


class _Linear(torch.autograd.Function):
    """A linear layer by `product`. It saves the weight itself, which ZeRO-3 frees and gathers again."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight: Tensor, bias_O: Tensor | None, inputs_first: bool) -> Tensor:
        ctx.save_for_backward(x_MI, weight)
        ctx.inputs_first = inputs_first
        return product(x_MI, weight if inputs_first else weight.t(), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if for_x:
            grad_x = product(grad_MO, weight.t() if ctx.inputs_first else weight)
        if for_weight:
            grad_weight = product(x_MI.t(), grad_MO) if ctx.inputs_first else product(grad_MO.t(), x_MI)
        return grad_x, grad_weight, grad_MO.sum(0) if for_bias else None, None
