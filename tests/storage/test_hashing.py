"""Hashes have fixed values, since splits, crops and samples depend on them."""

import hashlib
from pathlib import Path

from dalle_ds.storage.hashing import hash_to_integer, sha256_of_file


def test_integers_are_pinned() -> None:
    digest = hashlib.sha256(b"split:cat").digest()
    assert hash_to_integer("split:cat") == int.from_bytes(digest[:8], "big")
    assert hash_to_integer("split:cat", "little") == int.from_bytes(digest[:8], "little")
    assert hash_to_integer("\N{CAT FACE}") == 0x46EEAF23EDD9726B


def test_a_file_has_the_hash_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()
