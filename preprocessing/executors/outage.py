"""Wait for a store that is away: an outage of minutes must pause a run of days, not end it."""

import logging
import time
from collections.abc import Callable
from typing import Final, TypeVar

from dalle_ds.errors import StoreUnreachable
from dalle_ds.storage import objects
from dalle_ds.storage.retry import seconds_of

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_OUTAGE_SECONDS: Final = 3600.0
PAUSE_SECONDS: Final = 0.2  # between questions, each of which is repeated for DALLE_DS_RETRY_SECONDS


def patiently(action: Callable[[], T]) -> T:
    """Call `action`. If its store is away, wait until the store answers, and call it again.

    Raises:
        StoreUnreachable: the store was away for DALLE_DS_OUTAGE_SECONDS, or only this object cannot be had.
    """
    try:
        return action()
    except StoreUnreachable as error:
        wait_for_store(error)
        return action()


def wait_for_store(error: StoreUnreachable) -> None:
    """Return when the store of the failed request answers.

    Another name in the same folder is asked for: the request may have failed because of the one object.

    Raises:
        StoreUnreachable: the store was away for DALLE_DS_OUTAGE_SECONDS.
    """
    folder = error.url.rpartition("/")[0]
    started, limit = time.monotonic(), seconds_of("DALLE_DS_OUTAGE_SECONDS", DEFAULT_OUTAGE_SECONDS)
    while True:
        try:
            objects.exists(objects.join(folder, "probe"))
            return
        except StoreUnreachable:
            away = time.monotonic() - started
            if away > limit:
                raise
            time.sleep(PAUSE_SECONDS)
            log.warning("%s: the store has been away for %.0f s; waiting for up to %.0f s", folder, away, limit)
        except OSError:
            return  # it answers
