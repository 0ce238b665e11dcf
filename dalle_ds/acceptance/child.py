"""Run one step in its own process: `python -m dalle_ds.acceptance.child MODULE RECORD SECONDS full|rehearsal`.

This module imports nothing heavy: each step imports its own dependencies, so that an import error fails that step only.
"""

import sys
from importlib import import_module
from pathlib import Path

from dalle_ds.acceptance.guard import guard
from dalle_ds.acceptance.record import Record
from dalle_ds.parallel.launch import set_defaults


def main() -> None:
    """Run the step under its time limit, with the environment variables of a training rank."""
    module, record, seconds, mode = sys.argv[1:]
    guard(float(seconds))
    set_defaults()
    import_module(module).run(Record(Path(record)), mode == "rehearsal")


if __name__ == "__main__":
    main()
