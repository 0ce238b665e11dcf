"""End this process at a time limit, or when its parent dies."""

import ctypes
import faulthandler
import signal

PR_SET_PDEATHSIG = 1


def guard(seconds: float) -> None:
    """After `seconds`, print the stacks of all threads and exit with code 1. If the parent dies, this process is killed.

    Neither needs the Python interpreter, so a process also ends if it hangs in a library that holds Python's global lock.
    """
    faulthandler.enable()
    faulthandler.dump_traceback_later(seconds, exit=True)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
