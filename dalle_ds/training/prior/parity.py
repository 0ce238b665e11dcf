"""Proof that written weights give the engine's losses, with one tensor of the model in memory at a time."""

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
"""In a checkpoint: a few samples, and the losses that the engine gave them with the averaged weights."""

MEAN_DIFFERENCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Nats a token by which export and engine may differ, in the mean and at most, by the format of the engine's branches.

Both round to that format, but a GPU sums in another order than this machine and rounds attention's probabilities too: two
roundings of one model, each as far from fp32 as the other. Where this machine's own rounding moves losses that far, as in deep
models, the limits are ROUNDINGS times what it moves them."""

ROUNDINGS = (2, 3)
"""In the mean, on a token. Two roundings that have nothing in common are the square root of two as far from each other as from
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
    """Score the batch that the engine scored when it saved, with the weights as they were written.

    Args:
        data: folder of a checkpoint's files.
        tensors: where the weights lie; all are read once in fp32, and once more if the engine computed otherwise.
        fp16_branches: whether the engine's branches were fp16.
        dtype: the format of all weights in the engine; 16 bits under DeepSpeed's own fp16 and bf16.
        read: called with the bytes of each tensor that was read.

    Raises:
        DataError: the losses are not the engine's.
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
        if not (difference <= limits[where] and math.isfinite(difference)):  # where fp16 overflows, so does the limit
            raise DataError(
                f"export of {data} differs from the engine by {difference:.2e} nats {where}, expected at most "
                f"{limits[where]:.0e} with branches in {str(branches).removeprefix('torch.')}"
            )
    return {
        "samples": len(fp32_BN),
        "tokens": fp32_BN.numel(),
        "engine_mean_image_nll": saved["image_nll"].mean().item(),
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
    """While the context lasts, each module of a model on the meta device reads its parameters when it is called, and drops them
    when it is done. Parameters must be used where their module is called, which ZeRO-3 asks for too."""
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
                    value = value.half()  # what the branch does at once; here the fp32 original goes first
                setattr(module, name, nn.Parameter(value, requires_grad=False))
                read(stored.nbytes)

        # the same empty parameters come back: new ones would stand in the heap's holes, and each layer's activations would need
        # another
        def drop(module: nn.Module, _inputs: object, _output: object, empty: Mapping[str, nn.Parameter] = empty) -> None:
            for name, parameter in empty.items():
                setattr(module, name, parameter)

        handles += [module.register_forward_pre_hook(load), module.register_forward_hook(drop, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
