"""Write a safetensors file tensor by tensor.

The safetensors library's writer needs all tensors, and so the whole model, in memory. The format is the header's length
(8 bytes), a JSON header, and the tensors' bytes in the header's order.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from dalle_ds.storage.stored_tensors import DTYPES, StoredTensor, content_bytes

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """The constructor gets dtypes and shapes; `put` then writes the contents in any order."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor | StoredTensor], metadata: Mapping[str, str]) -> None:
        """Write the header. Of `tensors`, only dtypes and shapes are used.

        Raises:
            ValueError: the format does not support a dtype.
        """
        self._entries: dict[str, dict[str, Any]] = {}
        end = 0
        # Wide dtypes first, as in the library: readers that map the file need every tensor aligned to its item size.
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            if tensor.dtype not in _NAMES:
                raise ValueError(f"{name} has dtype {tensor.dtype}, which weights files do not support")
            start, end = end, end + tensor.nbytes
            self._entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header = self._header(metadata)
        self._data_offset = 8 + len(header)
        self._file = path.open("wb")
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.truncate(self._data_offset + end)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def put(self, name: str, tensor: Tensor) -> None:
        """Write the content of one tensor, which must be contiguous and on the CPU."""
        start, end = self._entries[name]["data_offsets"]
        content = content_bytes(tensor)
        assert len(content) == end - start, f"{name} has {len(content)} bytes, expected {end - start}"
        self._file.seek(self._data_offset + start)
        self._file.write(content)

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by other metadata of the same length, for values known only after the data (the fingerprint)."""
        header = self._header(metadata)
        assert len(header) == self._data_offset - 8, f"header of {len(header)} bytes, expected {self._data_offset - 8}"
        self._file.seek(8)
        self._file.write(header)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        header = json.dumps({"__metadata__": dict(metadata), **self._entries}, separators=(",", ":")).encode()
        return header + b" " * (-len(header) % 8)
