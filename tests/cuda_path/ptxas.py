"""Compile Inductor's kernels to machine code for their GPU. Child process of test_kernels.py:

python -m tests.cuda_path.ptxas FOLDER      reads FOLDER/80/*.py and FOLDER/90/*.py, writes FOLDER/code.json
"""

import contextlib
import importlib.util
import io
import json
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch._inductor.config
import torch._inductor.runtime.triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton import knobs
from triton.runtime import driver

_KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)
_USED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.DOTALL)
_FTZ = re.compile(r"(\w+)[\w.]*\.ftz")


@cache
def compile_kernel(name: str, source: str) -> list[dict[str, Any]]:
    """Returns for each autotuning candidate: registers per thread, threads and bytes of shared memory per block, spilled bytes
    per thread (written plus read), and instructions that flush subnormals to zero."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner: CachingAutotuner = getattr(module, name)
        return [_figures(tuner, config) for config in tuner.configs]


def _figures(tuner: CachingAutotuner, config: Any) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = tuner._precompile_config(config).kernel
    stored, loaded, registers = map(int, _USED.search(log.getvalue()).groups())
    return {
        "sm": tuner.device_props.cc,
        "registers": registers,
        "threads": 32 * kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "spilled": stored + loaded,
        "ftz": sorted(set(_FTZ.findall(kernel.asm["ptx"]))),
    }


def main(folder: Path) -> None:
    knobs.compilation.always_compile = True  # kernels from Triton's cache have no ptxas report
    knobs.nvidia.dump_ptxas_log = True
    torch._inductor.config.use_static_cuda_launcher = False  # it keeps only the data for launching
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    driver.set_active(SimpleNamespace(get_current_device=lambda: 0))
    found: dict[str, dict[str, Any]] = {"80": {}, "90": {}}
    for sm, modules in found.items():
        for path in sorted((folder / sm).glob("*.py")):
            modules[path.stem] = {name: compile_kernel(name, source) for name, source in _KERNEL.findall(path.read_text())}
    (folder / "code.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
