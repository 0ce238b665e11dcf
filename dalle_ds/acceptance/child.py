"""One step in a process of its own: `python -m dalle_ds.acceptance.child MODULE RECORD SECONDS full|rehearsal`.

Nothing heavy is imported here: what a step needs is the step's to import, and to fail at.
"""

import sys
from importlib import import_module
from pathlib import Path

from dalle_ds.acceptance.guard import guard
from dalle_ds.acceptance.record import Record
from dalle_ds.parallel.launch import set_defaults


def main() -> None:
    """Run the step under its limit, with the variables that ranks of a training run have."""
    module, record, seconds, mode = sys.argv[1:]
    guard(float(seconds))
    set_defaults()
    import_module(module).run(Record(Path(record)), mode == "rehearsal")


if __name__ == "__main__":
    main()
