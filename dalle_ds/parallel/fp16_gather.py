"""Gather the weights of residual branches as fp16, and keep them in fp16 until they are freed.

ZeRO-3 shards fp32 parameters here, which are their own master copies. Its own gather can send fp16. But then it concatenates
the shards in one copy and converts them to fp32 in a second, and the branch converts them to fp16 again in each pass. That
moves 38 bytes per parameter and micro-step through memory, where 4 are enough. Each parameter carries the function that gathers
it, so the function can be replaced: the replacement receives each weight into a buffer of its own, in fp16, and this buffer
becomes the parameter's data.

Two things follow. autograd must be told that the gradients of fp16 weights are fp32 (`grad_dtype`). And ZeRO-3 must reduce
gradients per module, not by hooks on parameters, whose dtype changes with each gather; so layers are its leaf modules.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.models.resblock import BranchLinear
from dalle_ds.parallel.deepspeed_api import PartitionedParamStatus, ZeroParamStatus, dist, get_accelerator

LARGE = 1 << 22
"""Parameters with at least this many values get a message of their
own: embeddings and unembeddings of all but the smallest models."""


def gather_in_half(model: nn.Module) -> list[nn.Parameter]:
    """Make ZeRO-3 gather the weights of `model`'s branches in fp16. Returns these weights.

    Call it after `zero.Init` and before `deepspeed.initialize`. `resident_gather` gathers those weights that stay gathered.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, BranchLinear)]
    halves = set(map(id, weights))
    for parameter in model.parameters():
        if id(parameter) in halves:
            parameter.grad_dtype = torch.float32
        # ZeRO-3 calls this method of one parameter to gather a whole group of parameters
        parameter.all_gather_coalesced = _Gather(halves, parameter.all_gather_coalesced)
    return weights


class _Gather:
    """Starts to gather a group of parameters. Returns a handle with `wait`."""

    def __init__(self, halves: set[int], others: Callable[..., Any]) -> None:
        self._halves, self._others = halves, others

    def __call__(self, params: Iterable[nn.Parameter], quantize: bool = False, **options: Any) -> "_Handle":
        ours, others = [], []
        for parameter in sorted(params, key=lambda p: p.ds_id):  # the same order of collectives on all ranks
            (ours if not quantize and self._is_ours(parameter) else others).append(parameter)
        handle = self._others(others, quantize=quantize, **options) if others else None
        return _Handle(handle, [(p, *_receive(p, id(p) in self._halves)) for p in ours])

    def _is_ours(self, parameter: nn.Parameter) -> bool:
        """Whether we gather this parameter ourselves instead of ZeRO-3.

        We gather fp16 weights. We also gather large parameters, for which ZeRO-3's second copy of gathered values would take
        too much memory. With one rank per shard group we gather all, since ZeRO-3 would wait for the device at every module.

        ZeRO-3 gathers parameters whose shard is on disk or has a secondary copy inside the node.
        """
        shard = parameter.ds_tensor
        is_at_hand = shard.status is PartitionedParamStatus.AVAILABLE and parameter.ds_secondary_tensor is None
        if id(parameter) in self._halves:
            return is_at_hand
        return is_at_hand and (parameter.ds_numel >= LARGE or parameter.ds_zero_partition_world_size == 1)


class _Handle:
    def __init__(self, others: Any, halves: list[tuple[nn.Parameter, Tensor, Any]]) -> None:
        self._others, self._halves = others, halves

    def wait(self, **options: Any) -> None:
        """Wait for the gathers and set the parameters' data. ZeRO-3 calls it once for every parameter of the group."""
        if self._others is not None:
            self._others.wait(**options)
        for parameter, whole, work in self._halves:
            if work is not None:
                work.wait()
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._others, self._halves = None, []


def _receive(parameter: nn.Parameter, in_half: bool) -> tuple[Tensor, Any]:
    """Start to gather a parameter. Returns its flat values and the collective that fills them.
    If there is only one rank to gather from, the values are complete and the collective is None."""
    parameter.ds_status = ZeroParamStatus.INFLIGHT
    shard, n_ranks = parameter.ds_tensor, parameter.ds_zero_partition_world_size
    device = get_accelerator().current_device_name()
    if n_ranks == 1:
        return shard.to(device, torch.float16 if in_half else shard.dtype, non_blocking=True), None
    dtype = torch.float16 if in_half else shard.dtype
    whole = torch.empty(shard.numel() * n_ranks, dtype=dtype, device=device)
    own = whole.narrow(0, shard.numel() * parameter.ds_zero_partition_rank, shard.numel())
    own.copy_(shard, non_blocking=True)  # rounds to fp16
    return whole, dist.all_gather_into_tensor(whole, own, group=parameter.ds_process_group, async_op=True)
