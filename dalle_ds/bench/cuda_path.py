"""What does a layer of the prior give a GPU to do in a micro-step, and what the host? Counted without a GPU.

fp16 branches with per-resblock scaling under ZeRO-3, layers recomputed: the real engine under the real DeepSpeed, on a fake
CUDA device for what a GPU gets, and at a tiny width on the CPU for the host's time against the plain model's.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dalle_ds.bench.fake_cuda.engine import DEPTHS, RANK, EngineCounts, count_engine
from dalle_ds.bench.fake_world.host_time import HostTime, host_time
from dalle_ds.bench.fake_world.one_rank import in_fake_world
from dalle_ds.bench.harness.memory import in_fresh_process
from dalle_ds.bench.harness.settings import CudaPathBenchConfig
from dalle_ds.errors import ConfigError


@dataclass(frozen=True)
class CudaPath:
    """Counts of each width, and the host's work (None: not asked for)."""

    settings: CudaPathBenchConfig
    widths: list[EngineCounts]
    host: HostTime | None

    def summary(self) -> dict[str, Any]:
        """One JSON object. `ratios` has the host's, above 1 where the engine takes less time than the plain model."""
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
        """On stderr where stdout belongs to the JSON line."""
        out = sys.stderr if to_stderr else sys.stdout
        rows: list[tuple[str, list[float]]] = [
            ("kernels", [c.kernels for c in self.widths]),
            ("kernels of DeepSpeed", [c.zero_kernels for c in self.widths]),
            ("collectives", [sum(c.layer.collectives.values()) for c in self.widths]),
            ("bytes an element of the residual stream, products left out", [c.bytes_per_element for c in self.widths]),
        ]
        by_purpose = [c.bytes_per_parameter for c in self.widths]
        rows += [(f"bytes a parameter: {name}", [found[name] for found in by_purpose]) for name in by_purpose[0]]
        rows.append(("MiB that it adds to the peak", [c.layer_bytes / 2**20 for c in self.widths]))
        rank = f"rank {RANK} of {self.settings.world_size}"
        print(f"cuda-path: {rank}, {self.settings.deepspeed_config}, fp16, recomputed", file=out)
        print(f"{'a layer in a micro-step of one sample':<60}" + "".join(f"  d {c.d_model:>6}" for c in self.widths), file=out)
        for name, values in rows:
            print(f"{name:<60}" + "".join(f"  {value:>8.4g}" for value in values), file=out)
        deepest = self.widths[-1]
        for name, counts in (("micro-step", deepest.micro_step), ("update", deepest.update)):
            print(f"the host waits {counts.n_syncs:g} times in a {name} ({DEPTHS[1]} layers):", file=out)
            for place, times in sorted(counts.sync_places().items(), key=lambda item: -item[1]):
                print(f"  {times:>4g}  {place}", file=out)
        if self.host is not None:
            calls = self.host.micro_step.calls / self.host.plain.calls
            against = f"{self.host.ratio:.2f} (Python calls: {calls:.2f})"
            print(f"the host's CPU time for a layer, against the plain model's: {against}", file=out)
        out.flush()


def run(settings: CudaPathBenchConfig) -> CudaPath:
    """Each width in a process of its own.

    Raises:
        ConfigError: fake CUDA can't be had on this machine, or the DeepSpeed JSON can't be read.
    """
    try:
        deepspeed_json = json.loads(Path(settings.deepspeed_config).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"--deepspeed-config {settings.deepspeed_config}: {error}") from None
    widths = [in_fresh_process(count_engine, n, deepspeed_json, settings.world_size) for n in settings.heads]
    host = None
    if settings.rounds:
        with in_fake_world(RANK, settings.world_size) as call:
            host = call(host_time, deepspeed_json, widths[-1].d_model, settings.rounds)
    return CudaPath(settings, widths, host)
