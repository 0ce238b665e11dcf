"""Test cases of replicas that run on every rank. Results are written as JSON to the given folder."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dalle_ds.models.prior import PriorConfig
from dalle_ds.ops.exactness import has_tf32
from dalle_ds.parallel.engine import PriorEngine, UpdateReport
from dalle_ds.parallel.engine_config import load_engine_config
from dalle_ds.parallel.ranks import Ranks, join, leave
from dalle_ds.parallel.replicas.groups import Replicas, ReplicasConfig, mean_in_1_6_9, mean_in_fp32
from tests.distributed.cases.engine import ADAMW, CLIP, CONFIG, GLOBAL_BATCH, UPDATES, _Inf, micro_batches, plain_run

PER_BLOCK = {"enabled": True, "loss_scale": "per_resblock"}
N_REPLICAS = 2
RUN_CONFIG = PriorConfig(n_layers=3, n_heads=2, d_head=32, text_len=4, grid=3, vocab_size=8, n_codes=8, conv_kernel=3)
RUN_UPDATES, RUN_BATCH = 50, 32


def replicas(compression: str = "power_sgd", **more: Any) -> ReplicasConfig:
    return ReplicasConfig(count=N_REPLICAS, compression=compression, **more)


def make_engine(
    folder: Path,
    ranks: Ranks,
    config: ReplicasConfig,
    fp16: dict[str, Any] | None = None,
    accumulation: int = 1,
    model: PriorConfig = CONFIG,
    batch: int = GLOBAL_BATCH,
    seed: int = 0,
    threshold: int = 0,
    **more: Any,
) -> PriorEngine:
    path = folder / f"ds-{ranks.rank}.json"
    zero = {"stage": 3, "reduce_bucket_size": 20000, "stage3_param_persistence_threshold": threshold}
    path.write_text(json.dumps({"zero_optimization": zero, **({"fp16": fp16} if fp16 else {}), **more}))
    micro = batch // ranks.world_size // accumulation
    engine_config = load_engine_config(path, micro_batch=micro, accumulation=accumulation, clip=CLIP)
    return PriorEngine(model, engine_config, ADAMW, ranks, seed, config)


def numbers(report: UpdateReport) -> list[float]:
    assert report.took_step
    return [report.text_loss, report.image_loss, report.grad_norm]


def short_run(
    folder: Path, ranks: Ranks, config: ReplicasConfig, accumulation: int = 1, **more: Any
) -> dict[str, list[list[float]]]:
    engine = make_engine(folder, ranks, config, accumulation=accumulation, **more)
    updates = [numbers(engine.update(micro_batches(u, ranks, accumulation), ADAMW.lr)) for u in range(UPDATES)]
    mine = slice(ranks.rank * 2, ranks.rank * 2 + 2)
    text, image = micro_batches(99, Ranks(0, 1, ranks.device), 1)[0]
    evaluated = engine.evaluate([(text[mine], image[mine])])
    return {"updates": updates, "evaluated": [list(evaluated)], "differences": [[replica_difference(engine)]]}


def replica_difference(engine: PriorEngine) -> float:
    """Largest difference between this rank's weights and those of its peers."""
    assert engine.replicas is not None
    weights = torch.cat([shard.detach().flatten().float() for shard in engine.shards().values()])
    first = weights.clone()
    dist.broadcast(first, dist.get_global_rank(engine.replicas.peers, 0), group=engine.replicas.peers)
    return float((weights - first).abs().max())


def inf_in_one_block(folder: Path, ranks: Ranks) -> list[dict[str, Any]]:
    """At update 2, residual block 3 gets an Inf in its backward pass on rank 3."""
    engine = make_engine(folder, ranks, replicas(rank=2), PER_BLOCK)
    branch = engine.scaler.blocks[3].branch
    whole, results = branch.forward, []
    errors = engine.replica_gradients.power_sgd.errors
    for update in range(4):
        poisoned = update == 2 and ranks.rank == 3
        branch.forward = (lambda *args: _Inf.apply(whole(*args))) if poisoned else whole
        before, errors_before = ({n: t.clone() for n, t in of.items()} for of in (engine.shards(), errors))
        report = engine.update(micro_batches(update, ranks, 1), ADAMW.lr)
        results.append(
            {
                "took_step": report.took_step,
                "blocks": report.nonfinite_blocks,
                "name": engine.scaler.names[3],
                "weights_moved": any(not torch.equal(shard, before[name]) for name, shard in engine.shards().items()),
                "errors_moved": any(not torch.equal(error, errors_before[name]) for name, error in errors.items()),
                "scales": engine.scaler.scale.log2().tolist(),
                "difference": replica_difference(engine),
            }
        )
    return results


def nan_without_scaling(folder: Path, ranks: Ranks) -> list[dict[str, Any]]:
    """At update 1, the gradient of one embedding is NaN on rank 2.
    The engine has no per-resblock scaling, so no block's flag shows it."""
    engine = make_engine(folder, ranks, replicas(rank=2))
    results, errors = [], engine.replica_gradients.power_sgd.errors
    for update in range(3):
        is_hit = update == 1 and ranks.rank == 2
        hook = engine.module.embed.row.register_hook(lambda grad, factor=float("nan") if is_hit else 1.0: grad * factor)
        before = {name: error.clone() for name, error in errors.items()}
        report = engine.update(micro_batches(update, ranks, 1), ADAMW.lr)
        hook.remove()
        moved = any(not torch.equal(error, before[name]) for name, error in errors.items())
        results.append({"took_step": report.took_step, "errors_moved": moved, "difference": replica_difference(engine)})
    return results


