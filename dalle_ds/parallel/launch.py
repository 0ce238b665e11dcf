"""Environment variables of a rank that launchers do not set: the rank under Slurm and Open MPI, and defaults for torch.

This module imports neither torch nor deepspeed, since variables such as OMP_NUM_THREADS only work if they are set before.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from dalle_ds.errors import ConfigError

LOADERS = ("LD_LIBRARY_PATH", "LD_PRELOAD")
"""The dynamic loader reads these variables when a process starts.
Setting them later is too late for the plugins of NCCL and libfabric."""
ALLOCATOR = "PYTORCH_ALLOC_CONF"
ALLOCATORS_NAMES = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
MOST_COMPILE_THREADS = 4


def prepare_rank(environment: Path | None) -> None:
    """Set the environment variables of a rank. Call it before importing torch.

    Args:
        environment: file of NAME=VALUE lines that all hosts of the job share.

    Raises:
        ConfigError: see `require_hostfile`, `take_environment` and `take_rank`.
    """
    require_hostfile()
    if environment is not None:
        take_environment(environment)
    take_rank()
    set_defaults()


def require_hostfile() -> None:
    """Check that the hostfile of the deepspeed launcher exists. If it does not, DeepSpeed only warns and uses this host alone.

    Raises:
        ConfigError: a launcher among the parents of this process has a --hostfile that does not exist.
    """
    for parent in psutil.Process().parents():
        with suppress(psutil.Error):  # it has ended, or belongs to another user
            words, folder = parent.cmdline(), parent.cwd()
            if any(Path(word).name in ("deepspeed", "ds") for word in words[:3]):
                hostfile = _hostfile(words)
                if hostfile is not None and not Path(folder, hostfile).is_file():
                    raise ConfigError(f"hostfile {hostfile} does not exist: expected one line per host, as in node-a slots=8")


def _hostfile(words: Sequence[str]) -> str | None:
    """Return the argument of --hostfile or -H among the words of a command, or None if it has neither."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("--hostfile", "-H"):
            return following
        if word.startswith("--hostfile="):
            return word.partition("=")[2]
    return None


def take_gpu(n_visible: int) -> int:
    """Return the index of this rank's GPU among the `n_visible` GPUs that the process sees.

    The index is LOCAL_RANK if the process sees enough GPUs. With `--gpus-per-task` or `--gpu-bind=single:1`, Slurm and mpirun
    show each task only its own GPUs, numbered from 0. Then the index is LOCAL_RANK modulo `n_visible`, and LOCAL_RANK is set to
    it, since DeepSpeed uses LOCAL_RANK as the index.

    Raises:
        ConfigError: there are fewer GPUs than ranks, and the launcher shows all GPUs to each rank.
    """
    told = os.environ
    number = int(told["LOCAL_RANK"])
    if number >= n_visible:
        if int(told.get("SLURM_STEP_NUM_TASKS", 1)) == 1 and "OMPI_COMM_WORLD_SIZE" not in told:
            raise ConfigError(
                f"rank {told['RANK']} has LOCAL_RANK {number} on {os.uname().nodename} and sees {n_visible} GPUs: "
                f"expected one GPU per rank; start {n_visible} ranks there (--num_gpus {n_visible})"
            )
        number %= n_visible
        told["LOCAL_RANK"] = str(number)
    return number


def take_environment(file: Path) -> None:
    """Set the environment variables of `file`, which override existing ones. It holds one NAME=VALUE per line, as `env` prints.

    If LD_LIBRARY_PATH or LD_PRELOAD changes, the process executes itself again, with the same process id and arguments.

    Raises:
        ConfigError: the file does not exist on this host, or a line is not NAME=VALUE.
    """
    had = [os.environ.get(name) for name in LOADERS]
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        host = os.uname().nodename
        raise ConfigError(f"no {file} on {host}: --environment expects a file that all hosts of the job share") from None
    for number, line in enumerate(lines, start=1):
        name, equals, value = line.partition("=")
        if not (equals and name.isidentifier()):
            raise ConfigError(f"{file}, line {number}: expected NAME=VALUE")  # don't print the line: it may hold a secret
        os.environ[name] = value
    if [os.environ.get(name) for name in LOADERS] != had:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def set_defaults() -> None:
    """Set environment variables that torch reads, unless the user has set them. Call it after `take_rank`.

    - CUDA allocator: expandable segments. ZeRO-3 gathers and frees tensors of many sizes on two streams, which would fragment
      segments of fixed size.
    - Inductor: few compile processes. By default, each rank starts one per core, up to 32, to compile a handful of kernels.
    - C++ log level: errors only. Otherwise, when a rank dies, the survivors' stack traces bury which one it was.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not any(name in os.environ for name in ALLOCATORS_NAMES):
        os.environ[ALLOCATOR] = "expandable_segments:True"
    # torchrun sets LOCAL_WORLD_SIZE, other launchers LOCAL_SIZE; a process without a launcher has neither
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // local_ranks)  # Slurm may bind each rank to its own cores
    os.environ.setdefault(COMPILE_THREADS, str(max(1, min(MOST_COMPILE_THREADS, cores))))


def take_rank() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT from Open MPI's or Slurm's variables.

    If RANK is already set, or neither launcher has started several processes, nothing changes. A Slurm batch script counts as a
    single process: it has SLURM_PROCID and SLURM_NTASKS too, but is not a task of a step.

    Raises:
        ConfigError: Open MPI has started several processes, and MASTER_ADDR is not set.
    """
    told = os.environ
    if "RANK" in told:
        return
    # check mpirun first: inside a Slurm job, it starts its own daemons as a Slurm step
    if int(told.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "MASTER_ADDR" not in told:
            raise ConfigError(
                "MASTER_ADDR is not set, and mpirun does not provide the host of rank 0: "
                "add --launcher_args '-x MASTER_ADDR=FIRST_HOST'"
            )
        prefix = "OMPI_COMM_WORLD_"
        rank, local_rank, size, local_size = (told[prefix + name] for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))
        address, port = told["MASTER_ADDR"], "29500"
    elif int(told.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        rank, local_rank, size = (told[name] for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"))
        local_size = str(len(told["SLURM_GTIDS"].split(",")))  # of the tasks on this node
        hosts = subprocess.check_output(["scontrol", "show", "hostnames", told["SLURM_STEP_NODELIST"]], text=True)
        address, port = hosts.split()[0], str(20000 + int(told["SLURM_JOB_ID"]) % 10000)  # jobs on one node get different ports
    else:
        return
    told |= {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": size, "LOCAL_SIZE": local_size}
    told.setdefault("MASTER_ADDR", address)
    told.setdefault("MASTER_PORT", port)
