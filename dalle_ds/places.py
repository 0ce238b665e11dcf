"""Check places that users name, paths and urls, before any work uses them.

Without the check, a url that lacks a part of its scheme, such as s3:/bucket/x, would be a local path.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Literal

from dalle_ds.errors import DataError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/|(s3|file|gs|hf|https?)(:|//)", re.IGNORECASE)
"""Start of a url, complete or not. A folder whose name looks like one can be given as ./NAME."""
S3 = re.compile(r"s3://[^/]")
OTHER = re.compile(r"(?!(s3|file):)[A-Za-z][A-Za-z0-9+.-]*://[^/]", re.IGNORECASE)
"""Start of a complete url of storage that is only read."""
VERSION = "?versionId="
STORE = re.compile(r"(https?://[^/]|(sqlite|postgresql|mysql|mssql)(\+\w+)?://|file:/|databricks(-uc)?($|://)|uc:)")


def check_place(place: str | Path) -> None:
    """Check that `place` is a path or a complete url. Raises DataError if not.

    Whether fsspec knows the scheme of a url is found out by the first read (`storage/other_requests.py`).
    """
    text = str(place)
    if not text:
        raise DataError("an empty text, perhaps of a variable that is not set; expected a path or a url")
    found = SCHEME.match(text)
    if VERSION in text and S3.match(text):  # s3fs would cut it off: the rest names another object
        raise DataError(f"{text}: names a version of an object; expected the name of an object or prefix, without {VERSION}")
    if found is None or S3.match(text) or OTHER.match(text) or text.startswith("file://"):
        return
    scheme, rest = (found[1] or found[2]).lower(), text[found.end() :].lstrip(":/")
    if scheme in ("s3", "file", "gs", "hf", "http", "https"):
        complete = f"file:///{rest}" if scheme == "file" else f"{scheme}://{rest or 'bucket'}"
        raise DataError(f"{text}: incomplete url; expected {complete}")
    raise DataError(f"{text}: unknown URL scheme; expected a path, file://, s3:// or another url that fsspec reads")


def expand_home(place: str) -> str:
    """Replace ~ or ~USER at the start by the home folder. A shell does not do it in quotes or after KEY=.

    Raises:
        DataError: there is no such user. A folder whose name starts with ~ can be given as ./~NAME.
    """
    if not place.startswith("~"):
        return place
    try:
        return str(Path(place).expanduser())
    except RuntimeError:
        user = place.partition("/")[0]
        raise DataError(f"{place}: no home folder of {user}; expected ~/..., ~USER/..., or ./{user}/... for a folder") from None


def check_local(place: str | Path) -> None:
    """Check that `place` is a local path. Raises DataError if it is empty, or a url, complete or not."""
    if place == "":
        raise DataError("an empty text, perhaps of a variable that is not set; expected a path")
    if SCHEME.match(str(place)):
        raise DataError(f"{place}: expected a local path, not a url")


def check_text(text: str) -> None:
    """Check that `text` can be stored. Raises DataError if it has bytes that are not UTF-8, as arguments may have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{ascii(text)[:200]} is not UTF-8; expected text in UTF-8") from None


def check_store(uri: str) -> None:
    """Check that `uri` names an MLflow store. Raises DataError if not, as for a server without http://, or a SQLite file below
    ~, which MLflow would create in a folder named ~."""
    if not STORE.match(uri):
        raise DataError(f"{uri}: expected http(s)://..., sqlite:///... or postgresql://...")
    if re.match(r"(sqlite(\+\w+)?:///|file:/+)~", uri):
        raise DataError(f"{uri}: ~ is not replaced in the url of a store; expected the path of the home folder, {Path.home()}")


def check_writable_scheme(place: str | Path) -> None:
    """Raises DataError if `place` is a url of storage that is only read."""
    if OTHER.match(str(place)):
        raise DataError(f"{place}: is only read, not written; expected a path, file:// or s3://")


def check_output(place: str | Path, kind: Literal["folder", "file"]) -> None:
    """Check that a local output can be created. Leaves nothing behind; object storage is not asked.

    Raises:
        DataError: `place` is a file instead of a folder or the reverse, or nothing can be created there.
    """
    text = str(place)
    check_writable_scheme(text)
    if text.startswith("s3://"):
        return
    path = Path(text.removeprefix("file://")).absolute()
    if kind == "file" and path.is_dir():
        raise DataError(f"{place}: is a folder; expected the path of a file")
    folder = path if kind == "folder" else path.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        # create something: below /proc the kernel refuses folders even though permissions allow them
        Path(tempfile.mkdtemp(prefix=".dalle-ds-", dir=folder)).rmdir()
    except OSError as error:
        why = f"{error.strerror or error}: {folder}"
        raise DataError(f"{place}: cannot be created ({why}); expected a {kind} that can be written") from None
