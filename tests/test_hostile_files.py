"""Files of strangers: no reader runs code in them, follows them out of a folder, or believes sizes that they state."""

import io
import json
import resource
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_ds.data.manifest import Block
from dalle_ds.data.tokens.shards import parse_block
from dalle_ds.errors import DataError
from dalle_ds.evaluation.caption_gap import gap_of_file
from dalle_ds.evaluation.statistics import Statistics
from dalle_ds.pretrained.clip import Clip
from dalle_ds.pretrained.openai_dvae import import_openai
from dalle_ds.storage.stored_tensors import read_layout
from preprocessing.configs import DuplicatesConfig, IngestConfig, VerifyConfig
from preprocessing.stages import duplicates, ingest, verify
from tests.support.clip_models import make_clip
from tests.support.hostile import pickles
from tests.support.images import draw_folder, encoded


def read_as_openai(data: bytes, folder: Path) -> object:
    (folder / "encoder.pkl").write_bytes(data)
    return import_openai(str(folder / "encoder.pkl"), str(folder / "encoder.pkl"), str(folder / "out.safetensors"))


def read_as_statistics(data: bytes, folder: Path) -> object:
    (folder / "s.npz").write_bytes(data)
    return Statistics.load(folder / "s.npz")


def read_as_losses(data: bytes, folder: Path) -> object:
    (folder / "losses.npz").write_bytes(data)
    return gap_of_file(folder / "losses.npz")


