"""Tensors stored in files, described by dtype, shape and byte ranges, and read one at a time.

Files are read, not memory-mapped: mapped pages count as memory of the process until the mapping is closed, and would add up to
the whole model.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_ds.errors import DataError
from dalle_ds.storage import objects

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Dtype names in safetensors headers."""

MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Piece:
    """A range of bytes in a file or object."""

    url: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor. Its content is the concatenation of `pieces`."""

    dtype: torch.dtype
    shape: torch.Size
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        found = sum(piece.n_bytes for piece in self.pieces)
        if found != self.nbytes:
            raise ValueError(f"pieces have {found} bytes, {self.dtype} of shape {tuple(self.shape)} needs {self.nbytes}")

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read the tensor into new memory.

        Raises:
            DataError: a file is truncated.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        target = content_bytes(tensor)
        for piece in self.pieces:
            objects.read_into(piece.url, piece.offset, target[: piece.n_bytes])
            target = target[piece.n_bytes :]
        return tensor

    def in_file(self, file: Path) -> "StoredTensor":
        """The same tensor, read from `file`, which must be a copy of its file."""
        return replace(self, pieces=tuple(replace(piece, url=str(file)) for piece in self.pieces))


def content_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    # Use a uint8 view, since numpy has no bfloat16.
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def cut(pieces: Iterable[Piece], start: int, n_bytes: int) -> tuple[Piece, ...]:
    """The byte range from start to start + n_bytes of the concatenated pieces.

    Raises:
        ValueError: the pieces end before.
    """
    found = []
    for piece in pieces:
        first = min(start, piece.n_bytes)
        taken = min(n_bytes, piece.n_bytes - first)
        if taken:
            found.append(Piece(piece.url, piece.offset + first, taken))
        start, n_bytes = start - first, n_bytes - taken
        if not n_bytes:
            break
    if n_bytes:
        raise ValueError(f"pieces end {start + n_bytes} bytes too early")
    return tuple(found)


def read_layout(url: str | Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Read the header of a safetensors file. Returns (metadata, stored tensors by name).

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: the file is not a safetensors file, or is truncated.
    """
    size = objects.size(url)
    try:
        if size < 8:
            raise ValueError(f"{size} bytes")
        n_header = int.from_bytes(objects.read_range(url, 0, 8), "little")
        if n_header > min(size - 8, MAX_HEADER):
            raise ValueError(f"a header of {n_header} bytes in {size}")
        header: dict[str, Any] = json.loads(objects.read_range(url, 8, n_header))
        metadata = header.pop("__metadata__", {})
        tensors = dict(_tensors(url, header, 8 + n_header))
        expected = 8 + n_header + sum(tensor.nbytes for tensor in tensors.values())
        if size != expected:
            raise ValueError(f"{size} bytes, expected {expected} according to its header")
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # an invalid header can cause any of these
        raise DataError(f"{url}: not a safetensors file ({error})") from None
    return metadata, tensors


def _tensors(url: str | Path, header: dict[str, Any], data_offset: int) -> Iterator[tuple[str, StoredTensor]]:
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], torch.Size(entry["shape"])
        if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} of shape {tuple(shape)} at bytes {start} to {end}")
        yield name, StoredTensor(dtype, shape, (Piece(str(url), data_offset + start, end - start),))
