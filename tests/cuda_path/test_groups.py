"""Process groups of replicas at cluster size: how many a rank takes part in creating. NCCL itself does not run."""

import sys
from collections.abc import Iterator
from types import FrameType

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from dalle_ds.parallel.ranks import leave
from dalle_ds.parallel.replicas.groups import Replicas


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """A list with one entry for each process group that is created, whichever ranks are in it."""
    made: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is distributed_c10d._new_group_with_tag.__code__:
            made.append("group")

    sys.setprofile(note)
    yield made
    sys.setprofile(None)


@pytest.mark.parametrize(("rank", "world_size", "n_replicas"), [(0, 1024, 128), (517, 1024, 128), (11, 12, 3), (7, 8, 8)])
def test_a_rank_makes_its_own_two_groups_and_no_other(calls: list[str], rank: int, world_size: int, n_replicas: int) -> None:
    """Before, 128 replicas of 8 took 136 calls. With NCCL, each call is a collective of all 1,024 ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        place = Replicas(n_replicas, rank, world_size)
        shards, peers = (sorted(distributed_c10d._world.pg_group_ranks[group]) for group in (place.shard_group, place.peers))
    finally:
        leave()
    assert len(calls) == 2 and not dist.is_initialized()
    n_shards = world_size // n_replicas
    assert shards == place.get_data_parallel_group_ranks()
    assert shards == list(range(rank // n_shards * n_shards, (rank // n_shards + 1) * n_shards))
    assert peers == list(range(rank % n_shards, world_size, n_shards))


@pytest.mark.parametrize("world_size", [8, 96, 512, 1024])
def test_one_split_tells_all_groups_apart(world_size: int) -> None:
    """torch passes NCCL a color computed from a group's ranks. Two groups with equal colors would become one group."""
    for n_shards in (n for n in (1, 2, 4, 8, 16, 32) if world_size % n == 0):
        n_replicas = world_size // n_shards
        shards = [list(range(i * n_shards, (i + 1) * n_shards)) for i in range(n_replicas)]
        assert len({distributed_c10d._process_group_color(ranks) for ranks in shards}) == n_replicas
        assert len({distributed_c10d._process_group_color(list(ranks)) for ranks in zip(*shards, strict=True)}) == n_shards
