"""A rank opens token data sets as training does: python opening.py FOLDER ROOT..."""

import json
import sys
from pathlib import Path
from typing import Any

from dalle_ds.data.tokens.batches import TokenStream, validation_batches
from dalle_ds.errors import DataError
from dalle_ds.parallel.ranks import Ranks, join, leave
from dalle_ds.training.prior.config import PriorDataConfig

GLOBAL_BATCH = 12


def open_set(ranks: Ranks, root: str) -> dict[str, Any]:
    config = PriorDataConfig(dataset=root)
    files = ranks.once(config.read)
    train, validation = config.open(files, "train"), config.open(files, "validation")
    where = {"text_len": 16, "rank": ranks.rank, "world_size": ranks.world_size}
    seen = [key for batch in validation_batches(validation, batch=1, **where) for key in batch.keys]
    settings = {"global_batch": GLOBAL_BATCH, "micro_batch": 1, "seed": 0, "bpe_dropout": 0.1}
    with TokenStream(train, prefetch=1, **settings, **where) as stream:
        trained = [key for batch in next(stream) for key in batch.keys]
    return {"content": train.content_fingerprint, "validation": seen, "train": trained}


def main(folder: str, *roots: str) -> None:
    ranks = join()
    found = [open_set(ranks, root) for root in roots]
    try:
        ranks.once(PriorDataConfig(dataset=f"{roots[0]}-missing").read)
        told = ""
    except DataError as error:
        told = str(error)
    Path(folder, f"{ranks.rank}.json").write_text(json.dumps([*found, told]))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
