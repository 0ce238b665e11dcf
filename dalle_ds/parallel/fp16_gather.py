"""Gather the weights of residual branches as fp16, and leave them so until they are freed.

ZeRO-3 shards fp32 parameters here, which are their own master copies. Its gather can send fp16, but then joins the parts in one
copy and widens them in another, and the branch narrows them once more in each of its passes: 38 bytes a parameter and
micro-step, where 4 do. Parameters carry the function that gathers them, so it can be another one: each weight is received in
its own place, in fp16, and that tensor is the parameter's data.

autograd then wants to be told that gradients stay fp32 (`grad_dtype`), and ZeRO-3 to reduce them per module and not by hooks on
parameters, whose kind changes with each gather: layers are its leaf modules (`leaf_layers`).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from dalle_ds.models.resblock import BranchLinear

LARGE = 1 << 22
"""Values of a parameter that has a message of its own: embeddings and unembeddings of all but the smallest models."""


def gather_in_half(model: nn.Module) -> list[nn.Parameter]:
    """Make ZeRO-3 gather the weights of `model`'s branches in fp16 -> these weights. Before `deepspeed.initialize`, after
    `zero.Init`; those that stay gathered come by another way too (`resident_gather`)."""
    weights = [module.weight for module in model.modules() if isinstance(module, BranchLinear)]
    halves = set(map(id, weights))
    for parameter in model.parameters():
        if id(parameter) in halves:
            parameter.grad_dtype = torch.float32
        # ZeRO-3 asks any one parameter to gather a whole group
        parameter.all_gather_coalesced = _Gather(halves, parameter.all_gather_coalesced)
    return weights


class _Gather:
    """Starts to gather a group of parameters -> a handle with `wait`."""

    def __init__(self, halves: set[int], others: Callable[..., Any]) -> None:
        self._halves, self._others = halves, others

    def __call__(self, params: Iterable[nn.Parameter], quantize: bool = False, **options: Any) -> "_Handle":
        ours, others = [], []
        for parameter in sorted(params, key=lambda p: p.ds_id):  # collectives in one order on all ranks
            (ours if not quantize and self._is_ours(parameter) else others).append(parameter)
        handle = self._others(others, quantize=quantize, **options) if others else None
        return _Handle(handle, [(p, *_receive(p, id(p) in self._halves)) for p in ours])

    def _is_ours(self, parameter: nn.Parameter) -> bool:
        """fp16 weights, and others so large that the second copy, which ZeRO-3 makes of what it gathers, would be missed; where
        nothing is sharded all: there ZeRO-3 would wait for the device at every module. Not those whose shard is on a disk, or
        has a second copy inside the node."""
        shard = parameter.ds_tensor
        is_at_hand = shard.status is PartitionedParamStatus.AVAILABLE and parameter.ds_secondary_tensor is None
        if id(parameter) in self._halves:
            return is_at_hand
        return is_at_hand and (parameter.ds_numel >= LARGE or parameter.ds_zero_partition_world_size == 1)


class _Handle:
    def __init__(self, others: Any, halves: list[tuple[nn.Parameter, Tensor, Any]]) -> None:
        self._others, self._halves = others, halves

    def wait(self, **options: Any) -> None:
        """ZeRO-3 calls it once for every parameter of the group."""
        if self._others is not None:
            self._others.wait(**options)
        for parameter, whole, work in self._halves:
            if work is not None:
                work.wait()
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._others, self._halves = None, []


def _receive(parameter: nn.Parameter, in_half: bool) -> tuple[Tensor, Any]:
    """-> flat values, and the collective that fills them in (None: they are there)."""
    parameter.ds_status = ZeroParamStatus.INFLIGHT
    shard, n_ranks = parameter.ds_tensor, parameter.ds_zero_partition_world_size
    device = get_accelerator().current_device_name()
    if n_ranks == 1:
        return shard.to(device, torch.float16 if in_half else shard.dtype, non_blocking=True), None
    dtype = torch.float16 if in_half else shard.dtype
    whole = torch.empty(shard.numel() * n_ranks, dtype=dtype, device=device)
    own = whole.narrow(0, shard.numel() * parameter.ds_zero_partition_rank, shard.numel())
    own.copy_(shard, non_blocking=True)  # rounds
    return whole, dist.all_gather_into_tensor(whole, own, group=parameter.ds_process_group, async_op=True)
