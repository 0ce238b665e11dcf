"""SHA-256 hashes of files and bytes, and integer hashes of text."""

import hashlib
from pathlib import Path
from typing import Literal


def sha256_of_file(path: Path) -> str:
    """SHA-256 of the file's content as 64 hex characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_bytes(data: bytes) -> str:
    """SHA-256 of the bytes as 64 hex characters."""
    return hashlib.sha256(data).hexdigest()


def hash_to_integer(text: str, byteorder: Literal["big", "little"] = "big") -> int:
    """The first eight bytes of the text's SHA-256 as an integer, uniform from 0 to 2^64 - 1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], byteorder)
