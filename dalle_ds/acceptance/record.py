"""Results of a step: rows with a verdict. Each is written to disk at once, so that a step that dies keeps its results."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["ok", "WRONG", "off", "-"]
"""WRONG: don't train on this machine. off: correct, but slower or larger than expected. -: there is no expected value."""

Value = float | int | str | bool


@dataclass(frozen=True)
class Row:
    """One line of the table. `why` is the reason for the expected value and its tolerance."""

    what: str
    measured: Value
    expected: str
    verdict: Verdict
    why: str


class Record:
    """Rows and details of one step, in a file of JSON lines.

    The table shows rows. Details, such as lists and counts by name, are only stored for later inspection.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        file.write_text("")

    # ---- numbers and behaviour: WRONG if not as expected -----------------------------------------------------------------

    def must(self, what: str, measured: Value, is_right: bool, expected: str, why: str) -> None:
        """Add a row that is ok if `is_right`, else WRONG. The step itself decides whether `measured` is as `expected`."""
        self._add(Row(what, measured, expected, "ok" if is_right else "WRONG", why))

    def equal(self, what: str, measured: Value, expected: Value, why: str) -> None:
        """Add a row that is ok if `measured` equals `expected`, else WRONG."""
        self.must(what, measured, measured == expected, str(expected), why)

    def at_most(self, what: str, measured: float, limit: float, why: str) -> None:
        """Add a row that is ok if `measured` is at most `limit`, else WRONG. NaN is WRONG."""
        self.must(what, measured, measured <= limit, f"at most {number(limit)}", why)

    # ---- speed and size: off if worse than expected ----------------------------------------------------------------------

    def should(self, what: str, measured: Value, is_as_hoped: bool, expected: str, why: str) -> None:
        """Add a row that is ok if `is_as_hoped`, else off: for measurements that cost time or memory but change no result."""
        self._add(Row(what, measured, expected, "ok" if is_as_hoped else "off", why))

    def rate(self, what: str, measured: float, expected: float | None, share: float, why: str) -> None:
        """Add a row that is ok if `measured` is at least fraction `share` of `expected`, else off. If the expected value is
        unknown (None), the row has no verdict."""
        if expected is None:
            self.tell(what, measured)
        else:
            self.should(what, measured, measured >= share * expected, f"{number(expected)}, at least {share:.0%} of it", why)

    def size(self, what: str, measured: float, expected: float | None, excess: float, why: str) -> None:
        """Add a row that is ok if `measured` exceeds `expected` by at most fraction `excess`, else off. If the expected value
        is unknown (None), the row has no verdict."""
        if expected is None:
            self.tell(what, measured)
        else:
            is_small = measured <= (1 + excess) * expected
            self.should(what, measured, is_small, f"{number(expected)}, at most {excess:.0%} more", why)

    # ---- no verdict ------------------------------------------------------------------------------------------------------

    def tell(self, what: str, measured: Value, why: str = "") -> None:
        """Add a row without an expected value and without a verdict."""
        self._add(Row(what, measured, "", "-", why))

    def detail(self, name: str, value: Any) -> None:
        """Store plain data that the table doesn't show."""
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
    """Returns the (rows, details) in a step's file. A last line that is incomplete because the step died is skipped."""
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
    """Format a value for the table: a float with four digits, other values unchanged."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
