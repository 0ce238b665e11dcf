"""The process group: joining and leaving it, this process's rank, and the few collectives that trainers use."""

import os
import socket
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from dalle_ds.errors import ConfigError, RankLost, UserError
from dalle_ds.ops.devices import use_cuda
from dalle_ds.ops.exactness import exact_fp32
from dalle_ds.ops.host_memory import keep_freed_memory
from dalle_ds.parallel.launch import stopped_siblings, take_gpu

T = TypeVar("T")

START_SECONDS = "DALLE_DS_START_SECONDS"
"""Environment variable: seconds in which all ranks must have joined, from the first one on."""


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

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start `sum`. The returned function waits for its end and returns `tensor`; on a GPU, only the device waits."""
        work = dist.all_reduce(tensor, async_op=True) if self.world_size > 1 else None

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return tensor

        return wait

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

    def once(self, action: Callable[[], T]) -> T:
        """Call `action` on the main rank alone, and return its result on every rank. All ranks must call it.

        Raises:
            UserError, OSError: `action` raised it on the main rank. Every rank raises it, so that none waits for the others.
        """
        result: T | None = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = action()
            except (UserError, OSError) as raised:
                error = raised
        result, error = self.from_main((result, error))
        if error is not None:
            raise error
        return cast(T, result)

    def each(self, action: Callable[[], T]) -> list[T]:
        """Call `action` on every rank. Returns the results of all ranks, on every rank, in rank order.

        Raises:
            UserError: `action` raised it, or an OSError, on some rank. Every rank raises the error of the first such rank, with
                its class and exit code. The message begins with the rank.
        """
        outcomes = self.gather_objects(self._attempt(action))
        _raise_first(error for _, error in outcomes)
        return [result for result, _ in outcomes]

    def each_to_main(self, action: Callable[[], T]) -> list[T]:
        """As `each`, but only the main rank gets the results. The others return an empty list."""
        result, error = self._attempt(action)
        _raise_first(self.gather_objects(error))
        return self._gather_on_main(result)

    def _attempt(self, action: Callable[[], T]) -> tuple[T | None, UserError | None]:
        try:
            return action(), None
        except (UserError, OSError) as error:
            message = f"rank {self.rank}: {error}" if self.world_size > 1 else str(error)
            return None, error.told_as(message) if isinstance(error, UserError) else UserError(message)

    def _gather_on_main(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered, dst=0)
        return gathered or []

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
            than GPUs; or DALLE_DS_START_SECONDS is not a number; or another process has the port of MASTER_PORT.
        RankLost: not all ranks have joined within DALLE_DS_START_SECONDS (600).
    """
    wait = _start_seconds()
    exact_fp32()
    cuda = use_cuda()
    if not cuda:
        keep_freed_memory()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler logs its start and stop to stderr
    # DeepSpeed uses collectives that torch has deprecated; users can't do anything about the warning
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use .*_single", category=FutureWarning)
    from dalle_ds.parallel.deepspeed_api import deepspeed, get_accelerator

    if not cuda:
        # DeepSpeed rejects fp16 on CPUs without fast fp16 kernels. torch computes fp16 on any CPU, but slowly.
        get_accelerator().is_fp16_supported = lambda: True
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
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = _store_of_this_start(wait)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=wait)
    except RuntimeError as error:  # torch's DistError is one
        raise _not_joined(error, wait) from error
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave() -> None:
    """Destroy all process groups, so that the processes end without warnings."""
    if dist.is_initialized():
        # All ranks must use the same order, since NCCL may wait for the other ranks of a group. torch itself orders groups by
        # name, but the names of groups that not all ranks made together are ordered differently on each rank.
        for group in reversed(list(distributed_c10d._world.pg_map)):
            dist.destroy_process_group(group)


def _raise_first(errors: Iterable[UserError | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


def _start_seconds() -> timedelta:
    given = os.environ.get(START_SECONDS, "600")
    try:
        return timedelta(seconds=float(given))
    except (ValueError, OverflowError):
        raise ConfigError(f"{START_SECONDS}={given!r}: expected a number of seconds") from None


def _not_joined(error: RuntimeError, wait: timedelta) -> UserError:
    """The error to raise instead of one of torch, which happened while the ranks joined."""
    rank, n, address = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    port, told = os.environ["MASTER_PORT"], str(error).partition("\n")[0]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return ConfigError(
            f"port {port} of {address} is taken by another process; choose another with --master_port, or with MASTER_PORT "
            "where no launcher sets it"
        )
    stopped = stopped_siblings()
    return RankLost(
        f"rank {rank} of {n} waited for the others at {address}:{port}, and not all have joined within "
        f"{wait.total_seconds():g} s ({START_SECONDS}): a rank did not start, was killed, hangs, or is in another network"
        + (f"; stopped on this machine: {stopped}" if stopped else "")
        + f"; torch says: {told}"
    )


def _store_of_this_start(wait: timedelta) -> dist.Store:
    """A store for this start of the job: torchrun reuses its own across restarts, so it would hold stale addresses."""
    if os.environ["GROUP_WORLD_SIZE"] != "1":  # each machine counts its own restarts, so the counts can't name the store
        raise ConfigError(
            "restarts by torchrun on several machines need --rdzv_backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=wait)
    return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _pick_free_port() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
