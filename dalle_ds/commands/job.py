"""One command on all ranks of a job: one summary, an error said once, one exit code. Imports torch only where it works."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_ds.console import print_error, print_summary, setup_logging
from dalle_ds.errors import UserError
from dalle_ds.parallel.launch import prepare_rank

if TYPE_CHECKING:
    from dalle_ds.parallel.ranks import Ranks


def prepare_process(environment: Path | None) -> None:
    """What a process needs that may be a rank of a launcher, before it imports torch; only rank 0 logs what goes well."""
    prepare_rank(environment)
    if os.environ.get("RANK", "0") != "0":
        setup_logging(logging.WARNING)


def alone_or_on_all_ranks(work: "Callable[[Ranks], dict[str, Any]]", as_json: bool) -> None:
    """`on_all_ranks` under a launcher; without one there is no process group, and deepspeed is not imported."""
    from dalle_ds.parallel.ranks import ALONE

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        on_all_ranks(work, as_json)
    else:
        print_summary(work(ALONE), as_json)


def on_all_ranks(work: "Callable[[Ranks], dict[str, Any]]", as_json: bool) -> None:
    """Join the job, work, print what the main rank returns, leave.

    Raises:
        SystemExit: what `work` raises, of all ranks; or the exit code of a UserError, whose message is printed once. Code 2 is
            a mistake in the input, 75 that another rank was lost, 143 that the job was asked to stop.
    """
    from dalle_ds.parallel.failure_detection import say
    from dalle_ds.parallel.ranks import join, leave

    try:
        ranks = join()
    except UserError as error:  # perhaps on this machine alone, and before there are others to agree with
        print_error(f"error: {error}")
        sys.exit(error.exit_code)
    try:
        summary = work(ranks)
    except UserError as error:
        say(ranks, error)  # without leave(), which may wait for a rank that is lost
        sys.exit(error.exit_code)
    except SystemExit:
        leave()
        raise
    if ranks.is_main:
        print_summary(summary, as_json)
    leave()
