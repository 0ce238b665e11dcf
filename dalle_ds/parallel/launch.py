"""Environment variables of a rank that launchers do not set: the rank under Slurm and Open MPI, and defaults for torch.

This module imports neither torch nor deepspeed, since variables such as OMP_NUM_THREADS only work if they are set before.
"""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from dalle_ds.errors import ConfigError
from dalle_ds.storage.bounded import read_bounded

LOADERS = ("LD_LIBRARY_PATH", "LD_PRELOAD")
"""The dynamic loader reads these variables when a process starts.
Setting them later is too late for the plugins of NCCL and libfabric."""
NUMBERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_PORT"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"),
)
"""Variables in which launchers count."""
RUN_DEEPSPEED = "--run-deepspeed"
"""First argument of train_prior.sh that runs `deepspeed_runner.py` instead of a rank."""
ALLOCATOR = "PYTORCH_ALLOC_CONF"
ALLOCATORS_NAMES = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
MOST_COMPILE_THREADS = 4


def prepare_rank(environment: Path | None) -> None:
    """Set the environment variables of a rank. Call it before importing torch.

    Args:
        environment: file of NAME=VALUE lines that all hosts of the job share.

    Raises:
        ConfigError: see `require_hostfile`, `take_environment`, `take_rank` and `check_rank`.
    """
    require_hostfile()
    end_runner_with_its_launcher()
    if environment is not None:
        take_environment(environment)
    check_numbers()
    take_rank()
    check_rank()
    set_defaults()


def check_numbers() -> None:
    """Check that the variables in which launchers count are numbers. Raises ConfigError if one is not."""
    for name in NUMBERS:
        value = os.environ.get(name)
        if value and not (value.isascii() and value.isdigit()):
            raise ConfigError(f"{name}={value!r}: expected a whole number, as launchers set it; unset it for a single process")


def check_rank() -> None:
    """Check that the variables of a rank fit together, once they are set.

    Raises:
        ConfigError: RANK is not below WORLD_SIZE; or there are several ranks, and not all variables by which they find each
            other are set: torch would wait for its timeout.
    """
    rank, size = (int(os.environ.get(name) or default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if rank >= size:
        raise ConfigError(f"RANK={rank} with WORLD_SIZE={size}: expected a rank below the number of ranks")
    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and lacking:
        raise ConfigError(
            f"WORLD_SIZE={size} without {', '.join(lacking)}: expected a launcher that sets them, or no WORLD_SIZE"
        )


def require_hostfile() -> None:
    """Check that the hostfile of the deepspeed launcher exists. If it does not, DeepSpeed only warns and uses this host alone.

    Raises:
        ConfigError: a launcher among the parents of this process has a --hostfile that does not exist.
    """
    for parent in psutil.Process().parents():
        with suppress(psutil.Error):  # it has ended, or belongs to another user
            if _is_runner(parent):
                words, folder = parent.cmdline(), parent.cwd()
                hostfile = _hostfile(words)
                if hostfile is not None and not Path(folder, hostfile).is_file():
                    raise ConfigError(f"hostfile {hostfile} does not exist: expected one line per host, as in node-a slots=8")


def end_runner_with_its_launcher() -> None:
    """If this rank outlives the node launcher (or mpirun), terminate the command `deepspeed` above it, in a thread.

    DeepSpeed passes on positive exit codes only. If the node launcher is killed by a signal, `deepspeed` exits with 0 about a
    tenth of a second later, and a script would go on with an unfinished run. This thread is faster: the shell sees 143. The
    bash form of train_prior.sh does not need it (`deepspeed_runner.py`).
    """
    if not hasattr(os, "pidfd_open"):  # Linux only
        return
    chain = psutil.Process().parents()
    with suppress(psutil.Error, OSError):
        for launcher, runner in zip(chain, chain[1:], strict=False):
            if RUN_DEEPSPEED in runner.cmdline()[:4]:
                return  # it knows by itself
            if _is_runner(runner):
                handles = os.pidfd_open(launcher.pid), os.pidfd_open(runner.pid)
                threading.Thread(target=_end_second_after_first, args=handles, name="launcher-end", daemon=True).start()
                return


def _end_second_after_first(first: int, second: int) -> None:
    poller = select.poll()
    poller.register(first, select.POLLIN)
    poller.poll()  # returns when the process has ended; a rank normally ends before its launcher
    with suppress(OSError):  # it has ended too
        signal.pidfd_send_signal(second, signal.SIGTERM)


def _is_runner(process: psutil.Process) -> bool:
    """Whether this is the command `deepspeed`."""
    return any(Path(word).name in ("deepspeed", "ds", RUN_DEEPSPEED) for word in process.cmdline()[:4])


def _hostfile(words: Sequence[str]) -> str | None:
    """Return the argument of --hostfile or -H among the words of a command, or None if it has neither."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("--hostfile", "-H"):
            return following
        if word.startswith("--hostfile="):
            return word.partition("=")[2]
    return None


def stopped_siblings() -> str:
    """Which ranks of this job on this machine are stopped (SIGSTOP), as text. Siblings have the same parent, the launcher."""
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            with suppress(psutil.Error):
                if process.status() == psutil.STATUS_STOPPED and "RANK" in (environment := process.environ()):
                    found.append(f"rank {environment['RANK']} (process {process.pid})")
    return ", ".join(found)


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
        text = read_bounded(file).decode(errors="surrogateescape")  # as Python holds variables that are not UTF-8
    except OSError as error:
        host = os.uname().nodename
        if not isinstance(error, FileNotFoundError):
            raise ConfigError(f"{file} cannot be read on {host}: {error.strerror or error}") from None
        raise ConfigError(f"no {file} on {host}: --environment expects a file that all hosts of the job share") from None
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
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
