"""Memory of one GPU that trains the prior under ZeRO-3: the state is counted to the byte, the rest is estimated."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from dalle_ds.models.presets import n_effective_parameters
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.ops.cross_entropy import MAX_LOGITS, MAX_WEIGHT_ROWS
from dalle_ds.optim.adamw import Master, Moments
from dalle_ds.optim.groups import decay_groups
from dalle_ds.parallel.replicas.groups import BUCKET_VALUES, PAPER_RATE
from dalle_ds.parallel.replicas.power_sgd import MatrixShard, largest_rank
from dalle_ds.planning.arithmetic import count_parameters
from dalle_ds.planning.counts import HEAD_MEMORY_BYTES, HEAD_ROW_BYTES, INPUT_BYTES, NOW, Counts
from dalle_ds.planning.settings import PlanInputsConfig

RESERVED_GIB = 1.5
"""GiB of a GPU that are reserved for the driver's context, communication buffers and fragmentation."""

CHECKPOINT_BYTES = 8
"""Bytes per parameter in a checkpoint, without the moments: fp32 weight and its EMA."""

AVERAGING_BYTES = 5 * 4.0 * BUCKET_VALUES
"""Working memory to average gradients between replicas: gradients, their matrix, its approximation, the difference, a copy."""


class StateBytes(NamedTuple):
    """Bytes per parameter of the state that a ZeRO shard keeps between updates."""

    parameter: float
    gradient: float
    moments: float

    @property
    def total(self) -> float:
        return sum(self)


def state_bytes(config: PriorConfig, moments: Moments, master: Master = "fp32") -> StateBytes:
    """Mean bytes per parameter, given the formats of weights, gradients and moments.

    fp32 weights are their own master copies. Without master copies, the matrices of residual branches are fp16, and their
    gradients are 16-bit codes.
    """
    n_matrices, *others = count_parameters(config)
    of_matrices = 2.0 if master == "none" else 4.0
    each = (of_matrices * n_matrices + 4.0 * sum(others)) / (n_matrices + sum(others))
    return StateBytes(each, each, moment_bytes_per_parameter(config, moments))


@cache
def moment_bytes_per_parameter(config: PriorConfig, moments: Moments) -> float:
    """Mean bytes per parameter of its two moments."""
    with torch.device("meta"):
        groups = decay_groups(Prior(config).named_parameters(), 1.0, moments)
    counted = [(sum(p.numel() for p in group["params"]), 4 if group.get("moments") == "low_bit" else 8) for group in groups]
    return sum(n * size for n, size in counted) / sum(n for n, _ in counted)


class Factors(NamedTuple):
    """PowerSGD on one GPU: its rank, and the numbers of values of errors, of starting factors, and of sent factors."""

    rank: int
    errors: int
    starts: int
    sent: int


