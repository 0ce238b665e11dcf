"""A process that outlives neither its limit nor its parent."""

import ctypes
import faulthandler
import signal

PR_SET_PDEATHSIG = 1


def guard(seconds: float) -> None:
    """For this process: at the limit all threads print their stacks, and it ends with code 1; it dies as its parent does.

    Both are the system's doing and need no Python: what hangs in a library, holding the interpreter's lock, ends too.
    """
    faulthandler.enable()
    faulthandler.dump_traceback_later(seconds, exit=True)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
