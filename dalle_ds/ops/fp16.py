"""fp16 arithmetic with fp32 accumulation, as on tensor cores, on any device, including CPUs without fp16 units.

B batch, L tokens, I input width, O output width.
"""

from functools import cache

import torch
from torch import Tensor

from dalle_ds.ops.products import product


@cache
def _cpu_has_fp16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def has_fast_fp16(device: torch.device) -> bool:
    """Whether fp16 matrix products run natively. If not, torch uses scalar loops, which are 5 to 15 times slower than fp32."""
    return device.type != "cpu" or _cpu_has_fp16()


def linear_fp16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer: x (..., I) fp16, weight (O, I) and bias (O) of any float dtype -> (..., O) fp16.

    The weight is rounded to fp16, sums are fp32, and the result is rounded once. Products of two fp16 numbers are exact in
    fp32. So on CPUs without fp16 units, computing in fp32 gives the result of fp16 units with fp32 accumulators, up to the
    order of sums.
    """
    weight16 = weight.to(torch.float16)
    # Not F.linear: ZeRO-3 replaces it by a version that adds the bias to the rounded product and rounds again.
    rows = x.flatten(0, -2)
    if has_fast_fp16(x.device):
        y = torch.mm(rows, weight16.t()) if bias is None else torch.addmm(bias.to(torch.float16), rows, weight16.t())
    else:
        y = product(rows.float(), weight16.float().t(), bias).to(torch.float16)
    return y.unflatten(0, x.shape[:-1])


def linear_fp16_backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, inputs_first: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x (fp16), weight and bias (fp32) of `linear_fp16`. With `inputs_first`, the weight's gradient is (I, O)."""
    if not has_fast_fp16(x.device):
        grad, x = grad.float(), x.float()  # converted once for all three gradients
    rows_RO, rows_RI = grad.flatten(0, -2), x.flatten(0, -2)
    # weight gradients are not rounded to fp16, which would only lose small sums
    grad_weight = matmul_to_fp32(rows_RI.t(), rows_RO) if inputs_first else matmul_to_fp32(rows_RO.t(), rows_RI)
    grad_bias = rows_RO.sum(0, dtype=torch.float32) if has_bias else None
    return linear_fp16(grad, weight.t(), None), grad_weight, grad_bias


def matmul_to_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) fp16 @ b (K, N) fp16 -> (M, N) fp32. The fp32 sums are not rounded to fp16."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return product(a.float(), b.float())


def batched_matmul_to_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a (..., M, K) @ b (..., K, N) -> (..., M, N) fp32, for any float dtype of a and b."""
    if a.dtype is torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32).unflatten(0, a.shape[:-2])
    return a.float() @ b.float()


def through_fp32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """If the device has no fp16 units, convert fp16 tensors to fp32. Otherwise return the tensors unchanged.

    Gradients of converted tensors are rounded to fp16.
    """
    if tensors[0].dtype is torch.float16 and not has_fast_fp16(tensors[0].device):
        return tuple(t.float() for t in tensors)
    return tensors
