"""Stand-ins for functions that Triton compiles on a GPU: they return tensors of the right shapes and count as kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dalle_ds.bench.fake_cuda.device import FakeGPU
from dalle_ds.bench.fake_cuda.torch_cuda import replaced
from dalle_ds.ops import fused
from dalle_ds.ops.attention import backends, flex
from dalle_ds.optim import adamw

ATTENTION = "flex_attention"
"""The name under which attention kernels count: one per forward, two per backward (one of the two sums rows of out * grad)."""


@contextmanager
def compiled_stand_ins(gpu: FakeGPU) -> Iterator[None]:
    """Replace FlexAttention, the loop of AdamW and fused functions by stand-ins on `gpu`. All other code is real."""

    def attend(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, **_: object) -> Tensor:
        return _Attention.apply(gpu, q_BHLD, k_BHLD, v_BHLD)

    def update(p: Tensor, g: Tensor, mean: Tensor, variance: Tensor, scalars: Tensor, low_bit: bool) -> None:
        with gpu.compiled("adamw", 1, [p, g, mean, variance, scalars], [p, mean, variance]):
            pass

    def observe(function: fused.Fused, args: tuple[Any, ...]) -> Any:
        writes: list[Tensor] = []
        reads = [arg for arg in args if isinstance(arg, Tensor)] * function.passes
        with gpu.compiled(function.name, function.kernels, reads, writes):
            out = function.plain(*args)
            writes += [out] if isinstance(out, Tensor) else out
        return out

    with (
        replaced(fused, "observer", observe),
        replaced(flex, "_compiled", lambda: attend),
        replaced(flex, "_block_mask", lambda mask, device: None),
        replaced(flex, "kernel_problem", lambda: None),
        replaced(adamw, "_compiled_loop", lambda: update),
        replaced(adamw, "kernel_problem", lambda: None),
    ):
        backends.attention_backend.cache_clear()
        try:
            yield
        finally:
            backends.attention_backend.cache_clear()  # backends made in this context hold fake tensors


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gpu: FakeGPU, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        writes: list[Tensor] = []
        with gpu.compiled(ATTENTION, 1, [q_BHLD, k_BHLD, v_BHLD], writes):
            out_BHLD = torch.empty_like(q_BHLD)
            log_sum_exp_BHL = torch.empty(q_BHLD.shape[:-1], dtype=torch.float32, device=q_BHLD.device)
            writes += [out_BHLD, log_sum_exp_BHL]
        ctx.gpu = gpu
        ctx.save_for_backward(q_BHLD, k_BHLD, v_BHLD, out_BHLD, log_sum_exp_BHL)
        return out_BHLD

    @staticmethod
    def backward(ctx: Any, grad_BHLD: Tensor) -> tuple[Tensor | None, ...]:
        saved, writes = ctx.saved_tensors, []
        with ctx.gpu.compiled(ATTENTION, 2, [*saved, grad_BHLD], writes):
            writes += [torch.empty_like(tensor) for tensor in saved[:3]]
        return None, *writes
