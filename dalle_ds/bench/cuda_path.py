"""How much GPU work and host work is a layer of the prior in a micro-step? Counted without a GPU.

The real engine runs under the real DeepSpeed: fp16 branches with per-resblock scaling, ZeRO-3, activation checkpointing. GPU
work is counted on a fake CUDA device. Host time is measured on the CPU at a tiny width, against the plain model.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from dalle_ds.bench.fake_cuda.engine import DEPTHS, RANK, EngineCounts, count_engine
from dalle_ds.bench.fake_world.host_time import HostTime, host_time
from dalle_ds.bench.fake_world.one_rank import in_fake_world
from dalle_ds.bench.harness.memory import in_fresh_process
from dalle_ds.bench.harness.settings import CudaPathBenchConfig
from dalle_ds.errors import ConfigError
from dalle_ds.project_files import here_or_shipped
from dalle_ds.storage.text import parse_json


@dataclass(frozen=True)
class CudaPath:
    """Counts for each width, and the host's work. With 0 rounds, `host` is None."""

    settings: CudaPathBenchConfig
    widths: list[EngineCounts]
    host: HostTime | None

    def summary(self) -> dict[str, Any]:
        """Returns one JSON object. `ratios` has the host's ratio: above 1, the engine takes less time than the plain model."""
        found: dict[str, Any] = {"bench": "cuda-path", "device": f"fake CUDA, torch {torch.__version__}"}
        found |= {"ratios": {}, "seconds": {}}
        if self.host is not None:
            found["ratios"] = {"host_layer_vs_plain": 1 / self.host.ratio}
            found["seconds"] = {"host_layer_ours": self.host.micro_step.seconds, "host_layer_plain": self.host.plain.seconds}
            found["host_ratio"] = self.host.ratio
            found["host_calls_ratio"] = self.host.micro_step.calls / self.host.plain.calls
        found["widths"] = {str(counts.d_model): counts.summary() for counts in self.widths}
        return {**found, "world_size": self.settings.world_size, "deepspeed_config": self.settings.deepspeed_config}

    def print_table(self, to_stderr: bool) -> None:
        """Print the table to stdout, or to stderr if stdout is reserved for the JSON line."""
        out = sys.stderr if to_stderr else sys.stdout
        rows: list[tuple[str, list[float]]] = [
            ("kernels", [c.kernels for c in self.widths]),
            ("kernels of DeepSpeed", [c.zero_kernels for c in self.widths]),
            ("collectives", [sum(c.layer.collectives.values()) for c in self.widths]),
            ("bytes per element of the residual stream, no products", [c.bytes_per_element for c in self.widths]),
        ]
        by_purpose = [c.bytes_per_parameter for c in self.widths]
        rows += [(f"bytes per parameter: {name}", [found[name] for found in by_purpose]) for name in by_purpose[0]]
        rows.append(("MiB added to the peak", [c.layer_bytes / 2**20 for c in self.widths]))
        rank = f"rank {RANK} of {self.settings.world_size}"
        print(f"cuda-path: {rank}, {self.settings.deepspeed_config}, fp16, activation checkpointing", file=out)
        print(f"{'a layer in a micro-step of one sample':<60}" + "".join(f"  d {c.d_model:>6}" for c in self.widths), file=out)
        for name, values in rows:
            print(f"{name:<60}" + "".join(f"  {value:>8.4g}" for value in values), file=out)
        deepest = self.widths[-1]
        for name, counts in (("micro-step", deepest.micro_step), ("update", deepest.update)):
            print(f"{counts.n_syncs:g} host synchronisations in one {name} ({DEPTHS[1]} layers):", file=out)
            for place, times in sorted(counts.sync_places().items(), key=lambda item: -item[1]):
                print(f"  {times:>4g}  {place}", file=out)
        if self.host is not None:
            calls = self.host.micro_step.calls / self.host.plain.calls
            against = f"{self.host.ratio:.2f} (Python calls: {calls:.2f})"
            print(f"host CPU time per layer, relative to the plain model: {against}", file=out)
        out.flush()


def run(settings: CudaPathBenchConfig) -> CudaPath:
    """Count each width in its own process.

    Raises:
        ConfigError: fake CUDA can't run on this machine, or the DeepSpeed JSON can't be read.
    """
    try:
        deepspeed_json = parse_json(here_or_shipped(settings.deepspeed_config).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed-config {settings.deepspeed_config}: {error}") from None
    widths = [in_fresh_process(count_engine, n, deepspeed_json, settings.world_size) for n in settings.n_heads]
    host = None
    if settings.rounds:
        with in_fake_world(RANK, settings.world_size) as call:
            host = call(host_time, deepspeed_json, widths[-1].d_model, settings.rounds)
    return CudaPath(settings, widths, host)
