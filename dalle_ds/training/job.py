"""One command on all ranks of a job: one summary, an error said once, one exit code."""

import sys
from collections.abc import Callable
from typing import Any

from dalle_ds.console import print_error, print_summary
from dalle_ds.errors import UserError
from dalle_ds.parallel.ranks import Ranks, join, leave
from dalle_ds.parallel.watch import say


def on_all_ranks(work: Callable[[Ranks], dict[str, Any]], as_json: bool) -> None:
    """Join the job, work, print what the main rank returns, leave.

    Raises:
        SystemExit: what `work` raises, of all ranks; or the exit code of a UserError, whose message is printed once.
    """
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
