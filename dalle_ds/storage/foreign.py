"""Copy files from storage that fsspec supports but `objects` does not (https://, gs://, hf://)."""

from pathlib import Path

import fsspec

from dalle_ds.errors import ConfigError, DataError


class ForeignFolder:
    """A remote folder, given by its URL. Its files are copied before use.

    Raises:
        ConfigError: fsspec does not support this URL scheme, or the package for it is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{url}: expected a path, s3:// or another URL that fsspec supports: {error}") from None

    def copy(self, name: str, target: Path) -> Path:
        """Copy a file of the folder to `target`. Returns `target`.

        Raises:
            FileNotFoundError: the file does not exist.
            DataError: the file cannot be read.
        """
        path = "/".join(part for part in (self._root.rstrip("/"), name) if part)
        try:
            self._files.get_file(path, str(target))
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.url}: no file {name}") from None
        except Exception as error:  # every file system of fsspec has its own exceptions
            raise DataError(f"{self.url}: file {name} cannot be read ({type(error).__name__}: {error})") from None
        return target
