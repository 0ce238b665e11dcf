"""The requests to S3 that `objects` consists of. A name is never a pattern: the request names exactly the given objects."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn
from fsspec.callbacks import Callback

from dalle_ds.errors import ConfigError
from dalle_ds.storage.retry import error_code, retrying, status_of

READ_TIMEOUT_SECONDS = 60  # a response that sends no byte for this time has stalled
PART_BYTES = 8 << 20  # part size of multipart transfers; N_PARTS parts are in memory at the same time
N_PARTS = 4
MAX_PARTS = 10_000  # S3's maximum number of parts of one object
MAX_DELETED = 1_000  # S3's maximum number of objects that one request deletes


def client() -> Any:
    """The fsspec file system of the S3 server that the AWS_* variables name.

    Raises:
        ConfigError: the variable of the endpoint contains no url.
    """
    # The cache key includes the process id: a client created before a fork hangs or raises in the child.
    return _client(
        os.getpid(),
        _endpoint(),
        os.environ.get("AWS_ACCESS_KEY_ID"),
        os.environ.get("AWS_SECRET_ACCESS_KEY"),
        READ_TIMEOUT_SECONDS,
    )


def _endpoint() -> str | None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if endpoint := os.environ.get(name):
            if not _is_url(endpoint):
                raise ConfigError(
                    f"{name}={endpoint}: expected a url such as https://HOST:PORT, with letters, digits, - and . in HOST"
                )
            return endpoint
    return None


def _is_url(endpoint: str) -> bool:
    from botocore.utils import is_valid_endpoint_url  # takes a tenth of a second, which only storage on S3 needs

    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # reading the port checks it
    except ValueError:
        return False
    return is_url and is_valid_endpoint_url(endpoint)  # it refuses more, such as _, by a ValueError at the first request


@functools.lru_cache(maxsize=4)
def _client(_pid: int, endpoint: str | None, _access_key: str | None, _secret_key: str | None, read_timeout: float) -> Any:
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


def key_of(url: str | Path) -> str:
    """Bucket and key, "BUCKET/KEY"."""
    return str(url).removeprefix("s3://")


def size(url: str | Path) -> int:
    """Size of an object in bytes. Raises FileNotFoundError if it does not exist."""
    return int(_head(url)["ContentLength"])


def etag(url: str | Path) -> str:
    """The ETag of an object. Raises FileNotFoundError if it does not exist."""
    return str(_head(url)["ETag"]).strip('"')


def _head(url: str | Path) -> dict[str, Any]:
    bucket, _, key = key_of(url).partition("/")
    return client().call_s3("head_object", Bucket=bucket, Key=key)


def read(url: str | Path) -> bytes:
    """One GET of the whole object."""
    # With more parts than one, s3fs would first ask for the size: two requests, and twice the latency, for a small object.
    return client().cat_file(key_of(url), max_concurrency=1)


def read_range(url: str | Path, offset: int, length: int) -> bytes:
    """One ranged GET. Returns fewer bytes if the object ends earlier."""
    try:
        return client().cat_file(key_of(url), start=offset, end=offset + length)
    except OSError as error:
        if status_of(error) == 416:  # the object ends before `offset`
            return b""
        raise


def download(url: str | Path, target: Path) -> None:
    """Download an object, in parts if it is large. Raises ConnectionError if the download ends early."""
    told = Callback()  # s3fs tells it the size that the response to the first GET names
    client().get_file(key_of(url), str(target), callback=told)
    found = target.stat().st_size
    if found != told.size:
        raise ConnectionError(f"download of {url} ended after {found} of {told.size} bytes")


def upload(local: str | Path, url: str | Path) -> None:
    """Upload a file in parts, of a size that S3's maximum number of parts allows."""
    part_bytes = max(PART_BYTES, -(-Path(local).stat().st_size // MAX_PARTS))
    client().put_file(str(local), key_of(url), chunksize=part_bytes)


def find(prefix_url: str | Path, at_most: int | None) -> dict[str, tuple[int, float]]:
    """{name relative to the folder: (bytes, seconds since 1970)} of the objects below a folder.

    Args:
        at_most: end the listing after this number of objects and one more. None: list all.

    Raises:
        FileNotFoundError: the bucket or the folder does not exist.
    """
    prefix = key_of(prefix_url).rstrip("/") + "/"
    # SeaweedFS lists the folder itself after its last file was deleted.
    return {
        key.removeprefix(prefix): (int(entry["size"]), entry["LastModified"].timestamp())
        for key, entry in _listed(prefix, at_most).items()
        if entry["type"] == "file" and key.startswith(prefix) and not key.endswith("/")
    }


def _listed(prefix: str, at_most: int | None) -> dict[str, dict[str, Any]]:
    # {"BUCKET/KEY": fsspec's info}
    file_system = client()
    if at_most is None:
        return file_system.find(prefix, detail=True)

    async def first() -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        bucket, _, key = prefix.partition("/")
        async for entry in file_system._iterdir(bucket, delimiter="", prefix=key):  # `find` would hold all pages
            found[entry["name"]] = entry
            if len(found) > at_most:
                break
        return found

    return fsspec.asyn.sync(file_system.loop, first)


def unfinished_uploads(root: str | Path) -> list[tuple[str, str, float]]:
    """Uploads in parts below a folder that were neither completed nor aborted: (key, id, seconds since 1970 when it began).

    Killed processes leave them. They are in no listing of objects, but their parts are stored. Tried once, not repeated.
    """
    bucket, _, prefix = key_of(root).partition("/")
    found: list[tuple[str, str, float]] = []
    marker: dict[str, str] = {}
    while True:
        answer = client().call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix.rstrip('/')}/", **marker)
        uploads = answer.get("Uploads", [])
        found += [(upload["Key"], upload["UploadId"], upload["Initiated"].timestamp()) for upload in uploads]
        if not answer.get("IsTruncated") or not uploads:
            return found
        marker = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}


