"""What fp32 means on a GPU: products of fp32 numbers, summed in fp32, unless somebody asks for less."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_PRODUCTS, _CONVOLUTIONS, _RECURRENCES = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def exact_fp32() -> None:
    """Switch off what makes CUDA's products less exact than their number formats say, for this process. Changes no CPU result.

    Every way to a GPU calls it: joining a job, opening a model, encoding, a benchmark. torch's defaults are otherwise: cuDNN
    takes the operands of fp32 convolutions in TF32 (10 bits of mantissa), and cuBLAS may add up the partial sums of 16-bit
    products in 16 bits, where they overflow near 65504. NVIDIA's containers allow TF32 in fp32 matrix products, too
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
    """
    _set_tf32(products=False, cudnn=False)
    _PRODUCTS.allow_fp16_reduced_precision_reduction = False
    _PRODUCTS.allow_bf16_reduced_precision_reduction = False
    _PRODUCTS.allow_fp16_accumulation = False


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within, fp32 convolutions and matrix products take their operands in TF32, where the GPU can, or they don't."""
    before = {"products": _is_tf32(_PRODUCTS), "cudnn": _is_tf32(_CONVOLUTIONS) or _is_tf32(_RECURRENCES)}
    _set_tf32(products=allowed, cudnn=allowed)
    try:
        yield
    finally:
        _set_tf32(**before)


def has_tf32() -> bool:
    """Whether some fp32 product may be one of TF32 now, on a GPU that has it."""
    return any(map(_is_tf32, (_PRODUCTS, _CONVOLUTIONS, _RECURRENCES)))


def _is_tf32(operation: Any) -> bool:
    # not allow_tf32, which raises where somebody set the newer fp32_precision alone
    return operation.fp32_precision == "tf32"


def _set_tf32(*, products: bool, cudnn: bool) -> None:
    # The older names first, which torch's compiler reads. They leave the newer ones at "none", which hands the question on to
    # torch.backends.fp32_precision: so these are set as well.
    torch.set_float32_matmul_precision("high" if products else "highest")
    torch.backends.cudnn.allow_tf32 = cudnn
    for operation, allowed in ((_PRODUCTS, products), (_CONVOLUTIONS, cudnn), (_RECURRENCES, cudnn)):
        operation.fp32_precision = "tf32" if allowed else "ieee"
