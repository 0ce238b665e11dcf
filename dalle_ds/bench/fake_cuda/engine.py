"""The real engine under the real DeepSpeed on the fake device: what a layer, a micro-step and an update give a GPU to do.

B samples of a micro-batch, D model width, P parameters of a layer's matrices.
"""

import gc
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from dalle_ds.bench.fake_cuda.compiled import ATTENTION, compiled_stand_ins
from dalle_ds.bench.fake_cuda.counts import GEMMS, Counts, Site
from dalle_ds.bench.fake_cuda.device import FakeGPU, fake_cuda
from dalle_ds.bench.fake_world.one_rank import join_alone, make_engine, random_batches
from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import PriorConfig

DEPTHS = (1, 5)
"""Layers of two models: four more are one period of the patterns, three rows and a column."""
RANK = 1
PRODUCTS = GEMMS | {ATTENTION}
"""Kernels that are bound by arithmetic."""


@dataclass(frozen=True)
class EngineCounts:
    """Of a model of width `d_model`; differences between runs, so that what happens once is left out.

    A layer is one of many: its weights are gathered for the forward pass, freed, and gathered again.
    """

    d_model: int
    n_slots: int
    layer: Counts
    """A layer in a micro-step of one sample, forward, recomputed, backward."""
    sample: Counts
    """What one more sample in the micro-batch adds to `layer`."""
    micro_step: Counts
    """All of a micro-step of a model of `DEPTHS[1]` layers, one sample."""
    update: Counts
    """What an update does beside its micro-steps: agreement, un-scaling, norm, AdamW, in that model."""
    layer_bytes: float
    """Memory that a layer adds to the peak of an update: this rank's state, and what is kept for the backward pass."""

    @property
    def kernels(self) -> float:
        """A layer's own kernels in a micro-step, attention's and autograd's included."""
        return self.layer.where(lambda site: not site.by_zero).n_kernels

    @property
    def zero_kernels(self) -> float:
        """Kernels that DeepSpeed launches for a layer in a micro-step, collectives not counted."""
        return self.layer.where(lambda site: site.by_zero).n_kernels

    @property
    def bytes_per_element(self) -> float:
        """Read and written by a layer outside of products, for an element of the residual stream (slots x D)."""
        return self.sample.where(lambda site: site.what not in PRODUCTS).n_bytes / (self.n_slots * self.d_model)

    @property
    def bytes_per_parameter(self) -> dict[str, float]:
        """Read and written in a micro-step for a parameter of the layer's matrices, whatever the micro-batch, by purpose."""
        weights, n = self.layer - self.sample, 12 * self.d_model**2
        found = {name: weights.where(lambda site, name=name: _purpose(site) == name).n_bytes / n for name in PURPOSES}
        return {**found, "all": weights.n_bytes / n}

    def summary(self) -> dict[str, Any]:
        """The numbers, with places in the code for host synchronisations."""
        return {
            "kernels": self.kernels,
            "zero_kernels": self.zero_kernels,
            "bytes_per_element": self.bytes_per_element,
            "bytes_per_parameter": self.bytes_per_parameter,
            "syncs_micro_step": self.micro_step.n_syncs,
            "syncs_update": self.update.n_syncs,
            "collectives_layer": sum(self.layer.collectives.values()),
            "places_micro_step": self.micro_step.sync_places(),
            "places_update": self.update.sync_places(),
            "layer_mib": self.layer_bytes / 2**20,
        }


PURPOSES = ("gather", "reduce", "unscale", "cast", "product", "other")
_REDUCES = ("runtime/comm/", "zero/stage3.py")
_GATHERS = ("zero/partition_parameters.py", "zero/partitioned_param_coordinator.py", "parallel/fp16_gather.py")


def _purpose(site: Site) -> str:
    """What bytes of weights and of their gradients are moved for."""
    if site.what in PRODUCTS:
        return "product"
    if "reduce_scatter" in site.what or any(part in site.file for part in _REDUCES):
        return "reduce"
    if "allgather" in site.what or any(part in site.file for part in _GATHERS):
        return "gather"
    if "block_scaling" in site.file:
        return "unscale"
    return "cast" if site.what == "_to_copy" else "other"


