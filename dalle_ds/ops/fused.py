"""Functions of many small operations that are compiled into few kernels on a GPU, and run uncompiled on other devices.

Only functions are compiled, not modules, since the hooks that ZeRO-3 installs on modules break compiled modules. The functions
hold no parameters, so ZeRO-3 does not need to gather anything for them.
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
"""Lowest compute capability that Triton supports."""

FUSED: dict[str, "Fused"] = {}
"""All fused functions by name. Tests use it to check that each compiles into its declared number of kernels."""

observer: Callable[["Fused", tuple[Any, ...]], Any] | None = None
"""If set, it is called with (function, arguments) instead of every fused function on CUDA tensors, and must return the result.
It serves to count kernels without a GPU."""


class Fused:
    """A pure function of tensors and plain values. `plain` is the uncompiled function."""

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
    """Decorator that makes a `Fused` function.

    Args:
        kernels: number of kernels that the compiler makes of it. Tests check this number.
        passes: how many times the kernels read the large inputs.
    """

    def wrap(plain: Callable[..., Any]) -> Fused:
        function = Fused(plain, kernels, passes)
        FUSED[function.name] = function
        return function

    return wrap


@cache
def compile_problem() -> str | None:
    """Return why this machine can't compile kernels for its GPU. If it can, return None."""
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name()} has compute capability {capability}, expected at least {MIN_CAPABILITY}"
    return kernel_problem()


@cache
def _warn_once(problem: str) -> None:
    log.warning("fused operations run as many small kernels, which is slow: %s", problem)
