"""Tensors are read from files unchanged, and invalid files are refused."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dalle_ds.errors import Damaged, DataError
from dalle_ds.storage.stored_tensors import StoredTensor, Wanted, read_layout, read_through


@pytest.mark.parametrize("piece", [8, 24, 1000])
def test_what_is_wanted_arrives_from_pieces_of_any_size(tmp_path: Path, piece: int) -> None:
    tensors = {"a": torch.arange(7.0), "b": torch.arange(5, dtype=torch.int16), "c": torch.arange(9.0).double()}
    save_file(tensors, tmp_path / "w", {"said": "x"})
    content = (tmp_path / "w").read_bytes()
    pieces = [bytearray(content[start : start + piece]) for start in range(0, len(content), piece)]
    found = {"a": torch.zeros(4), "b": torch.zeros(5, dtype=torch.int16), "c": torch.zeros(1).double()}

    def wanted(metadata: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> Iterator[Wanted]:
        assert metadata == {"said": "x"}
        for name, first in (("a", 2), ("b", 0), ("c", 8)):
            offset, dtype = stored[name].offset + first * tensors[name].itemsize, tensors[name].dtype
            put = lambda at, values, name=name: found[name][at : at + len(values)].copy_(values)  # noqa: E731
            yield Wanted(offset, len(found[name]), dtype, put)

    read_through("w", len(content), pieces, wanted)
    assert torch.equal(found["a"], tensors["a"][2:6]) and torch.equal(found["b"], tensors["b"]) and found["c"].item() == 8


def test_values_across_pieces_must_be_aligned() -> None:
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    )
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(9)
    start = len(content) - 8
    with pytest.raises(Damaged, match="torch.float32 at byte .*, expected a multiple of its size"):
        pieces = [bytearray(content[: start + 2]), bytearray(content[start + 2 :])]
        read_through("w", len(content), pieces, lambda *_: [Wanted(start, 2, torch.float32, lambda *_: None)])


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
