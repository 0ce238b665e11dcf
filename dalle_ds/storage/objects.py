"""Storage: the same small functions for plain paths, file:// and s3://. An object is complete or absent.

No function streams into the final object: an exception inside fsspec's `open(url, "wb")` commits a partial file on S3.
Every write is one PUT, one multipart upload that is completed at its end, or a temporary file that is renamed.

S3 endpoint and keys come from the standard AWS_* variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
Transient S3 faults are retried (see retry.py).
Start processes that use S3 with spawn or forkserver, never with fork.
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from dalle_ds.errors import DataError
from dalle_ds.places import check_place
from dalle_ds.storage.atomic import atomic_write, sync_file, temporary_beside
from dalle_ds.storage.retry import error_code, retrying, status_of

RANGE_BYTES = 64 << 20  # size of one GET of `read_into`, and of its buffer
READ_TIMEOUT_SECONDS = 60  # a response that sends no byte for this time has stalled
PART_BYTES = 8 << 20  # part size of multipart transfers; N_PARTS parts are in memory at the same time
N_PARTS = 4
MAX_PARTS = 10_000  # S3's maximum number of parts of one object


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def is_s3(url: str | Path) -> bool:
    return str(url).startswith("s3://")


def local_path(url: str | Path) -> Path | None:
    """The path of a local URL. None for s3://.

    Raises:
        DataError: the URL has another scheme or is incomplete.
    """
    text = str(url)
    if is_s3(text):
        return None
    check_place(text)
    return Path(text.removeprefix("file://"))


def join(url: str | Path, *parts: str) -> str:
    """Append path parts: join("s3://b/x/", "y", "z") == "s3://b/x/y/z"."""
    return "/".join([str(url).rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(url: str | Path) -> str:
    """Return the absolute path of a local path. URLs stay as they are."""
    return str(url) if "://" in str(url) else str(Path(url).resolve())


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_bytes(url: str | Path) -> bytes:
    """Read the whole object.

    Raises:
        FileNotFoundError: the object does not exist.
        PermissionError: access is denied.
        DataError: S3 was unreachable for DALLE_DS_RETRY_SECONDS.
    """
    path = local_path(url)
    if path is not None:
        return path.read_bytes()
    return retrying(lambda: _s3().cat_file(_key(url)), url, "read")


def read_range(url: str | Path, offset: int, length: int) -> bytes:
    """Read exactly `length` bytes from `offset`, by one ranged GET.

    Raises:
        DataError: the object ends before offset + length.
    """
    path = local_path(url)
    if path is not None:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    else:
        data = retrying(lambda: _s3_range(url, offset, length), url, "read")
    if len(data) != length:
        raise DataError(f"{url}: {len(data)} bytes at offset {offset}, expected {length}; the object is truncated")
    return data


def read_into(url: str | Path, offset: int, target: memoryview) -> None:
    """Fill `target` with the object's bytes from `offset`. On S3 each ranged GET reads RANGE_BYTES.

    Raises:
        DataError: the object ends before `target` is full.
    """
    path = local_path(url)
    if path is None:
        for start in range(0, len(target), RANGE_BYTES):
            part = target[start : start + RANGE_BYTES]
            part[:] = read_range(url, offset + start, len(part))
        return
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while target:
            n = file.readinto(target)
            if not n:
                raise DataError(f"{url}: {len(target)} bytes are missing at its end; the file is truncated")
            target = target[n:]


@contextmanager
def local_copy(url: str | Path) -> Iterator[Path]:
    """Yields a local file with the object's content: the file itself, or a temporary download that is deleted afterwards."""
    path = local_path(url)
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"{url}: no such file")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="dalle-ds-") as folder:
        target = Path(folder) / "copy"
        retrying(lambda: _download(url, target), url, "download")
        yield target


def exists(url: str | Path) -> bool:
    """Whether the object exists. A prefix is not an object, since S3 servers disagree on whether prefixes exist."""
    try:
        size(url)
        return True
    except FileNotFoundError:
        return False


