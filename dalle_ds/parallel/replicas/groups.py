"""Replicas: ZeRO-3 shards the model over the ranks of one; the ranks at the same place in all of them hold the same shard.

Ranks that follow each other make a replica, so with one replica a node all gathering and scattering of parameters stays inside
nodes, and only gradient shards travel between them (paper section 2.5 and appendix E.1).
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

PAPER_RATE = 0.141
"""Share of the gradient that the paper's factors hold: 5 r / (8 d) with r = 896 and d = 3968 (appendix E.1, table 1)."""


BUCKET_VALUES = 2**25
"""Gradient values that are averaged at a time: about a layer of the largest model on 8 ranks, 128 MiB a copy."""


class ReplicasConfig(Config):
    """How many copies of the model train side by side, and how they exchange gradients."""

    count: int = Field(1, ge=1, description="replicas; as many as there are nodes keeps ZeRO-3's traffic inside nodes")
    compression: Literal["none", "power_sgd"] = "none"
    sent_fraction: float = Field(
        PAPER_RATE, gt=0, le=1, description="share of the matrices' gradient values that their factors hold; sets the rank"
    )
    rank: int | None = Field(None, ge=1, description="rank of every shard's factors, instead of sent_fraction (12b: 112)")
    warm_start: bool = Field(
        False, description="begin each power iteration with the last factors (PowerSGD as published); the paper: a fixed start"
    )
    number_format: Literal["1-6-9", "fp32"] = Field("1-6-9", description="of factors on the wire and of the carried errors")

    checkpoint_errors: Literal["each", "mean"] = Field(
        "each",
        description="each: carried errors of all ranks, as large as the model for every replica: resumes to the last digit; "
        "mean: as much as one replica's, as in the paper: resumes but for rounding",
    )

    @model_validator(mode="after")
    def _check(self) -> "ReplicasConfig":
        # not what was set: the recipe that a run keeps sets everything
        changed = {name for name, known in type(self).model_fields.items() if getattr(self, name) != known.default}
        of_compression = changed - {"count", "compression"}
        if self.compression == "none" and of_compression:
            raise ValueError(f"{', '.join(sorted(of_compression))} would be ignored: compression is none")
        if self.compression != "none" and self.count == 1:
            raise ValueError(f"compression is {self.compression}, but with count 1 no gradients go between replicas")
        if self.rank is not None and "sent_fraction" in changed:
            raise ValueError("rank and sent_fraction both say how much is sent: set one of them")
        return self

    @property
    def checkpoint_bytes(self) -> int:
        """Of carried errors in a checkpoint, for one parameter of the model at most."""
        if self.compression == "none":
            return 0
        if self.checkpoint_errors == "mean":
            return 4
        return self.count * (2 if self.number_format == "1-6-9" else 4)


class Replicas:
    """This rank's place: `index` of its replica, and its `peers`, the ranks that hold the same shard in the others.

    Also what DeepSpeed calls a model parallel unit (the `get_...` methods): by it ZeRO-3 sees one replica and nothing else.
    """

    def __init__(self, count: int, rank: int, world_size: int) -> None:
        """All ranks construct it together.

        Raises:
            ConfigError: the ranks don't divide among the replicas.
        """
        if world_size % count:
            raise ConfigError(f"replicas.count {count} does not divide the {world_size} ranks of this job")
        self.count, self.n_shards = count, world_size // count
        self.index, self.shard_rank = divmod(rank, self.n_shards)
        self._shard_ranks = list(range(self.index * self.n_shards, (self.index + 1) * self.n_shards))
        # Each rank makes its own two groups alone. NCCL makes a group by splitting the communicator of all ranks, and all take
        # part in that: 136 times for 128 replicas of 8, were every rank to make every group. Here one split makes the groups of
        # all replicas and one those of all peers, since every rank is in one of each, and in this order.
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

    # No model parallelism: norms and overflow checks stay inside a replica, whose gradients are the same as in all others.
    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


Wire = Callable[[Sequence[Tensor], Any], list[Tensor]]
"""(fp32 tensors, group) -> their means over the group, the same bits on every rank; one message for all of them."""


def mean_in_fp32(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    return _split_as(flat.div_(dist.get_world_size(group)), tensors)


def mean_in_1_6_9(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Half the bytes: each rank gets one part of everybody's codes, averages it in fp32 and sends its codes to all. What is
    beyond the format's largest value, nearly 16, becomes that value; so do Inf and NaN, which must be agreed on by other means.
    """
    n_ranks, n = dist.get_world_size(group), sum(tensor.numel() for tensor in tensors)
    flat = torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_zeros(-n % n_ranks)])
    # as bytes: neither NCCL nor gloo knows 16-bit integers
    codes = encode(flat, FORMAT_1_6_9).view(torch.uint8)
    received = torch.empty_like(codes)
    dist.all_to_all_single(received, codes, group=group)
    parts = decode(received.view(torch.int16), FORMAT_1_6_9).view(n_ranks, -1)
    dist.all_gather_into_tensor(codes, encode(parts.mean(0), FORMAT_1_6_9).view(torch.uint8), group=group)
    return _split_as(decode(codes.view(torch.int16), FORMAT_1_6_9)[:n], tensors)


def _split_as(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
