"""The machine and the precision of a benchmark: device, threads, clock, dtypes."""

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dalle_ds.bench.harness.settings import Dtype, MachineBenchConfig
from dalle_ds.bench.harness.timing import Clock, clock_for
from dalle_ds.ops.devices import resolve_device
from dalle_ds.ops.exactness import exact_fp32
from dalle_ds.precision.fp16_branches import use_fp16_branches

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """A device, its number of CPU threads, and the clock that times it."""

    device: torch.device
    threads: int
    clock: Clock

    @property
    def name(self) -> str:
        """Readable name for tables: processor, CPU threads, torch version."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, torch {torch.__version__}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()}), {threads}, torch {torch.__version__}"


@contextmanager
def machine_for(settings: MachineBenchConfig) -> Iterator[Machine]:
    """Yields the machine of the settings, and sets torch's number of threads for the duration of the context."""
    device = resolve_device(settings.device)
    exact_fp32()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        yield Machine(device, settings.threads, clock_for(device, settings.threads))
    finally:
        torch.set_num_threads(threads_before)


def in_precision(model: nn.Module, dtype: Dtype, device: torch.device) -> AbstractContextManager[None]:
    """Prepare fp32 `model` for `dtype`. Returns the context for its forward pass. Gradients aren't scaled, see scaling.py."""
    if dtype == "fp16":
        use_fp16_branches(model)
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else nullcontext()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
