"""Whether Triton can build kernels here: torch's compiler, and with it FlexAttention, needs it on CUDA."""

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
    """Why Triton can't build kernels for the GPU of this process, or None.

    Its package brings all but one thing: a small library between Python and the driver, which it compiles where it first runs.
    Slim containers lack a C compiler or Python's headers; then the first kernel would die, minutes into a run.
    """
    try:
        import triton
    except ImportError as error:
        return f"its kernels need triton ({error})"
    if problem := launcher_problem():
        return problem
    try:
        triton.runtime.driver.active.get_current_target()  # builds that library
    except Exception as error:  # RuntimeError, AssertionError, CalledProcessError, OSError: as each part of it likes
        said = next(iter(str(error).strip().splitlines()), "without a word")
        return f"triton finds no way to the GPU ({type(error).__name__}: {said})"
    return None


def launcher_problem() -> str | None:
    """Why a library for this Python can't be compiled with the compiler that Triton takes, or None."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "triton needs a C compiler for its launcher: no gcc, clang or CC here (Debian: gcc python3-dev)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton: Debian's own has no headers
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
        return f"triton's launcher needs Python's headers, there is no Python.h in {headers} (Debian: python3-dev)"
    said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
    return f"triton's launcher can't be compiled: {compiler}: {said.strip()}"
