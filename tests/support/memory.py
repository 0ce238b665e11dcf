"""The memory that a piece of code needs."""

import multiprocessing
import sys
import tracemalloc
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path


def peak_of(action: Callable[[], object]) -> int:
    """Return the bytes that `action` allocates at its peak, in Python's count.

    It runs in a fork of this process, where no thread that an earlier test has left behind allocates too. What `action` changes
    in memory is lost. Raises what `action` raises.

    Python's table of interned strings grows by megabytes at once, and paths intern their names: see `names_below`.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(action, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = None
    process.join()
    if found is None:
        raise RuntimeError(f"the measured process ended with exit code {process.exitcode}")
    if isinstance(found, BaseException):
        raise found
    return found


def names_below(folder: Path) -> list[str]:
    """The names of all files below a folder, interned. While they are held, reading the folder does not grow the table."""
    return [sys.intern(name) for path in folder.rglob("*") for name in path.parts]


def _measure(action: Callable[[], object], sender: Connection) -> None:
    tracemalloc.start()
    try:
        action()
        sender.send(tracemalloc.get_traced_memory()[1])
    except BaseException as error:
        sender.send(error)
