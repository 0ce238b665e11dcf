"""Folders on storage that fsspec reads and `objects` does not (https://, gs://, hf://): their files are copied here."""

from pathlib import Path

import fsspec

from dalle_ds.errors import ConfigError, DataError


class ForeignFolder:
    """A folder by its url, to be read once.

    Raises:
        ConfigError: fsspec does not know this kind of url, or lacks the package that reads it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{url}: expected a path, s3:// or another url that fsspec reads: {error}") from None

    def copy(self, name: str, target: Path) -> Path:
        """Copy a file of the folder to `target` -> `target`.

        Raises:
            FileNotFoundError: there is none. DataError: the storage does not give it.
        """
        path = "/".join(part for part in (self._root.rstrip("/"), name) if part)
        try:
            self._files.get_file(path, str(target))
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.url}: no file {name}") from None
        except Exception as error:  # every file system of fsspec has errors of its own
            raise DataError(f"{self.url}: file {name} cannot be read ({type(error).__name__}: {error})") from None
        return target
