"""What every command shares: logs on stderr, one summary at the end, errors a person can mend without a traceback."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.utils import ObjectWrapper

from dalle_ds.errors import UserError

T = TypeVar("T")

TYPER_SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
"""Of every table of commands: plain help, plain tracebacks."""


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


def user_errors_exit(function: Callable[..., T]) -> Callable[..., T]:
    """Decorate a command: a UserError becomes its message on stderr and exit code 2; DALLE_DS_TRACEBACK=1 lets it through."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> T:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            if os.environ.get("DALLE_DS_TRACEBACK") == "1":
                raise
            print_error(f"error: {error}")
            raise SystemExit(2) from None

    return wrapper


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
