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
STORE = re.compile(r"(https?://[^/]|(sqlite|postgresql|mysql|mssql)(\+\w+)?://|file:/|databricks(-uc)?($|://)|uc:)")


def check_place(place: str | Path) -> None:
    """Check that `place` is a path, a file:// url or an s3:// url. Raises DataError if it is another or an incomplete url."""
    text = str(place)
    found = SCHEME.match(text)
    if found is None or S3.match(text) or text.startswith("file://"):
        return
    scheme, rest = (found[1] or found[2]).lower(), text[found.end() :].lstrip(":/")
    if scheme in ("s3", "file"):
        complete = f"s3://{rest or 'bucket'}" if scheme == "s3" else f"file:///{rest}"
        raise DataError(f"{text}: incomplete url; expected {complete}")
    raise DataError(f"{text}: unknown URL scheme; expected a path, file:// or s3://")


def expand_home(place: str) -> str:
    """Replace ~ or ~USER at the start by the home folder. A shell does not do it in quotes or after KEY=."""
    return str(Path(place).expanduser()) if place.startswith("~") else place


def check_local(place: str | Path) -> None:
    """Check that `place` is a local path. Raises DataError if it is a url, complete or not."""
    if SCHEME.match(str(place)):
        raise DataError(f"{place}: expected a local path, not a url")


def check_store(uri: str) -> None:
    """Check that `uri` names an MLflow store. Raises DataError if not, as for a server without http://."""
    if not STORE.match(uri):
        shown = uri.rpartition("@")[2]  # without a password
        raise DataError(f"{shown}: expected http(s)://..., sqlite:///... or postgresql://...")


def check_output(place: str | Path, kind: Literal["folder", "file"]) -> None:
    """Check that a local output can be created. Leaves nothing behind; object storage is not asked.

    Raises:
        DataError: `place` is a file instead of a folder or the reverse, or nothing can be created there.
    """
    text = str(place)
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
