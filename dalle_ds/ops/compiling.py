"""torch.compile with a recompile limit that is high enough for all shapes of a run, in every thread."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

VARIANTS = 64
"""Compiled variants of one function that a process may hold. Torch's default is 8, which suits a model that is called in one
way. Flex attention needs 12 variants per model: three masks times training, the forward pass of recomputed layers (no
gradients), validation, and the batch that verifies an export. A function that all layers share has variants for dtypes, with
and without gradients, for one row and for any number of rows."""


def compiled(function: Callable[P, T], *, dynamic: bool | None = None, keep_roundings: bool = False) -> Callable[P, T]:
    """Compile `function` as one graph at its first call. A call that torch can't compile raises an error.

    Compile only functions, never modules: ZeRO-3's hooks break compiled modules. The whole function must be one graph, so that
    too many variants are an error. Otherwise torch would only warn and run the function uncompiled.

    Args:
        dynamic: whether one variant serves all sizes. None means from the second size on.
        keep_roundings: if a value is rounded to 16 bits and then used in fp32, really round it. By default Inductor uses the
            unrounded value, so that x - x.half().float() is 0.
    """
    options = {"emulate_precision_casts": True} if keep_roundings else None
    call = torch.compile(function, dynamic=dynamic, fullgraph=True, options=options)

    @wraps(function)
    def with_room(*args: P.args, **kwargs: P.kwargs) -> T:
        # Set at every call: the setting is per thread, and on CUDA, recomputed layers run in a thread of autograd.
        config = torch._dynamo.config
        if config.recompile_limit < VARIANTS:
            config.recompile_limit = VARIANTS
        return call(*args, **kwargs)

    return with_room
