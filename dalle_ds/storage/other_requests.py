"""Reads from storage that only fsspec reaches, such as gs://, az://, hf:// and https://. Nothing is written there."""

from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.registry import available_protocols, known_implementations

from dalle_ds.errors import ConfigError, DataError

_TIMES = ("mtime", "updated", "last_modified", "created")


def read(url: str | Path) -> bytes:
    """The whole object."""
    files, path = _at(url)
    return files.cat_file(path)


def read_range(url: str | Path, offset: int, length: int) -> bytes:
    """Bytes of the object from `offset`. Fewer if the object ends earlier."""
    files, path = _at(url)
    data = files.cat_file(path, start=offset, end=offset + length)
    # a web server that knows no ranges sends the whole object
    return data if len(data) <= length else data[offset : offset + length]


def download(url: str | Path, target: Path) -> None:
    """Download an object. Raises ConnectionError if the download ends early."""
    files, path = _at(url)
    expected = files.info(path).get("size")  # some web servers do not tell it
    files.get_file(path, str(target))
    found = target.stat().st_size
    if expected is not None and found != expected:
        raise ConnectionError(f"download of {url} ended after {found} of {expected} bytes")


def size(url: str | Path) -> int:
    """Size of the object in bytes. Raises FileNotFoundError if it does not exist."""
    info = _info(url)
    return int(info["size"]) if info.get("size") is not None else len(read(url))


def etag(url: str | Path) -> str | None:
    """The ETag of the object. None if the storage tells none."""
    info = _info(url)
    found = next((info[key] for key in ("etag", "ETag") if info.get(key)), None)
    return None if found is None else str(found).strip('"')


def find(prefix: str | Path, at_most: int | None) -> dict[str, tuple[int, float]]:
    """{name relative to the folder: (bytes, seconds since 1970)} of all objects below a folder.

    The time is 0 on storage that does not tell it. Of web servers, only those list that answer with a page of links.

    Args:
        at_most: return this number of objects and one more at most. None: all.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    files, path = _at(prefix)
    root = path.rstrip("/") + "/"
    entries = files.find(root, detail=True)
    found: dict[str, tuple[int, float]] = {}
    for name, entry in entries.items():
        if at_most is not None and len(found) > at_most:
            break
        if name.startswith(root) and name != root:
            n_bytes = files.size(name) if entry.get("size") is None else entry["size"]
            times = (entry[key] for key in _TIMES if isinstance(entry.get(key), datetime))
            found[name.removeprefix(root)] = int(n_bytes or 0), next((time.timestamp() for time in times), 0.0)
    return found


def _info(url: str | Path) -> dict[str, Any]:
    files, path = _at(url)
    info = files.info(path)
    if info["type"] != "file":
        raise FileNotFoundError(f"{url}: no such object")
    return info


def _at(url: str | Path) -> tuple[Any, str]:
    """The file system of the url's scheme, and the object's path in it.

    Raises:
        DataError: fsspec does not know the scheme.
        ConfigError: the package for this scheme is not installed, or it needs settings.
    """
    scheme = str(url).partition("://")[0].lower()
    try:
        # a listing that is kept would miss what others write
        return fsspec.core.url_to_fs(str(url), use_listings_cache=False)
    except ImportError as error:
        package = known_implementations[scheme]["class"].partition(".")[0].replace("_", "-")
        how = f"expected the package {package}: pip install {package}" if package != "fsspec" else str(error)
        raise ConfigError(f"{url}: {scheme}:// cannot be read here; {how}") from None
    except ValueError as error:
        if scheme not in available_protocols():
            known = "a path, file://, s3:// or another url that fsspec reads"
            raise DataError(f"{url}: unknown URL scheme; expected {known}") from None
        raise ConfigError(f"{url}: {error}") from None  # adlfs without an account, say
