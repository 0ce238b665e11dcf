"""Check whether Triton can build kernels on this machine. On CUDA, torch.compile and FlexAttention need it."""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

SOURCE = "#include <Python.h>\nint main(void) { return Py_IsInitialized(); }\n"


@cache
def kernel_problem() -> str | None:
    """Return why Triton can't build kernels for the GPU of this process. If it can, return None.

    Triton's package contains everything but a small library between Python and the CUDA driver, which it compiles at the first
    use. Slim containers lack a C compiler or Python's headers. Then the first kernel would fail, minutes into a run.
    """
    try:
        import triton
    except ImportError as error:
        return f"its kernels need triton ({error})"
    if problem := launcher_problem():
        return problem
    try:
        triton.runtime.driver.active.get_current_target()  # builds this library
    except Exception as error:  # may be RuntimeError, AssertionError, CalledProcessError or OSError
        said = next(iter(str(error).strip().splitlines()), "no message")
        return f"triton can't access the GPU ({type(error).__name__}: {said})"
    return None


def launcher_problem() -> str | None:
    """Return why Triton's C compiler can't build a library for this Python. If it can, return None."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "triton needs a C compiler for its launcher, found no gcc, clang or CC (Debian: gcc python3-dev)"
    scheme = sysconfig.get_default_scheme().replace(
        "posix_local", "posix_prefix"
    )  # as in Triton: Debian's own scheme has no headers
    headers = sysconfig.get_path("include", scheme)
    with tempfile.TemporaryDirectory(prefix="dalle-ds-") as folder:
        source = Path(folder) / "probe.c"
        source.write_text(SOURCE)
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{headers}", "-o", f"{folder}/probe.so"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"triton's launcher can't be compiled: {compiler}: {error.strerror}"
    if done.returncode == 0:
        return None
    if "Python.h" in done.stderr:
        return f"triton's launcher needs Python's headers, found no Python.h in {headers} (Debian: python3-dev)"
    said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
    return f"triton's launcher can't be compiled: {compiler}: {said.strip()}"
