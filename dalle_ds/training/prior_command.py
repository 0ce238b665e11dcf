"""The command line of launchers/train_prior.sh, as every rank runs it."""

import argparse
import logging
import os
import sys
from pathlib import Path

from dalle_ds.console import print_summary, setup_logging
from dalle_ds.errors import DataError, UserError
from dalle_ds.recipes import load_recipe

EXAMPLES = """examples:
  deepspeed launchers/train_prior.sh
  deepspeed --num_gpus 2 launchers/train_prior.sh --recipe launchers/recipes/tiny.yaml --set updates=100
  deepspeed --hostfile hosts launchers/train_prior.sh --recipe launchers/recipes/12b.yaml
The same command goes on where a stopped or killed run left off."""


def main(default_recipe: Path, arguments: list[str] | None = None) -> None:
    """Join the job, train, leave. Exit code 0: finished; 2: a mistake in the input; 143: asked to stop, state saved."""
    parser = argparse.ArgumentParser(prog="train_prior.sh", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--recipe", type=Path, default=default_recipe, help="YAML file (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key, e.g. learning_rate.peak=1e-3"
    )
    parser.add_argument("--deepspeed_config", metavar="JSON", help="same as --set deepspeed_config=JSON")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON line, last on stdout")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it; LOCAL_RANK says the same
    options = parser.parse_args(arguments)
    overrides = list(options.set)
    if options.deepspeed_config:
        overrides.append(f"deepspeed_config={options.deepspeed_config}")
    is_main = os.environ.get("RANK", "0") == "0"
    setup_logging(logging.INFO if is_main else logging.WARNING)
    try:
        _run(options.recipe, overrides, options.json, is_default=options.recipe == default_recipe)
    except UserError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _run(recipe: Path, overrides: list[str], as_json: bool, is_default: bool) -> None:
    from dalle_ds.training.prior_config import PriorRun

    run = load_recipe(PriorRun, recipe, overrides)
    dataset = run.data.dataset
    if is_default and "://" not in dataset and not Path(dataset, "dataset.json").exists():
        raise DataError(
            f"no token data set at {dataset} (from {recipe}): `bash launchers/demo.sh` makes it, or name yours by --recipe"
        )
    # importing and joining takes seconds: a mistake in the recipe should not have to wait for it
    from dalle_ds.parallel.ranks import join, leave
    from dalle_ds.training.prior_trainer import train_prior

    ranks = join()
    try:
        summary = train_prior(run, ranks)
        if ranks.is_main:
            print_summary(summary, as_json)
    finally:
        leave()
