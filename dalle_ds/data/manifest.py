"""Manifests: content and origin of a shard. Readers find data only through manifests, never by listing data files."""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
from pydantic import Field, ValidationError, model_validator

from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint, require_same
from dalle_ds.storage.names import DATASET_FILE, MANIFEST_FILE
from dalle_ds.storage.record import Record

SCHEMA: Final = 1
SPLITS: Final = ("train", "validation")
MANIFESTS: Final = "manifests"
Split = Literal["train", "validation"]


class InputIdentity(Record):
    """Identity of the object from which a shard was made."""

    path: str
    bytes: int
    checksum: str | None = None
    etag: str | None = None


class RawShardManifest(Record):
    """Manifest of a raw shard: one tar of KEY.webp|png|jpg with KEY.json members."""

    schema_version: int = Field(SCHEMA, alias="schema")
    shard: str
    attempt: str
    path: str  # path of the tar below the root
    bytes: int
    checksum: str  # SHA-256 of the tar
    n_input: int
    n_samples: int
    dropped: dict[str, int]
    dropped_path: str | None = None  # path below the root of JSON lines {"key", "reason"}
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

    Columns are compact: a merged manifest has a million blocks, and every rank reads it. Block i is called `name`-i, with five
    digits, and starts at the end of the previous block.
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

    def __len__(self) -> int:
        return self.bytes.count(" ") + 1 if self.bytes else 0


class Part(Record):
    """One split of one shard: a tar of blocks."""

    path: str  # path of the tar below the root
    bytes: int
    checksum: str  # SHA-256 of the tar
    n_samples: int
    columns: BlockColumns = Field(alias="blocks")

    @property
    def blocks(self) -> list[Block]:
        """The blocks as objects."""
        return list(BlockTable([self]))


class BlockTable:
    """The blocks of many parts as arrays, 28 bytes per block. As objects, a million blocks would take nearly a gigabyte."""

    def __init__(self, parts: Sequence[Part]) -> None:
        columns = [part.columns for part in parts]
        counts = np.array([len(of_part) for of_part in columns], dtype=np.int64)
        self.part = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        self.bytes = _integers(of_part.bytes for of_part in columns)
        self.n_samples = _integers(of_part.n_samples for of_part in columns)
        self.crc32 = np.frombuffer(bytes.fromhex(" ".join(of_part.crc32 for of_part in columns)), dtype=">u4")
        self._names = [of_part.name for of_part in columns]
        self._first = np.cumsum(counts) - counts
        ends = np.cumsum(self.bytes)
        self.offset = ends - self.bytes
        self.offset -= np.repeat(self.offset[self._first[counts > 0]], counts[counts > 0])

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


def _integers(columns: Iterable[str]) -> np.ndarray:
    return np.fromstring(" ".join(filter(None, columns)), dtype=np.int64, sep=" ")


def _block_name(name: str, number: int) -> str:
    return f"{name}-{number:05d}"


class ShardManifest(Record):
    """Manifest of a token shard. An empty split has no part."""

    schema_version: int = Field(SCHEMA, alias="schema")
    shard: str
    attempt: str
    input: InputIdentity
    splits: dict[Split, Part]
    n_input: int
    dropped: dict[str, int]
    dropped_samples: list[tuple[str, str]] = []  # (key, reason)
    code_histogram: list[int]  # training split: number of uses of each code
    caption_lengths: dict[int, int]  # training split: number of BPE tokens in a caption -> number of captions
    fingerprint: str  # fingerprint of the data set
    seconds: float
    finished: float | None = None  # seconds since 1970

    @property
    def n_samples(self) -> int:
        return sum(part.n_samples for part in self.splits.values())


class DatasetInfo(Record):
    """dataset.json: the dVAE, tokenizer and settings with which all shards of a token data set were made."""

    schema_version: int = Field(SCHEMA, alias="schema")
    image_size: int
    grid: int
    n_codes: int
    dvae: str
    tokenizer: str
    crop: str
    validation_fraction: float
    precision: str | None = None  # number format of the encoder; None: fp32
    tf32: bool | None = None  # True: the encoder's fp32 convolutions ran in TF32; None otherwise
    agreement: float | None = None  # fraction of tokens equal to those of fp32 on the first images; not in the fingerprint
    fingerprint: str = ""

    @property
    def n_tokens(self) -> int:
        return self.grid**2

    def sealed(self) -> "DatasetInfo":
        """A copy with its fingerprint set: a hash of all fields that determine the tokens."""
        identity = self.model_dump(exclude={"fingerprint", "agreement"}, exclude_none=True)
        return self.model_copy(update={"fingerprint": fingerprint(identity)})


