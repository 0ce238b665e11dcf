"""Console output of every command: logs and progress bars on stderr, one summary on stdout, user errors without a traceback."""

import io
import json
import logging
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.utils import ObjectWrapper

from dalle_ds.redaction import redacted, redacted_message

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """Result of a command. The exit code is 0 if `is_complete` is set, else 1."""

    summary: dict[str, Any]
    is_complete: bool = True
    problems: list[str] = field(default_factory=list)
    text: str | None = None
    """Text to print instead of the summary's lines."""


class _Redacting(logging.Formatter):
    """Log lines and their tracebacks without passwords: exceptions of other libraries contain whole urls."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted_message(super().format(record))


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print_error(redacted_message("".join(traceback.format_exception(kind, error, trace))).rstrip())


def setup_logging(level: int = logging.INFO) -> None:
    """Log to stderr, so that stdout carries only the summary. No log line and no traceback contains the password of a url."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    sys.excepthook = _print_traceback
    if isinstance(sys.stdout, io.TextIOWrapper):  # a summary must not fail because of a name that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    for chatty in ("aiobotocore", "botocore", "s3fs", "fsspec", "PIL", "matplotlib", "alembic", "urllib3", "mlflow.store"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def print_summary(summary: dict[str, Any], as_json: bool) -> None:
    """Print a summary on stdout: as aligned lines, or with `as_json` as one JSON object on one line."""
    if as_json:
        print(redacted(json.dumps(summary, default=str)), flush=True)
        return
    width = max((len(key) for key in summary), default=0)
    for key, value in summary.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, dict):
            value = json.dumps(value, default=str)
        print(redacted(f"{key:<{width}}  {value}"), flush=True)


def print_error(message: str) -> None:
    """Print one line on stderr. A closed stderr is ignored."""
    with suppress(BrokenPipeError):
        print(redacted_message(message), file=sys.stderr, flush=True)


class _LastingStderr(ObjectWrapper):
    """A stderr that ignores a broken pipe. If the ssh session that started a rank ends, the rank must still save its state."""

    def write(self, text: str) -> int:
        with suppress(BrokenPipeError):
            self._wrapped.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(BrokenPipeError):
            self._wrapped.flush()


class _WholeLines(_LastingStderr):
    """A stderr that is not a terminal. A bar is a line each time that it is drawn, and log lines begin their own."""

    def write(self, text: str) -> int:
        if line := text.replace("\x1b[A", "").strip():  # tqdm moves the cursor up after a bar below another
            super().write(f"{line}\n")
        return len(text)


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
    """A progress bar with rate and ETA on stderr. All progress bars of the project come from this function.

    If stderr is not a terminal, a line is printed every ten seconds. With `unit_scale`, large counts are shown in k, M and G of
    the unit.
    """
    live = sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        unit_scale=unit_scale,
        disable=not enabled,
        file=_LastingStderr(sys.stderr) if live else _WholeLines(sys.stderr),
        dynamic_ncols=live,
        ncols=None if live else 100,
        mininterval=0.2 if live else 10.0,
    )
