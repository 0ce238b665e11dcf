"""Test cases of matrices without masters that run on every rank. Results are written as JSON to the given folder."""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_ds.models.prior import IMAGE_WEIGHT, TEXT_WEIGHT, Prior, initialise
from dalle_ds.ops.low_bit import FORMAT_1_6_9, decode, encode
from dalle_ds.optim.build import OptimizerSettings
from dalle_ds.optim.ema import EMA, EMAConfig
from dalle_ds.optim.groups import decay_groups
from dalle_ds.optim.masterless import MasterlessAdamW, Stretch
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.parallel.checkpoint_layout import WEIGHTS
from dalle_ds.parallel.engine import PriorEngine
from dalle_ds.parallel.engine_config import load_engine_config
from dalle_ds.parallel.ranks import Ranks, join, leave
from dalle_ds.parallel.replicas.groups import ReplicasConfig
from dalle_ds.parallel.saved_state import open_state
from dalle_ds.parallel.zero_shards import fragments
from dalle_ds.precision.resblock_scaling import ResblockGradScaler, ResblockScalingConfig
from tests.distributed.cases.engine import (
    ADAMW,
    CLIP,
    CONFIG,
    LOW_BIT,
    PER_RESBLOCK,
    UPDATES,
    WIDE,
    global_batch,
    make_engine,
    poisoned,
)

MASTERLESS = replace(LOW_BIT, master="none")
BATCH = 12  # divisible by 2 and by 3 ranks
CHECKPOINT = "checkpoint"


def batch_of(update: int) -> tuple[Tensor, Tensor]:
    parts = [global_batch(update), global_batch(update + 100)]
    text, image = (torch.cat(tensors)[:BATCH] for tensors in zip(*parts, strict=True))
    return text, image


def micro_batches(update: int, ranks: Ranks, accumulation: int = 1) -> list[tuple[Tensor, Tensor]]:
    mine = slice(ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size)
    text, image = (tensor[mine] for tensor in batch_of(update))
    return list(zip(text.chunk(accumulation), image.chunk(accumulation), strict=True))


def plain_run(n_updates: int = UPDATES) -> list[list[float]]:
    """Train in one process with the same roundings. Returns (text loss, image loss, norm before clipping) of every update."""
    model = Prior(CONFIG)
    initialise(model, torch.Generator().manual_seed(0))
    scaler = ResblockGradScaler(model, ResblockScalingConfig())
    groups = decay_groups(model.named_parameters(), ADAMW.weight_decay, "low_bit")
    ours = {name: model.get_parameter(name) for group in groups if group["moments"] == "low_bit" for name in group["names"]}
    halves = {name: parameter.detach().half().flatten() for name, parameter in ours.items()}
    theirs = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups if g["moments"] == "fp32"]
    settings = {"lr": ADAMW.lr, "betas": ADAMW.betas, "eps": ADAMW.eps}
    own, other = MasterlessAdamW(**settings, weight_decay=ADAMW.weight_decay, seed=0), torch.optim.AdamW(theirs, **settings)
    results = []
    for update in range(n_updates):
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(halves[name].view_as(parameter))
        text, image = batch_of(update)
        nll = model(text, image)
        text_loss, image_loss = nll.text_sum / nll.n_text.clamp(min=1), nll.image_sum / nll.n_image
        (TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss).backward()
        scaler.unscale()
        codes = {name: encode(parameter.grad.flatten(), FORMAT_1_6_9) for name, parameter in ours.items()}
        for name, parameter in ours.items():
            parameter.grad.copy_(decode(codes[name], FORMAT_1_6_9).view_as(parameter))
        norm = torch.linalg.vector_norm(torch.stack([parameter.grad.norm() for parameter in model.parameters()]))
        factor = (CLIP / (norm + 1e-6)).clamp(max=1.0)
        for group in theirs:
            for parameter in group["params"]:
                parameter.grad.mul_(factor)
        other.step()
        own.step([Stretch(name, half, partial(codes.get, name)) for name, half in halves.items()], factor)
        scaler.update(torch.zeros_like(scaler.scale))
        model.zero_grad()
        results.append([text_loss.item(), image_loss.item(), norm.item()])
    return results


