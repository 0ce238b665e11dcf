"""The table at the end of an acceptance run: measured value, expected value, verdict and reason."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from dalle_ds.acceptance.record import number

WIDTHS = (72, 22, 30)
"""Widths of the columns before the verdict."""


def table(summary: Mapping[str, Any]) -> str:
    """Returns all rows of a summary as text, followed by the reason for each row that is WRONG or off."""
    lines = [_line("", "measured", "expected", "verdict")]
    for step in summary["steps"]:
        lines += ["", f"{step['name']}: {step['settles']} ({step['seconds']:.0f} s)"]
        lines += [_line(f"  {row['what']}", number(row["measured"]), row["expected"], row["verdict"]) for row in step["rows"]]
        if step["outcome"] != "ended":
            lines.append(f"  {step['outcome'].upper()} after {step['seconds']:.0f} s. The end of its output:")
            lines += [f"  | {line}" for line in step["tail"].splitlines()]
    return "\n".join([*lines, *_reasons(summary), "", verdict(summary)])


def verdict(summary: Mapping[str, Any]) -> str:
    """Returns the verdict on the machine as one sentence."""
    where = f"{summary['identity']['host']}, {summary['written']}"
    n_steps = len(summary["steps"])
    if not summary["ok"]:
        return f"NOT ACCEPTED ({where}): {', '.join(summary['not_ok'])} of {n_steps} steps; {summary['wrong']} rows are WRONG"
    off = f"; {summary['off']} rows are off: correct, but slower or larger than expected" if summary["off"] else ""
    kind = "rehearsed on a CPU" if summary["identity"]["rehearsal"] else "accepted"
    return f"{kind} ({where}): {n_steps} steps{off}"


def _reasons(summary: Mapping[str, Any]) -> Iterator[str]:
    for step in summary["steps"]:
        for row in step["rows"]:
            if row["verdict"] in ("WRONG", "off"):
                yield ""
                told = f"{row['verdict']}: {step['name']}, {row['what']}. {row['why']}"
                yield textwrap.fill(told, sum(WIDTHS), subsequent_indent="  ")


def _line(what: str, measured: str, expected: str, verdict: str) -> str:
    cells = (what, measured, expected)
    return "".join(f"{cell:<{width}} " for cell, width in zip(cells, WIDTHS, strict=True)) + verdict
