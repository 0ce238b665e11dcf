"""Storage: the same small functions for plain paths, file:// and s3://; for reading, all that fsspec reaches.

An object is complete or absent.

No function streams into the final object: an exception inside fsspec's `open(url, "wb")` commits a partial file on S3.
Every write is one PUT, one multipart upload that is completed at its end, or a temporary file that is renamed.

S3 endpoint and keys come from the standard AWS_* variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
Transient S3 faults are retried (see retry.py).
Start processes that use S3 with spawn or forkserver, never with fork.
"""

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dalle_ds.errors import Damaged, DataError
from dalle_ds.places import OTHER, check_place, check_writable_scheme
from dalle_ds.storage import other_requests, s3_requests
from dalle_ds.storage.atomic import atomic_write, sync_file, temporary_beside
from dalle_ds.storage.retry import retrying
from dalle_ds.storage.scratch import scratch_folder

RANGE_BYTES = 64 << 20  # size of one GET of `read_into`, and of its buffer


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def is_s3(url: str | Path) -> bool:
    return str(url).startswith("s3://")


def local_path(url: str | Path) -> Path | None:
    """The path of a local URL. None for s3:// and other remote storage.

    Raises:
        DataError: the URL is incomplete.
    """
    text = str(url)
    check_place(text)
    if is_s3(text) or OTHER.match(text):
        return None
    return Path(text.removeprefix("file://"))


def _output_path(url: str | Path) -> Path | None:
    """The path of a local URL. None for s3://. Raises DataError for other remote storage, which is only read."""
    check_writable_scheme(url)
    return local_path(url)


def _requests(url: str | Path) -> Any:
    """The module with the requests to this remote storage."""
    return s3_requests if is_s3(url) else other_requests


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
        DataError: S3 was unreachable for DALLE_DS_RETRY_SECONDS; or it is a device or a pipe, which may have no end.
    """
    path = local_path(url)
    if path is not None:
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):  # the error of a folder says what it is
            raise DataError(f"{url}: a device or a pipe, expected a regular file")
        return path.read_bytes()
    return retrying(lambda: _requests(url).read(url), url, "read")


def read_range(url: str | Path, offset: int, length: int) -> bytes:
    """Read exactly `length` bytes from `offset`, by one ranged GET.

    Raises:
        Damaged: the object ends before offset + length.
    """
    path = local_path(url)
    if path is not None:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    else:
        data = retrying(lambda: _requests(url).read_range(url, offset, length), url, "read")
    if len(data) != length:
        raise Damaged(f"{url}: {len(data)} bytes at offset {offset}, expected {length}; the object is truncated")
    return data


def read_into(url: str | Path, offset: int, target: memoryview) -> None:
    """Fill `target` with the object's bytes from `offset`. On S3 each ranged GET reads RANGE_BYTES.

    Raises:
        Damaged: the object ends before `target` is full.
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
                raise Damaged(f"{url}: {len(target)} bytes are missing at its end; the file is truncated")
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
    with scratch_folder() as folder:
        target = folder / "copy"
        retrying(lambda: _requests(url).download(url, target), url, "download")
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
    return retrying(lambda: _requests(url).size(url), url, "look up")


def etag(url: str | Path) -> str | None:
    """The object's ETag. None on local disks, and on storage that has none."""
    return None if local_path(url) is not None else retrying(lambda: _requests(url).etag(url), url, "look up")


def version(url: str | Path) -> str:
    """What changes when the object is replaced, without reading it: size and times on local disks, else the ETag or the size.

    Raises:
        FileNotFoundError: the object does not exist.
    """
    path = local_path(url)
    if path is not None:
        found = path.stat()
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    return etag(url) or str(size(url))


def list_files(prefix_url: str | Path, suffix: str = "") -> list[str]:
    """Sorted URLs of all objects below a folder (recursive), without hidden names. Each URL starts with `prefix_url`."""
    return sorted(list_sizes(prefix_url, suffix))


