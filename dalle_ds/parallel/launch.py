"""What launchers leave to a rank: its number under Slurm and Open MPI, and the environment that a rank is to have.

Imports neither torch nor deepspeed: OMP_NUM_THREADS and its like count only where they are set before.
"""

import os
import subprocess
import sys
from pathlib import Path

from dalle_ds.errors import ConfigError

LOADERS = ("LD_LIBRARY_PATH", "LD_PRELOAD")
"""Read as a process starts, by what loads its libraries: to set them later is too late for NCCL's and libfabric's plugins."""
ALLOCATOR = "PYTORCH_ALLOC_CONF"
ALLOCATORS_NAMES = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
MOST_COMPILE_THREADS = 4


def prepare_rank(environment: Path | None) -> None:
    """What a rank needs before it imports torch: the variables of the file `environment`, its place, and `set_defaults`.

    Raises:
        ConfigError: as `take_environment` and `take_rank`.
    """
    if environment is not None:
        take_environment(environment)
    take_rank()
    set_defaults()


def take_gpu(n_visible: int) -> int:
    """Which of the GPUs that this process sees is its own; LOCAL_RANK then says it, which is what DeepSpeed goes by.

    By its number on this machine, where it sees enough of them. Slurm and mpirun may show each task its own GPUs alone, all of
    them with numbers from 0 on: `--gpus-per-task`, `--gpu-bind=single:1`.

    Raises:
        ConfigError: fewer GPUs than ranks, under a launcher that shows them all to each.
    """
    told = os.environ
    number = int(told["LOCAL_RANK"])
    if number >= n_visible:
        if int(told.get("SLURM_STEP_NUM_TASKS", 1)) == 1 and "OMPI_COMM_WORLD_SIZE" not in told:
            raise ConfigError(
                f"rank {told['RANK']} is number {number} on {os.uname().nodename} and sees {n_visible} GPUs: "
                f"expected one for each rank; start {n_visible} there (--num_gpus {n_visible})"
            )
        number %= n_visible
        told["LOCAL_RANK"] = str(number)
    return number


def take_environment(file: Path) -> None:
    """Set the variables of `file`, a NAME=VALUE a line as `env` prints them, over those that this process has.

    Where LD_LIBRARY_PATH or LD_PRELOAD is another one then, the process starts anew, with the same number and arguments.

    Raises:
        ConfigError: no such file on this host, or another kind of line in it.
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
            raise ConfigError(f"{file}, line {number}: expected NAME=VALUE")  # the line itself may be a secret
        os.environ[name] = value
    if [os.environ.get(name) for name in LOADERS] != had:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def set_defaults() -> None:
    """Give variables that torch reads the values that ranks want, where nobody set them. After `take_rank`.

    The CUDA allocator extends its segments: ZeRO-3 gathers and frees tensors of many sizes on two streams, which would cut up
    segments of fixed sizes. Inductor's pool of compilers is small: of its own accord each of a machine's ranks starts as many
    processes as there are cores, up to 32, for a handful of kernels. torch's C++ parts log errors alone: when a rank dies, the
    stack traces of the survivors would bury which one it was.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not any(name in os.environ for name in ALLOCATORS_NAMES):
        os.environ[ALLOCATOR] = "expandable_segments:True"
    # torchrun says LOCAL_WORLD_SIZE, other launchers LOCAL_SIZE; a process alone has neither
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // local_ranks)  # Slurm gives each rank cores of its own
    os.environ.setdefault(COMPILE_THREADS, str(max(1, min(MOST_COMPILE_THREADS, cores))))


def take_rank() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT from Open MPI's or Slurm's variables.

    Where RANK is set already, or neither started several processes, nothing changes. A Slurm batch script is alone: it has
    SLURM_PROCID and SLURM_NTASKS too, but is no task of a step.

    Raises:
        ConfigError: Open MPI started several processes and MASTER_ADDR is not set.
    """
    told = os.environ
    if "RANK" in told:
        return
    # mpirun first: inside of a Slurm job it starts its own daemons as a step
    if int(told.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "MASTER_ADDR" not in told:
            raise ConfigError(
                "MASTER_ADDR is not set, and mpirun does not tell the host of rank 0: "
                "add --launcher_args '-x MASTER_ADDR=FIRST_HOST'"
            )
        prefix = "OMPI_COMM_WORLD_"
        rank, local_rank, size, local_size = (told[prefix + name] for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))
        address, port = told["MASTER_ADDR"], "29500"
    elif int(told.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        rank, local_rank, size = (told[name] for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"))
        local_size = str(len(told["SLURM_GTIDS"].split(",")))  # of the tasks on this node
        hosts = subprocess.check_output(["scontrol", "show", "hostnames", told["SLURM_STEP_NODELIST"]], text=True)
        address, port = hosts.split()[0], str(20000 + int(told["SLURM_JOB_ID"]) % 10000)  # two jobs may share a node
    else:
        return
    told |= {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": size, "LOCAL_SIZE": local_size}
    told.setdefault("MASTER_ADDR", address)
    told.setdefault("MASTER_PORT", port)
