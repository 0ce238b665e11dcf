"""Tensors stored in files, described by dtype, shape and byte ranges, and read one at a time.

Files are read, not memory-mapped: mapped pages count as memory of the process until the mapping is closed, and would add up to
the whole model.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalle_ds.errors import Damaged
from dalle_ds.storage import objects
from dalle_ds.storage.text import parse_json

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
class StoredTensor:
    """A tensor in a file or object."""

    dtype: torch.dtype
    shape: torch.Size
    url: str
    offset: int
    """Its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read the tensor into new memory.

        Raises:
            Damaged: the file is truncated.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        objects.read_into(self.url, self.offset, content_bytes(tensor))
        return tensor

    def in_file(self, file: Path) -> "StoredTensor":
        """The same tensor, read from `file`, which must be a copy of its file."""
        return replace(self, url=str(file))


def content_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    # Use a uint8 view, since numpy has no bfloat16.
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def read_layout(url: str | Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Read the header of a safetensors file. Returns (metadata, stored tensors by name).

    Raises:
        FileNotFoundError: the file does not exist.
        Damaged: the file is not a safetensors file, or is truncated.
    """
    size = objects.size(url)
    start = objects.read_range(url, 0, min(8, size))
    return _parse(url, start + objects.read_range(url, len(start), _header_end(start, size) - len(start)), size)


class Wanted(NamedTuple):
    """Values in a file that `read_through` reads."""

    offset: int
    """First byte in the file."""
    n: int
    dtype: torch.dtype
    put: Callable[[int, Tensor], object]
    """Called with the index of the first of some of the values, and these values, flat."""


def read_through(
    url: str | Path,
    size: int,
    pieces: Iterable[bytearray],
    wanted: Callable[[dict[str, str], Mapping[str, StoredTensor]], Iterable[Wanted]],
    to_end: bool = True,
) -> bool:
    """Read a safetensors file of `size` bytes once, and hand out values as they arrive.

    Args:
        pieces: the content of the file in order.
        wanted: called with metadata and tensors. Returns values that do not overlap.
        to_end: False: stop when all wanted values have arrived.

    Returns:
        Whether the file was read to its end.

    Raises:
        Damaged: the file is not a safetensors file, or a tensor is not aligned to its item size.
    """
    arriving = iter(pieces)
    piece, position = next(arriving, bytearray()), 0
    while len(piece) < _header_end(piece, size):
        piece += next(arriving)
    missing = deque(sorted(wanted(*_parse(url, piece, size)), key=lambda values: values.offset))
    while piece:
        _hand_out(missing, piece, position, url)
        position += len(piece)
        if not (missing or to_end) and position < size:
            return False
        piece = next(arriving, bytearray())
    return True


def _hand_out(missing: deque[Wanted], piece: bytearray, position: int, url: str | Path) -> None:
    """Hand out what `piece`, which begins at byte `position`, holds of the missing values."""
    end = position + len(piece)
    while missing and missing[0].offset < end:
        offset, n, dtype, put = missing[0]
        first, last = max(position, offset), min(end, offset + n * dtype.itemsize)
        n_here, rest = divmod(last - first, dtype.itemsize)
        if rest or (first - offset) % dtype.itemsize:
            raise Damaged(f"{url}: {dtype} at byte {offset}, expected a multiple of its size")
        put((first - offset) // dtype.itemsize, torch.frombuffer(piece, dtype=dtype, count=n_here, offset=first - position))
        if last < offset + n * dtype.itemsize:
            return
        missing.popleft()


def _header_end(head: bytes | bytearray, size: int) -> int:
    """Index of the byte after the header, by the first eight bytes. Their end if a file of `size` bytes can't have it."""
    n_header = int.from_bytes(head[:8], "little")
    return 8 + n_header if 8 + n_header <= min(size, MAX_HEADER) else min(8, size)


def _parse(url: str | Path, head: bytes | bytearray, size: int) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Metadata and tensors of a safetensors file of `size` bytes that begins with `head`."""
    try:
        if size < 8:
            raise ValueError(f"{size} bytes")
        n_header = int.from_bytes(head[:8], "little")
        if n_header > min(size - 8, MAX_HEADER):
            raise ValueError(f"a header of {n_header} bytes in {size}")
        header: dict[str, Any] = parse_json(bytes(memoryview(head)[8 : 8 + n_header]))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not a mapping of texts")
        tensors = dict(_tensors(url, header, 8 + n_header))
        _require_all_bytes(tensors, 8 + n_header, size)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise Damaged(f"{url}: not a safetensors file ({error})") from None
    return metadata, tensors


def _tensors(url: str | Path, header: dict[str, Any], data_offset: int) -> Iterator[tuple[str, StoredTensor]]:
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (start, end, *entry["shape"])):
            raise ValueError(f"{name} of shape {entry['shape']} at bytes {start} to {end}: expected integers of at least 0")
        dtype, shape = DTYPES[entry["dtype"]], torch.Size(entry["shape"])
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} of shape {tuple(shape)} at bytes {start} to {end}")
        yield name, StoredTensor(dtype, shape, str(url), data_offset + start)


def _require_all_bytes(tensors: dict[str, StoredTensor], end: int, size: int) -> None:
    """Raises ValueError unless the tensors lie side by side from byte `end` to the end of the file, as the format demands."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise ValueError(f"{name} begins at byte {tensor.offset}, expected {end}")
        end += tensor.nbytes
    if size != end:
        raise ValueError(f"{size} bytes, expected {end} according to its header")
