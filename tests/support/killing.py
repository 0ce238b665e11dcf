"""Run a command to its end through SIGKILLs at random times: what it makes must be what an undisturbed run makes."""

import random
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support import launching

Choice = Callable[[int, random.Random], Collection[psutil.Process]]
"""(process id of the command, random numbers) -> the processes to kill."""


def everything(pid: int, _: random.Random) -> Collection[psutil.Process]:
    """As a power cut does."""
    return launching.family(pid)


def run_through_kills(
    command: list[str],
    cwd: Path,
    n_kills: int,
    draw: random.Random,
    *,
    seconds: float,
    has_begun: Callable[[], bool],
    choose: Choice = everything,
    after_kill: Callable[[], object] = lambda: None,
    extra_env: Mapping[str, str] | None = None,
) -> tuple[subprocess.CompletedProcess[str], int]:
    """Start the command again and again until it ends by itself with exit code 0.

    Args:
        n_kills: number of starts that are killed, each at a random time within `seconds` after `has_begun()` is true.
        choose: the processes to kill. The others must end by themselves, with an exit code that is not 0.
        after_kill: called when all processes of a killed start are gone.

    Returns:
        The last start, and the number of starts that were killed. It is below `n_kills` if the command was done before.
    """
    n_killed = 0
    while True:
        with launching.started(command, cwd, extra_env) as process:
            if n_killed < n_kills and _is_running_at(process, draw.uniform(0, seconds), has_begun):
                for victim in choose(process.pid, draw):
                    with suppress(psutil.NoSuchProcess):
                        victim.kill()
                _, err = process.communicate(timeout=600)
                assert process.returncode != 0, f"killed, and exit code 0:\n{err[-3000:]}"
                launching.wait_for(lambda pid=process.pid: not launching.family(pid), "end of all processes", timeout=300)
                n_killed += 1
                after_kill()
                continue
            out, err = process.communicate(timeout=1200)
        assert process.returncode == 0, f"after {n_killed} kills:\n{err[-4000:]}"
        return subprocess.CompletedProcess(command, 0, out, err), n_killed


def _is_running_at(process: subprocess.Popen[str], seconds: float, has_begun: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 600
    while not has_begun():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "it has not begun within 600 s"
        time.sleep(0.05)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False
