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

from dalle_ds.errors import ConfigError, DataError, StoreUnreachable

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_RETRY_SECONDS = 120.0
PERMANENT_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
WRONG_SETTINGS = {
    "ConfigNotFound",
    "ConfigParseError",
    "InvalidConfigError",
    "InvalidRegionError",
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
"""botocore's errors of keys, profiles and names of buckets, which no retry mends."""
CONNECTIONS_OF_HTTPX = {"ConnectError", "ConnectTimeout", "PoolTimeout", "ReadError", "ReadTimeout", "RemoteProtocolError"}
"""Names of errors of httpx, which huggingface_hub uses, under more than one package name."""
TRANSIENT_STATUS = (408, 409, 425, 429)  # 409: two conditional writes conflicted; the loser must retry


def retrying(action: Callable[[], T], url: str | Path, verb: str) -> T:
    """Call `action`, retry it after transient faults, and return its result; `verb` and `url` are for messages.

    Raises:
        FileNotFoundError, FileExistsError, PermissionError: S3 reports this.
        StoreUnreachable: storage was unreachable for DALLE_DS_RETRY_SECONDS.
        DataError: credentials are missing, or S3 refuses the request.
    """
    limit = seconds_of("DALLE_DS_RETRY_SECONDS", DEFAULT_RETRY_SECONDS)

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
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if str(url).startswith("s3://") else "the keys of this storage"
        raise PermissionError(f"not allowed to {verb} {url} ({error}); check {keys}") from None
    except Exception as error:
        if "Credentials" in type(error).__name__:  # botocore's
            raise DataError(f"cannot {verb} {url}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        if not isinstance(error, tenacity.RetryError):
            if status_of(error) and not isinstance(error, PERMANENT_ERRORS) or type(error).__module__.startswith("botocore"):
                raise DataError(f"cannot {verb} {url}: {_brief(error)}") from None
            if not str(url).startswith("s3://") and _is_of_a_library(error):
                raise DataError(f"cannot {verb} {url}: {_brief(error)}; expected a url that fsspec can read") from None
            raise
        last = error.last_attempt.exception()
        raise StoreUnreachable(
            f"cannot {verb} {url}: tried for {limit:.0f} s, last error: {_brief(last)}", url=str(url)
        ) from last


def seconds_of(variable: str, default: float) -> float:
    """The seconds that an environment variable gives; `default` if it is unset or empty.

    Raises:
        ConfigError: it is no number of seconds, 0 or more.
    """
    text = os.environ.get(variable) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:  # also nan
        raise ConfigError(f"{variable}={text}: expected a number of seconds, 0 or more")
    return seconds


def _is_transient(error: BaseException) -> bool:
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and not status_of(cause):
        return not isinstance(cause, PERMANENT_ERRORS) and _is_transient(cause)  # a web server that is away, for fsspec
    if isinstance(error, PERMANENT_ERRORS):
        # A server that has just restarted may not know its buckets and keys yet. It then answers 5xx, which has these types.
        return status_of(error) >= 500
    from botocore.exceptions import BotoCoreError

    if type(error).__name__ in WRONG_SETTINGS and isinstance(error, BotoCoreError):
        return False
    status = status_of(error)
    if status:
        return status >= 500 or status in TRANSIENT_STATUS
    if isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError, BotoCoreError)):
        return True
    if type(error).__name__ in CONNECTIONS_OF_HTTPX:
        return True
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) and error.errno not in (28, 30) or module in ("aiohttp", "botocore", "urllib3", "fsspec")


def _is_of_a_library(error: Exception) -> bool:
    """Whether the error is one of the many that file systems of fsspec raise, for names and answers that they do not expect."""
    return isinstance(error, ValueError) or type(error).__module__.partition(".")[0] not in ("builtins", "dalle_ds")


def status_of(error: BaseException) -> int:
    """HTTP status of the storage's response. 0 if there was no response."""
    response = _response(error)
    if response:
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    # of aiohttp, adlfs and gcsfs
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((status for status in found if isinstance(status, int)), 0)


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
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
