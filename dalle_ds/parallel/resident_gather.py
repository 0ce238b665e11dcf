"""Gather ZeRO-3's persistent parameters in one message; without hooks if all parameters of the model are persistent.

After a step, DeepSpeed sends one message per persistent parameter: 62 for the demo's prior. Each message waits for a thread of
every rank. The parameters are small, so copying them into one message is cheaper. DeepSpeed's hooks gather and free parameters
around each module. If the whole model stays gathered, they do nothing, but take a tenth of an update's time.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.parallel.deepspeed_api import PartitionedParamStatus, ZeroParamStatus, dist, get_accelerator


class Residents:
    """The persistent parameters of one engine.

    `GatheredParameters` leaves parameters alone that are gathered already. To get their fp32 values, first drop the gathered
    ones with `checkpoint_event_prologue`.
    """

    def __init__(self, zero_optimizer: Any, module: nn.Module, halves: Collection[nn.Parameter]) -> None:
        """Create it after `deepspeed.initialize`, at stage 3. Parameters in `halves` are gathered in fp16, others in the
        dtype of their shards."""
        self._parameters: Sequence[nn.Parameter] = zero_optimizer.persistent_parameters
        self._in_half = {id(parameter) for parameter in halves}
        self.are_all = all(parameter.ds_persist and _is_at_hand(parameter) for parameter in module.parameters())
        """Whether the whole model stays gathered. Then `gather` replaces DeepSpeed's hooks."""
        if not self._parameters:
            return
        self._others = self._parameters[0].all_gather
        self._parameters[0].all_gather = self._all_gather  # DeepSpeed calls this method of the list's first parameter
        if self.are_all:
            zero_optimizer.parameter_offload.destroy()  # its hooks

    def gather(self) -> None:
        """Call it before a forward pass. If the whole model stays gathered, gather the parameters that are not: after
        initialisation, and after a skipped step."""
        if self.are_all:
            self._all_gather(self._parameters)

    def _all_gather(self, param_list: Sequence[nn.Parameter] | None = None, **options: Any) -> Any:
        if param_list is not self._parameters or not all(map(_is_at_hand, self._parameters)):
            return self._others(param_list, **options)
        waiting = [p for p in self._parameters if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        return _gather(waiting, self._in_half) if waiting else None


def _is_at_hand(parameter: nn.Parameter) -> bool:
    """Whether the shard is in memory, is not quantized, and has no second copy inside the node."""
    shard = parameter.ds_tensor
    is_plain = not hasattr(shard, "ds_quant_scale") and parameter.ds_secondary_tensor is None
    return is_plain and shard.status is PartitionedParamStatus.AVAILABLE


@torch.no_grad()
def _gather(parameters: list[nn.Parameter], in_half: Collection[int]) -> None:
    device, n_ranks = get_accelerator().current_device_name(), parameters[0].ds_zero_partition_world_size
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        dtype = torch.float16 if id(parameter) in in_half else parameter.ds_tensor.dtype
        by_dtype.setdefault(dtype, []).append(parameter)
    groups = sorted(
        by_dtype.items(), key=lambda item: -item[0].itemsize
    )  # largest dtype first, so that every dtype starts at a multiple of its size
    n_bytes = sum(dtype.itemsize * p.ds_tensor.numel() for dtype, group in groups for p in group)
    own = torch.empty(-(-n_bytes // 8) * 8, dtype=torch.uint8, device=device)
    torch._foreach_copy_(_parts(own[None], groups), [p.ds_tensor.view(1, -1) for _, group in groups for p in group])
    whole = own
    if n_ranks > 1:
        whole = torch.empty(n_ranks * own.numel(), dtype=torch.uint8, device=device)
        dist.all_gather_into_tensor(whole, own, group=parameters[0].ds_process_group)
    ordered = [parameter for _, group in groups for parameter in group]
    for parameter, shards_Rn in zip(ordered, _parts(whole.view(n_ranks, -1), groups), strict=True):
        parameter.data = shards_Rn.reshape(-1)[: parameter.ds_numel].view(
            parameter.ds_shape
        )  # a copy, except with a single rank
        parameter.ds_status = ZeroParamStatus.AVAILABLE
    get_accelerator().synchronize()  # as DeepSpeed does here: its own gathers run on another stream


def _parts(bytes_RB: Tensor, groups: Sequence[tuple[torch.dtype, list[nn.Parameter]]]) -> list[Tensor]:
    """Split the messages of R ranks, of B bytes each, into the values (R, n) of every parameter."""
    parts, start = [], 0
    for dtype, group in groups:
        lengths = [parameter.ds_tensor.numel() for parameter in group]
        end = start + dtype.itemsize * sum(lengths)
        parts += bytes_RB[:, start:end].view(dtype).split(lengths, 1)
        start = end
    return parts
