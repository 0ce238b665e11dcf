"""Kernels and host waits of one layer and micro-step, by torch's profiler, and where a GPU's time goes."""

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
"""Not cudaDeviceSynchronize, which the profiler itself calls."""
CPU_WAITS = ("aten::_local_scalar_dense", "aten::nonzero")
"""What waits on a GPU: a rehearsal counts them."""
TOP, SHOWN = 25, 5

KERNELS = 110
"""Of a layer and micro-step: tests/cuda_path allows 68 of its own and 28 of ZeRO-3 on a pretended GPU; large sums are several
on a real one."""
WAITS_OF_A_MICRO_STEP = 1
"""For ZeRO-3's reduction."""
DEPTHS = (1, 5)
"""Four more layers are one period of the patterns, three rows and a column."""


def run(record: Record, is_rehearsal: bool) -> None:
    """Two depths: what they differ by is of the layers, whatever embeddings, unembeddings and the engine launch."""
    place = Place(is_rehearsal)
    ranks = join()
    shallow, deep = place.pick(DEPTHS, (1, 2))
    few, many = (_profiled(place, ranks, depth) for depth in (shallow, deep))
    per_layer = (many["kernels"] - few["kernels"]) / (deep - shallow)
    why = "`dalle-ds bench cuda-path` counts them without a GPU; more are operations that were not fused (see the longest)"
    if is_rehearsal:
        record.tell("operations of a layer and micro-step", per_layer)
    else:
        record.should("kernels of a layer and micro-step", per_layer, per_layer <= KERNELS, f"at most {KERNELS}", why)
    record.tell("the same outside of layers", few["kernels"] - shallow * per_layer)
    waits = (many["waits"] - few["waits"]) / (deep - shallow)
    why = "a host that waits in every layer cannot run ahead of the GPU"
    record.should("host waits of a layer and micro-step", waits, waits < 0.5, "0", why)
    once, why = few["waits"] - shallow * waits, "each lets the GPU run dry: `dalle-ds bench cuda-path` names their lines"
    record.should("host waits of a micro-step", once, once <= WAITS_OF_A_MICRO_STEP, f"at most {WAITS_OF_A_MICRO_STEP}", why)
    if many["seconds"]:
        record.tell("ms of a layer's kernels in a micro-step", 1e3 * (many["seconds"] - few["seconds"]) / (deep - shallow))
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
    """Of forward and backward: kernels, waits, kernel seconds, and the kernels that take longest."""
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
