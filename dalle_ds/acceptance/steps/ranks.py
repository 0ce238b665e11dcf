"""The engine on all GPUs and on one fewer, under torchrun: numbers of any number of ranks, shards that don't divide, traffic.

`python -m dalle_ds.acceptance.steps.ranks full|rehearsal FOLDER` is one rank; the step starts them.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dalle_ds.acceptance import expected
from dalle_ds.acceptance.engines import LEARNING_RATE, make_engine, overflowing
from dalle_ds.acceptance.guard import guard
from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.acceptance.sizes import Batch, random_batch, small_prior
from dalle_ds.acceptance.steps.engine import against_plain, plain_updates, told
from dalle_ds.acceptance.table import REHEARSAL_SECONDS
from dalle_ds.models.prior import PriorConfig
from dalle_ds.parallel.engine import PriorEngine
from dalle_ds.parallel.ranks import Ranks, join, leave

UPDATES = 3
REHEARSED_RANKS = 3
SAME = 1e-4
"""Relative: other numbers of ranks sum in another order, and fp16 rounds parts of another size."""
RANK_SECONDS = 170
"""After which a rank prints its stacks and ends; more than it takes, less than the step has."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    n_all = REHEARSED_RANKS if is_rehearsal else torch.cuda.device_count()
    if n_all == 1:
        record.tell("ranks", "not run: one GPU; on a node with more, this step runs on all of them")
        return
    config = small_prior(place)
    global_batch = n_all * (n_all - 1)
    plain = list(plain_updates(config, place.device, [random_batch(config, global_batch, seed) for seed in range(UPDATES)]))
    with tempfile.TemporaryDirectory() as folder:
        told_by = {n: _launched(n, global_batch, is_rehearsal, Path(folder)) for n in sorted({n_all, max(n_all - 1, 1)})[::-1]}
    for n, found in told_by.items():
        against_plain(record, found["updates"], plain, label=f"{n} ranks, ")
        _rows(record, n, found)
    first, second = told_by.values()
    difference = max(abs(a - b) / abs(b) for a, b in zip(first["resumed"], second["resumed"], strict=True))
    why = "a checkpoint of all ranks goes on at one fewer: what a node that lost a GPU does"
    record.at_most(f"update resumed on {n_all - 1} ranks: relative difference", difference, SAME, why)


def _launched(n: int, global_batch: int, is_rehearsal: bool, folder: Path) -> dict[str, Any]:
    from torch.distributed.run import main as torchrun

    mode = "rehearsal" if is_rehearsal else "full"
    # in this process: a launcher of its own would import torch once more
    torchrun(["--standalone", "--nproc_per_node", str(n), "-m", __name__, mode, str(global_batch), str(folder)])
    return json.loads((folder / f"{n}.json").read_text())


def _rows(record: Record, n: int, found: dict[str, Any]) -> None:
    why = f"d_model {found['d_model']}, {n} ranks: where they don't divide it, ZeRO pads, and no NaN may stay in there"
    record.equal(f"{n} ranks: an overflow on the last skipped the update on all", found["skipped"], True, why)
    record.equal(f"{n} ranks: the next two took their steps", found["stepped"], True, why)
    if found["gather_gbps"] is not None:
        why = "NVLink where GPUs reach each other's memory, else PCIe; environment's details have `nvidia-smi topo -m`"
        for name in ("gather", "scatter"):
            record.rate(f"{n} ranks: {name}, GB/s a rank", found[f"{name}_gbps"], found["hoped_gbps"], expected.SLOWER, why)


# ---- one rank --------------------------------------------------------------------------------------------------------------


def one_rank(is_rehearsal: bool, global_batch: int, folder: Path) -> None:
    """Updates, an overflow on the last rank, and a checkpoint, which the first job writes and the next one reads."""
    place, ranks = Place(is_rehearsal), join()
    config = small_prior(place)
    engine = make_engine(place, ranks, config, micro_batch=global_batch // ranks.world_size)
    updates = [told(engine.update([_share(config, global_batch, seed, ranks)], LEARNING_RATE)) for seed in range(UPDATES)]
    if not (folder / "state").exists():
        ranks.barrier()  # all have looked
        engine.save(folder / "state", {})
        ranks.barrier()
    else:
        engine.load(folder / "state")
    resumed = told(engine.update([_share(config, global_batch, UPDATES, ranks)], LEARNING_RATE))
    skipped, stepped = _overflow(engine, config, global_batch, ranks)
    found = {"updates": updates, "resumed": resumed, "skipped": skipped, "stepped": stepped, "d_model": config.d_model}
    found |= {"gather_gbps": None} if is_rehearsal else _traffic(ranks)
    if ranks.is_main:
        (folder / f"{ranks.world_size}.json").write_text(json.dumps(found))
    leave()


def _share(config: PriorConfig, global_batch: int, seed: int, ranks: Ranks) -> Batch:
    text_BT, image_BN = random_batch(config, global_batch, seed)
    return text_BT[ranks.rank :: ranks.world_size], image_BN[ranks.rank :: ranks.world_size]


def _overflow(engine: PriorEngine, config: PriorConfig, global_batch: int, ranks: Ranks) -> tuple[bool, bool]:
    """-> (the update was skipped, the next two were not), as the main rank saw it."""
    assert engine.scaler is not None
    branch, batch = engine.scaler.blocks[1].branch, _share(config, global_batch, 9, ranks)
    if ranks.rank == ranks.world_size - 1:
        with overflowing(branch):
            hit = engine.update([batch], LEARNING_RATE)
    else:
        hit = engine.update([batch], LEARNING_RATE)
    after = [engine.update([batch], LEARNING_RATE) for _ in range(2)]
    return not hit.took_step, all(r.took_step and math.isfinite(r.grad_norm) for r in after)


def _traffic(ranks: Ranks) -> dict[str, float | None]:
    """Rates of the two collectives that ZeRO-3 lives on, by what leaves or reaches a rank."""
    n = (1 << 28) // ranks.world_size
    part = torch.zeros(n, dtype=torch.float16, device=ranks.device)
    whole = torch.zeros(n * ranks.world_size, dtype=torch.float16, device=ranks.device)
    moved = 2 * n * (ranks.world_size - 1) / 1e9
    place = Place(False)
    gather = place.seconds(lambda: dist.all_gather_into_tensor(whole, part))
    scatter = place.seconds(lambda: dist.reduce_scatter_tensor(part, whole))
    return {"gather_gbps": moved / gather, "scatter_gbps": moved / scatter, "hoped_gbps": expected.link_gbps(ranks.device)}


if __name__ == "__main__":
    rehearsal = sys.argv[1] == "rehearsal"
    guard(REHEARSAL_SECONDS if rehearsal else RANK_SECONDS)
    one_rank(rehearsal, int(sys.argv[2]), Path(sys.argv[3]))
