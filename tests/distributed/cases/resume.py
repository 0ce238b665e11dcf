"""Save on some number of ranks and load on another: resume.py save+load+store+damage|load FOLDER."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dalle_ds.errors import UserError
from dalle_ds.optim.ema import EMA, EMAConfig
from dalle_ds.parallel.checkpoint_tensors import state_file
from dalle_ds.parallel.engine import PriorEngine
from dalle_ds.parallel.ranks import Ranks, join, leave
from dalle_ds.parallel.saved_state import open_state
from dalle_ds.storage.record import Record
from dalle_ds.training.checkpoint import Checkpoint, CheckpointStore
from tests.distributed.cases import engine as engine_cases
from tests.distributed.cases.engine import ADAMW, make_engine, micro_batches

engine_cases.GLOBAL_BATCH = 6  # divisible by one, two and three ranks

PER_RESBLOCK = {"enabled": True, "loss_scale": "per_resblock", "backoff_window": 0}
CASES: dict[str, dict[str, Any]] = {
    "zero3_fp16": {"fp16": PER_RESBLOCK, "threshold": 1000},
    "zero3_bf16": {"fp16": None, "bf16": {"enabled": True}},
    "zero2_bf16": {"fp16": None, "stage": 2, "bf16": {"enabled": True}},
    "zero0_fp32": {"fp16": None, "stage": 0},
}
ACROSS_STAGES = {"zero2_bf16": "zero3_bf16", "zero3_bf16": "zero2_bf16"}


class Said(Record):
    """Empty record: these checkpoints hold no data about their run."""


def _go_on(engine: PriorEngine, average: EMA, ranks: Ranks) -> dict[str, Any]:
    """Evaluate before any update, train two updates, then evaluate with the EMA."""
    batch = [engine_cases.global_batch(9)]
    seen: dict[str, Any] = {"at_once": engine.evaluate(batch)}
    reports = [engine.update(micro_batches(update, ranks, 1), ADAMW.lr) for update in (3, 4)]
    seen["updates"] = [[report.text_loss, report.image_loss, report.grad_norm] for report in reports]
    with average.in_place_of(engine.shards(), engine.refresh_gathered_parameters):
        seen["averaged"] = engine.evaluate(batch)
    seen["scales"] = engine.scaler.scale.tolist() if engine.scaler else None
    return seen


def _average(engine: PriorEngine) -> EMA:
    return EMA(engine.shards(), EMAConfig(decay=0.5))


def _empty(folder: Path, ranks: Ranks, case: str) -> PriorEngine:
    """An engine to load a checkpoint into. Fails if initial weights are drawn."""
    with patch("dalle_ds.parallel.sharded_model.initialise", side_effect=AssertionError("weights are drawn")):
        return make_engine(folder, ranks, initialised=False, **CASES[case])


def save(folder: Path, ranks: Ranks) -> dict[str, Any]:
    results = {}
    for case, options in CASES.items():
        engine = make_engine(folder, ranks, **options)
        average = _average(engine)
        for update in range(3):
            engine.update(micro_batches(update, ranks, 1), ADAMW.lr)
            average.update(engine.shards())
        if engine.scaler:
            engine.scaler.update(torch.tensor([0, 1.0, 0, 0, 0, 0]))  # so that the scales differ from the initial ones
        checkpoint = folder / case
        if ranks.is_main:
            checkpoint.mkdir()
        ranks.barrier()
        snapshot = engine.snapshot({"note": case}, average.averages)
        results[case] = _go_on(engine, average, ranks)
        average.update(engine.shards())
        snapshot.write(checkpoint)  # written late, as in the background, after everything has changed
        ranks.barrier()
    return results


def load(folder: Path, ranks: Ranks) -> dict[str, Any]:
    results = {}
    pairs = [(case, case) for case in CASES]
    for source, target in [*pairs, *ACROSS_STAGES.items()] if ranks.world_size == 2 else pairs:
        engine = _empty(folder, ranks, target)
        average = _average(engine)
        assert engine.load(folder / source, average.averages) == {"note": source}
        results[f"{source} as {target}"] = _go_on(engine, average, ranks)
    return results


def store(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Errors on a single rank must be handled by all ranks."""
    checkpoints = CheckpointStore(folder / "store", Said, keep=2)

    def write(to: Path) -> None:
        (to / f"{ranks.rank}.bin").write_text("state")

    def fails(to: Path) -> None:
        if ranks.rank == 1:
            raise OSError(28, "No space left on device")
        write(to)

    def said(work: Callable[[], Any]) -> list[str]:
        try:
            return ranks.gather_objects(f"no error, {work()}")
        except UserError as error:
            return ranks.gather_objects(str(error))

    for update in (1, 2):
        checkpoints.begin(update, write, Said(), ranks, background=True)
    checkpoints.begin(3, fails, Said(), ranks, background=True)
    full = said(lambda: checkpoints.finish(ranks))
    found = [checkpoints.newest(ranks)]
    if ranks.is_main:
        Path(found[0].data, "1.bin").write_text("stAte")  # rank 1's file, which rank 1 verifies
    ranks.barrier()
    found.append(checkpoints.newest(ranks))
    own = folder / f"own-{ranks.rank}"
    readonly = folder / "store" if ranks.is_main else folder / "store" / "update_00000001" / "checkpoint.json"
    return {
        "full": full,
        "found": ranks.gather_objects([each.name for each in found]),
        "files": sorted(Path(name).name for name in found[0].record.files),
        "not shared": said(lambda: CheckpointStore(own, Said, keep=2).check_disk_space(1, ranks)),
        "not writable": said(lambda: CheckpointStore(readonly, Said, keep=2).check_disk_space(1, ranks)),
        "writable": said(lambda: checkpoints.check_disk_space(1, ranks)),
    }


def damage(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The newest checkpoint is damaged in the file that only rank 1 reads: all ranks go on from the one before."""
    case, checkpoints = "zero3_fp16", CheckpointStore(folder / "damaged", Said, keep=2)
    engine = make_engine(folder, ranks, **CASES[case])
    average = _average(engine)
    for update in (1, 2):
        engine.update(micro_batches(update, ranks, 1), ADAMW.lr)
        average.update(engine.shards())
        checkpoints.begin(update, engine.snapshot({"note": update}, average.averages).write, Said(), ranks)
        checkpoints.finish(ranks)
    if ranks.is_main:
        file = Path(checkpoints.find(None).data, state_file(1, 2))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    ranks.barrier()
    engine = _empty(folder, ranks, case)
    average, read, tried = _average(engine), [], []

    def read_part(checkpoint: Checkpoint[Said]) -> list[str]:
        tried.append(checkpoint.name)
        read[:] = [open_state(checkpoint.data, checkpoint.data_files)]
        return [f"{checkpoint.record.attempt}/{name}" for name in engine.read_state(read[0], average.averages)]

    found = checkpoints.newest(ranks, read_part)
    note = engine.start_from(read[0])["note"]
    went_on = _go_on(engine, average, ranks)
    other = _empty(folder, ranks, case)
    other_average = _average(other)
    other.load(found.data, other_average.averages)
    return {"tried": tried, "note": note, "found": went_on, "expected": _go_on(other, other_average, ranks)}


def main(actions: str, folder: Path) -> None:
    ranks = join()
    for action in actions.split("+"):
        results = {"save": save, "load": load, "store": store, "damage": damage}[action](folder, ranks)
        if ranks.is_main:
            (folder / f"{action}-{ranks.world_size}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
