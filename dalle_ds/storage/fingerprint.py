"""Fingerprints: what a thing was made from, as a short hash that travels with everything made of it."""

import hashlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dalle_ds.errors import FingerprintMismatch
from dalle_ds.recipes import canonical_json

if TYPE_CHECKING:  # importing torch takes seconds, which ingest and its worker processes need not wait
    import torch

LENGTH = 20  # hex characters: 80 bits


def fingerprint(
    config: Mapping[str, Any],
    arrays: "Mapping[str, torch.Tensor | np.ndarray | bytes] | None" = None,
    *,
    with_dtypes: bool = True,
) -> str:
    """Hash of a JSON-like config and of named arrays (names, dtypes, shapes and bytes; the order of names is of no matter).

    Args:
        with_dtypes: False where all arrays have one dtype that is known, as CLIP's, whose fingerprint never held it.
    """
    hasher = FingerprintHasher(config, with_dtypes=with_dtypes)
    for name, array in sorted((arrays or {}).items()):
        hasher.add(name, array)
    return hasher.value()


class FingerprintHasher:
    """`fingerprint`, for arrays that are not in memory together: they are added one after another, in the order of names."""

    def __init__(self, config: Mapping[str, Any], *, with_dtypes: bool = True) -> None:
        self._digest = hashlib.sha256(canonical_json(dict(config)).encode())
        self._with_dtypes, self._last = with_dtypes, ""

    def add(self, name: str, array: "torch.Tensor | np.ndarray | bytes") -> None:
        """Raises ValueError for a name that does not come after the last one."""
        if name <= self._last:
            raise ValueError(f"{name} was added after {self._last}, expected ascending names")
        self._last = name
        dtype, shape, data = _content(array)
        about = (name, dtype, shape) if self._with_dtypes else (name, shape)
        self._digest.update(("\n" + "".join(f"{part}\0" for part in about)).encode())
        self._digest.update(data)

    def value(self) -> str:
        """The fingerprint of what was added so far."""
        return self._digest.hexdigest()[:LENGTH]


def require_same(what: str, expected: str, found: str, hint: str = "") -> None:
    """Raise FingerprintMismatch, with both fingerprints, unless they are equal."""
    if expected != found:
        raise FingerprintMismatch(what, expected, found, hint)


def _content(array: "torch.Tensor | np.ndarray | bytes") -> tuple[str, tuple[int, ...], Any]:
    if isinstance(array, bytes):
        return "bytes", (len(array),), array
    torch = sys.modules.get("torch")  # whoever passes a tensor has imported it
    if torch is not None and isinstance(array, torch.Tensor):
        # Bytes through a uint8 view: numpy has no bfloat16.
        flat = array.detach().cpu().contiguous().reshape(-1)
        return str(array.dtype).removeprefix("torch."), tuple(array.shape), memoryview(flat.view(torch.uint8).numpy())
    return array.dtype.name, tuple(array.shape), memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
