"""Memory, time and cost of a prior run, computed without measuring anything."""

from typing import Any

from dalle_ds.errors import ConfigError
from dalle_ds.models.prior import PriorConfig
from dalle_ds.parallel.engine_config import load_engine_config
from dalle_ds.planning.arithmetic import count_parameters, forward_flops
from dalle_ds.planning.memory import CHECKPOINT_BYTES, RESERVED_GIB, Memory, memory, state_bytes
from dalle_ds.planning.prior_work import GATHERED, REDUCED, exchanged_bytes, prior_workload
from dalle_ds.planning.proposal import propose
from dalle_ds.planning.settings import PlanInputsConfig
from dalle_ds.planning.timing import times
from dalle_ds.training.prior.config import PriorRunConfig

GIB = 2**30

TOO_MANY_SHARDS = 64
"""A plan warns if a ZeRO group has more GPUs than this."""


def plan(config: PriorConfig, settings: PlanInputsConfig) -> dict[str, Any]:
    """Compute all numbers of a plan, by name. Names that end in _estimate rest on assumptions beyond counting, which are
    listed in planning/README.md.

    Raises:
        ConfigError: `settings.machine` is not a known machine.
    """
    of_gpu = memory(config, settings)
    summary = {
        "note": "computed estimates, nothing was measured",
        "machine": settings.machine,
        "gpus": settings.gpus,
        "shard_gpus": settings.shards,
        "replicas": settings.gpus / settings.shards,
        "micro_batch": settings.micro_batch,
        "activation_checkpointing": _as_in_recipes(settings.activation_checkpointing),
        "updates": settings.updates,
        "global_batch": settings.global_batch,
        **_model(config, settings),
        **_memory(config, settings, of_gpu),
        **_traffic(config, settings),
        **_time(config, settings),
    }
    if warnings := _warnings(config, settings, of_gpu):
        summary["warnings"] = warnings
    summary["proposal"] = _proposal(config, settings)
    return summary


def settings_of(run: PriorRunConfig, gpus: int) -> dict[str, Any]:
    """The settings of a plan that a recipe and its DeepSpeed JSON determine, by name.

    Raises:
        ConfigError: the JSON cannot be read, or there are more replicas than GPUs.
    """
    if run.replicas.count > gpus:
        raise ConfigError(f"the recipe's replicas.count is {run.replicas.count}, expected at most the number of GPUs, {gpus}")
    run = run.on_ranks(gpus)
    engine = load_engine_config(run.deepspeed_path, micro_batch=run.micro_batch, accumulation=1, clip=run.optimizer.clip)
    zero = engine.json.get("zero_optimization", {})
    in_json = {
        "bucket": "reduce_bucket_size",
        "live": "stage3_max_live_parameters",
        "sub_group": "sub_group_size",
        "prefetch": "stage3_prefetch_bucket_size",
    }
    return {
        "shard_gpus": gpus // run.replicas.count,
        "micro_batch": run.micro_batch,
        "activation_checkpointing": int(run.activation_checkpointing),
        "updates": run.updates,
        "global_batch": run.global_batch,
        "moments": run.optimizer.moments,
        "master": run.optimizer.master,
        "compression": run.replicas.compression,
        "compression_rank": run.replicas.rank,
        "sent_fraction": run.replicas.sent_fraction,
        **{name: int(zero[key]) for name, key in in_json.items() if isinstance(zero.get(key), int | float)},
    }


def _model(config: PriorConfig, settings: PlanInputsConfig) -> dict[str, Any]:
    n_effective, n_embedding, n_other = count_parameters(config)
    n_parameters = n_effective + n_embedding + n_other
    forward = forward_flops(config)
    train = 3 * forward  # the backward pass costs twice the forward pass; recomputation does not count as useful FLOPs
    moments = state_bytes(config, settings.moments).moments
    return {
        "n_layers": config.n_layers,
        "d_model": config.d_model,
        "n_effective_parameters": n_effective,
        "n_embedding_parameters": n_embedding,
        "n_other_parameters": n_other,
        "n_parameters": n_parameters,
        "tokens_per_sample": config.n_slots,
        "train_tokens": settings.updates * settings.global_batch * config.n_slots,
        "flops_per_token_forward": forward / config.n_slots,
        "flops_per_token_train": train / config.n_slots,
        "flops_per_update": train * settings.global_batch,
        "checkpoint_gib": n_parameters * (CHECKPOINT_BYTES + moments) / GIB,
        "export_gib": n_parameters * 4 / GIB,
        "ema_cpu_gib_per_gpu": n_parameters * 4 / settings.shards / GIB,
    }


