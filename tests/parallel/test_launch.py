"""Environment variables of a rank. tests/distributed/test_multi_node.py runs the real launchers on two hosts."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dalle_ds.errors import ConfigError
from dalle_ds.parallel.launch import (
    ALLOCATORS_NAMES,
    COMPILE_THREADS,
    require_hostfile,
    set_defaults,
    take_environment,
    take_gpu,
    take_rank,
)
from tests.support import launching

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
STEP = {
    **BATCH_SCRIPT,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_GTIDS": "2,3",
    "SLURM_STEP_NODELIST": "node-[a-b]",
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment that only has PATH. Tests add variables to it."""
    environment = {"PATH": os.environ["PATH"]}
    monkeypatch.setattr(os, "environ", environment)
    return environment


def test_open_mpi_tells_all_but_the_first_host(told: dict[str, str]) -> None:
    told |= OPEN_MPI
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        take_rank()
    told["MASTER_ADDR"] = "node-a"
    take_rank()
    found = {name: told[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert list(found.values()) == ["3", "1", "4", "2", "node-a", "29500"]


@pytest.mark.parametrize("given", [{}, BATCH_SCRIPT, {"RANK": "5", **STEP}, {"RANK": "5", **OPEN_MPI}])
def test_nothing_changes_for_a_process_alone_or_with_a_rank(told: dict[str, str], given: dict[str, str]) -> None:
    told |= given
    before = dict(told)
    take_rank()
    assert told == before


def test_a_rank_takes_the_gpu_of_its_number_or_one_that_it_alone_sees(told: dict[str, str]) -> None:
    told |= {"RANK": "11", "LOCAL_RANK": "3"}
    assert take_gpu(8) == 3 and told["LOCAL_RANK"] == "3"
    for own, visible, taken in (
        ({"SLURM_STEP_NUM_TASKS": "16"}, 1, 0),
        ({"OMPI_COMM_WORLD_SIZE": "16"}, 1, 0),
        ({"SLURM_STEP_NUM_TASKS": "16"}, 2, 1),
        ({"SLURM_STEP_NUM_TASKS": "16"}, 4, 3),
    ):
        told.clear()
        told |= {"RANK": "11", "LOCAL_RANK": "3", **own}
        assert take_gpu(visible) == taken and told["LOCAL_RANK"] == str(taken), "DeepSpeed reads it"


@pytest.mark.parametrize("given", [{}, BATCH_SCRIPT, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_more_ranks_than_gpus_are_refused_by_the_rank_that_has_none(told: dict[str, str], given: dict[str, str]) -> None:
    """The deepspeed launcher and torchrun show all GPUs to every rank, even inside a Slurm job."""
    told |= {**given, "RANK": "1", "LOCAL_RANK": "1"}
    with pytest.raises(ConfigError, match=r"rank 1 has LOCAL_RANK 1 on .* sees 1 GPUs: .* \(--num_gpus 1\)"):
        take_gpu(1)


def test_the_environment_of_a_file_goes_over_the_hosts_own(told: dict[str, str], tmp_path: Path) -> None:
    told |= {"A": "of the host", "B": "stays"}
    file = tmp_path / "environment"
    file.write_text('A=b=c "d"\nEMPTY=\n')
    take_environment(file)
    assert (told["A"], told["B"], told["EMPTY"]) == ('b=c "d"', "stays", "")
    for text in ("A=1\nsecret\n", "A=1\nB C=secret\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="line 2: expected NAME=VALUE") as error:
            take_environment(file)
        assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match=f"gone on {os.uname().nodename}.*all hosts of the job share"):
        take_environment(tmp_path / "gone")


SETTINGS_OF_A_RANK = """
import ctypes, json, os, sys
from pathlib import Path
from dalle_ds.parallel.launch import prepare_rank
prepare_rank(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
if len(sys.argv) > 1:
    ctypes.CDLL("libfound_by_path.so")
import torch, torch._inductor.config
print(json.dumps({"pid": os.getpid(), "arguments": sys.argv, "threads": torch._inductor.config.compile_threads,
                  "allocator": torch._C._accelerator_getAllocatorSettings()}))
"""


def test_torch_and_the_loader_of_libraries_take_what_a_rank_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes LD_LIBRARY_PATH, by which NCCL's network plugins are found.
    A process reads it only once, when it starts."""
    for name in (COMPILE_THREADS, *ALLOCATORS_NAMES):  # runs within this process may have set them
        monkeypatch.delenv(name, raising=False)
    rank = [sys.executable, "-u", "-c", SETTINGS_OF_A_RANK]
    alone = launching.last_json(launching.run(rank, tmp_path, {"LOCAL_SIZE": str(os.cpu_count())}).stdout)
    assert (alone["threads"], alone["allocator"]) == (1, "expandable_segments:True")

    libraries = tmp_path / "libraries"
    libraries.mkdir()
    package = Path(find_spec("torch").origin).parent
    shutil.copy(package / "lib" / "libtorch_global_deps.so", libraries / "libfound_by_path.so")
    file = tmp_path / "environment"
    told = {
        "LD_LIBRARY_PATH": f"{libraries}:{package / 'lib'}",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512",
        "TORCHINDUCTOR_COMPILE_THREADS": "3",
    }
    file.write_text("".join(f"{name}={value}\n" for name, value in told.items()))
    with launching.started([*rank, str(file)], tmp_path) as process:
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    found = launching.last_json(out)
    assert (found["threads"], found["allocator"]) == (3, "max_split_size_mb:512")
    assert (found["pid"], found["arguments"]) == (process.pid, ["-c", str(file)]), "launchers know ranks by their numbers"


@pytest.mark.parametrize("ranks", [{}, {"LOCAL_WORLD_SIZE": "2"}, {"LOCAL_SIZE": "1000"}])
def test_compilers_of_a_machine_are_few_and_what_is_set_stays(told: dict[str, str], ranks: dict[str, str]) -> None:
    told |= ranks
    set_defaults()
    n_ranks = int(next(iter(ranks.values()), 1))
    assert 1 <= int(told["TORCHINDUCTOR_COMPILE_THREADS"]) <= min(4, max(1, os.cpu_count() // n_ranks))
    assert told["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        told.clear()
        told |= {name: "max_split_size_mb:64", "TORCHINDUCTOR_COMPILE_THREADS": "32"}
        before = dict(told)
        set_defaults()
        assert told == before | {"TORCH_CPP_LOG_LEVEL": "ERROR"}


@pytest.mark.parametrize("words", ["--hostfile hosts", "-H hosts", "--hostfile=hosts", "--num_gpus 2 --hostfile hosts"])
def test_a_hostfile_that_does_not_exist_is_refused(tmp_path, monkeypatch, words):
    """DeepSpeed itself only warns, and trains on one host."""
    command = ["python", "/x/deepspeed", *words.split()]
    parents = [psutil.Process(), SimpleNamespace(cmdline=lambda: command, cwd=lambda: str(tmp_path))]
    monkeypatch.setattr(psutil.Process, "parents", lambda self: parents)
    with pytest.raises(ConfigError, match="hostfile hosts does not exist: expected one line per host"):
        require_hostfile()
    (tmp_path / "hosts").write_text("localhost slots=2")
    require_hostfile()


@pytest.mark.parametrize("words", ["--hostfile nowhere", "--hostfile=nowhere", "-H nowhere"])
def test_bash_form_refuses_it_before_anything_starts(tmp_path, words):
    done = launching.run(["bash", str(launching.ROOT / "launchers" / "train_prior.sh")], tmp_path, {"DS_LAUNCH_ARGS": words})
    assert done.returncode == 2 and "hostfile nowhere does not exist" in done.stderr, done.stderr
    assert not (tmp_path / ".environment").exists()
