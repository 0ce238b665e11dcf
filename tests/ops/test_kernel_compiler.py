"""Messages about what Triton lacks in slim containers, with the packages to install."""

import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dalle_ds.ops.kernel_compiler import kernel_problem, launcher_problem


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CC", raising=False)
    kernel_problem.cache_clear()
    yield
    kernel_problem.cache_clear()


@pytest.mark.skipif(subprocess.run(["which", "gcc"], capture_output=True).returncode != 0, reason="no gcc here")
def test_with_a_compiler_and_headers_nothing_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher_problem() is None
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))  # Python without headers
    assert f"no Python.h in {tmp_path}" in launcher_problem()


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "found no gcc, clang or CC (Debian: gcc python3-dev)" in launcher_problem()
    monkeypatch.setenv("CC", "/gone/gcc")
    assert "can't be compiled: /gone/gcc: No such file" in launcher_problem()
    broken = tmp_path / "clang"
    broken.write_text("#!/bin/sh\necho 'ld: error: cannot find crti.o' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.delenv("CC")
    assert f"can't be compiled: {broken}: ld: error: cannot find crti.o" in launcher_problem()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_is_an_answer_and_no_error() -> None:
    assert kernel_problem() is not None
