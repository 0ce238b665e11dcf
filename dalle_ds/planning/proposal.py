"""Which micro-batch, recomputation and ZeRO shards make a run fastest on a machine whose memory holds them."""

from collections.abc import Iterator

from dalle_ds.models.prior import PriorConfig
from dalle_ds.planning.memory import RESERVED_GIB, memory
from dalle_ds.planning.prior_work import prior_workload
from dalle_ds.planning.settings import PlanInputsConfig

RECOMPUTED = (0, 8, 6, 4, 3, 2, 1)
"""Every how many layers one is recomputed; 0: none."""

MAX_SHARDS = 32
"""GPUs that a proposal shards over at most: DeepSpeed loops over all of them in Python, and its rings take a step for each."""

SLACK = 1.02
"""Times of so little difference are equal."""

HEADROOM = 0.9
"""Of the memory that is not reserved: estimates of activations are that good."""


def propose(config: PriorConfig, settings: PlanInputsConfig) -> PlanInputsConfig | None:
    """`settings` with the fastest micro-batch, recomputation and shards that fit and that the batch divides into; of equally
    fast ones that with the smallest shard group, then the least memory. None: none fits."""
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
        for recompute in RECOMPUTED:
            for shards in _divisors(settings.gpus):
                # whole nodes: the links inside them are there to be used
                if shards <= MAX_SHARDS and (shards % per_node == 0 or shards == settings.gpus):
                    yield settings.model_copy(update={"micro_batch": micro_batch, "recompute": recompute, "shard_gpus": shards})


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
