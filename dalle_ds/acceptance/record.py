"""What a step finds: rows with a verdict each, on disk one by one, so that a step that dies keeps what it had."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["ok", "WRONG", "off", "-"]
"""WRONG: don't train on this machine. off: right, but slower or larger than expected. -: told, with nothing to compare."""

Value = float | int | str | bool


@dataclass(frozen=True)
class Row:
    """One line of the table. `why` is the reason of the expectation and of its tolerance."""

    what: str
    measured: Value
    expected: str
    verdict: Verdict
    why: str


class Record:
    """Rows and details of one step, in a file of JSON lines.

    A row is for people. A detail is only kept: lists, counts by name, and what else one may want to look up afterwards.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        file.write_text("")

    # ---- numbers and behaviour: WRONG where they are not as they must be -------------------------------------------------

    def must(self, what: str, measured: Value, is_right: bool, expected: str, why: str) -> None:
        """`measured` must be as `expected` says, and the step knows whether it is."""
        self._add(Row(what, measured, expected, "ok" if is_right else "WRONG", why))

    def equal(self, what: str, measured: Value, expected: Value, why: str) -> None:
        """Nothing else will do."""
        self.must(what, measured, measured == expected, str(expected), why)

    def at_most(self, what: str, measured: float, limit: float, why: str) -> None:
        """An error and its limit; NaN is above every limit."""
        self.must(what, measured, measured <= limit, f"at most {number(limit)}", why)

    # ---- speed and size: off where they disappoint -----------------------------------------------------------------------

    def should(self, what: str, measured: Value, is_as_hoped: bool, expected: str, why: str) -> None:
        """As `must`, of what costs time or memory but no result."""
        self._add(Row(what, measured, expected, "ok" if is_as_hoped else "off", why))

    def rate(self, what: str, measured: float, expected: float | None, share: float, why: str) -> None:
        """More is better: at least this share of what is expected. None: nothing is known of such a device."""
        if expected is None:
            self.tell(what, measured)
        else:
            self.should(what, measured, measured >= share * expected, f"{number(expected)}, at least {share:.0%} of it", why)

    def size(self, what: str, measured: float, expected: float | None, excess: float, why: str) -> None:
        """Less is better: at most this share above what is expected."""
        if expected is None:
            self.tell(what, measured)
        else:
            is_small = measured <= (1 + excess) * expected
            self.should(what, measured, is_small, f"{number(expected)}, at most {excess:.0%} more", why)

    # ---- no verdict ------------------------------------------------------------------------------------------------------

    def tell(self, what: str, measured: Value, why: str = "") -> None:
        """Worth knowing, with nothing to compare."""
        self._add(Row(what, measured, "", "-", why))

    def detail(self, name: str, value: Any) -> None:
        """Plain data that is not for the table."""
        self._write({"detail": {name: value}})

    def _add(self, row: Row) -> None:
        measured = row.measured
        if isinstance(measured, float) and not math.isfinite(measured):
            measured = str(measured)  # JSON has no NaN
        self._write({"row": asdict(row) | {"measured": measured}})

    def _write(self, line: dict[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")


def read_record(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """-> (rows, details) that a step has left, also where it died while it wrote."""
    rows, details = [], {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "row" in found:
            rows.append(found["row"])
        details.update(found.get("detail", {}))
    return rows, details


def number(value: Value) -> str:
    """For people: four digits of a float, the rest as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
