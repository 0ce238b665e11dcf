"""All that this project uses of DeepSpeed, imported without what no rank needs.

A plain `import deepspeed` imports mlflow for DeepSpeed's autotuner, which costs each rank more files than DeepSpeed itself. And
when it makes a process group, it starts compilers on each rank, to find out which of its operators could be built.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dalle_ds.lazy import large_imports
from dalle_ds.ops.devices import use_cuda


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Within this context, importing `package` raises ImportError, unless it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


if not use_cuda():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed probes for accelerators and warns on every rank

with _without("mlflow"), large_imports():
    import deepspeed
    import deepspeed.ops
    from deepspeed import DeepSpeedEngine
    from deepspeed import comm as dist
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, is_zero_param
    from deepspeed.utils import logger, safe_get_local_grad, safe_set_local_grad, set_z3_leaf_modules

# This one is only looked up. It takes a minute and a C++ compiler to build, and serves inference on CPUs.
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}

__all__ = [
    "DeepSpeedEngine",
    "PartitionedParamStatus",
    "ZeroParamStatus",
    "deepspeed",
    "dist",
    "get_accelerator",
    "is_zero_param",
    "logger",
    "safe_get_local_grad",
    "safe_set_local_grad",
    "set_z3_leaf_modules",
]
