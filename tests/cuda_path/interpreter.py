"""Triton's interpreter, with additions that kernels from Inductor need. Only for child processes, like pretended_gpu.py.

The interpreter computes a kernel program by program with numpy. It cannot show races, the rounding of CUDA's exp2, erf and
similar functions (numpy computes them here), or a GPU's order of summation.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

_LIBDEVICE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "floor": np.floor,
    "isnan": np.isnan,
    "isinf": np.isinf,
    "erf": lambda x: torch.erf(torch.from_numpy(x)).numpy(),
}
"""numpy equivalents of functions in CUDA's libdevice, of which the interpreter knows only the names."""


def complete() -> None:
    """Add the missing functions to the interpreter."""
    for name, value in list(vars(libdevice).items()):
        if getattr(value, "__module__", None) == libdevice.__name__:  # without a replacement, they all return None
            setattr(libdevice, name, _on_blocks(_LIBDEVICE[name]) if name in _LIBDEVICE else _missing(name))
    ReduceOps.generic_reduce = _reduce_by_halves
    InterpreterBuilder.create_fma = _fma


def _on_blocks(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[tl.tensor], tl.tensor]:
    def call(x: tl.tensor) -> tl.tensor:
        values = function(x.handle.data)
        is_question = values.dtype == np.bool_
        dtype = tl.int32 if is_question else x.dtype  # C has no booleans
        values = values.astype(np.int32 if is_question else x.handle.data.dtype)
        return tl.tensor(TensorHandle(values, dtype), tl.block_type(dtype, x.shape) if x.type.is_block() else dtype)

    return call


def _missing(name: str) -> Callable[..., None]:
    def call(*_: tl.tensor) -> None:
        raise NotImplementedError(f"libdevice.{name} has no numpy equivalent in {__name__}: add one")

    return call


def _fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """Fused multiply-add with one rounding, like the instruction. The interpreter's own also rounds the product. Products of
    fp32 are exact in fp64."""
    return TensorHandle((x.data.astype(np.float64) * y.data + z.data).astype(z.data.dtype), z.dtype)


def _reduce_by_halves(self: ReduceOps, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """Reduce with any function as a GPU does: combine two halves elementwise, repeatedly. Lengths must be powers of two.

    The interpreter's own reduction takes one element at a time, which is seconds per block.
    """
    inputs, axis = self.unravel(inputs, self.axis)
    dtypes = [x.dtype for x in inputs]
    blocks = [np.moveaxis(x.handle.data, axis, 0) for x in inputs]
    while (n := len(blocks[0])) > 1:
        halves = [
            [self.to_tensor(block[part], dtype) for block, dtype in zip(blocks, dtypes, strict=True)]
            for part in (slice(n // 2), slice(n // 2, n))
        ]
        combined: Any = self.combine_fn.fn(*halves[0], *halves[1])
        blocks = [x.handle.data for x in (combined if isinstance(combined, tuple) else (combined,))]
    if self.keep_dims:
        results = [np.moveaxis(block, 0, axis) for block in blocks]
    else:
        results = [block[0] if block.ndim > 1 else block[0].item() for block in blocks]
    return [self.to_tensor(result, dtype) for result, dtype in zip(results, dtypes, strict=True)]
