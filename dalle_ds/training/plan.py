"""What a run of the prior would take, on paper: memory, time and cost, computed and nothing measured."""

from typing import Any

import torch
from pydantic import Field

from dalle_ds.models.presets import effective_parameters
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.ops.cross_entropy import MAX_LOGITS
from dalle_ds.ops.masks import layer_patterns
from dalle_ds.optim.adamw import Moments
from dalle_ds.optim.groups import decay_groups
from dalle_ds.recipes import Config

PAPER_UPDATES, PAPER_BATCH = 430_000, 1024
GATHERED_BYTES = 2  # of most weights: fp16 on the way
RESERVED_GIB = 1.5  # of a GPU: the driver's context, communication buffers, what fragments
CHECKPOINT_BYTES = 8  # fp32 weight, averaged weight; likewise


class PlanSettings(Config):
    """The machine and the run; the defaults are the paper's run on A100s."""

    gpus: int = Field(1024, ge=1)
    shard_gpus: int | None = Field(None, ge=1, description="GPUs that ZeRO-3 shards over; unset: all of them")
    micro_batch: int = Field(1, ge=1, description="samples a GPU takes at a time")
    updates: int = Field(PAPER_UPDATES, ge=1)
    global_batch: int = Field(PAPER_BATCH, ge=1)
    tflops: float = Field(312.0, gt=0, description="16-bit peak of one GPU (A100: 312, H100: 989, V100: 125)")
    mfu: float = Field(0.35, gt=0, le=1, description="share of the peak that useful arithmetic reaches")
    moments: Moments = Field("fp32", description="the recipe's optimizer.moments")
    bucket: int = Field(50_000_000, ge=1, description="reduce_bucket_size of the DeepSpeed JSON")
    live: int = Field(1_000_000_000, ge=1, description="stage3_max_live_parameters of the DeepSpeed JSON")
    gpu_memory: float | None = Field(None, gt=0, description="GiB of one GPU, to see whether it is enough")
    price: float | None = Field(None, ge=0, description="a GPU hour, any currency")


def plan(config: PriorConfig, settings: PlanSettings) -> dict[str, Any]:
    """All numbers as one flat dict. Names that end in _estimate rest on assumptions beyond counting (named in the README)."""
    shard_gpus = settings.shard_gpus or settings.gpus
    n_effective, n_embedding, n_other = count_parameters(config)
    n_parameters = n_effective + n_embedding + n_other
    forward = forward_flops(config)
    train_flops = 3 * forward  # one forward, twice as much backward; recomputation is not useful arithmetic
    tokens = settings.updates * settings.global_batch * config.n_slots
    seconds = settings.updates * settings.global_batch * train_flops / (settings.gpus * settings.tflops * 1e12 * settings.mfu)
    moments = moment_bytes_per_parameter(config, settings.moments)
    shard = n_parameters / shard_gpus
    parameters, gradients, optimizer = 4 * shard, 4 * shard, moments * shard  # fp32 weights are their own master copies
    activations = activation_bytes(config, settings.micro_batch)
    gathered, buffers = gathered_bytes(config, settings.live), bucket_bytes(settings.bucket)
    state = parameters + gradients + optimizer
    memory = state + gathered + activations + buffers
    micro_batches = settings.global_batch / (settings.gpus * settings.micro_batch)
    # a micro-batch gathers all weights for the forward and again for the backward pass, and scatters fp32 gradients
    sent = micro_batches * n_parameters * (2 * GATHERED_BYTES + 4) * (shard_gpus - 1) / shard_gpus
    summary: dict[str, Any] = {
        "note": "computed estimates, nothing was measured",
        "layers": config.n_layers,
        "d_model": config.d_model,
        "parameters_effective": n_effective,
        "parameters_embeddings": n_embedding,
        "parameters_other": n_other,
        "parameters": n_parameters,
        "tokens_per_sample": config.n_slots,
        "flops_per_token_forward": forward / config.n_slots,
        "flops_per_token_train": train_flops / config.n_slots,
        "flops_per_update": train_flops * settings.global_batch,
        "optimizer_bytes_per_parameter": moments,
        "parameters_gib_per_gpu": parameters / 2**30,
        "gradients_gib_per_gpu": gradients / 2**30,
        "optimizer_gib_per_gpu": optimizer / 2**30,
        "state_gib_per_gpu": state / 2**30,
        "gathered_layers_gib_estimate": gathered / 2**30,
        "activations_gib_estimate": activations / 2**30,
        "buffers_gib_estimate": buffers / 2**30,
        "memory_gib_per_gpu_estimate": memory / 2**30,
        "micro_batches_per_update": micro_batches,
        "communication_gib_per_gpu_per_update": sent / 2**30,
        "checkpoint_gib": n_parameters * (CHECKPOINT_BYTES + moments) / 2**30,
        "export_gib": n_parameters * 4 / 2**30,
        "averaged_weights_cpu_gib_per_gpu": n_parameters * 4 / shard_gpus / 2**30,
        "gpus": settings.gpus,
        "shard_gpus": shard_gpus,
        "replicas": settings.gpus / shard_gpus,
        "communication_between_replicas_gib_per_gpu_per_update": (
            2 * gradients * (1 - shard_gpus / settings.gpus) / 2**30  # fp32, as a ring averages them, not compressed
        ),
        "updates": settings.updates,
        "global_batch": settings.global_batch,
        "train_tokens": tokens,
        "seconds_per_update_estimate": seconds / settings.updates,
        "days_estimate": seconds / 86400,
        "gpu_hours_estimate": seconds * settings.gpus / 3600,
    }
    if settings.gpu_memory is not None:
        summary["gpu_memory_gib"] = settings.gpu_memory
        summary["fits_estimate"] = memory / 2**30 <= settings.gpu_memory - RESERVED_GIB
    if settings.price is not None:
        summary["cost_estimate"] = seconds * settings.gpus / 3600 * settings.price
    return summary


