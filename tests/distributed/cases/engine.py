"""Engine test cases that run on every rank. Results are written as JSON to the given folder."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import IMAGE_WEIGHT, TEXT_WEIGHT, Layer, Prior, PriorConfig, initialise
from dalle_ds.optim.build import OptimizerSettings
from dalle_ds.optim.ema import EMA, EMAConfig
from dalle_ds.optim.groups import decay_groups
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.parallel.checkpoint_layout import WEIGHTS
from dalle_ds.parallel.engine import PriorEngine
from dalle_ds.parallel.engine_config import load_engine_config
from dalle_ds.parallel.ranks import Ranks, join, leave
from dalle_ds.parallel.saved_state import open_state
from dalle_ds.parallel.zero_shards import fragments
from dalle_ds.precision.resblock_scaling import ResblockGradScaler, ResblockScalingConfig
from dalle_ds.storage.weights import open_weights, write_weights
from dalle_ds.training.prior.parity import PARITY_FILE, prove_parity

CONFIG = PriorConfig(n_layers=3, n_heads=2, d_head=16, text_len=6, grid=4, vocab_size=40, n_codes=32, conv_kernel=3)
ADAMW = OptimizerSettings(lr=3e-3, betas=(0.9, 0.96), eps=1e-8, weight_decay=0.045)
LOW_BIT = replace(ADAMW, moments="low_bit")
FASTER_EMBEDDINGS = replace(ADAMW, embedding_rate=3.0)
UPDATES, GLOBAL_BATCH, CLIP = 5, 8, 0.5  # the norm starts near 1, so clipping has an effect
DS_CONFIGS = Path(__file__).resolve().parents[3] / "ds_configs"
KEPT = (8, 4, 0, 1, 8)  # captions kept per update in the cases with dropped captions; 4: none on rank 1, 0: none at all

PER_RESBLOCK = {"enabled": True, "loss_scale": "per_resblock"}
WIDE = {**PER_RESBLOCK, "min_scale_power": -10, "max_scale_power": 40}
GLOBAL = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
TOO_HIGH = {**GLOBAL, "initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 2}  # the first two updates overflow
BF16 = {"bf16": {"enabled": True}}
TRIALS = 6

MODES: dict[str, dict[str, Any]] = {
    **{f"fp32_zero{stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    "fp32_accumulated": {"accumulation": 2},
    "fp32_structured": {"attention": "structured"},
    "fp32_offload": {"offload": ["optimizer"]},
    "bf16_zero1": {**BF16, "stage": 1},
    "bf16_structured": {**BF16, "attention": "structured"},
    "bf16_offload": {**BF16, "offload": ["optimizer"]},
    "fp16_global_zero1": {"fp16": GLOBAL, "stage": 1},
    "fp16_global_zero2": {"fp16": GLOBAL, "stage": 2},
    "fp16_global_offload": {"fp16": GLOBAL, "offload": ["optimizer"]},
    "fp16_global_static": {"fp16": {"enabled": True, "loss_scale": 1024}},
    "fp16_scale_1": {"fp16": {**PER_RESBLOCK, "initial_scale_power": 0, "min_scale_power": 0}},
    "fp16_accumulated": {"fp16": PER_RESBLOCK, "accumulation": 2},
    "fp16_structured": {"fp16": PER_RESBLOCK, "attention": "structured"},
    "fp16_all_offload": {"fp16": PER_RESBLOCK, "offload": ["optimizer", "param"]},
    **{path.stem: {"shipped": path.name} for path in DS_CONFIGS.glob("*.json")},
}
"""Ways to train the same model, as arguments of `make_engine` and `losses`."""

EMBEDDING_RATE: dict[str, dict[str, Any]] = {
    "fp32_zero1": {"stage": 1},
    "fp32_zero3": {},
    "fp32_offload": {"offload": ["optimizer"]},
}
CAPTIONS_DROPPED: dict[str, dict[str, Any]] = {"fp32": {"accumulation": 2}, "fp16": {"fp16": PER_RESBLOCK}}


def global_batch(update: int, n_captions: int = GLOBAL_BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, image) of one global batch. Only the first `n_captions` samples have a caption."""
    generator = torch.Generator().manual_seed(update)
    text = torch.randint(0, 40, (GLOBAL_BATCH, 5), generator=generator)
    lengths = torch.randint(
        1, 6, (GLOBAL_BATCH, 1), generator=generator
    )  # unequal lengths, so that the mean must be over the global batch
    lengths[n_captions:] = 0
    return text.masked_fill(torch.arange(5) >= lengths, -1), torch.randint(0, 32, (GLOBAL_BATCH, 16), generator=generator)


