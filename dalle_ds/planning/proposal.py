"""Propose the fastest micro-batch, activation checkpointing and ZeRO shards that fit into the memory of a machine."""

from collections.abc import Iterator

from dalle_ds.models.prior import PriorConfig
from dalle_ds.planning.memory import RESERVED_GIB, memory
from dalle_ds.planning.prior_work import prior_workload
from dalle_ds.planning.settings import PlanInputsConfig

RECOMPUTED = (0, 8, 6, 4, 3, 2, 1)
"""Candidates: every N-th layer is recomputed; 0: none."""

MAX_SHARDS = 32
"""Maximum number of GPUs that a proposal shards over: DeepSpeed loops over them in Python, and a ring has a step for each."""

SLACK = 1.02
"""Times that differ by less than this factor count as equal."""

HEADROOM = 0.9
"""Fraction of the unreserved memory that a proposal may fill, because activations are estimated."""


def propose(config: PriorConfig, settings: PlanInputsConfig) -> PlanInputsConfig | None:
    """Returns `settings` with the fastest micro-batch, recomputation and ZeRO shards that fit and divide the batch.

    Of equally fast candidates, it returns the one with the fewest shards, then with the least memory. Returns None if none
    fits.
    """
    machine = settings.build_machine()
    limit = (machine.memory_gib - RESERVED_GIB) * HEADROOM * 2**30
    found = []
    for candidate in _candidates(settings, machine.gpus_per_node):
        n_bytes = memory(config, candidate).total
        if n_bytes <= limit:
            found.append((prior_workload(config, candidate, machine).seconds(machine), candidate.shards, n_bytes, candidate))
    fastest = min((seconds for seconds, *_ in found), default=0.0)
    equal = [(shards, n_bytes, candidate) for seconds, shards, n_bytes, candidate in found if seconds <= SLACK * fastest]
    return min(equal, key=lambda option: option[:2])[2] if equal else None


def _candidates(settings: PlanInputsConfig, per_node: int) -> Iterator[PlanInputsConfig]:
    a_gpu, rest = divmod(settings.global_batch, settings.gpus)
    if rest:
        return
    for micro_batch in _divisors(a_gpu):
        for activation_checkpointing in RECOMPUTED:
            for shards in _divisors(settings.gpus):
                # shard over whole nodes, to use the links inside them
                if shards <= MAX_SHARDS and (shards % per_node == 0 or shards == settings.gpus):
                    yield settings.model_copy(
                        update={
                            "micro_batch": micro_batch,
                            "activation_checkpointing": activation_checkpointing,
                            "shard_gpus": shards,
                        }
                    )


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