def list_sizes(prefix_url: str | Path, suffix: str = "", *, at_most: int | None = None) -> dict[str, int]:
    """Like `list_files`, but returns {url: bytes}. Empty if the folder does not exist.

    Args:
        at_most: on s3://, end the listing after this number of objects and one more. None: list all.
    """
    return {url: n_bytes for url, (n_bytes, _) in _list(prefix_url, suffix, at_most).items()}


def list_times(prefix_url: str | Path, suffix: str = "") -> dict[str, float]:
    """Like `list_files`, but returns {url: when it was written, in seconds since 1970}. Empty if the folder does not exist."""
    return {url: written for url, (_, written) in _list(prefix_url, suffix).items()}


def _list(prefix_url: str | Path, suffix: str, at_most: int | None = None) -> dict[str, tuple[int, float]]:
    # {url: (bytes, when it was written)}
    root = local_path(prefix_url)
    found: dict[str, tuple[int, float]] = {}
    if root is not None:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for name in names:
                if name.endswith(suffix) and not name.startswith("."):
                    file = Path(folder) / name
                    with suppress(FileNotFoundError):  # deleted after it was listed
                        stat = file.stat()
                        found[join(prefix_url, file.relative_to(root).as_posix())] = stat.st_size, stat.st_mtime
        return found
    try:
        listed = retrying(lambda: _requests(prefix_url).find(prefix_url, at_most), prefix_url, "list")
    except FileNotFoundError:
        return {}
    return {join(prefix_url, name): told for name, told in listed.items() if name.endswith(suffix)}


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_bytes(url: str | Path, data: bytes) -> None:
    """Create or replace the object atomically: readers see the old or the new content, never a part."""
    path = _output_path(url)
    if path is None:
        retrying(lambda: s3_requests.client().pipe_file(s3_requests.key_of(url), data), url, "write")
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def create_exclusive(url: str | Path, data: bytes) -> bool:
    """Create the object only if it does not exist. Of several writers on any machines, the first wins.

    Returns:
        True if the object now contains `data`. False if it already had other content. Existing content equal to `data` counts
        as success, so that a retry after a lost response does not fail. Include an attempt id in `data` to distinguish writers.
    """
    path = _output_path(url)
    created = _create_local(path, data) if path is not None else s3_requests.create(url, data)
    return created or read_bytes(url) == data


def put_file(local: str | Path, url: str | Path) -> None:
    """Upload a finished local file, atomically."""
    path = _output_path(url)
    if path is None:
        retrying(lambda: s3_requests.upload(local, url), url, "upload")
        return
    with atomic_write(path) as temporary:
        shutil.copyfile(local, temporary)


def move_file(local: str | Path, url: str | Path) -> None:
    """Like `put_file`, but also removes the local file. On the same disk the file is renamed, not copied."""
    path = _output_path(url)
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
    path = _output_path(url)
    if path is None:
        with scratch_folder() as folder:
            spool = folder / "spool"
            yield spool
            put_file(spool, url)
        return
    with atomic_write(path) as temporary:  # on the same disk as `path`, so that large files are not copied
        yield temporary


def delete(url: str | Path) -> None:
    """Delete the object. Does nothing if it does not exist."""
    path = _output_path(url)
    with suppress(FileNotFoundError):
        if path is not None:
            path.unlink()
        else:
            retrying(lambda: s3_requests.client().rm_file(s3_requests.key_of(url)), url, "delete")


def delete_tree(url: str | Path) -> None:
    """Delete all objects below a folder, and on a local disk the folder itself. Does nothing if it does not exist."""
    path = _output_path(url)
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)
        return
    s3_requests.delete(url, list_files(url))


def check_writable(url: str | Path) -> None:
    """Check that objects can be written below an s3:// url, by writing and deleting an empty one. Local paths are not checked.

    Raises:
        DataError: the bucket does not exist, or S3 cannot be reached.
        PermissionError: the keys do not allow it.
    """
    if not is_s3(url):
        return
    probe = join(url, f".dalle-ds-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
    except FileNotFoundError:
        raise DataError(f"{url}: no such bucket; expected one that exists, since outputs create none") from None
    except (DataError, PermissionError) as error:
        raise type(error)(str(error).replace(probe, str(url))) from None
    with suppress(PermissionError):  # a store may allow to write only
        delete(probe)


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
