"""Build the stub of a CUDA device with the C++ compiler of this machine, load it, put it in and take it out."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from dalle_ds.errors import ConfigError

SOURCE = Path(__file__).with_name("stub.cpp")


def stub_problem() -> str | None:
    """Why fake CUDA can't be had on this machine, or None. Tests skip with it."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return f"torch {torch.__version__} has a CUDA of its own, which the stub must not replace; the CPU build has none"
    if _built() is None and _compiler() is None:
        return f"no C++ compiler: install g++, or name one in CXX (now {os.environ.get('CXX') or 'unset'})"
    return None


def install() -> None:
    """Make torch believe in one CUDA device, for autograd's sake; `remove` ends it.

    Raises:
        ConfigError: no compiler, a CUDA build of torch, or the compiler's own complaint.
        RuntimeError: autograd ran in this process before it knew of the device: its threads are made once.
    """
    library = _library()
    library.fake_cuda_install()
    try:
        _try_backward()
    except RuntimeError as error:
        remove()
        if "device_ready_queues_" not in str(error):
            raise
        raise RuntimeError("fake CUDA must be installed before the first backward pass of the process: start another") from None


def remove() -> None:
    """torch has no CUDA again."""
    _library().fake_cuda_remove()


def _try_backward() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        torch.empty(1, device="cuda:0", requires_grad=True).sum().backward()


@cache
def _library() -> ctypes.CDLL:
    problem = stub_problem()
    if problem:
        raise ConfigError(f"fake CUDA can't be had: {problem}")
    return ctypes.CDLL(str(_built() or _build()))


def _place() -> Path:
    """Of the library: another torch or another source is another file."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode() + torch.__file__.encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "dalle_ds", f"fake_cuda-{key}.so")


def _built() -> Path | None:
    place = _place()
    return place if place.is_file() else None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++") or shutil.which("clang++")


def _build() -> Path:
    """Three seconds. Written aside and renamed: processes that build at the same time don't see each other's halves."""
    place, torch_root = _place(), Path(torch.__file__).parent
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        target = Path(folder, "stub.so")
        command = [
            str(_compiler()),
            "-std=c++20",
            "-shared",
            "-fPIC",
            "-O0",
            f"-I{torch_root / 'include'}",
            str(SOURCE),
            "-o",
            str(target),
            f"-L{torch_root / 'lib'}",
            "-lc10",
            "-ltorch_cpu",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"fake CUDA can't be built: {' '.join(command)}\n{done.stderr[-2000:]}")
        target.replace(place)
    return place
