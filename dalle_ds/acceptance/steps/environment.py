"""Versions, flags and what the machine has: what the other steps' numbers depend on."""

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
"""Of a GPU's memory, before we take any: the driver alone takes less."""


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
    why = problem or "FlexAttention, fused functions and low-bit AdamW are kernels that Triton builds where they run"
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
    record.must(package, found, fits, str(wanted or "any"), "pyproject.toml: what the tests run with")


def _gpus(record: Record, place: Place) -> str | None:
    """Rows on the GPUs -> why Triton can't build kernels for them, or None."""
    if not torch.cuda.is_available():
        record.must("GPUs", 0, False, "at least 1", f"torch {torch.__version__} sees no CUDA device; --rehearse needs none")
        raise SystemExit("no CUDA device: all further steps would fail")
    about = torch.cuda.get_device_properties(0)
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    why = "ZeRO-3 waits for the slowest rank: GPUs of one kind"
    record.should("GPUs", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}", len(names) == 1, "of one kind", why)
    record.tell("GiB of a GPU", round(about.total_memory / 2**30, 1))
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    why = "FlexAttention's kernels need it; below, dense attention takes 2 to 4 times as long"
    record.should("compute capability", capability, about.major >= 8, ">=8.0", why)
    peak = known_peak_tflops(place.device)
    why = "dalle_ds/training/prior/throughput.py knows common GPUs; set tracking.peak_tflops, else there is no MFU"
    record.should("16-bit peak, TFLOP/s", peak or "unknown", peak is not None, "known", why)
    free, total = torch.cuda.mem_get_info()
    used = (total - free) / 2**30
    why = "another process holds memory of GPU 0: times and limits below are not this machine's"
    record.should("GiB in use before we start", round(used, 2), used < CROWDED_GIB, f"under {CROWDED_GIB:g}", why)
    record.tell("CUDA of torch", str(torch.version.cuda))
    record.tell("NCCL, cuDNN", f"{'.'.join(map(str, torch.cuda.nccl.version()))}, {torch.backends.cudnn.version()}")
    for option in (["--query-gpu=" + ASKED, "--format=csv"], ["topo", "-m"]):
        with suppress(OSError, subprocess.TimeoutExpired):
            told = subprocess.run(["nvidia-smi", *option], capture_output=True, text=True, timeout=15, check=False).stdout
            record.detail(f"nvidia-smi {option[0]}", told.splitlines())
    if torch.cuda.device_count() > 1:
        peers = all(torch.cuda.can_device_access_peer(0, i) for i in range(1, torch.cuda.device_count()))
        why = "without it, traffic between GPUs goes through the host's memory: see the rates of step `ranks`"
        record.should("GPUs reach each other's memory", peers, peers, "True", why)
    return kernel_problem()


def _flags(record: Record) -> None:
    """After `join`, which sets them for every rank."""
    matmul = torch.backends.cuda.matmul
    why = "partial sums of split-K in 16 bits overflow near 65504, where gradient scales live by design"
    for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation"):
        record.equal(name, getattr(matmul, name), False, why)
    why = "logits, norms, the optimizer and fp32 tokens: TF32 keeps 10 bits of 23"
    record.equal("fp32 products in TF32", has_tf32(), False, why)
