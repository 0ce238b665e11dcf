"""Token shards, schema 1: tars of blocks. A block contains many samples and is read by one ranged GET."""

import io
import json
import logging
import tarfile
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from dalle_ds.data.manifest import Block, BlockColumns, Part
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.disk_cache import DiskCache
from dalle_ds.storage.hashing import sha256_of_file
from dalle_ds.storage.text import parse_json

# n samples, N tokens per sample

log = logging.getLogger(__name__)

BLOCK_SAMPLES: Final = 256
TOKENS: Final = "tokens.npy"
CAPTIONS: Final = "captions.json"
NPY_HEADER_BYTES: Final = 1024  # maximum size of the npy header


class PartWriter:
    """Writes one part to a local file. Equal samples give equal bytes.

    Use it as a context manager. Samples are grouped into blocks of `block_samples`; the last block may be smaller.
    """

    def __init__(self, path: Path, shard: str, n_tokens: int, block_samples: int = BLOCK_SAMPLES) -> None:
        self.path, self.shard, self.n_tokens, self.block_samples = path, shard, n_tokens, block_samples
        self.blocks: list[Block] = []
        self._file = path.open("w+b")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._tokens: list[np.ndarray] = []
        self._keys: list[str] = []
        self._captions: list[str] = []
        self._groups: list[str] = []

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def n_samples(self) -> int:
        return sum(block.n_samples for block in self.blocks) + len(self._keys)

    def add(self, tokens_N: np.ndarray, key: str, caption: str, group: str) -> None:
        """Append one sample.

        Raises:
            ValueError: the shape is not (n_tokens,), or a token does not fit into 16 bits.
        """
        if tokens_N.shape != (self.n_tokens,) or tokens_N.min() < 0 or tokens_N.max() > np.iinfo(np.uint16).max:
            raise ValueError(
                f"tokens of {key}: shape {tokens_N.shape}, range {tokens_N.min()} to {tokens_N.max()}; "
                f"expected ({self.n_tokens},) in 0 to 65535"
            )
        self._tokens.append(tokens_N.astype(np.uint16))
        self._keys.append(key)
        self._captions.append(caption)
        self._groups.append(group)
        if len(self._keys) == self.block_samples:
            self._write_block()

    def finish(self, path_below_root: str) -> Part:
        """Write the last block and the end of the tar. Returns the description of the file at its path below the root."""
        if self._keys:
            self._write_block()
        self._tar.close()
        self._file.close()
        return Part(
            path=path_below_root,
            bytes=self.path.stat().st_size,
            checksum=sha256_of_file(self.path),
            n_samples=self.n_samples,
            blocks=BlockColumns.of(self.shard, self.blocks),
        )

    def _write_block(self) -> None:
        name = f"{self.shard}-{len(self.blocks):05d}"
        start = self._tar.offset
        array = io.BytesIO()
        np.save(array, np.stack(self._tokens), allow_pickle=False)
        self._add_member(f"{name}.{TOKENS}", array.getvalue())
        record = {"keys": self._keys, "captions": self._captions, "groups": self._groups}
        self._add_member(f"{name}.{CAPTIONS}", json.dumps(record, ensure_ascii=False).encode())
        self._file.seek(start)
        data = self._file.read(self._tar.offset - start)
        self.blocks.append(Block(name=name, offset=start, bytes=len(data), n_samples=len(self._keys), crc32=_crc32(data)))
        self._tokens, self._keys, self._captions, self._groups = [], [], [], []

    def _add_member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # time, owner and mode keep their fixed defaults
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