def count_engine(n_heads: int, deepspeed_json: Mapping[str, Any], world_size: int = 8) -> EngineCounts:
    """Rank 1 of `world_size`, at the paper's sequence and vocabularies. For a process of its own: `memory.in_fresh_process`.

    Raises:
        ConfigError: fake CUDA can't be had on this machine.
    """
    with _one_rank(world_size) as (gpu, ranks):
        fewer, more = (_count_updates(gpu, ranks, PriorConfig(n_layers=n, n_heads=n_heads), deepspeed_json) for n in DEPTHS)
    n = DEPTHS[1] - DEPTHS[0]
    micro_steps = [runs.updates[1, 2] - runs.updates[1, 1] for runs in (fewer, more)]
    samples = [runs.updates[2, 1] - runs.updates[1, 1] for runs in (fewer, more)]
    config = PriorConfig(n_heads=n_heads)
    return EngineCounts(
        d_model=config.d_model,
        n_slots=config.n_slots,
        layer=(micro_steps[1] - micro_steps[0]) / n,
        sample=(samples[1] - samples[0]) / n,
        micro_step=micro_steps[1],
        update=more.updates[1, 1] - micro_steps[1],
        layer_bytes=(more.peak_bytes - fewer.peak_bytes) / n,
    )


def engine_peaks(
    depths: Sequence[int], n_heads: int, deepspeed_json: Mapping[str, Any], world_size: int = 8, **settings: Any
) -> list[int]:
    """For models of so many layers: the most bytes that rank 1 of `world_size` has allocated in an update, with state and one
    sample. `settings` are `make_engine`'s. For a process of its own; raises as `count_engine`."""
    peaks = []
    with _one_rank(world_size) as (gpu, ranks):
        for n_layers in depths:
            before = gpu.live_bytes
            config = PriorConfig(n_layers=n_layers, n_heads=n_heads)
            engine = _engine(gpu, ranks, config, deepspeed_json, **settings)
            with gpu.measuring_peak() as peak:
                engine.update(random_batches(config, 1), lr=1e-4)
                peaks.append(peak() - before)
            del engine
            gc.collect()
    return peaks


def _engine(gpu: FakeGPU, ranks: Any, config: PriorConfig, deepspeed_json: Mapping[str, Any], **settings: Any) -> Any:
    """After two updates, in which ZeRO-3 learns the order of modules, and moments come to be."""
    engine = make_engine(ranks, config, deepspeed_json, **settings)
    use_attention(engine.module, "flex", gpu.device)
    for _ in range(2):
        engine.update(random_batches(config, 1), lr=1e-4)
    return engine


@contextmanager
def _one_rank(world_size: int) -> Iterator[tuple[FakeGPU, Any]]:
    """The fake device as the GPU of rank 1, alone on its node. Rank 0 would draw first weights, numbers that nobody reads."""
    place = {"RANK": RANK, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
    os.environ.update({name: str(value) for name, value in place.items()}, DS_ACCELERATOR="cuda")
    with redirect_stdout(io.StringIO()), fake_cuda() as gpu, compiled_stand_ins(gpu):  # DeepSpeed misses a CUDA toolkit, loudly
        yield gpu, join_alone(RANK, world_size)


@dataclass(frozen=True)
class _Runs:
    updates: dict[tuple[int, int], Counts]
    """By samples of a micro-batch and number of micro-batches."""
    peak_bytes: int


def _count_updates(gpu: FakeGPU, ranks: Any, config: PriorConfig, deepspeed_json: Mapping[str, Any]) -> _Runs:
    held_before = gpu.live_bytes
    engine = _engine(gpu, ranks, config, _as_in_a_deep_model(deepspeed_json))

    def update(n_samples: int, n_micro_batches: int) -> Counts:
        engine._engine.set_train_batch_size(ranks.world_size * n_micro_batches)
        engine._accumulation = n_micro_batches  # one engine for all: making it takes as long as an update
        with gpu.counting() as counts:
            engine.update(random_batches(config, n_samples, n_micro_batches), lr=1e-4)
        return counts

    with gpu.measuring_peak() as peak:
        updates = {(1, 1): update(1, 1)}
        peak_bytes = peak() - held_before
    return _Runs({**updates, **{shape: update(*shape) for shape in ((2, 1), (1, 2))}}, peak_bytes)


def _as_in_a_deep_model(deepspeed_json: Mapping[str, Any]) -> dict[str, Any]:
    """ZeRO-3 keeps gathered weights up to `stage3_max_live_parameters`, five of the largest layers or twenty of 2,048: all that
    there are here would stay from forward to backward pass. Here each is gathered when it is needed, and freed."""
    zero = {**deepspeed_json["zero_optimization"], "stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0}
    return {**deepspeed_json, "zero_optimization": zero}