def size(url: str | Path) -> int:
    """Size of the object in bytes.

    Raises:
        FileNotFoundError: the object does not exist.
    """
    path = local_path(url)
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"{url}: no such file")
        return path.stat().st_size
    return int(_head(url)["ContentLength"])


def etag(url: str | Path) -> str | None:
    """The object's ETag. None on local disks."""
    return None if local_path(url) is not None else str(_head(url)["ETag"]).strip('"')


def list_files(prefix_url: str | Path, suffix: str = "") -> list[str]:
    """Sorted URLs of all objects below a folder (recursive), without hidden names. Each URL starts with `prefix_url`."""
    return sorted(list_sizes(prefix_url, suffix))


def list_sizes(prefix_url: str | Path, suffix: str = "") -> dict[str, int]:
    """Like `list_files`, but returns {url: bytes}. Empty if the folder does not exist."""
    root = local_path(prefix_url)
    found: dict[str, int] = {}
    if root is not None:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for name in names:
                if name.endswith(suffix) and not name.startswith("."):
                    file = Path(folder) / name
                    with suppress(FileNotFoundError):  # deleted after it was listed
                        found[join(prefix_url, file.relative_to(root).as_posix())] = file.stat().st_size
        return found
    prefix = _key(prefix_url).rstrip("/") + "/"
    try:
        entries = retrying(lambda: _s3().find(prefix, detail=True), prefix_url, "list")
    except FileNotFoundError:
        return {}
    for key, entry in entries.items():
        # SeaweedFS lists the folder itself after its last file was deleted.
        if entry["type"] == "file" and key.startswith(prefix) and not key.endswith("/") and key.endswith(suffix):
            found[join(prefix_url, key.removeprefix(prefix))] = int(entry["size"])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_bytes(url: str | Path, data: bytes) -> None:
    """Create or replace the object atomically: readers see the old or the new content, never a part."""
    path = local_path(url)
    if path is None:
        retrying(lambda: _s3().pipe_file(_key(url), data), url, "write")
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def create_exclusive(url: str | Path, data: bytes) -> bool:
    """Create the object only if it does not exist. Of several writers on any machines, the first wins.

    Returns:
        True if the object now contains `data`. False if it already had other content. Existing content equal to `data` counts
        as success, so that a retry after a lost response does not fail. Include an attempt id in `data` to distinguish writers.
    """
    path = local_path(url)
    created = _create_local(path, data) if path is not None else _create_s3(url, data)
    return created or read_bytes(url) == data


