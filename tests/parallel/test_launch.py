"""What a rank takes from its launcher. Real launchers on two hosts: tests/distributed/test_multi_node.py."""

import os
from pathlib import Path

import pytest

from dalle_ds.errors import ConfigError
from dalle_ds.parallel.launch import take_environment, take_rank

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
STEP = {**BATCH_SCRIPT, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_GTIDS": "2,3",
        "SLURM_STEP_NODELIST": "node-[a-b]"}  # fmt: skip


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment, empty but for PATH; tests fill it."""
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