def save_and_load(folder: Path, ranks: Ranks, name: str, **settings: Any) -> dict[str, Any]:
    """Losses after a checkpoint, in the engine that wrote it and in new engines that read it."""
    config, target = replicas(rank=2, **settings), folder / name
    first = make_engine(folder, ranks, config, PER_BLOCK)
    for update in range(3):
        first.update(micro_batches(update, ranks, 1), ADAMW.lr)
    if ranks.is_main:
        target.mkdir()
    ranks.barrier()
    first.save(target, {"note": 7})
    ranks.barrier()
    expected = [numbers(first.update(micro_batches(u, ranks, 1), ADAMW.lr)) for u in range(3, 6)]
    second = make_engine(folder, ranks, config, PER_BLOCK, seed=5)
    note = second.load(target)["note"]
    found = [numbers(second.update(micro_batches(u, ranks, 1), ADAMW.lr)) for u in range(3, 6)]
    forgetful = make_engine(folder, ranks, config, PER_BLOCK, seed=5)
    forgetful.load(target)
    for error in forgetful.replica_gradients.power_sgd.errors.values():
        error.zero_()
    without = [numbers(forgetful.update(micro_batches(u, ranks, 1), ADAMW.lr)) for u in range(3, 6)]
    kinds = {key.split("/")[0] for path in target.glob("state-*") for key in load_file(path)}
    return {
        "note": note,
        "expected": expected,
        "found": found,
        "without_errors": without,
        "saved": sorted(kind for kind in kinds if kind.startswith("error")),
    }


def image_of(text: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Batches that follow a rule: the token of cell j is word 0 + j * word 1, except for one random cell in ten."""
    image = (text[:, :1] + torch.arange(9) * text[:, 1:2]) % 8
    return torch.where(noise[:, 0] < 0.1, (noise[:, 1] * 8).long(), image)


def real_run(folder: Path, ranks: Ranks, config: ReplicasConfig) -> dict[str, Any]:
    """Train a small model on the rule of the batches."""
    engine = make_engine(folder, ranks, config, PER_BLOCK, model=RUN_CONFIG, batch=RUN_BATCH, threshold=20_000)
    mine = slice(ranks.rank * RUN_BATCH // ranks.world_size, (ranks.rank + 1) * RUN_BATCH // ranks.world_size)
    losses = []
    for update in range(RUN_UPDATES):
        generator = torch.Generator().manual_seed(update)
        text = torch.randint(0, 8, (RUN_BATCH, 3), generator=generator)
        image = image_of(text, torch.rand(RUN_BATCH, 2, 9, generator=generator))
        losses.append(engine.update([(text[mine], image[mine])], ADAMW.lr).image_loss)
    sent = engine.replica_gradients
    return {
        "losses": losses,
        "difference": replica_difference(engine),
        "plain_bytes": sent.plain_bytes,
        "matrix_bytes": sent.matrix_bytes,
        "bytes_sent": sent.bytes_sent,
        "describe": sent.describe(),
        "power_sgd_bytes": sent.power_sgd.bytes_sent if sent.power_sgd else None,
        "rank": sent.power_sgd.rank if sent.power_sgd else None,
    }


def wires(ranks: Ranks) -> dict[str, Any]:
    """Means over the two peers of tensors with odd sizes."""
    place = Replicas(N_REPLICAS, ranks.rank, ranks.world_size)
    generator = torch.Generator().manual_seed(ranks.rank)
    tensors = [torch.randn(3, 5, generator=generator), torch.randn(4, generator=generator)]
    results = {}
    for name, mean in (("fp32", mean_in_fp32), ("1-6-9", mean_in_1_6_9)):
        results[name] = torch.cat([t.flatten() for t in mean(tensors, place.peers)]).tolist()
    huge = mean_in_1_6_9([torch.full((3,), -1e6)], place.peers)[0].tolist()
    return {
        "own": torch.cat([t.flatten() for t in tensors]).tolist(),
        "means": results,
        "huge": huge,
        "place": [place.index, place.shard_rank],
        "has_tf32": has_tf32(),
    }


def main(folder: Path) -> None:
    ranks = join()
    plain, full_rank = replicas("none"), replicas(rank=1000, number_format="fp32")
    results = {
        "wires": wires(ranks),
        "none": short_run(folder, ranks, plain),
        "bf16": short_run(folder, ranks, plain, bf16={"enabled": True}),
        "four_replicas": short_run(folder, ranks, ReplicasConfig(count=4)),
        "full_rank": short_run(folder, ranks, full_rank, accumulation=2),
        "inf": inf_in_one_block(folder, ranks),
        "nan": nan_without_scaling(folder, ranks),
        "checkpoint": save_and_load(folder, ranks, "each", warm_start=True),
        "checkpoint_mean": save_and_load(folder, ranks, "mean", checkpoint_errors="mean", number_format="fp32"),
        "run_none": real_run(folder, ranks, plain),
        "run_power_sgd": real_run(folder, ranks, replicas()),
    }
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(results))
    if ranks.is_main:
        (folder / "plain.json").write_text(json.dumps(plain_run()))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
