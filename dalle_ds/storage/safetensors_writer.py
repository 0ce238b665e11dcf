"""Write a safetensors file in any order, tensor by tensor or in smaller parts.

The safetensors library's writer needs all tensors, and so the whole model, in memory. The format is the header's length
(8 bytes), a JSON header, and the tensors' bytes in the header's order.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dalle_ds.storage.stored_tensors import DTYPES, content_bytes

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """The constructor gets dtypes and shapes; `put` then writes the contents in any order, from any thread."""

    def __init__(
        self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], small_first: bool = False
    ) -> None:
        """Write the header. Of `tensors`, only dtypes and shapes are used: they may be on the meta device.

        Args:
            small_first: order tensors of equally wide dtypes by size, not by name.

        Raises:
            ValueError: the format does not support a dtype.
        """
        self._entries: dict[str, dict[str, Any]] = {}
        end = 0
        # Wide dtypes first, as in the library: readers that map the file need every tensor aligned to its item size.
        for name, tensor in sorted(
            tensors.items(), key=lambda item: (-item[1].dtype.itemsize, small_first and item[1].nbytes, item[0])
        ):
            if tensor.dtype not in _NAMES:
                raise ValueError(f"{name} has dtype {tensor.dtype}, which weights files do not support")
            start, end = end, end + tensor.nbytes
            self._entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header = self._header(metadata)
        self._data_offset = 8 + len(header)
        self._file = path.open("w+b", buffering=0)
        self._write(0, memoryview(len(header).to_bytes(8, "little") + header))
        self._file.truncate(self._data_offset + end)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def put(self, name: str, values: Tensor, at: int = 0) -> None:
        """Write values of one tensor, from its flat index `at` on. They must be contiguous and on the CPU."""
        start, end = self._entries[name]["data_offsets"]
        content = content_bytes(values)
        first = start + at * values.dtype.itemsize
        assert _NAMES[values.dtype] == self._entries[name]["dtype"] and first + len(content) <= end, (
            f"{values.numel()} values of {values.dtype} from {at} on, of {name}, which is {self._entries[name]}"
        )
        self._write(self._data_offset + first, content)

    def read(self, name: str) -> Tensor:
        """Read a tensor that was written."""
        entry = self._entries[name]
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        content = content_bytes(tensor)
        self._file.seek(self._data_offset + entry["data_offsets"][0])
        while content:
            content = content[self._file.readinto(content) :]
        return tensor

    def _write(self, at: int, content: memoryview) -> None:
        while content:
            n = os.pwrite(self._file.fileno(), content, at)
            at, content = at + n, content[n:]

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by other metadata of the same length, for values known only after the data (the fingerprint)."""
        header = self._header(metadata)
        assert len(header) == self._data_offset - 8, f"header of {len(header)} bytes, expected {self._data_offset - 8}"
        self._write(8, memoryview(header))

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        header = json.dumps({"__metadata__": dict(metadata), **self._entries}, separators=(",", ":")).encode()
        return header + b" " * (-len(header) % 8)