def engine_of(
    folder: Path, ranks: Ranks, accumulation: int = 1, fp16: dict[str, Any] = PER_RESBLOCK, **how: Any
) -> PriorEngine:
    engine = make_engine(folder, ranks, fp16, accumulation, adamw=MASTERLESS, **how)
    recompute_layers(engine.module)
    return engine


def run(engine: PriorEngine, ranks: Ranks, updates: range, accumulation: int = 1) -> list[list[float]]:
    reports = [engine.update(micro_batches(u, ranks, accumulation), ADAMW.lr) for u in updates]
    assert all(report.took_step for report in reports)
    return [[report.text_loss, report.image_loss, report.grad_norm] for report in reports]


def held(engine: PriorEngine) -> dict[str, list[Tensor]]:
    """Copies of this rank's weights and moments, by parameter."""
    own = engine._other_fragments()
    return {
        fragment.name: [t.clone() for t in (fragment.values, *(e for e in fragment.state().values() if e.any()))]
        for fragment in fragments(engine._engine, own)
    }


def same(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> list[str]:
    return [name for name in a if len(a[name]) == len(b[name]) and all(map(torch.equal, a[name], b[name]))]


def events(folder: Path, ranks: Ranks, skip: str) -> list[dict[str, Any]]:
    """Residual block 3 gets an Inf at update 1, and the final norm at update 3."""
    engine = engine_of(folder, ranks, fp16={**PER_RESBLOCK, "skip": skip}, threshold=1000)
    victims, results = {1: engine.scaler.blocks[3].branch, 3: engine.module.heads.norm}, []
    for update in range(5):
        before = held(engine)
        with poisoned(victims[update], ranks) if update in victims else nullcontext():
            report = engine.update(micro_batches(update, ranks), ADAMW.lr)
        results.append({**asdict(report), "stayed": same(before, held(engine)), "n": len(before)})
    return results


def save_and_load(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A calibrated run in which one block is skipped, its checkpoint, and further updates in its engine and in a new one."""
    first = engine_of(folder, ranks, fp16={**WIDE, "skip": "block", "calibration_trials": 4})
    first.calibrate(micro_batches(0, ranks))
    average = EMA(first.shards(), EMAConfig(decay=0.5))
    first.update(micro_batches(0, ranks), ADAMW.lr)
    with poisoned(first.scaler.blocks[1].branch, ranks):
        first.update(micro_batches(1, ranks), ADAMW.lr)
    average.update(first.shards())
    kept = held(first)
    with average.in_place_of(first.shards(), first.refresh_gathered_parameters):
        averaged = first.evaluate(micro_batches(9, ranks))
    snapshot = first.snapshot({}, average.averages)
    expected = run(first, ranks, range(2, 5))
    snapshot.write(folder / CHECKPOINT)
    ranks.barrier()
    second = engine_of(folder, ranks, fp16=WIDE)
    averages = {name: torch.zeros_like(tensor) for name, tensor in average.averages.items()}
    second.load(folder / CHECKPOINT, averages)
    restored = sorted(same(kept, held(second))) == sorted(kept)
    is_same_average = all(torch.equal(averages[name], tensor) for name, tensor in average.averages.items())
    return {
        "expected": expected,
        "found": run(second, ranks, range(2, 5)),
        "restored": restored,
        "average_restored": is_same_average,
        "averaged": averaged,
        "whole": _whole_is_written(second, ranks),
    }


def _whole_is_written(engine: PriorEngine, ranks: Ranks) -> bool:
    """Whether `whole_weights` equals the concatenated shards."""
    wholes, parts = engine.whole_weights(), ranks.gather_objects({n: t.float().flatten() for n, t in engine.shards().items()})
    if wholes is None:
        return True
    return all(torch.equal(torch.cat([part[name] for part in parts])[: w.numel()], w.flatten()) for name, w in wholes.items())


def elsewhere(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Load the checkpoint of two ranks on another number of ranks, and train."""
    engine = engine_of(folder, ranks, fp16=WIDE)
    engine.load(folder / CHECKPOINT)
    saved = open_state(folder / CHECKPOINT)
    whole = {kind: saved.whole(kind) for kind in (WEIGHTS, "optimizer.exp_avg", "optimizer.exp_avg_sq")}
    n_equal = 0
    for fragment in fragments(engine._engine, engine._other_fragments()):
        for kind, values in ((WEIGHTS, fragment.values), *((f"optimizer.{k}", v) for k, v in fragment.state().items())):
            expected = whole[kind][fragment.name].flatten()[fragment.start : fragment.start + values.numel()]
            assert expected.dtype == values.dtype
            n_equal += torch.equal(values[: expected.numel()], expected) and not values[expected.numel() :].any()
    return {"n_equal": n_equal, "losses": run(engine, ranks, range(2, 5))}


def replicas(folder: Path, ranks: Ranks, optimizer: OptimizerSettings = MASTERLESS, **config: Any) -> PriorEngine:
    """An engine with two replicas of one rank each."""
    path = folder / f"replicas-{ranks.rank}.json"
    zero = {"stage": 3, "reduce_bucket_size": 20000, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({"zero_optimization": zero, "fp16": PER_RESBLOCK}))
    engine_config = load_engine_config(path, micro_batch=BATCH // 2, accumulation=1, clip=CLIP)
    return PriorEngine(CONFIG, engine_config, optimizer, ranks, seed=0, replicas=ReplicasConfig(count=2, **config))


def compressed(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Train with PowerSGD between replicas, at full rank and at a low rank, with and without masters.
    Then write a checkpoint."""
    full = run(replicas(folder, ranks, compression="power_sgd", rank=CONFIG.d_model), ranks, range(UPDATES))
    low = {"compression": "power_sgd", "rank": 4}
    masters = run(replicas(folder, ranks, LOW_BIT, **low), ranks, range(UPDATES))
    first = replicas(folder, ranks, **low)
    losses = run(first, ranks, range(UPDATES))
    with poisoned(first.scaler.blocks[1].branch, ranks):
        skipped = first.update(micro_batches(UPDATES, ranks), ADAMW.lr)
    errors_are_finite = all(decode(e, FORMAT_1_6_9).abs().max() < 15 for e in first.replica_gradients.power_sgd.errors.values())
    (folder / "compressed").mkdir(exist_ok=True)
    first.save(folder / "compressed", {})
    ranks.barrier()
    second = replicas(folder, ranks, **low)
    second.load(folder / "compressed")
    found = [run(engine, ranks, range(UPDATES, UPDATES + 3)) for engine in (first, second)]
    same_buffer = first.masterless._gradients is first.replica_gradients.power_sgd.errors
    return {
        "full": full,
        "masters": masters,
        "low": losses,
        "skipped": not skipped.took_step,
        "expected": found[0],
        "found": found[1],
        "one_buffer": same_buffer and errors_are_finite,
    }


def main(folder: Path) -> None:
    ranks = join()
    engine = engine_of(folder, ranks)
    results: dict[str, Any] = {"losses": run(engine, ranks, range(UPDATES))}
    matrices = sum(engine.masterless.parameters[name].ds_numel for name in engine.masterless.parameters)
    results["bytes"] = {
        "matrices": matrices,
        "weights": sum(s.numel() * 2 for s in engine.shards().values() if s.dtype is torch.float16),
        "zero": engine._engine.optimizer.grad_partitions_flat_buffer.numel(),
        "moments": engine.optimizer_bytes_per_parameter(),
    }
    if ranks.world_size == 2:
        results["accumulated"] = run(engine_of(folder, ranks, accumulation=2), ranks, range(UPDATES), accumulation=2)
        results["events"] = {skip: events(folder, ranks, skip) for skip in ("update", "block")}
        results["checkpoint"] = save_and_load(folder, ranks)
        results["replicas"] = run(replicas(folder, ranks), ranks, range(UPDATES))
        results["compressed"] = compressed(folder, ranks)
        if ranks.is_main:
            (folder / "plain.json").write_text(json.dumps(plain_run()))
    else:
        results["elsewhere"] = elsewhere(folder, ranks)
    (folder / f"{ranks.rank}-of-{ranks.world_size}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
