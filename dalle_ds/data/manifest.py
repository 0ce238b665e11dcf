"""Manifests: content and origin of a shard. Readers find data only through manifests, never by listing data files."""

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
from pydantic import Field, model_validator

from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint, require_same
from dalle_ds.storage.hashing import sha256_of_bytes
from dalle_ds.storage.names import DATASET_FILE
from dalle_ds.storage.record import PathBelow, Record, SealedRecord, parse

SCHEMA: Final = 1
SPLITS: Final = ("train", "validation")
MANIFESTS: Final = "manifests"
Split = Literal["train", "validation"]
M = TypeVar("M", "RawShardManifest", "ShardManifest")
T = TypeVar("T")

N_READERS = 16  # threads that read manifests
READ_AHEAD = 256  # manifests that may wait in memory


class InputIdentity(Record):
    """Identity of the object from which a shard was made."""

    path: str
    bytes: int
    checksum: str | None = None
    etag: str | None = None


class StoredFile(Record):
    """A file below the root of a data set, with its identity."""

    path: PathBelow
    bytes: int
    checksum: str  # SHA-256

    @classmethod
    def of(cls, path: str, data: bytes) -> "StoredFile":
        return cls(path=path, bytes=len(data), checksum=sha256_of_bytes(data))

    def read(self, root_url: str | Path) -> bytes:
        """The content of the file.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it has another content.
        """
        url = objects.join(root_url, self.path)
        data = objects.read_bytes(url)
        found = StoredFile.of(self.path, data)
        if found != self:
            raise DataError(
                f"{url}: {found.bytes} bytes with SHA-256 {found.checksum}, expected {self.bytes} with {self.checksum}"
            )
        return data


class RawShardManifest(SealedRecord):
    """Manifest of a raw shard: one tar of KEY.webp|png|jpg with KEY.json members."""

    schema_version: int = Field(SCHEMA, alias="schema")
    shard: PathBelow
    attempt: PathBelow
    path: PathBelow  # of the tar, below the root
    bytes: int
    checksum: str  # SHA-256 of the tar
    n_input: int
    n_samples: int
    dropped: dict[str, int]
    metadata: StoredFile | None = None  # parquet of `data.raw.metadata`; None in raw shards of earlier versions
    dropped_path: PathBelow | None = None  # of earlier versions: JSON lines {"key", "reason"}, below the root
    fingerprint: str  # fingerprint of the inputs and the filters
    seconds: float
    finished: float | None = None  # seconds since 1970


class Block(Record):
    """A block of samples in a part. One ranged GET of `bytes` at `offset` reads both tar members of the block."""

    name: str
    offset: int
    bytes: int
    n_samples: int
    crc32: str  # CRC-32 of these bytes as 8 hex characters, to check a ranged read


_INTEGERS = "^([0-9]+( [0-9]+)*)?$"


