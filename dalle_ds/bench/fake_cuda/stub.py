"""Build, load, install and remove the stub of a CUDA device (`stub.cpp`)."""

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
    """Returns why fake CUDA can't run on this machine, or None if it can. Tests use this as their skip reason."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return f"torch {torch.__version__} has a CUDA backend, which the stub must not replace; install the CPU build of torch"
    if _built() is None and _compiler() is None:
        return f"no C++ compiler: install g++, or name one in CXX (now {os.environ.get('CXX') or 'unset'})"
    return None


def install() -> None:
    """Make autograd see one CUDA device. `remove` undoes this.

    Raises:
        ConfigError: there is no compiler, torch is a CUDA build, or the compiler fails.
        RuntimeError: autograd ran in this process before the device was installed. It starts its device threads only once.
    """
    library = _library()
    library.fake_cuda_install()
    try:
        _try_backward()
    except RuntimeError as error:
        remove()
        if "device_ready_queues_" not in str(error):
            raise
        raise RuntimeError("fake CUDA must be installed before the process's first backward pass: use a new process") from None


def remove() -> None:
    """Restore torch's own CUDA hooks."""
    _library().fake_cuda_remove()


def _try_backward() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        torch.empty(1, device="cuda:0", requires_grad=True).sum().backward()


@cache
def _library() -> ctypes.CDLL:
    problem = stub_problem()
    if problem:
        raise ConfigError(f"fake CUDA can't run on this machine: {problem}")
    return ctypes.CDLL(str(_built() or _build()))


def _place() -> Path:
    """Returns the path of the built library. Each version of torch and of the source has its own file."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode() + torch.__file__.encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "dalle_ds", f"fake_cuda-{key}.so")


def _built() -> Path | None:
    place = _place()
    return place if place.is_file() else None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++") or shutil.which("clang++")


def _build() -> Path:
    """Compile the stub, which takes three seconds. The library is written to a temporary file and renamed, so that processes
    that build at the same time never load a partial file."""
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
            raise ConfigError(f"building fake CUDA failed: {' '.join(command)}\n{done.stderr[-2000:]}")
        target.replace(place)
    return place