def read_as_tokens(data: bytes, folder: Path) -> object:
    captions = json.dumps({"keys": ["k"], "captions": ["c"], "groups": ["g"]}).encode()
    with tarfile.open(folder / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("00000-00000.tokens.npy", data), ("00000-00000.captions.json", captions)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    block = (folder / "t.tar").read_bytes()
    about = Block(name="00000-00000", offset=0, bytes=len(block), n_samples=1, crc32=f"{zlib.crc32(block):08x}")
    return parse_block(block, about, "t.tar")


def read_as_clip(data: bytes, folder: Path) -> object:
    clip = folder / "clip"
    if not clip.exists():
        make_clip(clip)
        (clip / "model.safetensors").unlink()
    (clip / "pytorch_model.bin").write_bytes(data)
    return Clip.load(clip)


def read_as_hashes(data: bytes, folder: Path) -> object:
    raw = str(folder / "raw")
    if not (folder / "raw").exists():
        ingest.run(IngestConfig(images=str(draw_folder(folder / "images", 4)), out=raw, workers=1))
        duplicates.run(DuplicatesConfig(raw=raw, workers=1))
    (hashes,) = (folder / "raw").rglob("*.npz")
    hashes.write_bytes(data)
    return duplicates.run(DuplicatesConfig(raw=raw, workers=1))


READERS = [read_as_openai, read_as_statistics, read_as_losses, read_as_tokens, read_as_clip, read_as_hashes]


@pytest.mark.parametrize("reader", READERS)
def test_no_pickle_runs(tmp_path: Path, reader: Callable[[bytes, Path], object]) -> None:
    for name, data in pickles(tmp_path / "owned").items():
        with suppress(Exception):  # whether the message is a good one, the tests of each reader say
            reader(data, tmp_path)
        assert not (tmp_path / "owned").exists(), f"{name}: the file's code ran"


def test_the_pickles_are_loaded_guns(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    for name, data in pickles(tmp_path / "owned").items():
        with suppress(Exception):
            torch.load(io.BytesIO(data), weights_only=False)
        with suppress(Exception):
            found = np.load(io.BytesIO(data), allow_pickle=True)
            found["codes"]
        if name != "torchscript":  # torch runs its code in an interpreter without os
            assert (tmp_path / "owned").exists(), name
            (tmp_path / "owned").rmdir()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def huge_npy() -> bytes:
    """An array whose header claims 2^62 rows."""
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (4611686018427387904, 1), }\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(2)


@pytest.mark.parametrize(
    "tokens",
    [
        npy(np.zeros((1, 4))),
        npy(np.zeros((1, 4), np.int64)),
        npy(np.zeros(1, np.uint16)),
        npy(np.zeros((1, 4), np.uint16))[:-2],
        huge_npy(),
        b"",
    ],
)
def test_blocks_of_other_tokens_are_refused(tmp_path: Path, tokens: bytes) -> None:
    with little_memory(1 << 30), pytest.raises(DataError, match="t.tar, block 00000-00000: not a block of tokens"):
        read_as_tokens(tokens, tmp_path)


# ---- safetensors ----------------------------------------------------------------------------------------------------


@contextmanager
def little_memory(n_bytes: int) -> Iterator[None]:
    """At most `n_bytes` more than the process has now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def tensor(shape: list[object], start: object, end: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def with_header(header: object, data: bytes = bytes(8), n_header: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if n_header is None else n_header).to_bytes(8, "little") + text + data


HEADERS = {
    "a header of 2^63 bytes": with_header({}, n_header=2**63),
    "a header of 99 MB in a small file": with_header({}, n_header=99 << 20),
    "a header of one byte more": with_header({}, b"", n_header=3),
    "overlapping": with_header({"a": tensor([2], 0, 8), "b": tensor([2], 0, 8)}),
    "overlapping, of the right size": with_header({"a": tensor([2], 0, 8), "b": tensor([2], 0, 8)}, bytes(16)),
    "a gap": with_header({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)),
    "outside": with_header({"a": tensor([2], 8, 16)}),
    "negative": with_header({"a": tensor([2], -8, 0)}),
    "a negative shape": with_header({"a": tensor([-2, -1], 0, 8)}),
    "a shape of 2^63": with_header({"a": tensor([2**63], 0, 8)}),
    "a product of 2^64 + 2": with_header({"a": tensor([2**32, 2**32], 0, 8)}),
    "a huge tensor": with_header({"a": tensor([2**40], 0, 2**42)}),
    "fractions": with_header({"a": tensor([2.0], 0.0, 8.0)}),
    "texts": with_header({"a": tensor(["2"], "0", "8")}),
    "no numbers": with_header({"a": tensor([None], None, None)}),
    "true": with_header({"a": tensor([True, 2], False, 8)}),
    "three offsets": with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}),
    "another type": with_header({"a": tensor([1], 0, 8, "OBJECT")}),
    "a list": with_header([tensor([2], 0, 8)]),
    "no JSON": with_header(b"\\x80\\x04"),
    "digits": with_header(b'{"a": ' + b"9" * 10_000 + b"}"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_wild_headers_are_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(HEADERS[name])
    with little_memory(1 << 30), pytest.raises(DataError, match="not a safetensors file"):
        read_layout(tmp_path / "model.safetensors")


# ---- tars -----------------------------------------------------------------------------------------------------------


def test_members_that_lead_out_of_the_tar_write_and_read_nothing(tmp_path: Path) -> None:
    secret, image = tmp_path / "secret.txt", encoded(Image.new("RGB", (48, 48)))
    secret.write_text("a secret of this machine")
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "", size: int | None = None) -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data) if size is None else size, kind, target
            member.devmajor, member.devminor = 1, 5  # /dev/zero, which never ends
            tar.addfile(member, io.BytesIO(data) if kind == tarfile.REGTYPE else None)

        add("good.png", image)
        add("good.txt", b"a good one")
        for key, kind in (("char", tarfile.CHRTYPE), ("block", tarfile.BLKTYPE), ("fifo", tarfile.FIFOTYPE)):
            add(f"{key}.png", kind=kind)
            add(f"{key}.txt", b"a device")
        for key, kind in (("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            add(f"{key}.png", image)
            add(f"{key}.txt", kind=kind, target=str(secret))
            add(f"{key}_up.png", image)
            add(f"{key}_up.txt", kind=kind, target="../secret.txt")
        add("folder", kind=tarfile.SYMTYPE, target=str(tmp_path))
        add("folder/through.png", image)
        add("folder/through.txt", b"through a linked folder")
        add("../up.png", image)
        add("../up.txt", b"above")
        add(f"{tmp_path}/absolute.png", image)
        add(f"{tmp_path}/absolute.txt", b"elsewhere")
        add("; touch owned #.png", image)
        add("; touch owned #.txt", b"words of a shell")
        add("escape\x1b[2J.png", image)
        add("escape\x1b[2J.txt", b"words of a terminal")
    before = set(tmp_path.rglob("*"))
    root = tmp_path / "out" / "raw"
    summary = ingest.run(IngestConfig(images=str(tmp_path / "in"), out=str(root), workers=1)).summary
    assert summary["inputs"] == summary["samples"] + sum(summary["dropped"].values())
    assert all(path.is_relative_to(tmp_path / "out") for path in {*tmp_path.rglob("*")} - before)
    assert verify.run(VerifyConfig(root=str(root), workers=1)).is_complete
    shards = b"".join(path.read_bytes() for path in root.rglob("*.tar"))
    assert b"a good one" in shards and b"a secret of this machine" not in shards
    assert not list(Path.cwd().glob("owned"))
