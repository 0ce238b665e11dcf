"""Files of arrays: whatever is wrong with one is one error, and nothing is loaded as code."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dalle_ds.errors import Damaged
from dalle_ds.storage.arrays import read_npy, read_npz
from tests.support.hostile import Attack


def npz(*, compressed: bool = False, **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def header(shape: str) -> bytes:
    """An .npy file whose header claims `shape`, with sixteen bytes of content."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(16)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_changed_bit_is_damage_or_changes_no_value(compressed: bool) -> None:
    codes = np.arange(5, dtype=np.uint16)
    data, n_refused = npz(compressed=compressed, codes=codes), 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = read_npz(io.BytesIO(bytes(damaged)))
        except Damaged:
            n_refused += 1
        else:  # a name in the directory of the file has no checksum: callers compare the names
            assert "codes" not in found or np.array_equal(found["codes"], codes)
    assert n_refused > 3 * len(data)


@pytest.mark.parametrize("shape", ["(9223372036854775807,)", "(1000000, 1000000)", "(-1,)", "'x'"])
def test_headers_that_claim_more_than_there_is(tmp_path: Path, shape: str) -> None:
    (tmp_path / "a.npy").write_bytes(header(shape))
    with pytest.raises(Damaged, match=r"a\.npy is damaged"):
        read_npy(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("a.npy", header(shape))
    with pytest.raises(Damaged, match=r"a\.npz is damaged"):
        read_npz(tmp_path / "a.npz")


def test_one_kind_is_not_the_other(tmp_path: Path) -> None:
    (tmp_path / "several.npy").write_bytes(npz(a=np.zeros(2)))
    with pytest.raises(Damaged, match="several arrays"):
        read_npy(tmp_path / "several.npy")
    np.save(tmp_path / "one.npy", np.zeros(2))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(Damaged, match="a single array"):
        read_npz(tmp_path / "one.npz")
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "missing.npz")


def test_objects_are_not_loaded(tmp_path: Path) -> None:
    objects = np.array([Attack(os.mkdir, str(tmp_path / "owned"))], dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    (tmp_path / "a.npz").write_bytes(npz(a=objects))
    for read in (read_npy, read_npz):
        with pytest.raises(Damaged):
            read(tmp_path / f"a.{read.__name__[-3:]}")
    assert not (tmp_path / "owned").exists()
