"""What the tests of resident parameters do on every rank: results as JSON in the folder given."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dalle_ds.parallel.ranks import Ranks, join, leave
from tests.distributed.cases import engine as engine_cases
from tests.distributed.cases.engine import ADAMW, PER_RESBLOCK, UPDATES, make_engine, poisoned
from tests.distributed.cases.padding import SAMPLES, micro_batches

THRESHOLDS = {"none": 0, "some": 100, "all": 10**6}
"""By which parameters stay gathered: up to so many values."""


def case(folder: Path, ranks: Ranks, threshold: int) -> dict[str, Any]:
    engine = make_engine(folder, ranks, fp16=PER_RESBLOCK, threshold=threshold)
    reports = []
    for update in range(UPDATES):
        batch = micro_batches(update, ranks)
        if update == 2:
            with poisoned(engine.module.layers[1].mlp, ranks):  # a skipped step leaves nothing gathered
                reports.append(engine.update(batch, ADAMW.lr))
            continue
        if update == 3:
            engine.evaluate(batch)
            whole = engine.whole_weights()  # between a forward pass and the next
        reports.append(engine.update(batch, ADAMW.lr))
    weights = engine.whole_weights()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.update(micro_batches(UPDATES + 1, ranks), ADAMW.lr)
    collectives = Counter(event.name.removeprefix("c10d::") for event in profile.events() if event.name.startswith("c10d::"))
    residents = engine._residents
    return {
        "are_all": residents is not None and residents.are_all,
        "reports": [[r.text_loss, r.image_loss, r.grad_norm, r.took_step] for r in reports if r.took_step],
        "n_skipped": sum(not r.took_step for r in reports),
        "evaluated": engine.evaluate(micro_batches(UPDATES, ranks)),
        "weights": {name: w.flatten().tolist() for name, w in weights.items()} if weights else None,
        "collectives": collectives,
        "has_moved": whole is not None and any(not torch.equal(whole[name], weights[name]) for name in whole),
    }


def main(folder: Path) -> None:
    ranks = join()
    engine_cases.GLOBAL_BATCH = SAMPLES
    results = {name: case(folder, ranks, threshold) for name, threshold in THRESHOLDS.items()}
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