def abort_upload(root: str | Path, key: str, upload_id: str) -> None:
    """Delete the parts of an unfinished upload. `root` names the bucket."""
    client().call_s3("abort_multipart_upload", Bucket=key_of(root).partition("/")[0], Key=key, UploadId=upload_id)


def create(url: str | Path, data: bytes) -> bool:
    """Create an object unless it exists. Returns whether it was created."""

    def attempt() -> bool:
        try:
            client().pipe_file(key_of(url), data, mode="create")
            return True
        except Exception as error:
            # AWS names the failed condition, so s3fs raises FileExistsError. Other servers don't: s3fs raises OSError(EINVAL).
            if isinstance(error, FileExistsError) or error_code(error) in ("PreconditionFailed", "412"):
                return False
            raise

    return retrying(attempt, url, "create")


def delete(root: str | Path, urls: Sequence[str]) -> None:
    """Delete objects of one bucket, a thousand per request. `root` is for messages.

    fsspec's `rm` is not used: it expands [, * and ? in names, and so deletes objects that `urls` does not contain.

    Raises:
        PermissionError, OSError: S3 refuses to delete an object.
    """
    for start in range(0, len(urls), MAX_DELETED):
        part = urls[start : start + MAX_DELETED]
        retrying(lambda part=part: _delete(part), root, "delete")


def _delete(urls: Sequence[str]) -> None:
    bucket = key_of(urls[0]).partition("/")[0]
    listed = {"Objects": [{"Key": key_of(url).removeprefix(f"{bucket}/")} for url in urls], "Quiet": True}
    refused = client().call_s3("delete_objects", Bucket=bucket, Delete=listed).get("Errors") or []
    if refused:
        kind = PermissionError if refused[0].get("Code") == "AccessDenied" else OSError
        raise kind(f"{len(refused)} of {len(urls)} objects, the first {refused[0].get('Key')}: {refused[0].get('Message')}")