class BlockColumns(Record):
    """The blocks of a part as columns with one entry per block, separated by spaces.

    Columns are compact: a manifest of 40 blocks takes about two kilobytes. Block i is called `name`-i, with five digits, and
    starts at the end of the previous block.
    """

    name: str
    bytes: str = Field(pattern=_INTEGERS)
    n_samples: str = Field(pattern=_INTEGERS)
    crc32: str = Field(pattern="^([0-9a-f]{8}( [0-9a-f]{8})*)?$")

    @model_validator(mode="after")
    def _check(self) -> "BlockColumns":
        if not self.bytes.count(" ") == self.n_samples.count(" ") == self.crc32.count(" "):
            raise ValueError("columns have different lengths")
        return self

    @classmethod
    def of(cls, name: str, blocks: Sequence[Block]) -> "BlockColumns":
        """The columns of all blocks of a part, in stored order."""
        ends = [block.offset + block.bytes for block in blocks]
        assert [block.offset for block in blocks] == [0, *ends][:-1], "a block starts at the end of the previous block"
        assert [block.name for block in blocks] == [_block_name(name, i) for i in range(len(blocks))]
        return cls(
            name=name,
            bytes=" ".join(str(block.bytes) for block in blocks),
            n_samples=" ".join(str(block.n_samples) for block in blocks),
            crc32=" ".join(block.crc32 for block in blocks),
        )

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bytes, samples and CRC-32 of the blocks, int64."""
        crc32 = np.frombuffer(bytes.fromhex(self.crc32), dtype=">u4").astype(np.int64)
        return np.fromstring(self.bytes, np.int64, sep=" "), np.fromstring(self.n_samples, np.int64, sep=" "), crc32

    @classmethod
    def of_arrays(cls, name: str, *arrays: np.ndarray) -> "BlockColumns":
        """The inverse of `arrays`."""
        n_bytes, n_samples, crc32 = (array.tolist() for array in arrays)
        return cls(
            name=name,
            bytes=" ".join(map(str, n_bytes)),
            n_samples=" ".join(map(str, n_samples)),
            crc32=" ".join(f"{value:08x}" for value in crc32),
        )

    def __len__(self) -> int:
        return self.bytes.count(" ") + 1 if self.bytes else 0


class Part(Record):
    """One split of one shard: a tar of blocks."""

    path: PathBelow  # of the tar, below the root
    bytes: int
    checksum: str  # SHA-256 of the tar
    n_samples: int
    columns: BlockColumns = Field(alias="blocks")

    @property
    def blocks(self) -> list[Block]:
        """The blocks as objects."""
        return list(BlockTable.of([self]))


class BlockTable:
    """The blocks of many parts as arrays, 28 bytes per block. As objects, a million blocks would take nearly a gigabyte.

    Args:
        names: name of each part's blocks, without their number.
        counts: number of blocks of each part.
        bytes, n_samples, crc32: one entry per block, part after part.
    """

    def __init__(
        self, names: Sequence[str], counts: np.ndarray, bytes: np.ndarray, n_samples: np.ndarray, crc32: np.ndarray
    ) -> None:
        self.part = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.bytes, self.n_samples, self.crc32 = bytes, n_samples, crc32
        self._names = names
        self._first = np.cumsum(counts) - counts
        self.offset = np.cumsum(self.bytes) - self.bytes
        self.offset -= np.repeat(self.offset[self._first[counts > 0]], counts[counts > 0])

    @classmethod
    def of(cls, parts: Sequence[Part]) -> "BlockTable":
        columns = [part.columns for part in parts]
        counts = np.array([len(of_part) for of_part in columns], dtype=np.int64)
        arrays = [np.concatenate([np.zeros(0, np.int64), *each]) for each in zip(*(c.arrays() for c in columns), strict=True)]
        return cls([of_part.name for of_part in columns], counts, *(arrays or [np.zeros(0, np.int64)] * 3))

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, number: int) -> Block:
        part = self.part[number]
        name = _block_name(self._names[part], number - self._first[part])
        return Block.model_construct(
            name=name,
            offset=int(self.offset[number]),
            bytes=int(self.bytes[number]),
            n_samples=int(self.n_samples[number]),
            crc32=f"{self.crc32[number]:08x}",
        )


def _block_name(name: str, number: int) -> str:
    return f"{name}-{number:05d}"


class ShardDetails(Record):
    """What only statistics need of a token shard. A file beside the shard has it, so that manifests stay small."""

    code_histogram: list[int] = []  # training split, all crops: number of uses of each code
    caption_lengths: dict[int, int] = {}  # training split: number of BPE tokens in a caption -> number of captions
    dropped_samples: list[tuple[str, str]] = []  # (key, reason)

    def pack(self) -> bytes:
        """Compressed JSON. Equal details give equal bytes."""
        return gzip.compress(self.model_dump_json().encode(), mtime=0)


class ShardManifest(SealedRecord):
    """Manifest of a token shard. An empty split has no part. Its size is that of its parts' blocks: about 20 bytes a block."""

    schema_version: int = Field(SCHEMA, alias="schema")
    shard: PathBelow
    attempt: PathBelow
    input: InputIdentity
    splits: dict[Split, Part]
    more_crops: list[Part] | None = None  # crops 2, 3, ... of the training images: the samples of splits["train"], in its order
    n_input: int
    dropped: dict[str, int]
    details: StoredFile | None = None  # compressed JSON of ShardDetails
    code_histogram: list[int] | None = None  # this field and the next two: details in manifests of earlier versions
    caption_lengths: dict[int, int] | None = None
    dropped_samples: list[tuple[str, str]] | None = None
    fingerprint: str  # fingerprint of the data set
    seconds: float
    finished: float | None = None  # seconds since 1970

    def read_details(self, root_url: str | Path) -> ShardDetails:
        """Read the shard's details.

        Raises:
            DataError: they are missing or damaged.
        """
        if self.details is None:
            own = self.model_dump(include={"code_histogram", "caption_lengths", "dropped_samples"}, exclude_none=True)
            return ShardDetails(**own)
        url = objects.join(root_url, self.details.path)
        try:
            return parse(ShardDetails, gzip.decompress(self.details.read(root_url)), url)
        except FileNotFoundError:
            raise DataError(f"{url}: the manifest names this object, but it does not exist") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{url} is damaged: {error}") from None

    @property
    def n_samples(self) -> int:
        """Number of samples. The crops of an image are one sample."""
        return sum(part.n_samples for part in self.splits.values())

    @property
    def parts(self) -> list[Part]:
        """All parts, further crops included."""
        return [*self.splits.values(), *(self.more_crops or ())]


