"""What killed writers leave hidden: temporary files on disks, unfinished uploads on S3. Told, and removed when old."""

import logging
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from dalle_ds.storage import objects, s3_requests
from dalle_ds.storage.scratch import OLD_SECONDS

log = logging.getLogger(__name__)

# As storage/atomic.py names them: .NAME.ID.part, and .NAME.part where there is one writer.
_NAME: Final = re.compile(r"\..+\.part")


def leftovers(root_url: str | Path) -> dict[str, int]:
    """{url: bytes} of all temporary files below a folder, also those of a writer that still runs. Empty on s3://."""
    return {str(path): size for path, (size, _) in _find(root_url).items()}


def remove_old_leftovers(root_url: str | Path) -> None:
    """Remove what killed writers left below a folder more than a day ago, and log what was removed and what is left.

    On disks these are temporary files, on s3:// unfinished uploads. An S3 server that does not list uploads is no error.
    """
    if objects.is_s3(root_url):
        _abort_old_uploads(root_url)
        return
    removed, kept = [], []
    for path, (size, changed) in _find(root_url).items():
        is_old = time.time() - changed > OLD_SECONDS
        (removed if is_old else kept).append(size)
        if is_old:
            with suppress(OSError):  # another process removes it at the same time
                path.unlink()
    if removed:
        log.info("%s: removed %d hidden files of killed processes, %d bytes", root_url, len(removed), sum(removed))
    if kept:
        log.info(
            "%s: %d hidden files, %d bytes, of writers that were killed or still run; they are removed when a day old",
            root_url,
            len(kept),
            sum(kept),
        )


def _abort_old_uploads(root_url: str | Path) -> None:
    try:
        uploads = s3_requests.unfinished_uploads(root_url)
        old = [upload for upload in uploads if time.time() - upload[2] > OLD_SECONDS]
        for key, upload_id, _ in old:
            s3_requests.abort_upload(root_url, key, upload_id)
    except Exception as error:  # any kind: not allowed, not known to this server; the work itself will tell what is wrong
        log.debug("%s: unfinished uploads are not looked for: %s", root_url, error)
        return
    if uploads:
        log.info(
            "%s: %d unfinished uploads of writers that were killed or still run; removed the %d that are older than a day",
            root_url,
            len(uploads),
            len(old),
        )


def _find(root_url: str | Path) -> dict[Path, tuple[int, float]]:
    # {path: (bytes, time of the last change)}
    root = objects.local_path(root_url)
    found: dict[Path, tuple[int, float]] = {}
    for folder, _, names in os.walk(root) if root is not None else ():
        for name in filter(_NAME.fullmatch, names):
            with suppress(FileNotFoundError):
                status = Path(folder, name).lstat()
                found[Path(folder, name)] = status.st_size, status.st_mtime
    return found
