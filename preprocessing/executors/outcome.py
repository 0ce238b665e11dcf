"""What a stage hands back: its summary, and whether all of its work is done."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """`is_complete` decides the exit code: 0 only if all was done."""

    summary: dict[str, Any]
    is_complete: bool = True
    problems: list[str] = field(default_factory=list)
