"""What the engine tests do on every rank; started by the deepspeed launcher, results as JSON in the folder given."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import IMAGE_WEIGHT, TEXT_WEIGHT, Prior, PriorConfig, initialise
from dalle_ds.optim.averaging import AverageConfig, WeightAverage
from dalle_ds.optim.groups import decay_groups
from dalle_ds.parallel.engine import OptimizerSettings, PriorEngine
from dalle_ds.parallel.engine_config import load_engine_config
from dalle_ds.parallel.ranks import Ranks, join, leave
from dalle_ds.parallel.recompute import recompute_layers

CONFIG = PriorConfig(n_layers=3, n_heads=2, d_head=16, text_len=6, grid=4, text_vocab=40, image_vocab=32, conv_kernel=3)
ADAMW = OptimizerSettings(lr=3e-3, betas=(0.9, 0.96), eps=1e-8, weight_decay=0.045)
LOW_BIT = replace(ADAMW, moments="low_bit")
UPDATES, GLOBAL_BATCH, CLIP = 5, 8, 0.5  # the norm starts near 1, so clipping is at work
KEPT = (8, 4, 0, 1, 8)  # captions kept at each update where some are dropped: none on rank 1, none at all, ...


def global_batch(update: int, n_captions: int = GLOBAL_BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, image); only the first `n_captions` samples have a caption."""
    generator = torch.Generator().manual_seed(update)
    text = torch.randint(0, 40, (GLOBAL_BATCH, 5), generator=generator)
    lengths = torch.randint(1, 6, (GLOBAL_BATCH, 1), generator=generator)  # unequal: the mean must be over the global batch
    lengths[n_captions:] = 0
    return text.masked_fill(torch.arange(5) >= lengths, -1), torch.randint(0, 32, (GLOBAL_BATCH, 16), generator=generator)


