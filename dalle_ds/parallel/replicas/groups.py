"""Replicas: ZeRO-3 shards the model over the ranks of each replica. Ranks at the same position hold the same shard.

Consecutive ranks form a replica. So with one replica per node, all-gathers and reduce-scatters of ZeRO-3 stay inside nodes, and
only gradient shards are sent between nodes (paper section 2.5 and appendix E.1).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from dalle_ds.errors import ConfigError
from dalle_ds.ops.low_bit import FORMAT_1_6_9, decode, encode
from dalle_ds.recipes import Config

PAPER_RATE = 0.1412
"""Size of the factors relative to the gradient for the paper's largest model: 5 r / (8 d) with r = 896 and d = 3968, rounded up
(appendix E.1, table 1). Shards of 8 ranks then have the paper's rank, 896 / 8 = 112."""


BUCKET_VALUES = 2**25
"""Gradient values that are averaged at a time: about one layer of the largest model on 8 ranks. A copy takes 128 MiB."""


class ReplicasConfig(Config):
    """How many replicas of the model train in parallel, and how they exchange gradients."""

    count: int = Field(1, ge=1, description="number of replicas; one per node keeps ZeRO-3's traffic inside nodes")
    compression: Literal["none", "power_sgd"] = Field(
        "none", description="of the gradients between replicas; the paper uses PowerSGD"
    )
    sent_fraction: float = Field(
        PAPER_RATE, gt=0, le=1, description="size of the factors as a fraction of the matrices' gradients; sets the rank"
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="rank of every shard's factors, instead of sent_fraction; the paper's, for 8 ranks a replica: 64 (2.8b), "
        "80 (5.6b), 112 (12b)",
    )
    warm_start: bool = Field(
        False,
        description="start each power iteration from the last factors (PowerSGD as published); the paper uses a fixed start",
    )
    number_format: Literal["1-6-9", "fp32"] = Field(
        "1-6-9", description="format of the factors on the wire and of the carried errors"
    )
    p_scale_power: int = Field(
        -8, ge=-40, le=40, description="1-6-9 only: the first factor is multiplied by 2^this on the wire, to fit its range"
    )
    q_scale_power: int = Field(-8, ge=-40, le=40, description="1-6-9 only: the same for the second factor")

    checkpoint_errors: Literal["each", "mean"] = Field(
        "each",
        description="carried errors in checkpoints; each: those of all ranks, as large as the model for every replica, resumes "
        "bit-exactly; mean: their mean over replicas, as large as one replica's, as in the paper, resumes up to rounding",
    )

    @model_validator(mode="after")
    def _check(self) -> "ReplicasConfig":
        # Compare with the defaults rather than use model_fields_set: a run's saved recipe sets every field.
        changed = {name for name, known in type(self).model_fields.items() if getattr(self, name) != known.default}
        of_compression = changed - {"count", "compression"}
        if self.compression == "none" and of_compression:
            raise ValueError(f"{', '.join(sorted(of_compression))} would be ignored: compression is none")
        of_wire = sorted(changed & {"p_scale_power", "q_scale_power"})
        if self.number_format == "fp32" and of_wire:
            raise ValueError(f"{', '.join(of_wire)} would be ignored: number_format is fp32")
        if self.compression != "none" and self.count == 1:
            raise ValueError(f"compression is {self.compression}, but with count 1 no gradients go between replicas")
        if self.rank is not None and "sent_fraction" in changed:
            raise ValueError("rank and sent_fraction both set how much is sent: set only one of them")
        return self

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of carried errors in a checkpoint, per parameter of the model, at most."""
        if self.compression == "none":
            return 0
        if self.checkpoint_errors == "mean":
            return 4
        return self.count * (2 if self.number_format == "1-6-9" else 4)


class Replicas:
    """Process groups of this rank: `shard_group` are the ranks of its replica; `peers` hold the same shard in all replicas.

    It is also a model parallel unit for DeepSpeed (the `get_...` methods), so that ZeRO-3 only sees the ranks of one replica.
    """

    def __init__(self, count: int, rank: int, world_size: int) -> None:
        """Create the process groups. All ranks must call it together.

        Raises:
            ConfigError: the ranks don't divide among the replicas.
        """
        if world_size % count:
            raise ConfigError(f"replicas.count {count} does not divide the {world_size} ranks of this job")
        self.count, self.n_shards = count, world_size // count
        self.index, self.shard_rank = divmod(rank, self.n_shards)
        self._shard_ranks = list(range(self.index * self.n_shards, (self.index + 1) * self.n_shards))
        # Each rank creates only its own two groups. NCCL creates a group by splitting the communicator of all ranks, in which
        # all ranks take part. If every rank created every group, 128 replicas of 8 ranks would need 136 splits. Here two splits
        # are enough, one for all shard groups and one for all groups of peers: every rank is in one of each, in this order.
        self.shard_group = dist.new_group(self._shard_ranks, use_local_synchronization=True)
        self.peers = dist.new_group(list(range(self.shard_rank, world_size, self.n_shards)), use_local_synchronization=True)

    def get_data_parallel_group(self) -> Any:
        return self.shard_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._shard_ranks

    def get_data_parallel_rank(self) -> int:
        return self.shard_rank

    def get_data_parallel_world_size(self) -> int:
        return self.n_shards

    # No model parallelism: norms and overflow checks stay inside a replica, since all replicas have the same gradients.
    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


Wire = Callable[[Sequence[Tensor], Any], list[Tensor]]
"""A function (fp32 tensors, group) -> the tensors' means over the group, bit-identical on every rank.
It sends all tensors in one message."""


def mean_in_fp32(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    return _split_as(flat.div_(dist.get_world_size(group)), tensors)


def mean_in_1_6_9(tensors: Sequence[Tensor], group: Any, scale_power: int = 0) -> list[Tensor]:
    """`mean_in_fp32` with half the bytes: sends 16-bit codes in the format 1-6-9.

    Each rank receives one part of every rank's codes, averages it in fp32, and sends the codes of the average to all ranks.
    Values are multiplied by 2^`scale_power` on the wire. What is then beyond the format's largest value, nearly 16, becomes the
    largest. So do Inf and NaN, so ranks must agree on those by other means.
    """
    n_ranks, n = dist.get_world_size(group), sum(tensor.numel() for tensor in tensors)
    flat = torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_zeros(-n % n_ranks)])
    # send as bytes: neither NCCL nor gloo supports int16
    codes = encode(flat.mul_(2.0**scale_power), FORMAT_1_6_9).view(torch.uint8)
    received = torch.empty_like(codes)
    dist.all_to_all_single(received, codes, group=group)
    parts = decode(received.view(torch.int16), FORMAT_1_6_9).view(n_ranks, -1)
    dist.all_gather_into_tensor(codes, encode(parts.mean(0), FORMAT_1_6_9).view(torch.uint8), group=group)
    return _split_as(decode(codes.view(torch.int16), FORMAT_1_6_9)[:n].mul_(2.0**-scale_power), tensors)


def _split_as(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
