"""torchrun as a module ends with the exit code of its ranks."""

import sys
from pathlib import Path

import pytest

from tests.support import launching


@pytest.mark.parametrize("rank, code", [("exit 2", 2), ("kill -KILL $BASHPID", 137)])
def test_the_exit_code_is_that_of_the_rank(tmp_path: Path, rank: str, code: int) -> None:
    torchrun = [sys.executable, "-m", "dalle_ds.parallel.torchrun", "--master_port", str(launching.free_port())]
    assert launching.run([*torchrun, "--no-python", "bash", "-c", rank], tmp_path).returncode == code