def micro_batches(
    update: int, ranks: Ranks, accumulation: int, n_captions: int = GLOBAL_BATCH
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    text, image = global_batch(update, n_captions)
    mine = slice(ranks.rank * GLOBAL_BATCH // ranks.world_size, (ranks.rank + 1) * GLOBAL_BATCH // ranks.world_size)
    return list(zip(text[mine].chunk(accumulation), image[mine].chunk(accumulation), strict=True))


def plain_run(kept: Sequence[int] = (GLOBAL_BATCH,) * UPDATES) -> list[list[float]]:
    """One process, torch alone: (text loss, image loss, norm before clipping) of every update."""
    model = Prior(CONFIG)
    initialise(model, torch.Generator().manual_seed(0))
    groups = [{k: v for k, v in g.items() if k != "names"} for g in decay_groups(model.named_parameters(), ADAMW.weight_decay)]
    optimizer = torch.optim.AdamW(groups, lr=ADAMW.lr, betas=ADAMW.betas, eps=ADAMW.eps)
    results = []
    for update in range(UPDATES):
        nll = model(*global_batch(update, kept[update]))
        text_loss, image_loss = nll.text_sum / nll.n_text.clamp(min=1), nll.image_sum / nll.n_image
        (TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        results.append([text_loss.item(), image_loss.item(), norm.item()])
    return results


def make_engine(
    folder: Path,
    ranks: Ranks,
    fp16: dict[str, Any] | None,
    accumulation: int = 1,
    threshold: int = 0,
    stage: int = 3,
    adamw: OptimizerSettings = ADAMW,
    offload: bool = False,
    **more: Any,
) -> PriorEngine:
    path = folder / f"ds-{ranks.rank}.json"
    zero = {"stage": stage, "reduce_bucket_size": 20000, "stage3_param_persistence_threshold": threshold}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    path.write_text(json.dumps({"zero_optimization": zero, **({"fp16": fp16} if fp16 else {}), **more}))
    micro = GLOBAL_BATCH // ranks.world_size // accumulation
    return PriorEngine(
        CONFIG, load_engine_config(path, micro_batch=micro, accumulation=accumulation, clip=CLIP), adamw, ranks, seed=0
    )


def sharded_run(
    folder: Path, ranks: Ranks, accumulation: int = 1, recompute: bool = False,
    attention: str = "dense", kept: Sequence[int] = (GLOBAL_BATCH,) * UPDATES, **fp16: Any,
) -> list[list[float]]:  # fmt: skip
    engine = make_engine(folder, ranks, fp16 or None, accumulation)
    use_attention(engine.module, attention, ranks.device)
    if recompute:
        recompute_layers(engine.module)
    reports = [engine.update(micro_batches(u, ranks, accumulation, kept[u]), ADAMW.lr) for u in range(UPDATES)]
    assert all(report.took_step for report in reports)
    return [[report.text_loss, report.image_loss, report.grad_norm] for report in reports]


def bf16_run(folder: Path, ranks: Ranks, stage: int, attention: str = "dense") -> list[list[float]]:
    engine = make_engine(folder, ranks, None, stage=stage, bf16={"enabled": True})
    use_attention(engine.module, attention, ranks.device)
    reports = [engine.update(micro_batches(u, ranks, 1), ADAMW.lr) for u in range(UPDATES)]
    return [[report.text_loss, report.image_loss, report.grad_norm] for report in reports]


class _Inf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad.view(-1)[3] = float("inf")
        return grad


def inf_in_one_block(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """At update 2 rank 1's block 3 meets an Inf in its backward pass."""
    engine = make_engine(folder, ranks, {"enabled": True, "loss_scale": "per_resblock"})
    branch = engine.scaler.blocks[3].branch
    whole, results = branch.forward, []
    for update in range(4):
        poisoned = update == 2 and ranks.rank == 1
        branch.forward = (lambda *args: _Inf.apply(whole(*args))) if poisoned else whole
        before = {name: shard.clone() for name, shard in engine.shards().items()}
        report = engine.update(micro_batches(update, ranks, 1), ADAMW.lr)
        moved = any(not torch.equal(shard, before[name]) for name, shard in engine.shards().items())
        results.append({"took_step": report.took_step, "blocks": report.nonfinite_blocks, "moved": moved,
                        "scales": engine.scaler.scale.log2().tolist(), "image_loss": report.image_loss})  # fmt: skip
    return {"name": engine.scaler.names[3], "updates": results}


def save_and_load(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Losses after a checkpoint: of the engine that wrote it, and of a new one that read it."""
    fp16 = {"enabled": True, "loss_scale": "per_resblock", "backoff_window": 0}
    first = make_engine(folder, ranks, fp16)
    for update in range(3):
        first.update(micro_batches(update, ranks, 1), ADAMW.lr)
    first.scaler.update(torch.tensor([0, 1.0, 0, 0, 0, 0]))  # scales that differ from their start
    first.save(folder / "checkpoint", {"note": 7})
    expected = [first.update(micro_batches(u, ranks, 1), ADAMW.lr).loss for u in range(3, 6)]
    second = make_engine(folder, ranks, fp16)
    note = second.load(folder / "checkpoint")["note"]
    same_scales = second.scaler.state_dict() != first.scaler.state_dict()  # the first has moved on by three updates
    found = [second.update(micro_batches(u, ranks, 1), ADAMW.lr).loss for u in range(3, 6)]
    return {"note": note, "expected": expected, "found": found, "restored": same_scales,
            "scales_end_equal": second.scaler.state_dict() == first.scaler.state_dict()}  # fmt: skip


def low_bit_moments(folder: Path, ranks: Ranks, name: str, **how: Any) -> dict[str, Any]:
    """A run with 16-bit moments; then a checkpoint of it, and how its engine and a new one go on from there."""
    first = make_engine(folder, ranks, None, adamw=LOW_BIT, **how)
    bytes_before = first.optimizer_bytes_per_parameter()
    losses = []
    for update in range(UPDATES):
        report = first.update(micro_batches(update, ranks, 1), ADAMW.lr)
        losses.append([report.text_loss, report.image_loss, report.grad_norm])
    n_bytes = first.optimizer_bytes_per_parameter()
    checkpoint = folder / name
    checkpoint.mkdir(exist_ok=True)
    first.save(checkpoint, {})
    ranks.barrier()
    expected = [first.update(micro_batches(u, ranks, 1), ADAMW.lr).loss for u in range(UPDATES, UPDATES + 3)]
    second = make_engine(folder, ranks, None, adamw=LOW_BIT, **how)
    second.load(checkpoint)
    found = [second.update(micro_batches(u, ranks, 1), ADAMW.lr).loss for u in range(UPDATES, UPDATES + 3)]
    return {"losses": losses, "bytes_before": bytes_before, "bytes": n_bytes, "expected": expected, "found": found,
            "bytes_after_load": second.optimizer_bytes_per_parameter()}  # fmt: skip


def averaging(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Evaluate with averaged weights; small parameters stay whole on every rank (threshold), as in real configurations."""
    engine = make_engine(folder, ranks, None, threshold=1000)
    average = WeightAverage(engine.shards(), AverageConfig(decay=0.5))
    for update in range(3):
        engine.update(micro_batches(update, ranks, 1), ADAMW.lr)
        average.update(engine.shards())
    batch = micro_batches(9, ranks, 1)
    before = engine.evaluate(batch)
    with average.in_place_of(engine.shards(), engine.refresh_gathered_parameters):
        averaged = engine.evaluate(batch)
        wholes = {}
        parts = ranks.gather_objects(average.averages)
        if ranks.is_main:
            plain = Prior(CONFIG)
            flat = {n: torch.cat([part[n].flatten() for part in parts]) for n in parts[0]}
            wholes = {n: flat[n][: p.numel()].view(p.shape) for n, p in plain.named_parameters()}
            plain.load_state_dict(wholes)
            nll = plain(*global_batch(9))
            expected = [(nll.text_sum / nll.n_text).item(), (nll.image_sum / nll.n_image).item()]
    return {
        "before": before,
        "averaged": averaged,
        "after": engine.evaluate(batch),
        "expected": expected if ranks.is_main else None,
    }


def main(folder: Path) -> None:
    ranks = join()
    results = {
        "fp32": sharded_run(folder, ranks),
        "fp32_accumulated": sharded_run(folder, ranks, accumulation=2),
        "fp16_scale_1": sharded_run(
            folder, ranks, enabled=True, loss_scale="per_resblock", initial_scale_power=0, min_scale_power=0
        ),
        "fp16": sharded_run(folder, ranks, enabled=True, loss_scale="per_resblock"),
        "fp16_recomputed": sharded_run(folder, ranks, recompute=True, enabled=True, loss_scale="per_resblock"),
        "fp16_accumulated": sharded_run(folder, ranks, accumulation=2, enabled=True, loss_scale="per_resblock"),
        "fp32_captions_dropped": sharded_run(folder, ranks, accumulation=2, kept=KEPT),
        "fp16_captions_dropped": sharded_run(folder, ranks, kept=KEPT, enabled=True, loss_scale="per_resblock"),
        "fp32_structured": sharded_run(folder, ranks, attention="structured"),
        "fp16_structured": sharded_run(
            folder, ranks, attention="structured", recompute=True, enabled=True, loss_scale="per_resblock"
        ),
        "bf16_zero3": bf16_run(folder, ranks, 3),
        "bf16_structured": bf16_run(folder, ranks, 3, attention="structured"),
        "bf16_zero2": bf16_run(folder, ranks, 2),
        "inf": inf_in_one_block(folder, ranks),
        "checkpoint": save_and_load(folder, ranks),
        "averaging": averaging(folder, ranks),
        "low_bit": low_bit_moments(folder, ranks, "low_bit"),
        "low_bit_offloaded": low_bit_moments(folder, ranks, "low_bit_offloaded", offload=True),
        "low_bit_bf16_zero2": low_bit_moments(folder, ranks, "low_bit_zero2", stage=2, bf16={"enabled": True}),
    }
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(results))
    if ranks.is_main:
        (folder / "plain.json").write_text(json.dumps(plain_run()))
        (folder / "plain_captions_dropped.json").write_text(json.dumps(plain_run(KEPT)))
    leave()


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--"))))
