"""The real engine under the real DeepSpeed on the fake device: GPU work of a layer, a micro-step and an update.

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
"""Layers of the two models. They differ by four layers, one period of the patterns: three row layers and one column layer."""
RANK = 1
PRODUCTS = GEMMS | {ATTENTION}
"""Operators that are bound by arithmetic."""


@dataclass(frozen=True)
class EngineCounts:
    """Counts for a model of width `d_model`. They are differences between runs, which excludes work that happens only once.

    A layer is counted as one of many: its weights are gathered for the forward pass, freed, and gathered again for the backward
    pass.
    """

    d_model: int
    n_slots: int
    layer: Counts
    """One layer in a micro-step of one sample: forward, recomputation, backward."""
    sample: Counts
    """Added to `layer` by each further sample in the micro-batch."""
    micro_step: Counts
    """A whole micro-step of one sample, in a model of `DEPTHS[1]` layers."""
    update: Counts
    """An update without its micro-steps, in the same model: agreement between ranks, un-scaling, norm, AdamW."""
    layer_bytes: float
    """Bytes that a layer adds to the peak of an update: this rank's state, and tensors saved for the backward pass."""

    @property
    def kernels(self) -> float:
        """Kernels of a layer in a micro-step, including those of attention and autograd, without DeepSpeed's."""
        return self.layer.where(lambda site: not site.by_zero).n_kernels

    @property
    def zero_kernels(self) -> float:
        """Kernels that DeepSpeed launches for a layer in a micro-step, without collectives."""
        return self.layer.where(lambda site: site.by_zero).n_kernels

    @property
    def bytes_per_element(self) -> float:
        """Bytes that a layer reads and writes outside of `PRODUCTS`, per element of the residual stream (slots x D)."""
        return self.sample.where(lambda site: site.what not in PRODUCTS).n_bytes / (self.n_slots * self.d_model)

    @property
    def bytes_per_parameter(self) -> dict[str, float]:
        """Bytes read and written in a micro-step per parameter of the layer's matrices, by purpose. Bytes that depend on the
        size of the micro-batch are excluded."""
        weights, n = self.layer - self.sample, 12 * self.d_model**2
        found = {name: weights.where(lambda site, name=name: _purpose(site) == name).n_bytes / n for name in PURPOSES}
        return {**found, "all": weights.n_bytes / n}

    def summary(self) -> dict[str, Any]:
        """Returns the numbers, and the host synchronisations by place in the code."""
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
    """Returns the purpose for which `site` moves bytes of weights or of their gradients."""
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
    """Count as rank 1 of `world_size`, with the paper's sequence and vocabularies. Call in a new process: `in_fresh_process`.

    Raises:
        ConfigError: fake CUDA can't run on this machine.
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
    """Returns, for a model of each depth, the peak of allocated bytes on rank 1 of `world_size` in an update of one sample.

    The peak includes all model state. `settings` go to `make_engine`. Call in a new process; raises as `count_engine`.
    """
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
    """Returns an engine after two updates, in which ZeRO-3 traces the order of modules and AdamW's moments are allocated."""
    engine = make_engine(ranks, config, deepspeed_json, **settings)
    use_attention(engine.module, "flex", gpu.device)
    for _ in range(2):
        engine.update(random_batches(config, 1), lr=1e-4)
    return engine


@contextmanager
def _one_rank(world_size: int) -> Iterator[tuple[FakeGPU, Any]]:
    """Install the fake device as the GPU of rank 1, alone on its node. Rank 0 would draw initial weights that nothing uses."""
    place = {"RANK": RANK, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
    os.environ.update({name: str(value) for name, value in place.items()}, DS_ACCELERATOR="cuda")
    # redirected: DeepSpeed prints that the CUDA toolkit is missing
    with redirect_stdout(io.StringIO()), fake_cuda() as gpu, compiled_stand_ins(gpu):
        yield gpu, join_alone(RANK, world_size)


@dataclass(frozen=True)
class _Runs:
    updates: dict[tuple[int, int], Counts]
    """Keys: samples per micro-batch, number of micro-batches."""
    peak_bytes: int


def _count_updates(gpu: FakeGPU, ranks: Any, config: PriorConfig, deepspeed_json: Mapping[str, Any]) -> _Runs:
    held_before = gpu.live_bytes
    engine = _engine(gpu, ranks, config, _as_in_a_deep_model(deepspeed_json))

    def update(n_samples: int, n_micro_batches: int) -> Counts:
        engine._engine.set_train_batch_size(ranks.world_size * n_micro_batches)
        engine._accumulation = n_micro_batches  # all runs share one engine: creating one takes as long as an update
        with gpu.counting() as counts:
            engine.update(random_batches(config, n_samples, n_micro_batches), lr=1e-4)
        return counts

    with gpu.measuring_peak() as peak:
        updates = {(1, 1): update(1, 1)}
        peak_bytes = peak() - held_before
    return _Runs({**updates, **{shape: update(*shape) for shape in ((2, 1), (1, 2))}}, peak_bytes)


def _as_in_a_deep_model(deepspeed_json: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON with which ZeRO-3 gathers each layer when it is needed and then frees it, as in a deep model.

    ZeRO-3 keeps gathered weights up to `stage3_max_live_parameters`: five of the largest layers, or twenty of width 2,048.
    Without this change, all layers of these shallow models would stay gathered from the forward to the backward pass.
    """
    zero = {**deepspeed_json["zero_optimization"], "stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0}
    return {**deepspeed_json, "zero_optimization": zero}
