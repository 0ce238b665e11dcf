"""What every command shares: logs on stderr, one summary at the end, errors a person can mend without a traceback."""

import json
import logging
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.utils import ObjectWrapper

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What a command came to; `is_complete` decides the exit code: 0 only if all was done."""

    summary: dict[str, Any]
    is_complete: bool = True
    problems: list[str] = field(default_factory=list)
    text: str | None = None
    """For people, instead of the summary's lines."""


def setup_logging(level: int = logging.INFO) -> None:
    """Log to stderr, so that stdout carries nothing but the summary."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for chatty in ("aiobotocore", "botocore", "s3fs", "fsspec", "PIL", "matplotlib", "alembic", "urllib3", "mlflow.store"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def print_summary(summary: dict[str, Any], as_json: bool) -> None:
    """Print the outcome on stdout: aligned lines for people, or one JSON object on the last line."""
    if as_json:
        print(json.dumps(summary, default=str), flush=True)
        return
    width = max((len(key) for key in summary), default=0)
    for key, value in summary.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, dict):
            value = json.dumps(value, default=str)
        print(f"{key:<{width}}  {value}", flush=True)


def print_error(message: str) -> None:
    """One line on stderr, whether or not somebody still reads it."""
    with suppress(BrokenPipeError):
        print(message, file=sys.stderr, flush=True)


class _LastingStderr(ObjectWrapper):
    """Work outlives whoever reads of it: where an ssh session is gone, the ranks it started have a state to save."""

    def write(self, text: str) -> int:
        with suppress(BrokenPipeError):
            self._wrapped.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(BrokenPipeError):
            self._wrapped.flush()


def progress(
    iterable: Iterable[T] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    what: str,
    unit: str,
    unit_scale: bool = False,
    enabled: bool = True,
) -> "tqdm[T]":
    """The one progress bar: rate and ETA on stderr; in a log file a line every ten seconds instead of a redrawn one.
    With `unit_scale` large counts are shown as k, M, G of the unit."""
    live = sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        unit_scale=unit_scale,
        disable=not enabled,
        file=_LastingStderr(sys.stderr),
        dynamic_ncols=live,
        ncols=None if live else 100,
        mininterval=0.2 if live else 10.0,
    )
