"""Fingerprints: short hashes of configs and arrays, stored with everything that is made from them."""

import hashlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dalle_ds.errors import FingerprintMismatch
from dalle_ds.recipes import canonical_json

if TYPE_CHECKING:  # importing torch takes seconds, and ingest and its worker processes do not need it
    import torch

LENGTH = 20  # hex characters: 80 bits


def fingerprint(
    config: Mapping[str, Any],
    arrays: "Mapping[str, torch.Tensor | np.ndarray | bytes] | None" = None,
    *,
    with_dtypes: bool = True,
) -> str:
    """Hash of a JSON-like config and of named arrays (names, dtypes, shapes and bytes). The order of `arrays` is irrelevant.

    Args:
        with_dtypes: whether to hash dtypes. False for CLIP, whose arrays have one known dtype and whose fingerprint never
            included it.
    """
    hasher = FingerprintHasher(config, with_dtypes=with_dtypes)
    for name, array in sorted((arrays or {}).items()):
        hasher.add(name, array)
    return hasher.value()


class FingerprintHasher:
    """Computes `fingerprint` incrementally, for arrays that do not fit into memory together.

    Arrays must be added in ascending order of their names.
    """

    def __init__(self, config: Mapping[str, Any], *, with_dtypes: bool = True) -> None:
        self._digest = hashlib.sha256(canonical_json(dict(config)).encode())
        self._with_dtypes, self._last = with_dtypes, ""

    def add(self, name: str, array: "torch.Tensor | np.ndarray | bytes") -> None:
        """Add an array.

        Raises:
            ValueError: the name does not come after the previous name.
        """
        if name <= self._last:
            raise ValueError(f"{name} was added after {self._last}, expected ascending names")
        self._last = name
        dtype, shape, data = _content(array)
        about = (name, dtype, shape) if self._with_dtypes else (name, shape)
        self._digest.update(("\n" + "".join(f"{part}\0" for part in about)).encode())
        self._digest.update(data)

    def value(self) -> str:
        """The fingerprint of the config and all arrays added so far."""
        return self._digest.hexdigest()[:LENGTH]


def require_same(what: str, expected: str, found: str, hint: str = "") -> None:
    """Raise FingerprintMismatch with both fingerprints if they differ."""
    if expected != found:
        raise FingerprintMismatch(what, expected, found, hint)


def _content(array: "torch.Tensor | np.ndarray | bytes") -> tuple[str, tuple[int, ...], Any]:
    if isinstance(array, bytes):
        return "bytes", (len(array),), array
    torch = sys.modules.get("torch")  # if `array` is a tensor, torch is already imported
    if torch is not None and isinstance(array, torch.Tensor):
        # Read the bytes through a uint8 view, since numpy has no bfloat16.
        flat = array.detach().cpu().contiguous().reshape(-1)
        return str(array.dtype).removeprefix("torch."), tuple(array.shape), memoryview(flat.view(torch.uint8).numpy())
    return array.dtype.name, tuple(array.shape), memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
