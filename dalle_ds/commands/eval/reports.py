"""A report is never replaced by a report about something else: whoever looks for it would take the new numbers for the old."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_ds.errors import ConfigError
from dalle_ds.storage.bounded import read_bounded


def require_replaceable(file: Path, result: Mapping[str, Any], same: str, *names: str) -> None:
    """Call before `result` is written to `file`. A report about the same subject may be replaced.

    Args:
        same: key of the subject's fingerprint in a report.
        names: keys whose values name the subject for people.

    Raises:
        ConfigError: `file` exists and has another subject.
    """
    try:
        there = json.loads(read_bounded(file))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        there = None
    if not isinstance(there, dict):
        raise ConfigError(f"{file} is no report of this command: choose another --out, or move the file away")
    if there.get(same) != result[same]:
        before, now = (", ".join(f"{name} {tree.get(name)}" for name in (*names, same)) for tree in (there, result))
        raise ConfigError(
            f"{file} is a report about something else; choose another --out, or move the file away:\n"
            f"  there: {before}\n  now:   {now}"
        )
