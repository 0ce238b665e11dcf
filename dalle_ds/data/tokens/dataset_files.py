"""The files of a token data set that every reader needs: dataset.json, manifest.json, the index and the tokenizer."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import Field

from dalle_ds.data.manifest import (
    SCHEMA,
    SPLITS,
    DatasetInfo,
    ShardDetails,
    ShardManifest,
    Split,
    StoredFile,
    done_shards,
    iterate_shards,
    load_dataset_info,
    load_shard_manifest,
    shard_times,
)
from dalle_ds.data.tokens.index import TokenIndex
from dalle_ds.errors import DataError, UserError
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.hashing import sha256_of_bytes
from dalle_ds.storage.names import MANIFEST_FILE, TOKENIZER_FILE
from dalle_ds.storage.record import SealedRecord, parse

log = logging.getLogger(__name__)

INDEX_FOLDER = "index"


class DatasetManifest(SealedRecord):
    """manifest.json: sums over the finished shards, and the file with their index. Written at the end of an encode run."""

    schema_version: int = Field(SCHEMA, alias="schema")
    fingerprint: str
    complete: bool  # whether every raw shard was finished
    missing: list[str] = []  # names of the raw shards that were not
    n_shards: int = 0
    n_input: int = 0
    n_samples: dict[Split, int]
    n_bytes: int = 0  # of all token shards
    input_bytes: int = 0  # of all raw shards
    seconds: float = 0.0  # of work
    dropped: dict[str, int]
    code_histogram: list[int]
    caption_lengths: dict[int, int]
    masked: int = 0  # number of samples that the index masks
    no_longer_listed: int = 0  # samples that a drop list named when they should have been encoded, and that none names now
    drop_lists: str | None = None  # fingerprint of the drop lists that the mask follows; None: there was none
    index: StoredFile | None = None
    shards: list[ShardManifest] | None = None  # instead of an index, in manifests of earlier versions


@dataclass(frozen=True)
class DatasetFiles:
    """What all ranks need of a token data set. It can be pickled, so that one rank may read it for all."""

    root_url: str
    info: DatasetInfo
    manifest: DatasetManifest
    packed_index: bytes
    tokenizer: bytes

    @classmethod
    def read(cls, root_url: str | Path) -> "DatasetFiles":
        """Read the files: four objects, whatever the number of shards.

        Raises:
            DataError: there is no data set, no shard is finished, or a file is missing or damaged.
            FingerprintMismatch: a shard belongs to another data set.
        """
        info = load_dataset_info(root_url)
        manifest, packed_index = _load_packed(root_url, info)
        tokenizer_url = objects.join(root_url, TOKENIZER_FILE)
        try:
            tokenizer = objects.read_bytes(tokenizer_url)
        except FileNotFoundError:
            raise DataError(f"tokenizer {tokenizer_url}: no such file; `dalle-ds data encode` writes it") from None
        return cls(str(root_url), info, manifest, packed_index, tokenizer)

    @cached_property
    def index(self) -> TokenIndex:
        return TokenIndex.unpack(self.packed_index, f"index of {self.root_url}")


def merge(
    info: DatasetInfo, shards: Iterable[tuple[ShardManifest, ShardDetails]], missing: Sequence[str] = ()
) -> tuple[DatasetManifest, TokenIndex]:
    """Merge shards, one at a time, in any order. The manifest does not yet name the file of the index.

    Raises:
        FingerprintMismatch: a shard belongs to another data set.
    """
    n_samples: Counter[Split] = Counter(dict.fromkeys(SPLITS, 0))
    dropped: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    histogram = np.zeros(info.n_codes, dtype=np.int64)
    sums: Counter[str] = Counter()
    seconds: list[float] = []

    def counted() -> Iterable[ShardManifest]:
        for shard, details in shards:
            require_same(f"shard {shard.shard}", info.fingerprint, shard.fingerprint, "It belongs to another data set.")
            n_samples.update({split: part.n_samples for split, part in shard.splits.items()})
            dropped.update(shard.dropped)
            lengths.update(details.caption_lengths)
            if details.code_histogram:
                histogram[:] += details.code_histogram
            n_bytes = sum(part.bytes for part in shard.parts)
            sums.update(n_shards=1, n_input=shard.n_input, n_bytes=n_bytes, input_bytes=shard.input.bytes)
            seconds.append(shard.seconds)
            yield shard

    index = TokenIndex.of(counted())
    manifest = DatasetManifest(
        fingerprint=info.fingerprint,
        complete=not missing,
        missing=sorted(missing),
        n_samples=dict(n_samples),
        seconds=sum(sorted(seconds)),  # sorted: the sum does not depend on the order of the shards
        dropped=dict(sorted(dropped.items())),
        code_histogram=histogram.tolist(),
        caption_lengths=dict(sorted(lengths.items())),
        **sums,
    )
    return manifest, index


def merge_stored(
    root_url: str | Path, info: DatasetInfo, shards: Iterable[str], missing: Sequence[str] = (), *, with_details: bool = True
) -> tuple[DatasetManifest, TokenIndex]:
    """Merge the shards of these names, with one or (with details) two GETs a shard.

    Args:
        with_details: count codes and lengths of captions too.
    """

    def read(name: str) -> tuple[ShardManifest, ShardDetails]:
        shard = load_shard_manifest(root_url, ShardManifest, name)
        return shard, shard.read_details(root_url) if with_details else ShardDetails()

    return merge(info, iterate_shards(sorted(shards), read), missing)


def publish(root_url: str | Path, manifest: DatasetManifest, index: TokenIndex) -> DatasetManifest:
    """Write the index, then the manifest that names it. Returns the manifest.

    The index is named after its content, so a reader of the manifest before this one still finds the index of that one.
    """
    data = index.pack()
    path = f"{INDEX_FOLDER}/{sha256_of_bytes(data)[:20]}.npz"
    manifest = manifest.model_copy(update={"index": StoredFile.of(path, data)})
    objects.write_bytes(objects.join(root_url, path), data)
    objects.write_bytes(objects.join(root_url, MANIFEST_FILE), manifest.to_json())
    return manifest


def load_current(root_url: str | Path, info: DatasetInfo) -> tuple[DatasetManifest, TokenIndex] | None:
    """What is published, by two listings and two GETs. None if it is not younger than the manifests of all shards, if it is not
    of these shards, or if it is damaged."""
    try:
        manifest = _published(root_url, info)
        if manifest is None or manifest.index is None:
            return None
        index = TokenIndex.unpack(manifest.index.read(root_url), objects.join(root_url, manifest.index.path))
    except (FileNotFoundError, UserError) as error:
        log.warning("%s: what is published cannot be used, and is written again: %s", root_url, error)
        return None
    written = objects.list_times(objects.join(root_url, INDEX_FOLDER)).get(objects.join(root_url, manifest.index.path), 0.0)
    times = shard_times(root_url)
    if written <= max(times.values(), default=0.0):
        return None
    return (manifest, index) if set(index.names) == times.keys() else None


def load_manifest(root_url: str | Path) -> DatasetManifest:
    """Read manifest.json alone. If no encode run has ended yet, merge the finished shards, with two GETs each.

    Raises:
        DataError: there is no data set, or no shard is finished.
        FingerprintMismatch: a shard belongs to another data set.
    """
    info = load_dataset_info(root_url)
    manifest = _published(root_url, info)
    return _merge_unpublished(root_url, info, with_details=True)[0] if manifest is None else manifest


def load_index(root_url: str | Path) -> tuple[DatasetManifest, TokenIndex]:
    """Read manifest.json and the index. If no encode run has ended yet, merge the finished shards, with one GET each and
    without their details.

    Raises:
        DataError: there is no data set, no shard is finished, or the index is missing or damaged.
        FingerprintMismatch: a shard belongs to another data set.
    """
    manifest, packed = _load_packed(root_url, load_dataset_info(root_url))
    return manifest, TokenIndex.unpack(packed, f"index of {root_url}")


def _load_packed(root_url: str | Path, info: DatasetInfo) -> tuple[DatasetManifest, bytes]:
    manifest = _published(root_url, info)
    if manifest is None:
        manifest, index = _merge_unpublished(root_url, info, with_details=False)
        return manifest, index.pack()
    if manifest.shards is not None:
        return manifest.model_copy(update={"shards": None}), TokenIndex.of(manifest.shards).pack()
    if manifest.index is None:
        raise DataError(f"{objects.join(root_url, MANIFEST_FILE)}: it names no index; run `dalle-ds data encode` again")
    try:
        return manifest, manifest.index.read(root_url)
    except FileNotFoundError:
        url = objects.join(root_url, manifest.index.path)
        raise DataError(
            f"{url}: manifest.json names this index, but it does not exist; run `dalle-ds data encode` again"
        ) from None


def _published(root_url: str | Path, info: DatasetInfo) -> DatasetManifest | None:
    url = objects.join(root_url, MANIFEST_FILE)
    try:
        manifest = parse(DatasetManifest, objects.read_bytes(url), url)
    except FileNotFoundError:
        return None
    require_same(url, info.fingerprint, manifest.fingerprint, "It belongs to another data set.")
    return manifest if manifest.shards is None else _completed(info, manifest, manifest.shards)


def _completed(info: DatasetInfo, manifest: DatasetManifest, shards: list[ShardManifest]) -> DatasetManifest:
    # Manifests of earlier versions have the shards themselves, without sums that are stored now.
    sums, _ = merge(info, ((shard, ShardDetails()) for shard in shards))
    names = ("n_shards", "n_input", "n_bytes", "input_bytes", "seconds")
    return manifest.model_copy(update={name: getattr(sums, name) for name in names})


def _merge_unpublished(root_url: str | Path, info: DatasetInfo, *, with_details: bool) -> tuple[DatasetManifest, TokenIndex]:
    shards = done_shards(root_url)
    if not shards:
        raise DataError(f"{root_url}: the token data set has no finished shard; run `dalle-ds data encode` again")
    manifest, index = merge_stored(root_url, info, shards, with_details=with_details)
    return manifest.model_copy(update={"complete": False}), index
