"""Environment variables of a rank. tests/distributed/test_multi_node.py runs the real launchers on two hosts."""

import os
import re
import shutil
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dalle_ds.commands import job
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import launch, ranks
from dalle_ds.parallel.launch import (
    ALLOCATORS_NAMES,
    COMPILE_THREADS,
    NUMBERS,
    RUN_DEEPSPEED,
    check_numbers,
    check_rank,
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


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "1e3", "\u0663", "0x1", " 1"])
def test_variables_that_count_are_numbers(told: dict[str, str], name: str, value: str) -> None:
    told[name] = value
    with pytest.raises(ConfigError, match=rf"^{name}=.*: expected a whole number, as launchers set it"):
        check_numbers()


def test_every_variable_that_is_read_as_a_number_is_checked() -> None:
    read = set()
    for path in (Path(launch.__file__), Path(ranks.__file__), Path(job.__file__)):
        read |= set(re.findall(r"int\([^)]*?\"([A-Z_]{4,})\"", path.read_text()))
    assert {"WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"} <= read <= {*NUMBERS}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2: expected a rank below the number of ranks"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 with WORLD_SIZE=0"),
        ({"RANK": "5"}, "RANK=5 with WORLD_SIZE=1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: expected a launcher"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}, "WORLD_SIZE=2 without MASTER_PORT"),
    ],
)
def test_ranks_that_could_never_meet_are_told_at_once(told: dict[str, str], given: dict[str, str], message: str) -> None:
    told |= given
    with pytest.raises(ConfigError, match=message):
        check_rank()


@pytest.mark.parametrize(
    "given", [{}, {"RANK": "0"}, {"LOCAL_SIZE": ""}, {**dict.fromkeys(("MASTER_ADDR", "LOCAL_RANK"), "1")}]
)
def test_a_process_alone_needs_no_variables(told: dict[str, str], given: dict[str, str]) -> None:
    told |= given
    check_numbers()
    check_rank()


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


def test_the_file_of_the_environment_holds_whole_variables_and_follows_no_link(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=2")
    (tmp_path / "theirs").write_text("of somebody else")
    (tmp_path / ".environment").symlink_to(tmp_path / "theirs")
    told = {
        "PYTHON": str(tmp_path / "bin" / "python"),
        "DS_LAUNCH_ARGS": "--hostfile hosts",
        "AWS_ACCESS_KEY_ID": "a key = with 'signs' $HOME",
        "MLFLOW_TWO_LINES": "x\nAWS_SESSION_TOKEN=evil",
        "UNRELATED": "x\nAWS_PROFILE=evil",
    }
    done = launching.run(["bash", str(launching.ROOT / "launchers" / "train_prior.sh")], tmp_path, told)
    assert done.returncode == 0 and "MLFLOW_TWO_LINES has a line break and is not passed" in done.stderr, done.stderr
    file = tmp_path / ".environment"
    assert not file.is_symlink() and file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "theirs").read_text() == "of somebody else"
    lines = file.read_text().splitlines()
    assert "AWS_ACCESS_KEY_ID=a key = with 'signs' $HOME" in lines and any(line.startswith("PATH=") for line in lines)
    assert "evil" not in file.read_text() and "UNRELATED" not in file.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "hosts", "theirs", ".environment"}


@pytest.mark.launch
@pytest.mark.parametrize("form", ["deepspeed", "bash"])
def test_a_killed_node_launcher_is_never_exit_code_0(tmp_path: Path, form: str) -> None:
    """DeepSpeed alone exits with 0 there, and a script would go on with an unfinished run."""
    script, port = tmp_path / "rank.py", str(launching.free_port())
    script.write_text(
        "import os, pathlib, time\n"
        "from dalle_ds.parallel.launch import prepare_rank\n"
        "prepare_rank(None)\n"
        "pathlib.Path('started' + os.environ['RANK']).write_text(os.environ['MASTER_PORT'])\n"
        "time.sleep(600)\n"
    )
    words = ["--num_gpus", "2", str(script), "tracking.uri=http://me:hush@host"]
    run_deepspeed = [
        sys.executable,
        launching.TRAIN_PRIOR,
        RUN_DEEPSPEED,
    ]  # what the bash form becomes, which takes MASTER_PORT
    command = ["deepspeed", "--master_port", port] if form == "deepspeed" else run_deepspeed
    with launching.started([*command, *words], tmp_path, extra_env={"MASTER_PORT": port}) as process:
        launching.wait_for(lambda: len(list(tmp_path.glob("started?"))) == 2, "two ranks", process=process)
        launching.wait_for(lambda: {file.read_text() for file in tmp_path.glob("started?")} == {port}, "their port")
        (launcher,) = (
            child for child in launching.family(process.pid) if "deepspeed.launcher.launch" in " ".join(child.cmdline())
        )
        launcher.kill()
        process.wait(timeout=240)
        launching.kill_tree(process.pid)  # these ranks do not look for their launcher
        out, err = process.communicate(timeout=240)
    assert process.returncode == (-15 if form == "deepspeed" else 143), "the shell sees 143 for both"
    if form == "bash":
        assert f"the launcher's process {launcher.pid} was killed by SIGKILL: the job is not done" in err
        assert "warning: the command line has a password" in err
        assert "hush" not in out + err, "DeepSpeed's log has the command lines of the ranks"


def test_values_of_the_environment_are_taken_as_they_are(told, tmp_path):
    file = tmp_path / "environment"
    file.write_bytes("AWS_PROFILE=a\u2028b\x0bc\nMLFLOW_NAME=caf".encode() + b"\xe9\n")
    take_environment(file)
    assert (told["AWS_PROFILE"], os.fsencode(told["MLFLOW_NAME"])) == ("a\u2028b\x0bc", b"caf\xe9")
    file.write_bytes(b"")
    take_environment(file)
    with pytest.raises(ConfigError, match="cannot be read on .*: Is a directory"):
        take_environment(tmp_path)


def test_a_master_port_that_is_taken_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = launching.run([sys.executable, "-m", "dalle_ds.cli", "sample", "nowhere", "--caption", "a"], tmp_path, told)
    assert (
        done.returncode == 2 and f"error: port {port} of 127.0.0.1 is taken by another process; choose another" in done.stderr
    )
    assert "Traceback" not in done.stderr
