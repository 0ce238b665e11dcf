"""Exact fp32 on GPUs: fp32 products are computed and summed in fp32, unless TF32 is explicitly allowed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_PRODUCTS, _CONVOLUTIONS, _RECURRENCES = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def exact_fp32() -> None:
    """Disable TF32 and 16-bit accumulation on CUDA, for this process. CPU results do not change.

    All code that uses a GPU calls it first: joining a process group, opening a model, encoding, benchmarks. By torch's
    defaults, cuDNN rounds the operands of fp32 convolutions to TF32 (10 bits of mantissa), and cuBLAS may add partial sums of
    16-bit products in 16 bits, where they overflow near 65504. NVIDIA's containers also allow TF32 in fp32 matrix products
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
    """
    _set_tf32(products=False, cudnn=False)
    _PRODUCTS.allow_fp16_reduced_precision_reduction = False
    _PRODUCTS.allow_bf16_reduced_precision_reduction = False
    _PRODUCTS.allow_fp16_accumulation = False


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within this context, allow or forbid TF32 in fp32 convolutions and matrix products, on GPUs that have it."""
    before = {"products": _is_tf32(_PRODUCTS), "cudnn": _is_tf32(_CONVOLUTIONS) or _is_tf32(_RECURRENCES)}
    _set_tf32(products=allowed, cudnn=allowed)
    try:
        yield
    finally:
        _set_tf32(**before)


def has_tf32() -> bool:
    """Whether some fp32 operation may now use TF32, on a GPU that has it."""
    return any(map(_is_tf32, (_PRODUCTS, _CONVOLUTIONS, _RECURRENCES)))


def _is_tf32(operation: Any) -> bool:
    # not allow_tf32, which raises if only the newer fp32_precision has been set
    return operation.fp32_precision == "tf32"


def _set_tf32(*, products: bool, cudnn: bool) -> None:
    # torch's compiler reads the older settings, so set them first. They leave the newer settings at "none", which means that
    # torch.backends.fp32_precision decides. So set the newer ones too.
    torch.set_float32_matmul_precision("high" if products else "highest")
    torch.backends.cudnn.allow_tf32 = cudnn
    for operation, allowed in ((_PRODUCTS, products), (_CONVOLUTIONS, cudnn), (_RECURRENCES, cudnn)):
        operation.fp32_precision = "tf32" if allowed else "ieee"