def read_block(
    root_url: str, part: Part, block: Block, disk: DiskCache | None = None
) -> tuple[np.ndarray, list[str], list[str]]:
    """Read one block from the disk cache, or by one ranged GET. Returns (tokens uint16 (n, N), keys, captions).

    Raises:
        DataError: the object is missing or truncated, or its content has changed.
    """
    url = objects.join(root_url, part.path)
    name = f"{url} {part.checksum} {block.offset}"
    kept = disk.get(name) if disk else None
    if disk and kept is not None:
        try:
            return parse_block(kept, block, url)
        except DataError as error:
            log.warning("a cached block is damaged and is read from storage again (%s)", error)
            disk.forget(name)
    try:
        data = objects.read_range(url, block.offset, block.bytes)
    except FileNotFoundError:
        raise DataError(f"{url}: the manifest names this object, but it does not exist") from None
    found = parse_block(data, block, url)
    if disk:
        disk.put(name, data)
    return found


def parse_block(data: bytes, block: Block, url: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Parse a block's bytes. Returns and raises the same as `read_block`."""
    tokens_nN, record = parse_record(data, block, url)
    return tokens_nN, record["keys"], record["captions"]


def parse_record(data: bytes, block: Block, url: str) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Parse a block's bytes to tokens (n, N) and {"keys", "captions", "groups"}. Checks the CRC and the counts.

    Raises:
        DataError: the bytes do not match `block`.
    """
    if _crc32(data) != block.crc32:
        raise DataError(
            f"{url}, block {block.name}: CRC-32 {_crc32(data)}, expected {block.crc32} as in its manifest; the data is damaged"
        )
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = {
                member.name.removeprefix(f"{block.name}."): memoryview(data)[member.offset_data :][: member.size]
                for member in tar
            }
        tokens_nN, record = decode_members(members[TOKENS], members[CAPTIONS])
        _check_types(tokens_nN, record)
    except (tarfile.TarError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{url}, block {block.name}: not a block of tokens ({type(error).__name__}: {error})") from None
    counts = {"token rows": len(tokens_nN), **{name: len(values) for name, values in record.items()}}
    if set(counts.values()) != {block.n_samples}:
        raise DataError(f"{url}, block {block.name}: {counts}, expected {block.n_samples} samples as in its manifest")
    return tokens_nN, record


def _check_types(tokens_nN: np.ndarray, record: Any) -> None:
    """Raises ValueError if the members of a block have other types. The CRC only shows that nothing has changed since."""
    if tokens_nN.dtype != np.uint16 or tokens_nN.ndim != 2:
        raise ValueError(f"tokens {tokens_nN.dtype} {tokens_nN.shape}, expected uint16 (n, N)")
    if not isinstance(record, dict) or not {"keys", "captions", "groups"} <= record.keys():
        raise ValueError("expected keys, captions and groups")
    for name, values in record.items():
        if not isinstance(values, list) or not all(type(value) is str for value in values):
            raise ValueError(f"{name} are not a list of texts")


_ONE_PARSER = threading.Lock()
"""numpy parses the header as Python code. CPython 3.11 shares the parser's recursion counter between threads, so two concurrent
parses may raise SystemError ("AST constructor recursion depth mismatch")."""


def decode_members(tokens: bytes | memoryview, captions: bytes | memoryview) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Decode the two members of a block: tokens (n, N), read-only, and {"keys", "captions", "groups"}."""
    header = io.BytesIO(tokens[:NPY_HEADER_BYTES])
    version = np.lib.format.read_magic(header)
    if version != (1, 0):
        raise ValueError(f"npy version {version}, expected (1, 0)")
    with _ONE_PARSER:
        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    # A view: np.load would copy half a megabyte.
    return np.frombuffer(tokens, dtype, offset=header.tell()).reshape(shape), parse_json(bytes(captions))


def unbatch(blocks: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A stage for `webdataset` pipelines. Its input has one dict per block; its output has one dict per sample.

    webdataset.WebDataset(urls).compose(unbatch) yields {"__key__", "tokens" uint16 (N,), "caption", "group"}.
    """
    for block in blocks:
        tokens_nN, record = decode_members(block[TOKENS], block[CAPTIONS])
        for row, key, caption, group in zip(tokens_nN, record["keys"], record["captions"], record["groups"], strict=True):
            yield {"__key__": key, "tokens": row, "caption": caption, "group": group}


def _crc32(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"
