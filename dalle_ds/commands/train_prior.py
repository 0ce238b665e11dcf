"""The command line of launchers/train_prior.sh, as every rank runs it."""

import argparse
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dalle_ds.console import print_error, setup_logging
from dalle_ds.errors import ConfigError, DataError, UserError
from dalle_ds.parallel.launch import prepare_rank
from dalle_ds.recipes import load_recipe
from dalle_ds.storage.names import DATASET_FILE

if TYPE_CHECKING:
    from dalle_ds.training.prior.config import PriorRun

EXAMPLES = """examples:
  deepspeed launchers/train_prior.sh
  deepspeed --num_gpus 1 launchers/train_prior.sh --recipe launchers/recipes/tiny.yaml --set updates=100
  deepspeed --hostfile hosts launchers/train_prior.sh --recipe launchers/recipes/12b.yaml
  torchrun --nproc_per_node 8 --max_restarts 3 launchers/train_prior.sh --recipe launchers/recipes/12b.yaml
The same command goes on where a stopped or killed run left off; torchrun gives it again by itself."""


def main(default_recipe: Path, arguments: list[str] | None = None) -> None:
    """Join the job, train, leave.

    Exit code 0: finished; 2: a mistake in the input, or a run that can't go on; 75: another rank was lost, to be started again;
    143: asked to stop, state saved.
    """
    parser = argparse.ArgumentParser(
        prog="train_prior.sh", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=default_recipe, help="YAML file (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key, e.g. learning_rate.peak=1e-3"
    )
    parser.add_argument("--deepspeed_config", metavar="JSON", help="same as --set deepspeed_config=JSON")
    parser.add_argument(
        "--replay", metavar="DIR", help="make the update of a diagnosis again, by its own recipe where none is named"
    )
    parser.add_argument(
        "--environment", type=Path, metavar="FILE", help="for hosts that ssh reaches: variables, NAME=VALUE a line as of `env`"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON line, last on stdout")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it; LOCAL_RANK says the same
    options = parser.parse_args(arguments)
    try:
        prepare_rank(options.environment)
    except ConfigError as error:  # perhaps on this host alone
        parser.error(str(error))
    is_main = os.environ.get("RANK", "0") == "0"
    setup_logging(logging.INFO if is_main else logging.WARNING)
    try:
        run = _recipe(options, default_recipe)
        # importing and joining takes seconds: a mistake in the recipe should not have to wait for it
        from dalle_ds.commands.job import on_all_ranks
        from dalle_ds.training.prior.diagnosis import replay
        from dalle_ds.training.prior.trainer import train_prior

        work = partial(replay, run, options.replay) if options.replay else partial(train_prior, run)
        on_all_ranks(work, options.json)
    except UserError as error:  # the same on every rank
        if is_main:
            print_error(f"error: {error}")
        sys.exit(error.exit_code)


def _recipe(options: argparse.Namespace, default_recipe: Path) -> "PriorRun":
    from dalle_ds.training.prior.config import PriorRun

    recipe, overrides, is_default = options.recipe, list(options.set), options.recipe == default_recipe
    if options.deepspeed_config:
        overrides.append(f"deepspeed_config={options.deepspeed_config}")
    if options.replay and is_default:
        if "://" in options.replay:
            raise ConfigError(f"--replay {options.replay} needs --recipe, such as recipe.yaml in the run's folder")
        recipe = Path(options.replay, "recipe.yaml")
        overrides.insert(0, f"deepspeed_config={Path(options.replay, 'deepspeed.json')}")
    run = load_recipe(PriorRun, recipe, overrides)
    dataset = run.data.dataset
    if is_default and not options.replay and dataset and "://" not in dataset and not Path(dataset, DATASET_FILE).exists():
        raise DataError(
            f"no token data set at {dataset} (from {recipe}): `bash launchers/demo.sh` makes it, or name yours by --recipe"
        )
    return run
