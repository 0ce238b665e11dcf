"""Memory of one GPU that trains the prior under ZeRO-3: the state to the byte, the rest estimated."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from dalle_ds.models.presets import effective_parameters
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
"""Of a GPU: the driver's context, communication buffers, what fragments."""

CHECKPOINT_BYTES = 8
"""Of a parameter in a checkpoint, without its moments: fp32 weight, averaged weight."""

AVERAGING_BYTES = 5 * 4.0 * BUCKET_VALUES
"""What the average of replicas works on at a time: gradients, their matrix, its approximation, the difference, a copy."""


class StateBytes(NamedTuple):
    """Bytes of a parameter of the model that its ZeRO shard takes from update to update."""

    parameter: float
    gradient: float
    moments: float

    @property
    def total(self) -> float:
        return sum(self)


def state_bytes(config: PriorConfig, moments: Moments, master: Master = "fp32") -> StateBytes:
    """Mean over all parameters, by the formats of weights, gradients and moments. fp32 weights are their own master copies;
    without masters the matrices of residual branches are fp16, and their gradients codes of 16 bits."""
    n_matrices, *others = count_parameters(config)
    of_matrices = 2.0 if master == "none" else 4.0
    each = (of_matrices * n_matrices + 4.0 * sum(others)) / (n_matrices + sum(others))
    return StateBytes(each, each, moment_bytes_per_parameter(config, moments))


@cache
def moment_bytes_per_parameter(config: PriorConfig, moments: Moments) -> float:
    """Mean over all parameters of what their two moments take."""
    with torch.device("meta"):
        groups = decay_groups(Prior(config).named_parameters(), 1.0, moments)
    counted = [(sum(p.numel() for p in group["params"]), 4 if group.get("moments") == "low_bit" else 8) for group in groups]
    return sum(n * size for n, size in counted) / sum(n for n, _ in counted)


class Factors(NamedTuple):
    """What PowerSGD keeps and sends on one GPU, in values."""

    rank: int
    errors: int
    starts: int
    sent: int


