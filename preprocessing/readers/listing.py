"""List the input of ingest: its files, and every name below it that cannot be read, with the reason."""

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Final

from dalle_ds.errors import DataError
from dalle_ds.storage import objects

log = logging.getLogger(__name__)

MAX_FILES: Final = 2_000_000
"""Maximum number of files. One process lists them and pairs them with captions: about 4 GB at the limit."""
LINK_OUT: Final = "link out of the folder"


@dataclass(frozen=True)
class Listing:
    """Paths below `root`, without hidden names."""

    root: str
    files: dict[str, int]  # path -> bytes
    problems: dict[str, str] = field(default_factory=dict)  # path -> why neither the file nor the folder is read
    is_file: bool = False  # `root` is one file, and the only one in `files`

    def url(self, path: str) -> str:
        """The url of a file."""
        return self.root if self.is_file else objects.join(self.root, path)

    def told(self, paths: Iterable[str] | None = None) -> str:
        """The files in words, for messages: "12 files (8 .zip, 3 .md, 1 without extension)"."""
        chosen = list(self.files if paths is None else paths)
        kinds = Counter(extension_of_path(path) for path in chosen).most_common(6)
        parts = [f"{count} .{kind}" if kind else f"{count} without extension" for kind, count in kinds]
        hint = ""
        if paths is None:
            parts += [f"{count} x {reason}" for reason, count in Counter(self.problems.values()).items()]
            hint = "; set ingest.follow_links=true to follow links" if LINK_OUT in self.problems.values() else ""
        return f"{len(chosen)} files ({', '.join(parts)}{hint})" if parts else "0 files"


def extension_of_path(path: str) -> str:
    return PurePosixPath(path).suffix.lower().lstrip(".")


def list_input(url: str, *, follow_links: bool = False, without: str | None = None) -> Listing:
    """List a folder (recursive) or one file. `without` is a folder below `url` that is not part of the input.

    Links to files inside the folder are read. A link that leads out is a problem unless `follow_links`.

    Raises:
        DataError: nothing exists at `url`, or more than MAX_FILES.
    """
    url = url.rstrip("/")
    root = objects.local_path(url)
    if root is not None and root.exists() and not root.is_dir():
        if not root.is_file():
            raise DataError(f"{url}: neither a folder nor a regular file")
        return _one_file(url)
    if root is None:
        listing = Listing(url, {_below(url, file): size for file, size in objects.list_sizes(url, at_most=MAX_FILES).items()})
        _require_few(url, len(listing.files))
        if not listing.files and url.count("/") > 2 and objects.exists(url):
            return _one_file(url)
    else:
        listing = _list_disk(url, root, follow_links)
    if without and without.startswith(url + "/"):
        own = _below(url, without) + "/"
        listing = Listing(
            url,
            {path: size for path, size in listing.files.items() if not path.startswith(own)},
            {path: reason for path, reason in listing.problems.items() if not path.startswith(own)},
        )
    if not listing.files and not listing.problems:
        hint = ". Patterns are not expanded: give the folder that contains the files" if set(url) & set("*{[?") else ""
        raise DataError(
            f"{url}: the folder does not exist or is empty; expected images with captions, tars or parquet files{hint}"
        )
    if n_links := list(listing.problems.values()).count(LINK_OUT):
        log.warning("%s: %d links lead out of the folder and are not read; ingest.follow_links=true reads them", url, n_links)
    return listing


def _require_few(url: str, n: int) -> None:
    if n > MAX_FILES:
        raise DataError(
            f"{url}: more than {MAX_FILES:,} files. Ingest reads a folder of single images in one process; expected tars of "
            "some thousand images each, such as img2dataset writes (output_format=webdataset), or parquet files"
        )


def _one_file(url: str) -> Listing:
    return Listing(url, {PurePosixPath(url).name: objects.size(url)}, is_file=True)


def _below(root: str, url: str) -> str:
    return url.removeprefix(root).lstrip("/")


def _list_disk(url: str, root: Path, follow_links: bool) -> Listing:
    listing = Listing(url, {})
    top = Path(os.path.realpath(root))
    visited: set[str] = set()
    folders, linked = [(root, "")], []
    while folders or linked:
        # Linked folders come last, so that a folder which is also linked keeps its own path.
        folder, base = folders.pop() if folders else linked.pop()
        real = os.path.realpath(folder)
        if real in visited:
            listing.problems[base] = "repeated folder"
            continue
        visited.add(real)
        try:
            with os.scandir(folder) as found_here:
                entries = list(islice(found_here, MAX_FILES + 1))
        except OSError:
            if not base and not root.exists():
                return listing
            listing.problems[base or "."] = "not allowed to read"
            continue
        _require_few(url, len(listing.files) + len(entries))
        for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
            path = f"{base}/{entry.name}".lstrip("/")
            if entry.name.startswith("."):
                continue
            problem, found = _look_at(entry, top, follow_links)
            if problem:
                listing.problems[path] = problem
            elif found is None:
                (linked if entry.is_symlink() else folders).append((Path(entry.path), path))
            else:
                listing.files[path] = found
    return listing


def _look_at(entry: os.DirEntry[str], top: Path, follow_links: bool) -> tuple[str, int | None]:
    # Returns (problem or "", size of a file or None for a folder).
    try:
        if entry.is_symlink() and not follow_links and not Path(os.path.realpath(entry.path)).is_relative_to(top):
            return LINK_OUT if Path(entry.path).exists() else "broken link", None
        found = entry.stat()
    except PermissionError:
        return "not allowed to read", None
    except OSError:  # the target is missing, or links form a circle
        return "broken link" if entry.is_symlink() else "missing file", None
    if stat.S_ISDIR(found.st_mode):
        return "", None
    return ("", found.st_size) if stat.S_ISREG(found.st_mode) else ("not a regular file", None)
