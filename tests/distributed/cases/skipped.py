"""A skipped update between replicas, on every rank. Results are written as JSON to the given folder."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.optim.build import OptimizerSettings
from dalle_ds.parallel.engine import PriorEngine
from dalle_ds.parallel.engine_config import load_engine_config
from dalle_ds.parallel.ranks import Ranks, join, leave
from dalle_ds.parallel.replicas.groups import ReplicasConfig
from dalle_ds.parallel.replicas.power_sgd import as_fp32
from tests.distributed.cases.engine import ADAMW, CLIP, CONFIG, LOW_BIT, PER_RESBLOCK, poisoned
from tests.distributed.cases.masterless import BATCH, micro_batches

SKIPPED, BLOCK = 2, 3
FULL_RANK = {"rank": CONFIG.d_model, "number_format": "fp32"}


def engine_of(folder: Path, ranks: Ranks, optimizer: OptimizerSettings, **config: Any) -> PriorEngine:
    """An engine with as many replicas as ranks."""
    path = folder / f"ds-{ranks.rank}.json"
    zero = {"stage": 3, "reduce_bucket_size": 20000, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({"zero_optimization": zero, "fp16": PER_RESBLOCK}))
    engine_config = load_engine_config(path, micro_batch=BATCH // ranks.world_size, accumulation=1, clip=CLIP)
    replicas = ReplicasConfig(count=ranks.world_size, compression="power_sgd", **config)
    return PriorEngine(CONFIG, engine_config, optimizer, ranks, seed=0, replicas=replicas)


def errors_of(engine: PriorEngine) -> dict[str, Tensor]:
    return {name: as_fp32(error).clone() for name, error in engine.replica_gradients.power_sgd.errors.items()}


def run_until_skipped(engine: PriorEngine, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the errors before and after an update in which a residual block of rank 1 gets an Inf."""
    for update in range(SKIPPED):
        assert engine.update(micro_batches(update, ranks), ADAMW.lr).took_step
    before = errors_of(engine)
    with poisoned(engine.scaler.blocks[BLOCK].branch, ranks):
        assert not engine.update(micro_batches(SKIPPED, ranks), ADAMW.lr).took_step
    return before, errors_of(engine)


def sent_later(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """At full rank and in fp32, nothing is left of an error: what a skipped update has added is sent with the next."""
    engine = engine_of(folder, ranks, ADAMW, **FULL_RANK)
    gradients, averages = engine.replica_gradients, {}
    noted: list[dict[str, Tensor]] = []
    plain_average, plain_keep, plain_set = gradients.average, gradients.keep, gradients._set_gradient

    def note() -> None:
        noted.append({name: gradients._gradient(name).clone() for name in gradients.power_sgd.shards})

    gradients.keep = lambda: (note(), plain_keep())
    gradients.average = lambda: (note(), plain_average())
    gradients._set_gradient = lambda name, values: (averages.update({name: values.clone()}), plain_set(name, values))
    before, after = run_until_skipped(engine, ranks)
    engine.update(micro_batches(SKIPPED + 1, ranks), ADAMW.lr)
    *_, skipped, last = noted
    lost, worst = [], 0.0
    for name in gradients.power_sgd.shards:
        is_finite = bool(torch.isfinite(skipped[name]).all())
        if not is_finite:
            lost.append(name)
        expected = (skipped[name] if is_finite else 0.0) + last[name]
        dist.all_reduce(expected)
        expected /= ranks.world_size
        worst = max(worst, float((averages[name] - expected).norm() / expected.norm()))
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    return {"worst": worst, "lost": lost, "moved": moved, "n": len(after), "block": engine.scaler.names[BLOCK]}


def both_ways(folder: Path, ranks: Ranks) -> float:
    """Largest relative difference between the errors after a skipped update, with and without fp32 masters."""
    low = {"rank": 4}
    with_masters = run_until_skipped(engine_of(folder, ranks, LOW_BIT, **low), ranks)[1]
    without = run_until_skipped(engine_of(folder, ranks, replace(LOW_BIT, master="none"), **low), ranks)[1]
    return max(float((with_masters[name] - without[name]).norm() / with_masters[name].norm()) for name in without)


def main(folder: Path) -> None:
    ranks = join()
    results = {"sent_later": sent_later(folder, ranks), "both_ways": both_ways(folder, ranks)}
    (folder / f"{ranks.rank}-of-{ranks.world_size}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
