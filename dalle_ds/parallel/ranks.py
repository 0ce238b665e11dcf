"""The process group: joining and leaving it, this process's rank, and the few collectives that trainers use."""

import os
import socket
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from dalle_ds.errors import ConfigError
from dalle_ds.ops.devices import use_cuda
from dalle_ds.ops.exactness import exact_fp32
from dalle_ds.ops.host_memory import keep_freed_memory
from dalle_ds.parallel.launch import take_gpu


@dataclass(frozen=True)
class Ranks:
    """Rank, world size and device of this process. A single process may be rank 0 of 1 without a process group."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` in place by summing. Returns `tensor`."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Gather the `value` of every rank, on every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def from_main(self, value: Any) -> Any:
        """Broadcast the main rank's `value` to every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


ALONE = Ranks(0, 1, torch.device("cpu"))
"""A single process without a process group. Its callers choose the compute device themselves."""


def join() -> Ranks:
    """Join the process group that a launcher has described in the environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_*). Without
    a launcher, create a group of one process.

    Raises:
        ConfigError: torchrun restarts on several machines without the settings that this needs; or a machine has more ranks
            than GPUs.
    """
    exact_fp32()
    cuda = use_cuda()
    if not cuda:
        keep_freed_memory()
        # otherwise DeepSpeed probes for accelerators and warns on every rank
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler logs its start and stop to stderr
    # DeepSpeed uses collectives that torch has deprecated; users can't do anything about the warning
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use .*_single", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    # Compiling this operator takes a minute and a C++ compiler, and it is only used for inference on CPUs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not cuda:
        # DeepSpeed rejects fp16 on CPUs without fast fp16 kernels. torch computes fp16 on any CPU, but slowly.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    device = torch.device("cuda", take_gpu(torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun sets 1 by default
        # torchrun sets LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if os.environ["WORLD_SIZE"] == "1" and os.environ["MASTER_PORT"] == "0":
        _pick_free_port()
    backend = "nccl" if cuda else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=_store_of_this_start(), rank=rank, world_size=world_size)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave() -> None:
    """Destroy all process groups, so that the processes end without warnings."""
    if dist.is_initialized():
        # All ranks must use the same order, since NCCL may wait for the other ranks of a group. torch itself orders groups by
        # name, but the names of groups that not all ranks made together are ordered differently on each rank.
        for group in reversed(list(distributed_c10d._world.pg_map)):
            dist.destroy_process_group(group)


def _store_of_this_start() -> dist.Store:
    """A store for this start of the job: torchrun reuses its own across restarts, so it would hold stale addresses."""
    if os.environ["GROUP_WORLD_SIZE"] != "1":  # each machine counts its own restarts, so the counts can't name the store
        raise ConfigError(
            "restarts by torchrun on several machines need --rdzv_backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _pick_free_port() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