class DatasetInfo(SealedRecord):
    """dataset.json: the dVAE, tokenizer and settings with which all shards of a token data set were made."""

    schema_version: int = Field(SCHEMA, alias="schema")
    image_size: int
    grid: int
    n_codes: int
    dvae: str
    tokenizer: str
    crop: str
    validation_fraction: float
    crops: int | None = None  # crops of each training image; None: 1
    precision: str | None = None  # number format of the encoder; None: fp32
    tf32: bool | None = None  # True: the encoder's fp32 convolutions ran in TF32; None otherwise
    agreement: float | None = None  # fraction of tokens equal to those of fp32 on the first images; not in the fingerprint
    fingerprint: str = ""

    @property
    def n_tokens(self) -> int:
        return self.grid**2

    def n_crops(self, split: Split) -> int:
        """Number of stored crops of an image of this split."""
        return (self.crops or 1) if split == "train" else 1

    def sealed(self) -> "DatasetInfo":
        """A copy with its fingerprint set: a hash of all fields that determine the tokens."""
        identity = self.model_dump(exclude={"fingerprint", "agreement"}, exclude_none=True)
        return self.model_copy(update={"fingerprint": fingerprint(identity)})


def manifest_url(root_url: str | Path, shard: str) -> str:
    return objects.join(root_url, MANIFESTS, f"{shard}.json")


def shard_times(root_url: str | Path) -> dict[str, float]:
    """{committed shard: when its manifest was written, in seconds since 1970}. Takes one listing."""
    folder = objects.join(root_url, MANIFESTS)
    times = objects.list_times(folder, ".json")
    return {url.removeprefix(folder).strip("/").removesuffix(".json"): written for url, written in times.items()}


def done_shards(root_url: str | Path) -> set[str]:
    """Names of the committed shards. Takes one listing."""
    return set(shard_times(root_url))


def load_shard_manifests(root_url: str | Path, record_class: type[M]) -> list[M]:
    """All shard manifests under a root, sorted by the shard's name. Empty if there are none."""
    return list(iterate_shards(sorted(done_shards(root_url)), partial(load_shard_manifest, root_url, record_class)))


def load_shard_manifest(root_url: str | Path, record_class: type[M], shard: str) -> M:
    """Read the manifest of a shard.

    Raises:
        DataError: it is damaged, or that of another shard: a copy under another name would double the shard's samples.
    """
    url = manifest_url(root_url, shard)
    manifest = parse(record_class, objects.read_bytes(url), url)
    if manifest.shard != shard:
        raise DataError(f"{url} is the manifest of shard {manifest.shard}, expected shard {shard}; remove the copy")
    return manifest


def spread(shards: Sequence[T], n: int) -> list[T]:
    """At most `n` of the shards, at equal distances."""
    return [shards[i] for i in np.unique(np.linspace(0, len(shards) - 1, min(n, len(shards))).round().astype(int))]


def iterate_shards(shards: Sequence[str], read: Callable[[str], T]) -> Iterator[T]:
    """`read` of each shard's name, in order. Several are read at a time, since the cost is latency, and few wait in memory."""
    with ThreadPoolExecutor(N_READERS) as pool:
        for start in range(0, len(shards), READ_AHEAD):
            yield from pool.map(read, shards[start : start + READ_AHEAD])


def load_dataset_info(root_url: str | Path) -> DatasetInfo:
    """Read dataset.json and check it against its own fingerprint.

    Raises:
        DataError: there is no data set, or its schema is unknown.
        FingerprintMismatch: the file was edited.
    """
    url = objects.join(root_url, DATASET_FILE)
    try:
        info = parse(DatasetInfo, objects.read_bytes(url), url)
    except FileNotFoundError:
        raise DataError(f"{root_url}: no token data set: dataset.json is missing. `dalle-ds data encode` creates it") from None
    if info.schema_version != SCHEMA:
        raise DataError(f"{url}: schema {info.schema_version}, expected schema {SCHEMA}")
    require_same(f"{url} (its content)", info.fingerprint, info.sealed().fingerprint, "The file was edited.")
    return info
