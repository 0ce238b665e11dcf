"""The memory that a piece of code needs."""

import multiprocessing
import tracemalloc
from collections.abc import Callable
from multiprocessing.connection import Connection


def peak_of(action: Callable[[], object]) -> int:
    """Return the bytes that `action` allocates at its peak, in Python's count.

    It runs in a fork of this process, where no other thread runs: those that earlier tests have left behind, such as a
    thread that imports something, allocate megabytes at any time and would be counted too. What `action` changes in memory is
    lost. Raises what `action` raises.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(action, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = RuntimeError(f"the measured process ended with exit code {process.exitcode}")
    process.join()
    if isinstance(found, BaseException):
        raise found
    return found


def _measure(action: Callable[[], object], sender: Connection) -> None:
    tracemalloc.start()
    try:
        action()
        sender.send(tracemalloc.get_traced_memory()[1])
    except BaseException as error:
        sender.send(error)
