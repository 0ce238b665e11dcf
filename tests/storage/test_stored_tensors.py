"""Tensors stored in pieces of files are read back unchanged, and invalid files are refused."""

import json
from pathlib import Path

import pytest
import torch

from dalle_ds.errors import DataError
from dalle_ds.storage.stored_tensors import Piece, StoredTensor, cut, read_layout


def test_any_cut_of_any_pieces(tmp_path: Path) -> None:
    content = bytes(range(40))
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    places = (("a", 3, 5), ("b", 0, 0), ("b", 10, 1), ("a", 20, 9))
    pieces = [Piece(str(tmp_path / name), offset, n) for name, offset, n in places]
    joined = content[3:8] + content[10:11] + content[20:29]
    for start in range(len(joined) + 1):
        for n in range(len(joined) - start + 1):
            found = StoredTensor(torch.uint8, torch.Size([n]), cut(pieces, start, n)).read()
            assert bytes(found.tolist()) == joined[start : start + n]
    with pytest.raises(ValueError, match="pieces end 2 bytes too early"):
        cut(pieces, 10, 7)
    with pytest.raises(ValueError, match="pieces have 5 bytes, torch.float32 of shape \\(2,\\) needs 8"):
        StoredTensor(torch.float32, torch.Size([2]), cut(pieces, 0, 5))


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},  # the file ends too early
        {"a": {"shape": [1]}},
        {"a": 1},
        [],
        "text",
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "w").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(DataError, match="w: not a safetensors file"):
        read_layout(tmp_path / "w")


def test_bytes_that_are_no_header_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"short", b"\xff" * 100, (4).to_bytes(8, "little") + b"\xff\xfe{}"):
        (tmp_path / "w").write_bytes(content)
        with pytest.raises(DataError, match="w: not a safetensors file"):
            read_layout(tmp_path / "w")