@cache
def power_sgd_factors(config: PriorConfig, shards: int, rank: int | None = None, sent_fraction: float = PAPER_RATE) -> Factors:
    """`Factors` of the first of `shards` GPUs. `sent_fraction` determines the rank if it is None."""
    d = config.d_model
    pieces = {"qkv": ((3 * d, d), 3), "mix": ((d, d), 1), "expand": ((4 * d, d), 1), "project": ((4 * d, d), 1)}
    matrices = {
        f"{name} {layer}": MatrixShard(shape, 0, -(-shape[0] * shape[1] // shards), n_pieces)
        for layer in range(config.n_layers)
        for name, (shape, n_pieces) in pieces.items()
    }
    rank = rank or largest_rank(matrices, sent_fraction)
    shapes = [matrix.shape for matrix in matrices.values()]
    return Factors(
        rank,
        errors=sum(matrix.numel for matrix in matrices.values()),
        starts=sum(k * n * min(rank, m) for k, m, n in shapes),
        sent=sum(matrix.n_sent(rank) for matrix in matrices.values()),
    )


def planned_factors(config: PriorConfig, settings: PlanInputsConfig) -> Factors:
    """`power_sgd_factors` of a plan."""
    return power_sgd_factors(config, settings.shards, settings.compression_rank, settings.sent_fraction)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU.

    State, compression and buffers are permanent. The memory of the passes (`gathered`, `activations`) and of the optimizer step
    (`step`) is not needed at the same time.
    """

    parameters: float
    gradients: float
    optimizer: float
    compression: float
    gathered: float
    activations: float
    buffers: float
    step: float

    @property
    def state(self) -> float:
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.state + self.compression + self.buffers + max(self.gathered + self.activations, self.step)


def memory(config: PriorConfig, settings: PlanInputsConfig, counts: Counts = NOW) -> Memory:
    """Estimate the memory of a GPU that trains `config` under `settings`."""
    shard = sum(count_parameters(config)) / settings.shards
    state = state_bytes(config, settings.moments, settings.master)
    return Memory(
        parameters=state.parameter * shard,
        gradients=state.gradient * shard,
        optimizer=state.moments * shard,
        compression=compression_bytes(config, settings),
        gathered=gathered_bytes(config, settings, counts),
        activations=max(
            activation_bytes(config, settings.micro_batch, settings.activation_checkpointing, counts)
            + layer_gradient_bytes(config, settings),
            losses_bytes(config, settings.micro_batch, settings.activation_checkpointing, counts),
        ),
        buffers=bucket_bytes(settings.bucket),
        step=step_bytes(config, settings),
    )


def step_bytes(config: PriorConfig, settings: PlanInputsConfig) -> float:
    """Working memory at the end of an update.

    Before its step, DeepSpeed copies the gradients of a sub-group, up to `sub_group_size` values, into one tensor. Without
    master copies, DeepSpeed's optimizer has only the parameters outside the matrices, and the PowerSGD factors of all matrices
    are kept until the gradient norm is known.
    """
    n_matrices, *others = count_parameters(config)
    owned = (sum(others) if settings.master == "none" else n_matrices + sum(others)) / settings.shards
    averaging = AVERAGING_BYTES if settings.replicas > 1 else 0.0
    if settings.master == "none" and settings.is_compressed:
        averaging += 4.0 * planned_factors(config, settings).sent
    return max(4.0 * min(owned, settings.sub_group), averaging)


def compression_bytes(config: PriorConfig, settings: PlanInputsConfig) -> float:
    """Memory of PowerSGD: its errors in 16-bit codes, and its fp32 starting factors.

    Without master copies both are 0: gradients accumulate in the errors, and the starting factors are drawn anew each time.
    """
    if not settings.is_compressed or settings.master == "none":
        return 0.0
    factors = planned_factors(config, settings)
    return 2.0 * factors.errors + 4.0 * factors.starts


def activation_bytes(config: PriorConfig, micro_batch: int, activation_checkpointing: int = 1, counts: Counts = NOW) -> float:
    """Estimate of the peak memory of the backward pass through the layers.

    It is the sum of the saved activations and the working memory of a layer, at the worst layer, and of the fp32 gradients of
    the unembeddings, which the forward pass computes. Fused attention saves no scores.
    """
    peak = max(kept + again + counts.working_bytes for kept, again in _kept(config, activation_checkpointing, counts))
    return peak * micro_batch * config.n_slots * config.d_model + _unembeddings(config)


def losses_bytes(config: PriorConfig, micro_batch: int, activation_checkpointing: int = 1, counts: Counts = NOW) -> float:
    """Estimate of the memory while the losses are computed.

    It is the sum of saved activations, chunks of fp32 logits, a head's weight, rows of its gradient, and the gradients of the
    unembeddings.
    """
    *_, (kept, _) = _kept(config, activation_checkpointing, counts)
    n_logits = micro_batch * max(config.text_len * config.vocab_size, config.n_image * config.n_codes)
    head = HEAD_MEMORY_BYTES * max(config.vocab_size, config.n_codes) + HEAD_ROW_BYTES * MAX_WEIGHT_ROWS
    losses = 3 * 4.0 * min(MAX_LOGITS, n_logits) + head * config.d_model
    return kept * micro_batch * config.n_slots * config.d_model + losses + _unembeddings(config)


def _kept(config: PriorConfig, activation_checkpointing: int, counts: Counts) -> Iterator[tuple[float, float]]:
    """For each layer, yields bytes per element: saved by the layers up to this one, and recomputed in its backward pass."""
    kept = 0.0
    for layer in range(config.n_layers):
        is_recomputed = activation_checkpointing > 0 and layer % activation_checkpointing == 0
        kept += INPUT_BYTES if is_recomputed else counts.kept_bytes
        yield kept, counts.kept_bytes if is_recomputed else 0.0  # the saved input replaces the output


def _unembeddings(config: PriorConfig) -> float:
    return 4.0 * config.d_model * (config.vocab_size + config.n_codes)


def bucket_bytes(bucket: int) -> float:
    """Memory of ZeRO-3's fp32 gradient bucket, and of the copy that a reduction makes of it."""
    return 2 * 4.0 * bucket


def gathered_bytes(config: PriorConfig, settings: PlanInputsConfig, counts: Counts = NOW) -> float:
    """Estimate of the memory of the weights that ZeRO-3 holds gathered at the same time.

    It is the larger of stage3_max_live_parameters and one layer with the prefetched part of the next, at most all layers.
    ZeRO-3 frees only weights that it will not use again soon, so around the last layer many stay gathered.
    """
    layers = n_effective_parameters(config)
    return counts.gathered_bytes * min(layers, max(settings.live, layers / config.n_layers + settings.prefetch))


def layer_gradient_bytes(config: PriorConfig, settings: PlanInputsConfig) -> float:
    """Memory of a layer's fp32 gradients.

    Without master copies, it is that of the layer's two largest matrices, because each gradient is consumed as soon as it is
    computed.
    """
    return 4.0 * (2 * 4 if settings.master == "none" else 12) * config.d_model**2
