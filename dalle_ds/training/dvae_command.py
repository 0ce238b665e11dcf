"""`dalle-ds train-dvae`, as a process alone or as every rank of a launcher runs it."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from dalle_ds.console import print_summary, setup_logging
from dalle_ds.parallel.launch import prepare_rank
from dalle_ds.recipes import load_recipe


def main(recipe: Path | None, overrides: Sequence[str], environment: Path | None, as_json: bool) -> None:
    """Train; alone, there is no process group, and deepspeed is not imported.

    Exit code 0: finished; 2: a mistake in the input; 75: another rank was lost, to be started again; 143: asked to stop, state
    saved.
    """
    prepare_rank(environment)
    if os.environ.get("RANK", "0") != "0":
        setup_logging(logging.WARNING)
    # read where torch is imported; else the ranks that are left by another one bury its name under frames of C++
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dalle_ds.training.dvae_trainer import DVAERun, train_dvae
    from dalle_ds.training.job import on_all_ranks

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        on_all_ranks(lambda ranks: train_dvae(load_recipe(DVAERun, recipe, overrides), ranks), as_json)
    else:
        print_summary(train_dvae(load_recipe(DVAERun, recipe, overrides)), as_json)
