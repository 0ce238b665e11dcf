"""Ranks of a job on this machine, forked from one process that has done their imports, which take half of a rank's start.

python ranks.py N_RANKS SCRIPT [ARGUMENTS]      if a rank fails, kills the others and exits with the code of that rank
"""

import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

import torch._dynamo  # noqa: F401  imported by torch's optimizers

import dalle_ds.parallel.engine  # noqa: F401


def become(rank: int, script: str, arguments: list[str]) -> int:
    """Run `python script arguments` in this process. Returns its exit code."""
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(n_ranks: int, script: str, arguments: list[str]) -> int:
    os.environ["WORLD_SIZE"] = str(n_ranks)
    children = set()
    for rank in range(n_ranks):
        if (child := os.fork()) == 0:
            code = become(rank, script, arguments)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        children.add(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            return abs(os.waitstatus_to_exitcode(status))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
