"""Gather the parameters that ZeRO-3 keeps gathered, its persistent ones, in one message after each step.

DeepSpeed sends one message for each of them. A small model stays gathered as a whole: 62 messages after every step of the
demo's prior, each of which waits for a thread of every rank. They are few bytes, so that a copy on both sides costs less.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn


def gather_residents_at_once(residents: Sequence[nn.Parameter], halves: Collection[nn.Parameter]) -> None:
    """From now on ZeRO-3 gathers its list `residents` in one message; those in `halves` as fp16, others as their shards are.

    Call after `deepspeed.initialize`. What gathers single parameters (`GatheredParameters`) is as before, but leaves those alone
    that are gathered already: for fp32 values drop the resident ones first (`checkpoint_event_prologue`).
    """
    if not residents:
        return
    others, in_half = residents[0].all_gather, {id(parameter) for parameter in halves}

    def all_gather(param_list: Sequence[nn.Parameter] | None = None, **options: Any) -> Any:
        # DeepSpeed asks the first parameter of a list; any other list is not of those that stay
        if param_list is not residents or not all(map(_is_at_hand, residents)):
            return others(param_list, **options)
        return _gather([p for p in residents if p.ds_status is ZeroParamStatus.NOT_AVAILABLE], in_half)

    residents[0].all_gather = all_gather


def _is_at_hand(parameter: nn.Parameter) -> bool:
    """The shard is neither on a disk nor quantized, and has no second copy inside the node."""
    shard = parameter.ds_tensor
    is_plain = not hasattr(shard, "ds_quant_scale") and parameter.ds_secondary_tensor is None
    return is_plain and shard.status is PartitionedParamStatus.AVAILABLE


@torch.no_grad()
def _gather(parameters: list[nn.Parameter], in_half: Collection[int]) -> None:
    if not parameters:
        return
    device, n_ranks = get_accelerator().current_device_name(), parameters[0].ds_zero_partition_world_size
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        dtype = torch.float16 if id(parameter) in in_half else parameter.ds_tensor.dtype
        by_dtype.setdefault(dtype, []).append(parameter)
    groups = sorted(by_dtype.items(), key=lambda item: -item[0].itemsize)  # so that each begins at a multiple of its size
    sizes = [dtype.itemsize * sum(p.ds_tensor.numel() for p in group) for dtype, group in groups]
    n_bytes = -(-sum(sizes) // 8) * 8
    own = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    torch._foreach_copy_(
        [shard for part in _parts(own[None], groups, sizes) for shard in part],
        [p.ds_tensor.view(1, -1) for _, group in groups for p in group],
    )
    whole = own
    if n_ranks > 1:
        whole = torch.empty(n_ranks * n_bytes, dtype=torch.uint8, device=device)
        dist.all_gather_into_tensor(whole, own, group=parameters[0].ds_process_group)
    for (_, group), shards in zip(groups, _parts(whole.view(n_ranks, n_bytes), groups, sizes), strict=True):
        for parameter, shard in zip(group, shards, strict=True):
            parameter.data = shard.reshape(-1)[: parameter.ds_numel].view(parameter.ds_shape)  # copied but on a single rank
            parameter.ds_status = ZeroParamStatus.AVAILABLE
    get_accelerator().synchronize()  # as DeepSpeed does here: its own gathers run on another stream


def _parts(
    bytes_RB: Tensor, groups: Sequence[tuple[torch.dtype, list[nn.Parameter]]], sizes: Sequence[int]
) -> list[tuple[Tensor, ...]]:
    """Of R ranks' messages of B bytes, the values of every parameter (R, n), by group."""
    parts, start = [], 0
    for (dtype, group), size in zip(groups, sizes, strict=True):
        values = bytes_RB[:, start : start + size].view(dtype)
        parts.append(values.split([p.ds_tensor.numel() for p in group], 1))
        start += size
    return parts