class DatasetManifest(Record):
    """manifest.json: the merged shard manifests, sorted by shard name."""

    schema_version: int = Field(SCHEMA, alias="schema")
    fingerprint: str
    complete: bool  # True if it was written at the end of an encode run, when every shard was finished
    shards: list[ShardManifest]
    n_samples: dict[Split, int]
    dropped: dict[str, int]
    code_histogram: list[int]
    caption_lengths: dict[int, int]

    def parts(self, split: Split) -> list[Part]:
        """The parts of a split in reading order (by shard name). Shards without samples in this split are skipped."""
        return [shard.splits[split] for shard in self.shards if split in shard.splits]


R = TypeVar("R", bound=Record)


def parse(record_class: type[R], data: bytes, url: str) -> R:
    """Parse and validate JSON bytes; `url` is for messages.

    Raises:
        DataError: the bytes are not a valid record; the message names the file and its problems.
    """
    try:
        return record_class.model_validate_json(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or '(file)'}: {p['msg']}" for p in error.errors()[:3])
        raise DataError(f"{url}: not a valid {record_class.__name__}: {problems}") from None


def manifest_url(root_url: str | Path, shard: str) -> str:
    return objects.join(root_url, MANIFESTS, f"{shard}.json")


def done_shards(root_url: str | Path) -> set[str]:
    """Names of the committed shards. Takes one listing."""
    folder = objects.join(root_url, MANIFESTS)
    return {url.removeprefix(folder).strip("/").removesuffix(".json") for url in objects.list_files(folder, ".json")}


def load_shard_manifests(root_url: str | Path, record_class: type[R]) -> list[R]:
    """All shard manifests under a root, sorted by name. Empty if there are none."""
    urls = objects.list_files(objects.join(root_url, MANIFESTS), ".json")
    with ThreadPoolExecutor(max_workers=16) as pool:  # the cost is latency: each file has a few kilobytes
        return list(pool.map(lambda url: parse(record_class, objects.read_bytes(url), url), urls))


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


def merge(info: DatasetInfo, shards: Iterable[ShardManifest], *, complete: bool) -> DatasetManifest:
    """Merge shard manifests.

    Raises:
        FingerprintMismatch: a shard belongs to another data set.
    """
    ordered = sorted(shards, key=lambda shard: shard.shard)
    n_samples: Counter[Split] = Counter(dict.fromkeys(SPLITS, 0))
    dropped: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    histogram = [0] * info.n_codes
    for shard in ordered:
        require_same(f"shard {shard.shard}", info.fingerprint, shard.fingerprint, "It belongs to another data set.")
        n_samples.update({split: part.n_samples for split, part in shard.splits.items()})
        dropped.update(shard.dropped)
        lengths.update(shard.caption_lengths)
        for code, count in enumerate(shard.code_histogram):
            histogram[code] += count
    # Keep the merged manifest small: histograms, lengths and lists of dropped samples stay in the shard manifests.
    slim = [shard.model_copy(update={"code_histogram": [], "caption_lengths": {}, "dropped_samples": []}) for shard in ordered]
    return DatasetManifest(
        fingerprint=info.fingerprint,
        complete=complete,
        shards=slim,
        n_samples=dict(n_samples),
        dropped=dict(sorted(dropped.items())),
        code_histogram=histogram,
        caption_lengths=dict(sorted(lengths.items())),
    )


def load_manifest(root_url: str | Path) -> DatasetManifest:
    """The data set's manifest: manifest.json. If the encode run is not finished, the merged manifests of its finished shards.

    Raises:
        DataError: there is no data set, or no shard is finished.
        FingerprintMismatch: a shard belongs to another data set.
    """
    info = load_dataset_info(root_url)
    url = objects.join(root_url, MANIFEST_FILE)
    try:
        manifest = parse(DatasetManifest, objects.read_bytes(url), url)
        require_same(url, info.fingerprint, manifest.fingerprint, "It belongs to another data set.")
        return manifest
    except FileNotFoundError:
        shards = load_shard_manifests(root_url, ShardManifest)
    if not shards:
        raise DataError(f"{root_url}: the token data set has no finished shard; run `dalle-ds data encode` again")
    return merge(info, shards, complete=False)
