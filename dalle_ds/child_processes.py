"""Children of `multiprocessing` that end with their parent."""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess


def leave_with_parent() -> None:
    """From now on, end this process when its parent dies, however that dies.

    An idle child would outlive a killed parent forever, because it holds its own end of the queue open. Does nothing in a
    process that `multiprocessing` did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: BaseProcess) -> None:
    wait([parent.sentinel])
    os._exit(1)