@cache
def power_sgd_factors(config: PriorConfig, shards: int) -> Factors:
    """Of the first of `shards` GPUs, at the paper's rate."""
    d = config.d_model
    pieces = {"qkv": ((3 * d, d), 3), "mix": ((d, d), 1), "expand": ((4 * d, d), 1), "project": ((d, 4 * d), 1)}
    matrices = {
        f"{name} {layer}": MatrixShard(shape, 0, -(-shape[0] * shape[1] // shards), n_pieces)
        for layer in range(config.n_layers)
        for name, (shape, n_pieces) in pieces.items()
    }
    rank = largest_rank(matrices, PAPER_RATE)
    shapes = [matrix.shape for matrix in matrices.values()]
    return Factors(
        rank,
        errors=sum(matrix.numel for matrix in matrices.values()),
        starts=sum(k * n * min(rank, m) for k, m, n in shapes),
        sent=sum(matrix.n_sent(rank) for matrix in matrices.values()),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. State and compression stay; the passes' working memory and the step's take turns."""

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
    """Of a GPU that trains `config` under `settings`."""
    shard = sum(count_parameters(config)) / settings.shards
    state = state_bytes(config, settings.moments, settings.master)
    return Memory(
        parameters=state.parameter * shard,
        gradients=state.gradient * shard,
        optimizer=state.moments * shard,
        compression=compression_bytes(config, settings),
        gathered=gathered_bytes(config, settings, counts),
        activations=max(
            activation_bytes(config, settings.micro_batch, settings.recompute, counts) + layer_gradient_bytes(config, settings),
            losses_bytes(config, settings.micro_batch, settings.recompute, counts),
        ),
        buffers=bucket_bytes(settings.bucket),
        step=step_bytes(config, settings),
    )


def step_bytes(config: PriorConfig, settings: PlanInputsConfig) -> float:
    """What the end of an update works on. DeepSpeed copies the gradients of a sub-group, at least as many as that, into one
    tensor before its step; without masters it owns the rest alone, and the factors of all matrices wait for the norm."""
    n_matrices, *others = count_parameters(config)
    owned = (sum(others) if settings.master == "none" else n_matrices + sum(others)) / settings.shards
    averaging = AVERAGING_BYTES if settings.replicas > 1 else 0.0
    if settings.master == "none" and settings.is_compressed:
        averaging += 4.0 * power_sgd_factors(config, settings.shards).sent
    return max(4.0 * min(owned, settings.sub_group), averaging)


def compression_bytes(config: PriorConfig, settings: PlanInputsConfig) -> float:
    """PowerSGD's errors in codes of 16 bits, and its fp32 factors to start from. Without masters there is neither: gradients
    gather in the errors, and the factors are drawn anew each time."""
    if not settings.is_compressed or settings.master == "none":
        return 0.0
    factors = power_sgd_factors(config, settings.shards)
    return 2.0 * factors.errors + 4.0 * factors.starts


def activation_bytes(config: PriorConfig, micro_batch: int, recompute: int = 1, counts: Counts = NOW) -> float:
    """Estimate: what the layers keep for the backward pass, at its worst place what one layer works on, and the fp32
    gradients of the unembeddings, which the forward pass makes. Fused attention keeps no scores."""
    peak = max(kept + again + counts.working_bytes for kept, again in _kept(config, recompute, counts))
    return peak * micro_batch * config.n_slots * config.d_model + _unembeddings(config)


def losses_bytes(config: PriorConfig, micro_batch: int, recompute: int = 1, counts: Counts = NOW) -> float:
    """Estimate: what the layers keep, chunks of fp32 logits, a head's weight, rows of its gradient, and the gradients."""
    *_, (kept, _) = _kept(config, recompute, counts)
    n_logits = micro_batch * max(config.text_len * config.vocab_size, config.n_image * config.n_codes)
    head = HEAD_MEMORY_BYTES * max(config.vocab_size, config.n_codes) + HEAD_ROW_BYTES * MAX_WEIGHT_ROWS
    losses = 3 * 4.0 * min(MAX_LOGITS, n_logits) + head * config.d_model
    return kept * micro_batch * config.n_slots * config.d_model + losses + _unembeddings(config)


def _kept(config: PriorConfig, recompute: int, counts: Counts) -> Iterator[tuple[float, float]]:
    """By layer: bytes of an element that it and those before keep, and that it makes again in the backward pass."""
    kept = 0.0
    for layer in range(config.n_layers):
        is_recomputed = recompute > 0 and layer % recompute == 0
        kept += INPUT_BYTES if is_recomputed else counts.kept_bytes
        yield kept, counts.kept_bytes if is_recomputed else 0.0  # the input is there, the output is beside


def _unembeddings(config: PriorConfig) -> float:
    return 4.0 * config.d_model * (config.vocab_size + config.n_codes)


def bucket_bytes(bucket: int) -> float:
    """ZeRO-3's fp32 bucket of gradients, and the copy of it that a reduction makes."""
    return 2 * 4.0 * bucket


def gathered_bytes(config: PriorConfig, settings: PlanInputsConfig, counts: Counts = NOW) -> float:
    """Estimate of the weights that ZeRO-3 holds whole at a time: up to the limit that it is given, or of one layer and what is
    prefetched of the next. It frees only what it will not need again soon, and around the last layer that is a lot."""
    layers = effective_parameters(config)
    return counts.gathered_bytes * min(layers, max(settings.live, layers / config.n_layers + settings.prefetch))


def layer_gradient_bytes(config: PriorConfig, settings: PlanInputsConfig) -> float:
    """Of one layer in fp32; without masters those of its two largest matrices, as each is taken when it is made."""
    return 4.0 * (2 * 4 if settings.master == "none" else 12) * config.d_model**2
