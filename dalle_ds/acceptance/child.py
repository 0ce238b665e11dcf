"""One step in a process of its own: `python -m dalle_ds.acceptance.child MODULE RECORD SECONDS full|rehearsal`.

Nothing heavy is imported here: what a step needs is the step's to import, and to fail at.
"""

import ctypes
import faulthandler
import signal
import sys
from importlib import import_module
from pathlib import Path

from dalle_ds.acceptance.record import Record
from dalle_ds.parallel.launch import set_defaults

PR_SET_PDEATHSIG = 1


def main() -> None:
    """A step that hangs says where: at its limit all threads print their stacks, and the process ends with code 1."""
    module, record, seconds, mode = sys.argv[1:]
    faulthandler.enable()
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # whoever kills the run ends its step
    set_defaults()
    import_module(module).run(Record(Path(record)), mode == "rehearsal")


if __name__ == "__main__":
    main()
