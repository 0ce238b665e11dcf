"""Throughput of a run: samples, tokens and useful FLOPs per second, MFU, and the fraction of time in each phase."""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from dalle_ds.models.prior import PriorConfig
from dalle_ds.planning.arithmetic import forward_flops

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10": 125.0,
    "V100": 125.0,
    "T4": 65.0,
    "RTX 5090": 210.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense 16-bit matrix peak in TFLOPS as stated by the maker, by a substring of the device name. The first match counts."""


def known_peak_tflops(device: torch.device) -> float | None:
    """16-bit peak of `device` in TFLOPS. None for CPUs and for GPUs that are not in PEAK_TFLOPS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_gigabytes(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far, by metric: CPU memory if /proc reports it, and memory of a CUDA `device`."""
    peaks = {}
    # not getrusage: its peak starts with the peak of the parent process
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            peaks["memory/cpu_peak_gigabytes"] = round(int(found[1]) * 1024 / 1e9, 3)
    if device.type == "cuda":
        peaks["memory/device_peak_gigabytes"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return peaks


class Throughput:
    """Rates and time fractions since the previous call of `metrics`.

    FLOPs are useful FLOPs: forward and backward passes, sparse attention by attended pairs, without recomputed layers.
    """

    def __init__(
        self, config: PriorConfig, global_batch: int, peak_tflops: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`peak_tflops`: sum over all devices. None: no MFU."""
        self._batch, self._tokens = global_batch, config.n_slots
        self._flops = 3 * forward_flops(config)
        self._peak, self._clock = peak_tflops, clock
        self._since, self._updates, self._waited = clock(), 0, 0.0

    def add(self) -> None:
        """Count an update."""
        self._updates += 1

    def metrics(self, phase_seconds: Mapping[str, float], waited_seconds: float) -> dict[str, float]:
        """Return the metrics by name.

        Args:
            phase_seconds: seconds of each phase on the main rank since the previous call.
            waited_seconds: total seconds waited for data so far.
        """
        now = self._clock()
        seconds = max(now - self._since, 1e-9)
        samples = self._updates * self._batch / seconds
        shares = {"data_wait": (waited_seconds - self._waited) / seconds}
        shares |= {phase: spent / seconds for phase, spent in phase_seconds.items()}
        # "other": validation, checkpoints, logging, and agreement between the ranks
        shares["other"] = max(0.0, 1.0 - sum(shares.values()))
        self._since, self._updates, self._waited = now, 0, waited_seconds
        tflops = samples * self._flops / 1e12
        return {
            "speed/samples_per_second": samples,
            "speed/tokens_per_second": samples * self._tokens,
            "speed/model_tflops": tflops,
            **({"speed/mfu": tflops / self._peak} if self._peak else {}),
            **{f"time_share/{name}": share for name, share in shares.items()},
        }
