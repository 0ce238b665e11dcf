"""Kernels and host synchronisations of one layer and micro-step, from torch's profiler, and the longest kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dalle_ds.acceptance.engines import LEARNING_RATE, make_engine
from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.acceptance.sizes import random_batch, wide_prior
from dalle_ds.parallel.engine import PriorEngine
from dalle_ds.parallel.ranks import Ranks, join, leave

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""Without cudaDeviceSynchronize, which the profiler itself calls."""
CPU_WAITS = ("aten::_local_scalar_dense", "aten::nonzero")
"""Operators that synchronise the host on a GPU. A rehearsal counts these."""
TOP, SHOWN = 25, 5

KERNELS = 110
"""Limit per layer and micro-step. On the fake GPU, tests/cuda_path allows 68 of the layer's own and 28 of ZeRO-3; on a real
GPU, a large sum takes several kernels."""
WAITS_OF_A_MICRO_STEP = 1
"""One host synchronisation, for ZeRO-3's reduction."""
DEPTHS = (1, 5)
"""The depths differ by four layers, one period of the patterns: three row layers and one column layer."""


def run(record: Record, is_rehearsal: bool) -> None:
    """Count at two depths. Their difference belongs to the layers, and excludes embeddings, unembeddings and the engine."""
    place = Place(is_rehearsal)
    ranks = join()
    shallow, deep = place.pick(DEPTHS, (1, 2))
    few, many = (_profiled(place, ranks, depth) for depth in (shallow, deep))
    per_layer = (many["kernels"] - few["kernels"]) / (deep - shallow)
    why = "`dalle-ds bench cuda-path` counts them without a GPU; more mean that operations were not fused (see the longest)"
    if is_rehearsal:
        record.tell("operators per layer and micro-step", per_layer)
    else:
        record.should("kernels per layer and micro-step", per_layer, per_layer <= KERNELS, f"at most {KERNELS}", why)
    record.tell("the same outside layers", few["kernels"] - shallow * per_layer)
    waits = (many["waits"] - few["waits"]) / (deep - shallow)
    why = "if the host waits in every layer, it cannot run ahead of the GPU"
    record.should("host waits per layer and micro-step", waits, waits < 0.5, "0", why)
    once, why = few["waits"] - shallow * waits, "each leaves the GPU idle: `dalle-ds bench cuda-path` lists their lines of code"
    record.should("host waits per micro-step", once, once <= WAITS_OF_A_MICRO_STEP, f"at most {WAITS_OF_A_MICRO_STEP}", why)
    if many["seconds"]:
        record.tell("ms of kernels per layer and micro-step", 1e3 * (many["seconds"] - few["seconds"]) / (deep - shallow))
    for name, count, milliseconds in many["longest"][:SHOWN]:
        record.tell(f"longest: {name[:60]}", f"{count} x, {milliseconds:.3g} ms in all")
    record.detail("longest", many["longest"])
    leave()


def _profiled(place: Place, ranks: Ranks, n_layers: int) -> dict[str, Any]:
    config = wide_prior(place, n_layers)
    engine = make_engine(place, ranks, config, micro_batch=place.pick(8, 2), accumulation=1)
    data = [random_batch(config, place.pick(8, 2), 0)]
    for _ in range(2):
        engine.update(data, LEARNING_RATE)
    return _count(place, engine, data)


def _count(place: Place, engine: PriorEngine, data: list[Any]) -> dict[str, Any]:
    """Profile forward and backward. Returns kernels, host waits, kernel seconds, and the longest kernels."""
    activities = [ProfilerActivity.CPU, *([] if place.is_rehearsal else [ProfilerActivity.CUDA])]
    profilers = []

    @contextmanager
    def phases(phase: str) -> Iterator[None]:
        if phase not in ("forward", "backward"):
            yield
            return
        with profile(activities=activities) as profiler:
            yield
        profilers.append(profiler)

    plain, engine.phases = engine.phases, phases  # type: ignore[assignment]
    engine.update(data, LEARNING_RATE)
    engine.phases = plain
    rows = [row for profiler in profilers for row in profiler.key_averages()]
    if place.is_rehearsal:
        kernels = [row for row in rows if row.key.startswith("aten::")]
        times = {id(row): row.self_cpu_time_total for row in kernels}
    else:
        kernels = [row for row in rows if row.device_type is DeviceType.CUDA and not row.key.startswith(("Mem", "nccl"))]
        times = {id(row): row.self_device_time_total for row in kernels}
    longest = sorted(kernels, key=lambda row: -times[id(row)])[:TOP]
    return {
        "kernels": sum(row.count for row in kernels),
        "waits": sum(row.count for row in rows if row.key in place.pick(WAITS, CPU_WAITS)),
        "seconds": 0.0 if place.is_rehearsal else sum(times.values()) / 1e6,
        "longest": [[row.key[:90], row.count, round(times[id(row)] / 1e3, 3)] for row in longest],
    }