def micro_batches(
    update: int, ranks: Ranks, accumulation: int, n_captions: int = GLOBAL_BATCH
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    text, image = global_batch(update, n_captions)
    mine = slice(ranks.rank * GLOBAL_BATCH // ranks.world_size, (ranks.rank + 1) * GLOBAL_BATCH // ranks.world_size)
    return list(zip(text[mine].chunk(accumulation), image[mine].chunk(accumulation), strict=True))


def plain_run(kept: Sequence[int] = (GLOBAL_BATCH,) * UPDATES, embedding_rate: float = 1.0) -> list[list[float]]:
    """Train in one process with plain torch. Returns (text loss, image loss, norm before clipping) of every update."""
    model = Prior(CONFIG)
    initialise(model, torch.Generator().manual_seed(0))
    groups = [{k: v for k, v in g.items() if k != "names"} for g in decay_groups(model.named_parameters(), ADAMW.weight_decay)]
    faster = {*model.embed.parameters(), model.heads.text.weight, model.heads.image.weight}
    for group in groups[:2]:
        groups.append({**group, "params": [p for p in group["params"] if p in faster], "lr": embedding_rate * ADAMW.lr})
        group["params"] = [p for p in group["params"] if p not in faster]
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
    fp16: dict[str, Any] | None = None,
    accumulation: int = 1,
    threshold: int = 0,
    stage: int = 3,
    adamw: OptimizerSettings = ADAMW,
    offload: Sequence[str] = (),
    shipped: str | None = None,
    initialised: bool = True,
    **more: Any,
) -> PriorEngine:
    """Make an engine. `offload` lists "optimizer", "param" or both.
    `shipped` names a file of ds_configs that is used instead of the other arguments."""
    path = folder / f"ds-{ranks.rank}.json"
    zero = {"stage": stage, "reduce_bucket_size": 20000, "stage3_param_persistence_threshold": threshold}
    zero |= {f"offload_{what}": {"device": "cpu", "pin_memory": True} for what in offload}
    path.write_text(json.dumps({"zero_optimization": zero, **({"fp16": fp16} if fp16 else {}), **more}))
    if shipped:
        path = DS_CONFIGS / shipped
    micro = GLOBAL_BATCH // ranks.world_size // accumulation
    engine_config = load_engine_config(path, micro_batch=micro, accumulation=accumulation, clip=CLIP)
    return PriorEngine(CONFIG, engine_config, adamw, ranks, seed=0, initialised=initialised)


def losses(
    folder: Path,
    ranks: Ranks,
    accumulation: int = 1,
    attention: str = "dense",
    kept: Sequence[int] = (GLOBAL_BATCH,) * UPDATES,
    **how: Any,
) -> list[list[float]]:
    """Train with the engine. Returns (text loss, image loss, norm before clipping) of every update."""
    engine = make_engine(folder, ranks, accumulation=accumulation, **how)
    use_attention(engine.module, attention, ranks.device)
    reports = [engine.update(micro_batches(u, ranks, accumulation, kept[u]), ADAMW.lr) for u in range(UPDATES)]
    assert all(report.took_step for report in reports)
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


@contextmanager
def poisoned(module: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Within this context, the module gets an Inf in its backward pass on rank 1."""
    whole = module.forward
    if ranks.rank == 1:
        module.forward = lambda *args: _Inf.apply(whole(*args))
    try:
        yield
    finally:
        module.forward = whole


def _by(run_layer: Callable[[Layer, Tensor], Tensor]) -> Callable[[Prior], None]:
    return lambda prior: setattr(prior, "run_layer", run_layer)


CHECKPOINTING: dict[str, Callable[[Prior], None]] = {
    "none": lambda prior: None,
    "torch": recompute_layers,
    "torch_reentrant": _by(partial(checkpoint, use_reentrant=True)),
    "deepspeed": _by(deepspeed.checkpointing.checkpoint),
}
"""Kinds of activation checkpointing, as functions that apply them to a model. DeepSpeed's non-reentrant one is missing: it
references parameters that are already freed when a layer, a ZeRO-3 leaf module, has been recomputed."""


def inf_in_one_block(folder: Path, ranks: Ranks, kind: str) -> dict[str, Any]:
    """At update 2, residual block 3 gets an Inf in its backward pass on rank 1."""
    engine, runs = make_engine(folder, ranks, PER_RESBLOCK), Counter()
    CHECKPOINTING[kind](engine.module)
    block = engine.scaler.blocks[3]
    block.register_forward_pre_hook(lambda *_: runs.update([kind]))
    results = []
    for update in range(4):
        before = {name: shard.clone() for name, shard in engine.shards().items()}
        with poisoned(block.branch, ranks) if update == 2 else nullcontext():
            report = engine.update(micro_batches(update, ranks, 1), ADAMW.lr)
        moved = any(not torch.equal(shard, before[name]) for name, shard in engine.shards().items())
        results.append({**asdict(report), "moved": moved, "scales": engine.scaler.scale.log2().tolist()})
    return {"name": engine.scaler.names[3], "runs": runs[kind], "updates": results}


def _weights_and_moments(engine: PriorEngine) -> dict[str, list[Tensor]]:
    """This rank's weights and moments by residual block, or by parameter outside of residual blocks."""
    found: dict[str, list[Tensor]] = {}
    for fragment in fragments(engine._engine, engine._other_fragments()):
        of = next((name for name in engine.scaler.names if fragment.name.startswith(f"{name}.")), fragment.name)
        moments = [entry for entry in fragment.state().values() if entry.any()]  # moments that are all zero count as none
        found.setdefault(of, []).extend(tensor.clone() for tensor in (fragment.values, *moments))
    return found


def skipped_block(folder: Path, ranks: Ranks, accumulation: int = 1, **how: Any) -> dict[str, Any]:
    """With "skip": "block", residual block 3 gets an Inf at updates 0 and 2, and the final norm at update 3."""
    engine = make_engine(folder, ranks, {**PER_RESBLOCK, "skip": "block"}, accumulation, **how)
    block, norm = engine.scaler.blocks[3].branch, engine.module.heads.norm
    victims, results = {0: block, 2: block, 3: norm}, []
    for update in range(5):
        before = _weights_and_moments(engine)
        with poisoned(victims[update], ranks) if update in victims else nullcontext():
            report = engine.update(micro_batches(update, ranks, accumulation), ADAMW.lr)
        after = _weights_and_moments(engine)
        stayed = [of for of in before if len(before[of]) == len(after[of]) and all(map(torch.equal, before[of], after[of]))]
        seen = engine.evaluate(micro_batches(9, ranks, 1))
        engine.refresh_gathered_parameters()
        results.append(
            {
                **asdict(report),
                "stayed": stayed,
                "all_stayed": stayed == list(before),
                "seen": seen,
                "seen_anew": engine.evaluate(micro_batches(9, ranks, 1)),
                "scales": engine.scaler.scale.log2().tolist(),
            }
        )
    return {"name": engine.scaler.names[3], "updates": results}


def calibration(folder: Path, ranks: Ranks, **how: Any) -> dict[str, Any]:
    """Calibrate one engine, give the same scales to a second engine, and train both."""
    engine, given = (
        make_engine(folder, ranks, {**WIDE, "calibration_trials": trials}, accumulation=2, **how) for trials in (TRIALS, 0)
    )
    start = given.scaler.scale.log2().tolist()
    for each in (engine, given):
        each.calibrate(micro_batches(0, ranks, 2))
    untouched = given.scaler.scale.log2().tolist() == start
    found = engine.scaler.scale.log2().tolist()
    given.scaler.scale.copy_(engine.scaler.scale)
    reports = [[asdict(each.update(micro_batches(u, ranks, 2), ADAMW.lr)) for u in range(3)] for each in (engine, given)]
    counts = [(each._engine.global_steps, each._engine.skipped_steps, each._engine.micro_steps) for each in (engine, given)]
    return {
        "found": found,
        "untouched": untouched,
        "calibrated": [*reports[0], engine.scaler.state_dict(), counts[0]],
        "given": [*reports[1], given.scaler.state_dict(), counts[1]],
    }


def plain_calibration() -> list[float]:
    """Calibrate in one process with all micro-batches."""
    model = Prior(CONFIG)
    initialise(model, torch.Generator().manual_seed(0))
    settings = {key: value for key, value in WIDE.items() if key not in ("enabled", "loss_scale")}
    scaler = ResblockGradScaler(model, ResblockScalingConfig(calibration_trials=TRIALS, **settings), n_micro_batches=4)
    text, image = global_batch(0)
    n_text, n_image = (text >= 0).sum(), image.numel()

    def attempt() -> Tensor:
        model.zero_grad()
        for part in zip(text.chunk(4), image.chunk(4), strict=True):
            nll = model(*part)
            (TEXT_WEIGHT * nll.text_sum / n_text + IMAGE_WEIGHT * nll.image_sum / n_image).backward()
        scaler.unscale()
        return scaler.found_nonfinite.clone()

    scaler.calibrate(attempt)
    return scaler.scale.log2().tolist()


def save_and_load(
    folder: Path, ranks: Ranks, name: str, fp16: dict[str, Any], weight_dtype: torch.dtype = torch.float32, **how: Any
) -> dict[str, Any]:
    """Compare updates after a checkpoint: in the engine that wrote it, and in a new engine that read it. `parity` is the
    difference per token between the losses of the written weights and those of the engine."""

    def updates(engine: PriorEngine, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [asdict(engine.update(micro_batches(u, ranks, 1), ADAMW.lr)) for u in numbers]

    first = make_engine(folder, ranks, fp16, **how)
    first.calibrate(micro_batches(0, ranks, 1))
    before = updates(first, [0])
    with poisoned(first.scaler.blocks[1].branch, ranks) if first.scaler else nullcontext():
        before += updates(first, [1])
    before += updates(first, [2])
    checkpoint = folder / name
    checkpoint.mkdir(exist_ok=True)
    first.save(checkpoint, {"note": 7})
    text, image = global_batch(9)
    nll = first.image_nll(text, image)
    if ranks.is_main:
        save_file({"text": text, "image": image, "image_nll": nll}, checkpoint / PARITY_FILE)
    ranks.barrier()
    model = folder / f"{name}-{ranks.rank}.safetensors"
    write_weights(model, kind="prior", config={}, state=open_state(checkpoint).whole(WEIGHTS))
    written = open_weights(model, "prior").tensors
    proof = prove_parity(checkpoint, CONFIG, written, fp16_branches=first.scaler is not None, dtype=weight_dtype)
    second = make_engine(folder, ranks, fp16, **how)
    note = second.load(checkpoint)["note"]
    scales = [each.scaler.state_dict() for each in (first, second) if each.scaler]
    seen = [each.evaluate(micro_batches(9, ranks, 1)) for each in (first, second)]
    expected, found = updates(first, [3, 4, 5]), updates(second, [3, 4, 5])
    return {
        "note": note,
        "parity": proof["max_difference_same_format"],
        "before": before,
        "scales": scales,
        "seen": seen,
        "expected": expected,
        "found": found,
        "scales_at_end": [each.scaler.state_dict() for each in (first, second) if each.scaler],
    }


def low_bit_moments(folder: Path, ranks: Ranks, name: str, **how: Any) -> dict[str, Any]:
    """Train with 16-bit moments, write a checkpoint, and continue in the same engine and in a new one."""
    first = make_engine(folder, ranks, adamw=LOW_BIT, **how)
    bytes_before = first.optimizer_bytes_per_parameter()
    losses = []
    for update in range(UPDATES):
        report = first.update(micro_batches(update, ranks, 1), ADAMW.lr)
        losses.append([report.text_loss, report.image_loss, report.grad_norm])
    n_bytes = first.optimizer_bytes_per_parameter()
    checkpoint = folder / name
    checkpoint.mkdir(exist_ok=True)
    snapshot = first.snapshot({})  # written later, as in the background: it must not contain the updates in between
    expected = [first.update(micro_batches(u, ranks, 1), ADAMW.lr).loss for u in range(UPDATES, UPDATES + 3)]
    snapshot.write(checkpoint)
    ranks.barrier()
    second = make_engine(folder, ranks, adamw=LOW_BIT, **how)
    second.load(checkpoint)
    found = [second.update(micro_batches(u, ranks, 1), ADAMW.lr).loss for u in range(UPDATES, UPDATES + 3)]
    return {
        "losses": losses,
        "bytes_before": bytes_before,
        "bytes": n_bytes,
        "expected": expected,
        "found": found,
        "bytes_after_load": second.optimizer_bytes_per_parameter(),
    }


def averaging(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Evaluate with the EMA. Small parameters stay gathered on every rank (`threshold`), as in real configurations."""
    engine = make_engine(folder, ranks, threshold=1000)
    average = EMA(engine.shards(), EMAConfig(decay=0.5))
    for update in range(3):
        engine.update(micro_batches(update, ranks, 1), ADAMW.lr)
        average.update(engine.shards())
    batch = micro_batches(9, ranks, 1)
    before = engine.evaluate(batch)
    with average.in_place_of(engine.shards(), engine.refresh_gathered_parameters):
        with_ema = engine.evaluate(batch)
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
        "with_ema": with_ema,
        "after": engine.evaluate(batch),
        "expected": expected if ranks.is_main else None,
    }


def at_the_least_scale(folder: Path, ranks: Ranks) -> list[tuple[bool, float]]:
    """(took step, loss scale) of updates that all overflow."""
    engine = make_engine(folder, ranks, {**GLOBAL, "initial_scale_power": 1, "hysteresis": 1})
    engine.shards()["heads.norm.weight"].fill_(float("inf"))
    engine.refresh_gathered_parameters()
    reports = [engine.update(micro_batches(0, ranks, 1), ADAMW.lr) for _ in range(4)]
    return [(report.took_step, report.loss_scale) for report in reports]


def main(folder: Path) -> None:
    ranks = join()
    results = {
        "modes": {mode: losses(folder, ranks, **how) for mode, how in MODES.items()},
        "captions_dropped": {mode: losses(folder, ranks, kept=KEPT, **how) for mode, how in CAPTIONS_DROPPED.items()},
        "embedding_rate": {mode: losses(folder, ranks, adamw=FASTER_EMBEDDINGS, **how) for mode, how in EMBEDDING_RATE.items()},
        "inf": {kind: inf_in_one_block(folder, ranks, kind) for kind in CHECKPOINTING},
        "skipped_block": skipped_block(folder, ranks, threshold=1000),
        "skipped_block_offload": skipped_block(folder, ranks, accumulation=2, adamw=LOW_BIT, offload=["optimizer", "param"]),
        "calibration": calibration(folder, ranks),
        "calibration_offload": calibration(folder, ranks, offload=["optimizer"]),
        "checkpoint": save_and_load(
            folder, ranks, "checkpoint", {**WIDE, "backoff_window": 0, "skip": "block", "calibration_trials": TRIALS}
        ),
        "checkpoint_global_zero3": save_and_load(folder, ranks, "global_zero3", TOO_HIGH, torch.float16),
        "checkpoint_global_zero2": save_and_load(folder, ranks, "global_zero2", TOO_HIGH, torch.float16, stage=2),
        "least_scale": at_the_least_scale(folder, ranks),
        "averaging": averaging(folder, ranks),
        "low_bit": low_bit_moments(folder, ranks, "low_bit"),
        "low_bit_offloaded": low_bit_moments(folder, ranks, "low_bit_offloaded", offload=["optimizer"]),
        "low_bit_bf16_zero2": low_bit_moments(folder, ranks, "low_bit_zero2", stage=2, **BF16),
    }
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(results))
    if ranks.is_main:
        (folder / "plain.json").write_text(json.dumps(plain_run()))
        (folder / "plain_captions_dropped.json").write_text(json.dumps(plain_run(KEPT)))
        (folder / "plain_embedding_rate.json").write_text(
            json.dumps(plain_run(embedding_rate=FASTER_EMBEDDINGS.embedding_rate))
        )
        (folder / "plain_calibration.json").write_text(json.dumps(plain_calibration()))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
