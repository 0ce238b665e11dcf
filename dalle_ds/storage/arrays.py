"""Read .npz and .npy files that may be damaged or hostile: no pickle, and one error for all that can be wrong."""

import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dalle_ds.errors import Damaged

_DAMAGE = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error),
    NotImplementedError,  # zipfile: an unknown compression or version, of one changed bit
    RuntimeError,  # zipfile: an encrypted member
    MemoryError,  # a header that claims terabytes
    OverflowError,
)
"""What numpy and zipfile raise for damaged files. A test tries every changed bit."""


def read_npz(source: Path | BinaryIO) -> dict[str, np.ndarray]:
    """All arrays of an .npz file by name.

    Raises:
        FileNotFoundError: the file does not exist.
        Damaged: it is not an .npz file, or not the one that was written.
    """
    try:
        found = np.load(source, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError("a single array, expected an .npz file")
        with found as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise Damaged(f"{_name(source)} is damaged: {type(error).__name__}: {error}") from None


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy file. Raises as `read_npz`."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header may claim terabytes
        if not isinstance(found, np.ndarray):
            raise ValueError("several arrays, expected an .npy file")
        return np.array(found)
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise Damaged(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _name(source: Path | BinaryIO) -> str:
    return str(source) if isinstance(source, Path) else "its content"
