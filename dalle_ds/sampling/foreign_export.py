"""Open an export on storage that only fsspec can read. The files are first copied to a temporary folder."""

import tempfile
from dataclasses import replace
from pathlib import Path

from dalle_ds.errors import DataError
from dalle_ds.sampling.export import Export, load_export
from dalle_ds.sampling.export_record import RECORD_FILE
from dalle_ds.storage.foreign import ForeignFolder
from dalle_ds.storage.names import DVAE_FILE, PRIOR_FILE, TOKENIZER_FILE
from dalle_ds.storage.weights import fetch_weights


def load_foreign_export(url: str, device: str) -> Export:
    """`load_export` for any url that fsspec can read. The disk for temporary files must have space for the export.

    Raises:
        ConfigError: fsspec cannot read this kind of url.
        DataError, FingerprintMismatch: as `load_export`.
    """
    folder = ForeignFolder(url)
    with tempfile.TemporaryDirectory(prefix="dalle-ds-") as local:

        def fetch(name: str) -> Path:
            return folder.copy(name, Path(local) / name)

        try:
            for name in (RECORD_FILE, TOKENIZER_FILE, DVAE_FILE):
                fetch(name)
            fetch_weights(PRIOR_FILE, fetch)
        except FileNotFoundError as error:
            raise DataError(f"{error}; this is not an export folder: `dalle-ds export` writes one") from None
        return replace(load_export(local, device), url=url)
