"""torch.compile for a whole run: room for all its shapes, in whichever thread they come up."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

VARIANTS = 64
"""Compiled variants of one function that a process may hold. Torch's default is 8, for a model that is called in one way.
Flex attention takes three masks times training, the forward pass of recomputed layers (no gradients), validation and the batch
that proves an export: 12 a model. A function that all layers share takes formats, with and without gradients, one or any number
of rows."""


def compiled(function: Callable[P, T], *, dynamic: bool | None = None, keep_roundings: bool = False) -> Callable[P, T]:
    """`function` compiled as one graph when it is called first; a call that torch can't compile raises.

    Only functions are compiled, never modules: ZeRO-3's hooks break compiled modules. One graph, so that too many variants are
    an error; left alone, torch falls back to running the function operation by operation with no more than a warning.
    `dynamic`: whether one variant serves all sizes; None: from the second size on.
    `keep_roundings`: a value that is rounded to 16 bits within the function and then computed with in fp32 is rounded indeed.
    By default Inductor computes on with what it had; x - x.half().float() then is 0.
    """
    options = {"emulate_precision_casts": True} if keep_roundings else None
    call = torch.compile(function, dynamic=dynamic, fullgraph=True, options=options)

    @wraps(function)
    def with_room(*args: P.args, **kwargs: P.kwargs) -> T:
        # at every call: torch keeps this setting for each thread, and on CUDA recomputed layers run in one of autograd's
        config = torch._dynamo.config
        if config.recompile_limit < VARIANTS:
            config.recompile_limit = VARIANTS
        return call(*args, **kwargs)

    return with_room
