"""Raw shards: WebDataset tars of images with captions, read sample by sample; every damaged sample is counted."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dalle_ds.data.manifest import RawShardManifest, Split
from dalle_ds.data.raw.compressed import TAR_ENDINGS, tar_stem
from dalle_ds.data.raw.index import load_raw_manifests
from dalle_ds.data.raw.sample import Dropped, RawSample
from dalle_ds.data.raw.tar_samples import read_tar
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.hashing import hash_to_integer, sha256_of_file
from dalle_ds.storage.names import DATASET_FILE
from dalle_ds.storage.record import PathBelow, SealedRecord, parse
from dalle_ds.storage.text import lines_of, parse_json

DROP_LISTS: Final = "duplicates.json"
LISTED_REASONS: Final = ("near duplicate", "in evaluation set", "in training set")  # of drop lists; these are no failures
IN_TRAINING: Final = LISTED_REASONS[2]


@dataclass(frozen=True)
class RawShard:
    """One tar to read. `checksum` and `n_samples` are None if there is no manifest.

    The checksum is the tar's SHA-256. If the shard has a drop list, "+" and the list's hash follow, so that a changed list
    changes the input's identity.
    """

    name: str
    url: str
    bytes: int
    checksum: str | None = None
    n_samples: int | None = None
    drop_list: str | None = None  # URL of JSON lines {"key", "reason"}: samples to skip
    metadata: str | None = None  # URL of the parquet file of `data.raw.metadata`
    metadata_checksum: str | None = None  # its SHA-256


class DropLists(SealedRecord):
    """duplicates.json under a root of raw shards: the drop lists written by `dalle-ds data dedup`."""

    max_distance: int
    lists: dict[str, PathBelow]  # of each shard, below the root; the file name contains a hash of the list


def split_of(group: str, validation_fraction: float) -> Split:
    """ "train" or "validation", by hash of the group. The split does not depend on the other samples of the data set."""
    return "validation" if split_draw(group) < validation_fraction else "train"


def split_draw(group: str) -> float:
    """A number from 0 to 1 by hash of the group, uniformly distributed. The validation split has those below its fraction."""
    return hash_to_integer(f"split:{group}") / 2**64


def list_raw_shards(root_url: str | Path) -> list[RawShard]:
    """The shards under a root, sorted by name: all shards with a manifest. If there are no manifests, every tar.

    Raises:
        DataError: there are neither manifests nor tars, or the root is that of a token data set.
    """
    if objects.exists(objects.join(root_url, DATASET_FILE)):
        raise DataError(f"{root_url} is a token data set: it has {DATASET_FILE}. Expected raw shards of `dalle-ds data ingest`")
    manifests = load_raw_manifests(root_url)
    if manifests:
        return _with_drop_lists(root_url, [shard_of(root_url, manifest) for manifest in manifests])
    found = objects.list_sizes(root_url)
    tars = {url: size for url, size in found.items() if tar_stem(url) is not None}
    if not tars:
        raise DataError(
            f"{root_url}: no raw shards among its {len(found)} files: neither manifests/*.json nor {', '.join(TAR_ENDINGS)}. "
            "`dalle-ds data ingest` creates raw shards from a folder of images with captions, and reads parquet files"
        )
    names = distinct_names(root_url, {url: _shard_name(root_url, url) for url in tars})
    return sorted((RawShard(names[url], url, size) for url, size in tars.items()), key=lambda shard: shard.name)


def shard_of(root_url: str | Path, manifest: RawShardManifest) -> RawShard:
    """The shard of a manifest, without its drop list."""
    return RawShard(
        manifest.shard,
        objects.join(root_url, manifest.path),
        manifest.bytes,
        manifest.checksum,
        manifest.n_samples,
        metadata=objects.join(root_url, manifest.metadata.path) if manifest.metadata else None,
        metadata_checksum=manifest.metadata.checksum if manifest.metadata else None,
    )


def distinct_names(root_url: str | Path, names: Mapping[str, str]) -> dict[str, str]:
    """Make names of shards, by url, distinct. Equal names, with "/" equal to "_", get a hash of the path below `root_url`.

    Without it, a/0.tar and a_0.tar would both be the shard a_0, and one of them would count as done.
    """
    counts = Counter(name.replace("/", "_") for name in names.values())
    start = len(str(root_url))
    return {
        url: f"{name}-{hashlib.sha256(url[start:].encode()).hexdigest()[:8]}" if counts[name.replace("/", "_")] > 1 else name
        for url, name in names.items()
    }


def read_raw_shard(shard: RawShard, *, with_overlap: bool = False) -> Iterator[RawSample | Dropped]:
    """The samples of a shard in stored order. An unusable sample is a Dropped with its reason.

    Args:
        with_overlap: yield the samples of an evaluation set that are in the training set too.

    Raises:
        DataError: the shard is missing, or does not match its manifest (size, checksum).
    """
    with fetched(shard) as file:
        yield from samples_in(shard, file, with_overlap=with_overlap)


@contextmanager
def fetched(shard: RawShard) -> Iterator[Path]:
    """Yields a local file with the shard's tar, whose size and checksum are those of its manifest.

    Raises:
        DataError: the shard is missing, or does not match its manifest.
    """
    try:
        with objects.local_copy(shard.url) as file:
            _check_identity(shard, file)
            yield file
    except FileNotFoundError:
        raise DataError(f"{shard.url}: the shard does not exist") from None


def samples_in(shard: RawShard, file: Path, *, with_overlap: bool = False) -> Iterator[RawSample | Dropped]:
    """As `read_raw_shard`, of a tar that `fetched` gave."""
    dropped = read_drop_list(shard.drop_list) if shard.drop_list else {}
    for sample in read_tar(file, shard.name):
        reason = dropped.get(sample.key)
        if with_overlap and reason == IN_TRAINING:
            reason = None
        yield Dropped(sample.key, reason) if reason else sample


def without_drop_list(shard: RawShard) -> RawShard:
    """The same shard without its drop list, so that readers yield all its samples."""
    return replace(shard, drop_list=None, checksum=shard.checksum.partition("+")[0] if shard.checksum else None)


def _with_drop_lists(root_url: str | Path, shards: list[RawShard]) -> list[RawShard]:
    found = load_drop_lists(root_url)
    lists = found.lists if found else {}
    return [
        replace(
            shard,
            drop_list=objects.join(root_url, lists[shard.name]),
            checksum=f"{shard.checksum}+{lists[shard.name].rpartition('-')[2].removesuffix('.jsonl')}",
        )
        if shard.name in lists
        else shard
        for shard in shards
    ]


def load_drop_lists(root_url: str | Path) -> DropLists | None:
    """The drop lists of the raw shards under a root. None if `dalle-ds data dedup` has written none."""
    url = objects.join(root_url, DROP_LISTS)
    try:
        return parse(DropLists, objects.read_bytes(url), url)
    except FileNotFoundError:
        return None


def read_drop_list(url: str) -> dict[str, str]:
    """The listed samples: {key: reason}.

    Raises:
        DataError: the list is missing or damaged.
    """
    remedy = "run `dalle-ds data dedup` again"
    return {record["key"]: record["reason"] for record in read_reasons(url, "drop list", remedy)}


def read_reasons(url: str, kind: str, remedy: str) -> list[dict[str, str]]:
    """Records with at least a key and a reason, from JSON lines, in stored order.

    Args:
        kind: what the list is, for messages.
        remedy: what a user can do if it is missing or damaged, for messages.

    Raises:
        DataError: the list is missing or damaged.
    """
    try:
        records = [parse_json(line) for line in lines_of(objects.read_bytes(url).decode())]
    except FileNotFoundError:
        raise DataError(f"{url}: the {kind} is missing; {remedy}") from None
    except ValueError:
        raise DataError(f"{url}: the {kind} is damaged; {remedy}") from None
    if not all(
        isinstance(record, dict) and all(isinstance(record.get(name), str) for name in ("key", "reason")) for record in records
    ):
        raise DataError(f"{url}: the {kind} is damaged; {remedy}")
    return records


def _shard_name(root_url: str | Path, url: str) -> str:
    # The name includes sub-folders, so that a/0.tar and b/0.tar are two shards.
    return (tar_stem(url) or url).removeprefix(str(root_url)).strip("/").replace("/", "_")


def _check_identity(shard: RawShard, file: Path) -> None:
    found = file.stat().st_size
    if found != shard.bytes:
        raise DataError(f"{shard.url}: {found} bytes, expected {shard.bytes}; the shard has changed or is truncated")
    if shard.checksum is not None:
        digest = sha256_of_file(file)
        expected = shard.checksum.partition("+")[0]
        if digest != expected:
            raise DataError(f"{shard.url}: SHA-256 {digest}, expected {expected} as in its manifest; the shard is damaged")
