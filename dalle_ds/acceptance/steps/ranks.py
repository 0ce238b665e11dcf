"""The engine under torchrun on all GPUs and on one fewer: equal results, uneven ZeRO shards, communication rates.

The step starts the ranks; each runs `python -m dalle_ds.acceptance.steps.ranks full|rehearsal GLOBAL_BATCH FOLDER`.
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
"""Relative difference: another number of ranks sums in another order, and fp16 rounds partial sums of another size."""
RANK_SECONDS = 170
"""After this time a rank prints its stacks and exits. It is longer than a rank takes, and shorter than the step's limit."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    n_all = REHEARSED_RANKS if is_rehearsal else torch.cuda.device_count()
    if n_all == 1:
        record.tell("ranks", "not run: the node has one GPU; on a node with more, this step uses all of them")
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
    why = "a run must resume on another number of ranks, as on a node that lost a GPU"
    record.at_most(f"update resumed on {n_all - 1} ranks: relative difference", difference, SAME, why)


def _launched(n: int, global_batch: int, is_rehearsal: bool, folder: Path) -> dict[str, Any]:
    from torch.distributed.run import main as torchrun

    mode = "rehearsal" if is_rehearsal else "full"
    # torchrun runs in this process, because a separate launcher process would import torch again
    torchrun(["--standalone", "--nproc_per_node", str(n), "-m", __name__, mode, str(global_batch), str(folder)])
    return json.loads((folder / f"{n}.json").read_text())


def _rows(record: Record, n: int, found: dict[str, Any]) -> None:
    why = f"d_model {found['d_model']}, {n} ranks: if d_model is not a multiple, ZeRO pads, and the padding must not keep a NaN"
    record.equal(f"{n} ranks: an overflow on the last rank skipped the update on all", found["skipped"], True, why)
    record.equal(f"{n} ranks: the next two updates took their steps", found["stepped"], True, why)
    if found["gather_gbps"] is not None:
        why = "NVLink if GPUs reach each other's memory, else PCIe; the details of `environment` have `nvidia-smi topo -m`"
        for name in ("gather", "scatter"):
            record.rate(f"{n} ranks: {name}, GB/s per rank", found[f"{name}_gbps"], found["hoped_gbps"], expected.SLOWER, why)


# ---- one rank --------------------------------------------------------------------------------------------------------------


def one_rank(is_rehearsal: bool, global_batch: int, folder: Path) -> None:
    """Take updates, save or load a checkpoint, overflow on the last rank. The first job saves, the second loads."""
    place, ranks = Place(is_rehearsal), join()
    config = small_prior(place)
    engine = make_engine(place, ranks, config, micro_batch=global_batch // ranks.world_size)
    updates = [told(engine.update([_share(config, global_batch, seed, ranks)], LEARNING_RATE)) for seed in range(UPDATES)]
    if not (folder / "state").exists():
        ranks.barrier()  # all ranks have checked for the folder
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
    """Returns (whether the update was skipped, whether the next two were taken), as this rank saw it."""
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
    """Returns the rates of ZeRO-3's two collectives, in GB/s that each rank sends or receives, and the expected rate."""
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
