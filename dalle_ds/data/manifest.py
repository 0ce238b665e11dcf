"""Manifests: what a shard holds and where it came from. Readers trust these alone, never a listing of data files."""

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
    """Which object a shard was made of."""

    path: str
    bytes: int
    checksum: str | None = None
    etag: str | None = None


class RawShardManifest(Record):
    """A raw shard: one tar of KEY.webp|png|jpg with KEY.json members."""

    schema_version: int = Field(SCHEMA, alias="schema")
    shard: str
    attempt: str
    path: str  # of the tar, below the root
    bytes: int
    checksum: str  # SHA-256 of the tar
    n_input: int
    n_samples: int
    dropped: dict[str, int]
    dropped_path: str | None = None  # JSON lines {"key", "reason"}, below the root
    fingerprint: str  # of the inputs and the filters
    seconds: float
    finished: float | None = None  # seconds since 1970


class Block(Record):
    """Some samples inside a part: `bytes` at `offset` is one ranged GET that holds both members of the block."""

    name: str
    offset: int
    bytes: int
    n_samples: int
    crc32: str  # of those bytes, 8 hex characters: a ranged read can check itself


_INTEGERS = "^([0-9]+( [0-9]+)*)?$"


class BlockColumns(Record):
    """The blocks of a part, as columns with an entry each: a merged manifest has a million blocks, and every rank reads it.

    Entries are separated by spaces. Block i is called `name`-i, with five digits, and begins where the one before it ended.
    """

    name: str
    bytes: str = Field(pattern=_INTEGERS)
    n_samples: str = Field(pattern=_INTEGERS)
    crc32: str = Field(pattern="^([0-9a-f]{8}( [0-9a-f]{8})*)?$")

    @model_validator(mode="after")
    def _check(self) -> "BlockColumns":
        if not self.bytes.count(" ") == self.n_samples.count(" ") == self.crc32.count(" "):
            raise ValueError("columns of different lengths")
        return self

    @classmethod
    def of(cls, name: str, blocks: Sequence[Block]) -> "BlockColumns":
        """The columns of all blocks of a part, in stored order."""
        ends = [block.offset + block.bytes for block in blocks]
        assert [block.offset for block in blocks] == [0, *ends][:-1], "a block begins where the one before it ended"
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

    path: str  # below the root
    bytes: int
    checksum: str  # SHA-256 of the tar
    n_samples: int
    columns: BlockColumns = Field(alias="blocks")

    @property
    def blocks(self) -> list[Block]:
        """The blocks one by one."""
        return list(BlockTable([self]))


class BlockTable:
    """The blocks of many parts as arrays, 28 bytes a block: as objects, a million of them would be near a gigabyte."""

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
    """A token shard. An empty split has no part."""

    schema_version: int = Field(SCHEMA, alias="schema")
    shard: str
    attempt: str
    input: InputIdentity
    splits: dict[Split, Part]
    n_input: int
    dropped: dict[str, int]
    dropped_samples: list[tuple[str, str]] = []  # (key, reason)
    code_histogram: list[int]  # of the train split: how often each code is used
    caption_lengths: dict[int, int]  # of the train split: BPE tokens a caption -> captions
    fingerprint: str  # of the data set
    seconds: float
    finished: float | None = None  # seconds since 1970

    @property
    def n_samples(self) -> int:
        return sum(part.n_samples for part in self.splits.values())


class DatasetInfo(Record):
    """dataset.json: what every shard of a token data set was made with."""

    schema_version: int = Field(SCHEMA, alias="schema")
    image_size: int
    grid: int
    n_codes: int
    dvae: str
    tokenizer: str
    crop: str
    validation_fraction: float
    precision: str | None = None  # of the encoder, where it is not fp32
    tf32: bool | None = None  # True: its fp32 convolutions were computed in TF32; else there is no such field
    agreement: float | None = None  # share of tokens that were those of fp32 on the first images: a figure, no identity
    fingerprint: str = ""

    @property
    def n_tokens(self) -> int:
        return self.grid**2

    def sealed(self) -> "DatasetInfo":
        """The same with its fingerprint: a hash of the other fields that decide the tokens."""
        identity = self.model_dump(exclude={"fingerprint", "agreement"}, exclude_none=True)
        return self.model_copy(update={"fingerprint": fingerprint(identity)})


class DatasetManifest(Record):
    """manifest.json: a pure merge of the shard manifests, in the order of their names."""

    schema_version: int = Field(SCHEMA, alias="schema")
    fingerprint: str
    complete: bool  # written at the end of an encode run, when every shard was done
    shards: list[ShardManifest]
    n_samples: dict[Split, int]
    dropped: dict[str, int]
    code_histogram: list[int]
    caption_lengths: dict[int, int]

    def parts(self, split: Split) -> list[Part]:
        """The parts of a split in reading order (by shard name); shards without such samples have none."""
        return [shard.splits[split] for shard in self.shards if split in shard.splits]


R = TypeVar("R", bound=Record)


def parse(record_class: type[R], data: bytes, url: str) -> R:
    """Validate JSON bytes; DataError names the file and what is wrong in it."""
    try:
        return record_class.model_validate_json(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or '(file)'}: {p['msg']}" for p in error.errors()[:3])
        raise DataError(f"{url}: not a valid {record_class.__name__}: {problems}") from None


def manifest_url(root_url: str | Path, shard: str) -> str:
    return objects.join(root_url, MANIFESTS, f"{shard}.json")


def done_shards(root_url: str | Path) -> set[str]:
    """Names of the shards that are committed, by one listing."""
    folder = objects.join(root_url, MANIFESTS)
    return {url.removeprefix(folder).strip("/").removesuffix(".json") for url in objects.list_files(folder, ".json")}


def load_shard_manifests(root_url: str | Path, record_class: type[R]) -> list[R]:
    """All shard manifests under a root, in the order of their names; an empty list where there are none."""
    urls = objects.list_files(objects.join(root_url, MANIFESTS), ".json")
    with ThreadPoolExecutor(max_workers=16) as pool:  # latency, not work: each is a few kilobytes
        return list(pool.map(lambda url: parse(record_class, objects.read_bytes(url), url), urls))


def load_dataset_info(root_url: str | Path) -> DatasetInfo:
    """dataset.json, checked against its own fingerprint.

    Raises:
        DataError: no data set there; FingerprintMismatch: the file was edited.
    """
    url = objects.join(root_url, DATASET_FILE)
    try:
        info = parse(DatasetInfo, objects.read_bytes(url), url)
    except FileNotFoundError:
        raise DataError(f"{root_url}: no token data set: dataset.json is missing. `dalle-ds data encode` makes one") from None
    if info.schema_version != SCHEMA:
        raise DataError(f"{url}: schema {info.schema_version}, this version reads schema {SCHEMA}")
    require_same(f"{url} (its content)", info.fingerprint, info.sealed().fingerprint, "The file was changed by hand.")
    return info


def merge(info: DatasetInfo, shards: Iterable[ShardManifest], *, complete: bool) -> DatasetManifest:
    """Merge shard manifests; each must carry the data set's fingerprint."""
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
    # What was summed up, and the lists of the dropped, stay in the shard manifests: the merged one must stay small.
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
    """The data set's manifest: manifest.json, or, while an encode run is not finished, a merge of the shards done so far.

    Raises:
        DataError: no data set, or no shard done; FingerprintMismatch: shards of different making.
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
        raise DataError(f"{root_url}: a token data set without any finished shard; run `dalle-ds data encode` to its end")
    return merge(info, shards, complete=False)
