"""torchrun, with the exit code of the rank that failed first: torchrun itself exits with 1 after every failure.

A scheduler needs the code to know whether another start helps (75, 143) or repeats the same mistake (2).
"""

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run(arguments: Sequence[str]) -> None:
    """Do what `torchrun ARGUMENTS` does.

    Raises:
        SystemExit: the exit code of the first of this machine's ranks that failed; 128 + N if signal N ended it, or torchrun.
    """
    try:
        main(list(arguments))
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    run(sys.argv[1:])
