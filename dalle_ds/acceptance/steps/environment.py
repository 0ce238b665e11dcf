"""Versions, flags and hardware, on which the numbers of the other steps depend."""

import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from importlib import metadata

import torch

from dalle_ds import project_files
from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.ops.exactness import has_tf32
from dalle_ds.ops.kernel_compiler import kernel_problem, launcher_problem
from dalle_ds.parallel.ranks import join, leave
from dalle_ds.training.prior.throughput import known_peak_tflops

CHECKED = ("torch", "deepspeed", "numpy", "pydantic", "einops", "safetensors")
TOLD = ("triton", "nvidia-nccl-cu13", "nvidia-cudnn-cu13")
ASKED = "driver_version,power.limit,clocks.max.sm,ecc.mode.current,mig.mode.current,memory.used"
VARIABLES = re.compile(r"^(NCCL|CUDA|TORCH|PYTORCH|TRITON|FI|OMP|DS|GLOO)_")
CROWDED_GIB = 1.0
"""If more of a GPU's memory is in use before this process allocates any, another process holds it: the driver takes less."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    python = sys.version_info >= (3, 11)
    record.must("Python", platform.python_version(), python, ">=3.11", "pyproject.toml: requires-python")
    for package in CHECKED:
        _version(record, package)
    for package in TOLD:
        with suppress(metadata.PackageNotFoundError):
            record.tell(package, metadata.version(package))
    record.detail("variables", {key: value for key, value in os.environ.items() if VARIABLES.match(key)})
    problem = launcher_problem() if is_rehearsal else _gpus(record, place)
    why = problem or "Triton compiles the kernels of FlexAttention, fused functions and AdamW on this machine"
    record.must("Triton can build kernels", problem is None, problem is None, "True", why)
    ranks = join()
    record.equal("rank of one process", f"{ranks.rank} of {ranks.world_size}", "0 of 1", "no launcher started this step")
    _flags(record)
    leave()


def _version(record: Record, package: str) -> None:
    from packaging.requirements import Requirement

    wanted = next((r.specifier for r in map(Requirement, project_files.requirements()) if r.name == package), None)
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        found = "none"
    fits = found != "none" and (wanted is None or wanted.contains(found, prereleases=True))
    record.must(package, found, fits, str(wanted or "any"), "pyproject.toml: the versions that the tests run with")


def _gpus(record: Record, place: Place) -> str | None:
    """Add rows about the GPUs. Returns why Triton can't build kernels for them, or None if it can.

    Raises:
        SystemExit: torch sees no CUDA device.
    """
    if not torch.cuda.is_available():
        record.must("GPUs", 0, False, "at least 1", f"torch {torch.__version__} sees no CUDA device; --rehearse needs none")
        raise SystemExit("no CUDA device: all further steps would fail")
    about = torch.cuda.get_device_properties(0)
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    why = "ZeRO-3 waits for the slowest rank, so all GPUs should be of one kind"
    record.should("GPUs", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}", len(names) == 1, "of one kind", why)
    record.tell("GiB of one GPU", round(about.total_memory / 2**30, 1))
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    why = "FlexAttention's kernels need it; without them, dense attention takes 2 to 4 times as long"
    record.should("compute capability", capability, about.major >= 8, ">=8.0", why)
    peak = known_peak_tflops(place.device)
    why = "dalle_ds/training/prior/throughput.py lists common GPUs; for others set tracking.peak_tflops, or there is no MFU"
    record.should("16-bit peak, TFLOP/s", peak or "unknown", peak is not None, "known", why)
    free, total = torch.cuda.mem_get_info()
    used = (total - free) / 2**30
    why = "another process holds memory of GPU 0, so the times and limits below are unreliable"
    record.should("GiB in use at start", round(used, 2), used < CROWDED_GIB, f"under {CROWDED_GIB:g}", why)
    record.tell("CUDA of torch", str(torch.version.cuda))
    record.tell("NCCL, cuDNN", f"{'.'.join(map(str, torch.cuda.nccl.version()))}, {torch.backends.cudnn.version()}")
    for option in (["--query-gpu=" + ASKED, "--format=csv"], ["topo", "-m"]):
        with suppress(OSError, subprocess.TimeoutExpired):
            told = subprocess.run(["nvidia-smi", *option], capture_output=True, text=True, timeout=15, check=False).stdout
            record.detail(f"nvidia-smi {option[0]}", told.splitlines())
    if torch.cuda.device_count() > 1:
        peers = all(torch.cuda.can_device_access_peer(0, i) for i in range(1, torch.cuda.device_count()))
        why = "without peer access, traffic between GPUs goes through host memory: see the rates of step `ranks`"
        record.should("GPUs reach each other's memory", peers, peers, "True", why)
    return kernel_problem()


def _flags(record: Record) -> None:
    """Check torch's precision flags. Call after `join`, which sets them on every rank."""
    matmul = torch.backends.cuda.matmul
    why = "16-bit partial sums of split-K overflow near 65504, and gradient scales bring values close to it by design"
    for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation"):
        record.equal(name, getattr(matmul, name), False, why)
    why = "logits, norms, the optimizer and fp32 tokens need fp32: TF32 keeps 10 of 23 bits"
    record.equal("fp32 products in TF32", has_tf32(), False, why)
