"""Retry transient faults of object storage.

Retries use back-off and jitter for DALLE_DS_RETRY_SECONDS (default 120), on top of the client's own retries.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from dalle_ds.errors import DataError

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_RETRY_SECONDS = 120.0
PERMANENT_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
TRANSIENT_STATUS = (408, 409, 425, 429)  # 409: two conditional writes conflicted; the loser must retry


def retrying(action: Callable[[], T], url: str | Path, verb: str) -> T:
    """Call `action`, retry it after transient faults, and return its result; `verb` and `url` are for messages.

    Raises:
        FileNotFoundError, PermissionError: S3 reports this.
        DataError: storage was unreachable for DALLE_DS_RETRY_SECONDS, or credentials are missing.
    """
    limit = float(os.environ.get("DALLE_DS_RETRY_SECONDS", DEFAULT_RETRY_SECONDS))

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning(
            "cannot %s %s (%s); attempt %d, next in %.1f s",
            verb,
            url,
            _brief(error),
            state.attempt_number,
            state.upcoming_sleep,
        )

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.5, min=0.2, max=15),
        stop=tenacity.stop_after_delay(limit),
        before_sleep=tell,
    )
    try:
        return attempts(action)
    except FileNotFoundError:
        raise FileNotFoundError(f"{url}: no such object") from None
    except PermissionError as error:
        raise PermissionError(
            f"not allowed to {verb} {url} ({error}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"):  # botocore's
            raise DataError(f"cannot {verb} {url}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        if not isinstance(error, tenacity.RetryError):
            raise
        last = error.last_attempt.exception()
        raise DataError(f"cannot {verb} {url}: tried for {limit:.0f} s, last error: {_brief(last)}") from last


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, PERMANENT_ERRORS):
        # A server that has just restarted may not know its buckets and keys yet. It then answers 5xx, which has these types.
        return status_of(error) >= 500
    from botocore.exceptions import BotoCoreError, NoCredentialsError, ParamValidationError

    if isinstance(error, (NoCredentialsError, ParamValidationError)):
        return False
    status = status_of(error)
    if status:
        return status >= 500 or status in TRANSIENT_STATUS
    if isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError, BotoCoreError)):
        return True
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) and error.errno not in (28, 30) or module in ("aiohttp", "botocore", "urllib3", "fsspec")


def status_of(error: BaseException) -> int:
    """HTTP status of S3's response. 0 if there was no response."""
    response = _response(error)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if response else 0


def error_code(error: BaseException) -> str:
    """S3's error code, such as "NoSuchKey". Empty if there was no response."""
    response = _response(error)
    return str(response.get("Error", {}).get("Code", "")) if response else ""


def _response(error: BaseException | None) -> dict[str, Any] | None:
    while error is not None:  # s3fs sets botocore's error, which has the HTTP response, as the cause
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response
        error = error.__cause__
    return None


def _brief(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"[:200]