def _memory(config: PriorConfig, settings: PlanInputsConfig, of_gpu: Memory) -> dict[str, Any]:
    gpu_memory = settings.build_machine().memory_gib
    return {
        "optimizer_bytes_per_parameter": state_bytes(config, settings.moments).moments,
        "parameters_gib_per_gpu": of_gpu.parameters / GIB,
        "gradients_gib_per_gpu": of_gpu.gradients / GIB,
        "optimizer_gib_per_gpu": of_gpu.optimizer / GIB,
        "state_gib_per_gpu": of_gpu.state / GIB,
        "compression_gib_per_gpu": of_gpu.compression / GIB,
        "gathered_layers_gib_estimate": of_gpu.gathered / GIB,
        "activations_gib_estimate": of_gpu.activations / GIB,
        "step_gib_estimate": of_gpu.step / GIB,
        "buffers_gib_estimate": of_gpu.buffers / GIB,
        "memory_gib_per_gpu_estimate": of_gpu.total / GIB,
        "gpu_memory_gib": gpu_memory,
        "fits_estimate": of_gpu.total / GIB <= gpu_memory - RESERVED_GIB,
    }


def _traffic(config: PriorConfig, settings: PlanInputsConfig) -> dict[str, Any]:
    shards, n_parameters = settings.shards, sum(count_parameters(config))
    # a micro-batch all-gathers all weights for the forward and again for the backward pass, and reduce-scatters fp32 gradients
    sent = settings.n_micro_steps * n_parameters * (2 * GATHERED + REDUCED) * (shards - 1) / shards
    between = 2 * exchanged_bytes(config, settings) * (1 - 1 / settings.replicas)  # reduce-scatter, then all-gather
    return {
        "micro_batches_per_update": settings.n_micro_steps,
        "communication_gib_per_gpu_per_update": sent / GIB,
        "communication_between_replicas_gib_per_gpu_per_update": between / GIB,
    }


def _time(config: PriorConfig, settings: PlanInputsConfig) -> dict[str, Any]:
    machine = settings.build_machine()
    workload = prior_workload(config, settings, machine)
    step = times(workload.micro_step, machine)
    seconds, mfu, binds = workload.seconds(machine), workload.mfu(machine), step.binds
    if settings.mfu is not None:
        seconds, mfu, binds = workload.useful_flops / (machine.tflops * 1e12 * settings.mfu), settings.mfu, "the MFU given"
    hours = seconds * settings.updates * settings.gpus / 3600
    return {
        "micro_step_compute_seconds_estimate": step.compute,
        "micro_step_compute_parts_estimate": {name: round(part, 4) for name, part in step.parts.items() if part},
        "micro_step_links_inside_nodes_seconds_estimate": step.inside,
        "micro_step_links_between_nodes_seconds_estimate": step.between,
        "micro_step_host_seconds_estimate": step.host,
        "binds": binds,
        "update_end_seconds_estimate": times(workload.closing, machine).one_after_the_other,
        "mfu_estimate": mfu,
        "seconds_per_update_estimate": seconds,
        "days_estimate": seconds * settings.updates / 86400,
        "gpu_hours_estimate": hours,
        **({"cost_estimate": hours * settings.price} if settings.price is not None else {}),
    }


def _warnings(config: PriorConfig, settings: PlanInputsConfig, of_gpu: Memory) -> list[str]:
    found = []
    if settings.gpus % settings.shards:
        found.append(f"shard_gpus {settings.shards} does not divide the {settings.gpus} GPUs: such a run would not start")
    if settings.n_micro_steps % 1:
        found.append(
            f"global_batch {settings.global_batch} is not a multiple of {settings.gpus} GPUs x micro_batch "
            f"{settings.micro_batch}: such a run would not start"
        )
    if settings.shards > TOO_MANY_SHARDS:
        found.append(
            f"ZeRO-3 over {settings.shards} GPUs: for every tensor DeepSpeed loops over all GPUs in Python, and its "
            f"collectives are rings of {settings.shards} steps; shard over 8 to 32 GPUs and set replicas.count"
        )
    available = settings.build_machine().memory_gib - RESERVED_GIB
    if of_gpu.total / GIB > available:
        found.append(
            f"the run needs {of_gpu.total / GIB:.1f} GiB per GPU, but a GPU has {available:g} GiB ({RESERVED_GIB:g} GiB are "
            "reserved)"
        )
    return found


def _proposal(config: PriorConfig, settings: PlanInputsConfig) -> dict[str, Any] | None:
    """The fastest settings that fit in memory. None if none fit."""
    best = propose(config, settings)
    if best is None:
        return None
    machine = best.build_machine()
    workload = prior_workload(config, best, machine)
    return {
        "micro_batch": best.micro_batch,
        "activation_checkpointing": _as_in_recipes(best.activation_checkpointing),
        "shard_gpus": best.shards,
        "replicas": best.replicas,
        "memory_gib_per_gpu_estimate": round(memory(config, best).total / GIB, 1),
        "binds": times(workload.micro_step, machine).binds,
        "mfu_estimate": round(workload.mfu(machine), 3),
        "seconds_per_update_estimate": round(workload.seconds(machine), 3),
    }


def _as_in_recipes(activation_checkpointing: int) -> bool | int:
    """The value of `activation_checkpointing` in a recipe."""
    return activation_checkpointing if activation_checkpointing > 1 else bool(activation_checkpointing)
