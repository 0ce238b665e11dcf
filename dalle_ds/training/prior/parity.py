"""Parity check: an export must reproduce the engine's losses. One module's weights are in memory at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dalle_ds.errors import DataError
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.models.resblock import BranchLinear
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.storage import objects
from dalle_ds.storage.stored_tensors import StoredTensor

PARITY_FILE = "parity.safetensors"
"""File of a checkpoint: a few samples, and the engine's losses on them with the EMA weights."""

MEAN_DIFFERENCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Limits for the mean and the maximum difference between the losses of export and engine, in nats per token, by the number
format of the engine's branches.

Both round to that format, but a GPU sums in another order than this machine and also rounds attention probabilities. The two
results are independent roundings of one model, at similar distances from fp32. The rounding on this machine alone may change
the losses by more than these limits, as in deep models. The limit is therefore at least ROUNDINGS times that change."""

ROUNDINGS = (2, 3)
"""Factors for the mean and for the maximum. The distance between two independent roundings is sqrt(2) times their distance from
fp32."""


@torch.no_grad()
def prove_parity(
    data: str,
    config: PriorConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    fp16_branches: bool,
    dtype: torch.dtype = torch.float32,
    read: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:
    """Compute the losses of the checkpoint's parity batch with the exported weights, and compare them with the engine's losses.

    Args:
        data: folder of a checkpoint's files.
        tensors: the stored weights. All are read once for fp32, and once more if the engine used another format.
        fp16_branches: whether the engine's branches were fp16.
        dtype: dtype of all weights in the engine: 16-bit in DeepSpeed's built-in fp16 and bf16 modes.
        read: called with the number of bytes of each tensor after it was read.

    Returns:
        Numbers of samples and tokens, the engine's mean loss, and the differences in nats per token.

    Raises:
        DataError: the losses differ from the engine's by more than the limits.
    """
    with objects.local_copy(objects.join(data, PARITY_FILE)) as file:
        saved = load_file(file)

    def image_nll(fp16_branches: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.device("meta"):
            prior = Prior(config)
        if fp16_branches:
            use_fp16_branches(prior)
        with weights_from_files(prior, tensors, fp16_branches, read, dtype):
            return prior.image_nll(saved["text"], saved["image"])

    fp32_BN = image_nll()
    is_fp32 = not fp16_branches and dtype is torch.float32
    same_format_BN = fp32_BN if is_fp32 else image_nll(fp16_branches, dtype)
    branches, rounding_BN = torch.float16 if fp16_branches else dtype, (same_format_BN - fp32_BN).abs()
    difference_BN = (same_format_BN - saved["image_nll"]).abs()
    found = {"in the mean": difference_BN.mean().item(), "on a token": difference_BN.max().item()}
    limits = {
        "in the mean": max(MEAN_DIFFERENCE[branches], ROUNDINGS[0] * rounding_BN.mean().item()),
        "on a token": max(MAX_DIFFERENCE[branches], ROUNDINGS[1] * rounding_BN.max().item()),
    }
    for where, difference in found.items():
        if not (difference <= limits[where] and math.isfinite(difference)):  # if fp16 overflows, the limit is not finite
            raise DataError(
                f"export of {data} differs from the engine by {difference:.2e} nats {where}, expected at most "
                f"{limits[where]:.0e} with branches in {str(branches).removeprefix('torch.')}"
            )
    return {
        "samples": len(fp32_BN),
        "tokens": fp32_BN.numel(),
        "engine_image_loss": saved["image_nll"].mean().item(),
        "mean_difference_same_format": found["in the mean"],
        "max_difference_same_format": found["on a token"],
        "max_difference_fp32": (fp32_BN - saved["image_nll"]).abs().max().item(),
    }


@contextmanager
def weights_from_files(
    model: nn.Module,
    tensors: Mapping[str, StoredTensor],
    fp16_branches: bool = False,
    read: Callable[[int], object] = lambda n: None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[None]:
    """Context in which every module of a model on the meta device reads its parameters before its forward and frees them after.

    As with ZeRO-3, a parameter must be used only in the forward of its own module.
    """
    handles = []
    for path, module in model.named_modules():
        empty = dict(module.named_parameters(recurse=False))
        if not empty:
            continue

        def load(module: nn.Module, _inputs: object, names: Iterable[str] = tuple(empty), path: str = path) -> None:
            for name in names:
                stored = tensors[f"{path}.{name}" if path else name]
                value = stored.read().to(dtype)
                if fp16_branches and isinstance(module, BranchLinear) and name == "weight":
                    value = value.half()  # as the branch would do; here it frees the fp32 tensor first
                setattr(module, name, nn.Parameter(value, requires_grad=False))
                read(stored.nbytes)

        # restore the same meta parameters: new objects would fill the free gaps of the heap, and the activations of every layer
        # would then need new memory
        def drop(module: nn.Module, _inputs: object, _output: object, empty: Mapping[str, nn.Parameter] = empty) -> None:
            for name, parameter in empty.items():
                setattr(module, name, parameter)

        handles += [module.register_forward_pre_hook(load), module.register_forward_hook(drop, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
