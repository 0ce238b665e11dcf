"""Test cases of padded shards that run on every rank. Results are written as JSON to the given folder."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dalle_ds.models import prior
from dalle_ds.optim.ema import EMA, EMAConfig
from dalle_ds.parallel.engine import PriorEngine
from dalle_ds.parallel.ranks import Ranks, join, leave
from tests.distributed.cases import engine as engine_cases
from tests.distributed.cases.engine import ADAMW, PER_RESBLOCK, UPDATES, WIDE, make_engine, poisoned

N_SAVED = 3
"""Number of ranks that write the checkpoint."""
SAMPLES = 30
"""Samples per global batch. It can be divided among 3 or 5 ranks, in one or two micro-batches."""

HOWS: dict[str, tuple[int, Sequence[str]]] = {
    "32": (16, ()),
    "32, offloaded": (16, ["optimizer"]),
    "4": (2, ()),
    "4, offloaded": (2, ["optimizer"]),
}
"""(width of each of two heads, what is offloaded) by d_model.
With d_model 4, a norm has 4 values, and the last of 3 or of 5 ranks holds none of them."""


def micro_batches(update: int, ranks: Ranks, accumulation: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    mine = slice(ranks.rank * SAMPLES // ranks.world_size, (ranks.rank + 1) * SAMPLES // ranks.world_size)
    text, image = (tensor[mine].chunk(accumulation) for tensor in engine_cases.global_batch(update, SAMPLES))
    return list(zip(text, image, strict=True))


def padding(engine: PriorEngine, ranks: Ranks) -> int:
    """Number of padding values in this rank's shards."""
    n = 0
    for parameter in engine.module.parameters():
        size = parameter.ds_tensor.numel()
        n += size - min(size, max(0, parameter.ds_numel - ranks.rank * size))
    return n


@contextmanager
def width(d_head: int) -> Iterator[None]:
    """Within this context, new engines have heads of this width."""
    whole, engine_cases.CONFIG = engine_cases.CONFIG, engine_cases.CONFIG.model_copy(update={"d_head": d_head})
    yield
    engine_cases.CONFIG = whole


def veto(folder: Path, ranks: Ranks, d_head: int, offload: Sequence[str]) -> dict[str, Any]:
    """Calibrate, where each trial is an update without its step. Then train, with an Inf on rank 1 at update 1."""
    with width(d_head):
        engine = make_engine(folder, ranks, {**WIDE, "calibration_trials": 1}, offload=offload)
    assert sum(ranks.gather_objects(padding(engine, ranks))) > 0
    assert engine.calibrate(micro_batches(0, ranks))
    reports = []
    for update in range(4):
        with poisoned(engine.scaler.blocks[3].branch, ranks) if update == 1 else nullcontext():
            reports.append(engine.update(micro_batches(update, ranks), ADAMW.lr))
    return {"took_step": [report.took_step for report in reports], "norms": [report.grad_norm for report in reports]}


def run(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A run with an EMA that skips one block in an update. 3 ranks save a checkpoint and continue; 5 ranks resume from it."""

    def update(number: int) -> list[float]:
        report = engine.update(micro_batches(number, ranks), ADAMW.lr)
        average.update(engine.shards())
        assert report.took_step
        return [report.text_loss, report.image_loss, report.grad_norm]

    def evaluate() -> list[tuple[float, float]]:
        batch = [
            engine_cases.global_batch(9, SAMPLES)
        ]  # each rank evaluates the whole batch, so the result does not depend on the number of ranks
        with average.in_place_of(engine.shards(), engine.refresh_gathered_parameters):
            averaged = engine.evaluate(batch)
        return [engine.evaluate(batch), averaged]

    checkpoint, n_draws = folder / "checkpoint", 0

    def count(*given: Any) -> None:
        nonlocal n_draws
        n_draws += 1
        draw(*given)

    draw, prior._draw = prior._draw, count
    engine = make_engine(folder, ranks, {**PER_RESBLOCK, "skip": "block"}, threshold=1000)
    prior._draw = draw
    average = EMA(engine.shards(), EMAConfig(decay=0.5))
    found: dict[str, Any] = {"draws": ranks.gather_objects(n_draws), "at_first": evaluate(), "before": [update(0)]}
    if ranks.world_size == N_SAVED:
        with poisoned(engine.scaler.blocks[3].branch, ranks):
            found["before"].append(update(1))
        checkpoint.mkdir(exist_ok=True)
        engine.save(checkpoint, {}, average.averages)
    else:
        engine.load(checkpoint, average.averages)
    return {**found, "seen": evaluate(), "after": [update(2), update(3)]}


def main(folder: Path) -> None:
    engine_cases.GLOBAL_BATCH = SAMPLES
    ranks = join()
    results = {"veto": {name: veto(folder, ranks, *how) for name, how in HOWS.items()}, "run": run(folder, ranks)}
    (folder / f"{ranks.rank}-of-{ranks.world_size}.json").write_text(json.dumps(results))
    if ranks.is_main and ranks.world_size == N_SAVED:
        (folder / "plain.json").write_text(json.dumps(engine_cases.plain_run((SAMPLES,) * UPDATES)[0]))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
