"""Time, MFU and memory of a stack of layers of width 2048 under the engine, in several settings, against `plan`'s estimates.

Each setting runs in its own process: DeepSpeed keeps references to engines, so the memory of earlier settings would count.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dalle_ds.acceptance import expected
from dalle_ds.acceptance.guard import guard
from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.acceptance.sizes import random_batch, wide_prior
from dalle_ds.acceptance.table import REHEARSAL_SECONDS
from dalle_ds.models.prior import PriorConfig
from dalle_ds.training.prior.throughput import known_peak_tflops

LAYERS, ACCUMULATION, UPDATES = 12, 2, 3
SETTING_SECONDS = 120


@dataclass(frozen=True)
class Setting:
    """The options that differ between runs."""

    samples: int
    activation_checkpointing: bool = True
    moments: str = "fp32"
    master: str = "fp32"

    @property
    def label(self) -> str:
        kept = "" if self.activation_checkpointing else ", no activation checkpointing"
        moments = ", low-bit moments" if self.moments == "low_bit" else ""
        return f"{self.samples} samples{kept}{moments}{', no masters' if self.master == 'none' else ''}"


SETTINGS = (
    Setting(8),
    Setting(8, activation_checkpointing=False, moments="low_bit"),
    Setting(8, moments="low_bit", master="none"),
    Setting(32),
)
REHEARSED = (Setting(2), Setting(2, activation_checkpointing=False, moments="low_bit", master="none"))
SAME_LOSS = 2e-3
"""Relative difference between settings with the same samples after the same number of updates: recomputation and storage
formats must not change the loss. Without master weights, stochastic rounding of fp16 weights changes single weights by 2^-11,
and a loss by far less."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    config = wide_prior(place, LAYERS)
    losses: dict[int, float] = {}
    room = None if is_rehearsal else torch.cuda.get_device_properties(0).total_memory / 2**30
    for setting in REHEARSED if is_rehearsal else SETTINGS:
        hoped = expected.micro_step(
            config,
            place.device,
            samples=setting.samples,
            accumulation=ACCUMULATION,
            activation_checkpointing=setting.activation_checkpointing,
            moments=setting.moments,
            master=setting.master,
        )
        if room and hoped.memory_gib and hoped.memory_gib > room:
            record.tell(f"{setting.label}: not run, expected GiB exceed the GPU", hoped.memory_gib)
            continue
        command = [sys.executable, "-m", __name__, json.dumps([is_rehearsal, asdict(setting)])]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(child.stdout)
        if child.returncode:
            why = "the log of this step has the error; the other settings are independent"
            record.must(f"{setting.label}: exit code", child.returncode, False, "0", why)
            continue
        found = json.loads(child.stdout.splitlines()[-1])
        _rows(record, place, config, setting, found, hoped)
        first = losses.setdefault(setting.samples, found["loss"])
        why = "against the first setting with these samples: recomputation and storage formats must not change the loss"
        difference = abs(found["loss"] - first) / first
        record.at_most(f"{setting.label}: loss, relative difference", difference, SAME_LOSS, why)


def measure(is_rehearsal: bool, setting: Setting) -> dict[str, Any]:
    """Time some updates after the same number of warm-up updates. Returns seconds and CPU seconds per micro-batch, peak memory,
    loss and phases."""
    from dalle_ds.acceptance.engines import LEARNING_RATE, make_engine  # DeepSpeed, which the parent process does not need
    from dalle_ds.parallel.ranks import join, leave

    place = Place(is_rehearsal)
    config = wide_prior(place, LAYERS)
    engine = make_engine(
        place,
        join(),
        config,
        micro_batch=setting.samples,
        accumulation=ACCUMULATION,
        activation_checkpointing=setting.activation_checkpointing,
        moments=setting.moments,
        master=setting.master,
    )
    data = [random_batch(config, setting.samples, seed) for seed in range(ACCUMULATION)]
    n_updates = place.pick(UPDATES, 1)
    for _ in range(n_updates):
        engine.update(data, LEARNING_RATE)
    engine.phases.take()
    place.wait()
    place.forget_peak()
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(n_updates):
        report = engine.update(data, LEARNING_RATE)
    place.wait()
    n = n_updates * ACCUMULATION
    seconds, cpu_seconds = (time.perf_counter() - began) / n, (time.process_time() - cpu) / n
    phases = {name: spent / n for name, spent in engine.phases.take().items()}
    leave()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gib": place.peak_gib(), "loss": report.loss, "phases": phases}


def _rows(
    record: Record, place: Place, config: PriorConfig, setting: Setting, found: dict[str, Any], hoped: expected.Expected
) -> None:
    label, seconds, why = setting.label, found["seconds"], expected.WHY
    record.detail(label, {**found, "plan_says_that_binds": hoped.binds})
    record.size(f"{label}: s per micro-step", seconds, hoped.seconds, 1 / expected.SLOWER - 1, why)
    record.tell(f"{label}: tokens per second", setting.samples * config.n_slots / seconds)
    rate, peak = expected.useful_flops(config, setting.samples) / seconds / 1e12, known_peak_tflops(place.device)
    record.tell(f"{label}: TFLOP/s", rate)
    if peak:
        record.rate(f"{label}: MFU", rate / peak, hoped.mfu, expected.SLOWER, why)
    if not place.is_rehearsal:
        why = "`dalle-ds plan` counts state to the byte and estimates the memory of forward, backward and optimizer step"
        record.size(f"{label}: peak GiB", found["peak_gib"], hoped.memory_gib, expected.LARGER, why)
    why = "near or above 1, the GPU waits for the host: use a larger micro-batch or faster cores"
    record.tell(f"{label}: host CPU s divided by wall s", found["cpu_seconds"] / seconds, why)


if __name__ == "__main__":
    rehearsal, options = json.loads(sys.argv[1])
    guard(REHEARSAL_SECONDS if rehearsal else SETTING_SECONDS)
    print(json.dumps(measure(rehearsal, Setting(**options))))
