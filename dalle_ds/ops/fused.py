"""Functions of many small operations that run as few kernels on a GPU: compiled there, plain elsewhere.

Functions and no modules are compiled: ZeRO-3 hangs hooks on modules, and each of them would break a compiled one. They hold no
parameters, so nothing in them needs gathering either.
"""

import logging
from collections.abc import Callable
from functools import cache, cached_property, update_wrapper
from typing import Any

import torch
from torch import Tensor

from dalle_ds.ops.compiling import compiled
from dalle_ds.ops.kernel_compiler import kernel_problem

log = logging.getLogger(__name__)

MIN_CAPABILITY = (7, 0)
"""Of a GPU that Triton makes code for."""

FUSED: dict[str, "Fused"] = {}
"""All fused functions by name: for what checks that each compiles, to as few kernels as it says."""

observer: Callable[["Fused", tuple[Any, ...]], Any] | None = None
"""For counting without a GPU: called with (function, arguments) in place of every call on CUDA tensors, gives its result."""


class Fused:
    """A pure function of tensors and plain values. `plain` is what it computes, operation by operation."""

    def __init__(self, plain: Callable[..., Any], kernels: int, passes: int) -> None:
        update_wrapper(self, plain)
        self.plain, self.kernels, self.passes = plain, kernels, passes
        self.name = plain.__qualname__

    def __call__(self, *args: Any) -> Any:
        if not any(isinstance(arg, Tensor) and arg.is_cuda for arg in args):
            return self.plain(*args)
        if observer is not None:
            return observer(self, args)
        return self._compiled(*args)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        problem = compile_problem()
        if problem is None:
            return compiled(self.plain, keep_roundings=True)
        _warn_once(problem)
        return self.plain


def fused(kernels: int, passes: int = 1) -> Callable[[Callable[..., Any]], Fused]:
    """Decorator. `kernels`: how many the compiler makes of it (tests hold it to that); `passes`: how often these read the
    large inputs."""

    def wrap(plain: Callable[..., Any]) -> Fused:
        function = Fused(plain, kernels, passes)
        FUSED[function.name] = function
        return function

    return wrap


@cache
def compile_problem() -> str | None:
    """Why this machine can't compile kernels for its GPU, or None."""
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name()} has compute capability {capability}, it takes {MIN_CAPABILITY}"
    return kernel_problem()


@cache
def _warn_once(problem: str) -> None:
    log.warning("the edges of residual blocks run as many small kernels, which is slow: %s", problem)
