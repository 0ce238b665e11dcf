"""Run one command on all ranks of a job: one summary, each error printed once, one exit code.

The module imports torch only when the work starts.
"""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_ds.console import print_error, print_summary, setup_logging
from dalle_ds.errors import UserError, as_user_error
from dalle_ds.parallel.launch import prepare_rank

if TYPE_CHECKING:
    from dalle_ds.parallel.ranks import Ranks


def prepare_process(environment: Path | None) -> None:
    """Prepare a process that may be a rank of a launcher. Call it before importing torch.

    Ranks other than 0 log only warnings and errors.

    Args:
        environment: file of environment variables, as in `prepare_rank`. If None, none are read.

    Raises:
        ConfigError: as `prepare_rank`.
    """
    prepare_rank(environment)
    if os.environ.get("RANK", "0") != "0":
        setup_logging(logging.WARNING)


def alone_or_on_all_ranks(work: "Callable[[Ranks], dict[str, Any]]", as_json: bool) -> None:
    """Run `work` on all ranks of a launcher, or on this process alone if WORLD_SIZE is 1 or unset.

    A process that runs alone creates no process group and does not import DeepSpeed.
    """
    from dalle_ds.parallel.ranks import ALONE

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        on_all_ranks(work, as_json)
    else:
        print_summary(work(ALONE), as_json)


def on_all_ranks(work: "Callable[[Ranks], dict[str, Any]]", as_json: bool) -> None:
    """Join the process group, run `work`, print the main rank's summary, and leave the process group.

    Raises:
        SystemExit: `work` raised it on all ranks, or `work` raised a UserError, whose message is printed once and whose exit
            code is used. Exit code 2: invalid input; 75: another rank was lost; 143: the job was asked to stop.
    """
    from dalle_ds.parallel.failure_detection import say
    from dalle_ds.parallel.ranks import join, leave

    try:
        ranks = join()
    except UserError as error:  # it may occur on this machine alone, and there is no process group yet to print it once
        print_error(f"error: {error}")
        sys.exit(error.exit_code)
    try:
        summary = work(ranks)
    except (UserError, OSError) as error:
        said = as_user_error(error)
        if said is None:
            raise
        say(ranks, said)  # no leave(): it may wait for a lost rank
        sys.exit(said.exit_code)
    except SystemExit:
        leave()
        raise
    if ranks.is_main:
        print_summary(summary, as_json)
    leave()