def put_file(local: str | Path, url: str | Path) -> None:
    """Upload a finished local file, atomically."""
    path = local_path(url)
    if path is None:
        part_bytes = max(PART_BYTES, -(-Path(local).stat().st_size // MAX_PARTS))
        retrying(lambda: _s3().put_file(str(local), _key(url), chunksize=part_bytes), url, "upload")
        return
    with atomic_write(path) as temporary:
        shutil.copyfile(local, temporary)


def move_file(local: str | Path, url: str | Path) -> None:
    """Like `put_file`, but also removes the local file. On the same disk the file is renamed, not copied."""
    path = local_path(url)
    if path is None:
        put_file(local, url)
        Path(local).unlink()
        return
    sync_file(Path(local))
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(local, path)


@contextmanager
def atomic_object(url: str | Path) -> Iterator[Path]:
    """Yields a local temporary file. At the end of the block it becomes the object, atomically; an error discards it."""
    path = local_path(url)
    if path is None:
        with tempfile.TemporaryDirectory(prefix="dalle-ds-") as folder:
            spool = Path(folder) / "spool"
            yield spool
            put_file(spool, url)
        return
    with atomic_write(path) as temporary:  # on the same disk as `path`, so that large files are not copied
        yield temporary


def delete(url: str | Path) -> None:
    """Delete the object. Does nothing if it does not exist."""
    path = local_path(url)
    with suppress(FileNotFoundError):
        if path is not None:
            path.unlink()
        else:
            retrying(lambda: _s3().rm_file(_key(url)), url, "delete")


def delete_tree(url: str | Path) -> None:
    """Delete all objects below a folder, and on a local disk the folder itself. Does nothing if it does not exist."""
    path = local_path(url)
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)
        return
    if keys := [_key(found) for found in list_files(url)]:
        retrying(lambda: _s3().rm(keys), url, "delete")  # one request deletes a thousand objects


def free_bytes(url: str | Path) -> int | None:
    """Free space in bytes on the disk of `url`. None on object storage, which is unlimited."""
    path = local_path(url)
    if path is None:
        return None
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_disk_space(url: str | Path, needed_bytes: float, what: str) -> None:
    """Check that the disk of `url` has enough free space; `what` names the needed files in the message.

    Raises:
        DataError: less than `needed_bytes` are free.
    """
    free = free_bytes(url)
    if free is not None and free < needed_bytes:
        raise DataError(f"no space in {url}: {_size(free)} free, {_size(needed_bytes)} needed for {what}")


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


# ---------------------------------------------------------------------------------------------------------------------
# Local side
# ---------------------------------------------------------------------------------------------------------------------


def _create_local(path: Path, data: bytes) -> bool:
    with temporary_beside(path) as temporary:
        temporary.write_bytes(data)
        sync_file(temporary)
        try:
            os.link(temporary, path)  # atomic, and fails if the name exists
        except FileExistsError:
            return False
        except OSError as error:
            raise DataError(
                f"{path}: this file system does not support hard links ({error.strerror}), which commits need; "
                "write the output to another file system or to s3://"
            ) from None
    return True


# ---------------------------------------------------------------------------------------------------------------------
# S3 side
# ---------------------------------------------------------------------------------------------------------------------


def _s3() -> Any:
    # The cache key includes the process id: a client created before a fork hangs or raises in the child.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _s3_client(
        os.getpid(),
        endpoint,
        os.environ.get("AWS_ACCESS_KEY_ID"),
        os.environ.get("AWS_SECRET_ACCESS_KEY"),
        READ_TIMEOUT_SECONDS,
    )


@functools.lru_cache(maxsize=4)
def _s3_client(_pid: int, endpoint: str | None, _access_key: str | None, _secret_key: str | None, read_timeout: float) -> Any:
    # Disable botocore's retries. Multiplied with s3fs's retries, they would take minutes before ours check their time limit.
    return fsspec.filesystem(
        "s3",
        endpoint_url=endpoint,
        use_listings_cache=False,
        skip_instance_cache=True,
        max_concurrency=N_PARTS,
        default_block_size=PART_BYTES,
        config_kwargs={"connect_timeout": 10, "read_timeout": read_timeout, "retries": {"max_attempts": 0}},
    )


def _key(url: str | Path) -> str:
    return str(url).removeprefix("s3://")


def _head(url: str | Path) -> dict[str, Any]:
    bucket, _, key = _key(url).partition("/")
    return retrying(lambda: _s3().call_s3("head_object", Bucket=bucket, Key=key), url, "look up")


def _s3_range(url: str | Path, offset: int, length: int) -> bytes:
    try:
        return _s3().cat_file(_key(url), start=offset, end=offset + length)
    except OSError as error:
        if status_of(error) == 416:  # the object ends before `offset`
            return b""
        raise


def _download(url: str | Path, target: Path) -> None:
    expected = int(_head(url)["ContentLength"])
    _s3().get_file(_key(url), str(target))
    found = target.stat().st_size
    if found != expected:
        raise ConnectionError(f"download of {url} ended after {found} of {expected} bytes")


def _create_s3(url: str | Path, data: bytes) -> bool:
    def attempt() -> bool:
        try:
            _s3().pipe_file(_key(url), data, mode="create")
            return True
        except Exception as error:
            # AWS names the failed condition, so s3fs raises FileExistsError. Other servers don't: s3fs raises OSError(EINVAL).
            if isinstance(error, FileExistsError) or error_code(error) in ("PreconditionFailed", "412"):
                return False
            raise

    return retrying(attempt, url, "create")