def count_parameters(config: PriorConfig) -> tuple[int, int, int]:
    """-> (the paper's count 12 d^2 a layer, embeddings and unembeddings, the rest: biases and norms), from the model itself."""
    with torch.device("meta"):
        prior = Prior(config)
    n_all = sum(parameter.numel() for parameter in prior.parameters())
    n_embedding = sum(parameter.numel() for module in (prior.embed, prior.heads) for parameter in module.parameters())
    n_effective = effective_parameters(config)
    return n_effective, n_embedding, n_all - n_embedding - n_effective


def moment_bytes_per_parameter(config: PriorConfig, moments: Moments) -> float:
    """Mean over all parameters of what their two moments take."""
    with torch.device("meta"):
        groups = decay_groups(Prior(config).named_parameters(), 1.0, moments)
    counted = [(sum(p.numel() for p in group["params"]), 4 if group.get("moments") == "low_bit" else 8) for group in groups]
    return sum(n * size for n, size in counted) / sum(n for n, _ in counted)


def forward_flops(config: PriorConfig) -> float:
    """Multiply-adds count two, for one sample: matrices, attention over the keys that each pattern reaches, unembeddings."""
    d, n = config.d_model, config.n_slots
    matrices = 2.0 * effective_parameters(config) * n
    pairs = {pattern: int(config.mask(pattern).dense().sum()) for pattern in set(layer_patterns(config.n_layers))}
    attention = sum(4.0 * d * pairs[pattern] for pattern in layer_patterns(config.n_layers))  # scores, then the weighted sum
    heads = 2.0 * d * ((config.text_len - 1) * config.text_vocab + config.n_image * config.image_vocab)
    return matrices + attention + heads


def activation_bytes(config: PriorConfig, micro_batch: int) -> float:
    """Estimate with each layer recomputed: its fp32 input is kept; one layer's inner values in 16 bit exist at a time (norm,
    q, k, v, attention, 4d of the MLP before and after its nonlinearity, and the gradients of half of it), or before that a
    chunk of fp32 logits; and the unembeddings' fp32 gradients, which the forward pass makes. Attention is taken to store no
    scores (fused kernels)."""
    d, n = config.d_model, micro_batch * config.n_slots
    kept = config.n_layers * n * d * 4.0
    inside = n * d * 2.0 * (2 + 3 + 1 + 8) * 1.5
    n_logits = micro_batch * max(config.text_len * config.text_vocab, config.n_image * config.image_vocab)
    unembedding = 4.0 * d * (config.text_vocab + config.image_vocab)
    return kept + max(inside, 4.0 * min(MAX_LOGITS, n_logits)) + unembedding


def bucket_bytes(bucket: int) -> float:
    """ZeRO-3's fp32 bucket of gradients, and the copy of it that a reduction makes."""
    return 2 * 4.0 * bucket


def gathered_bytes(config: PriorConfig, live: int) -> float:
    """Estimate of what ZeRO-3 holds whole at a time: fp32 weights, up to the limit that it is given, and one layer's gradients.
    It frees only what it will not need again soon, and around the last layer that is a lot."""
    layers = effective_parameters(config)
    return 4.0 * (min(layers, live) + layers / config.n_layers)
