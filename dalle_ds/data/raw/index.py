"""The index of raw shards: the manifests of all shards in one file. It saves readers a GET a shard, and holds nothing else."""

import gzip
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

from dalle_ds.data.manifest import RawShardManifest, load_shard_manifests, shard_times
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.record import SealedRecord, parse

log = logging.getLogger(__name__)

RAW_INDEX = "index/raw.json.gz"


class RawIndex(SealedRecord):
    """index/raw.json.gz"""

    shards: list[RawShardManifest]


def write_raw_index(root_url: str | Path, manifests: Sequence[RawShardManifest]) -> None:
    """Write the index of these shards, unless readers use the one that is there. A copied data set may have an index with the
    right content that is older than its manifests: it is written again."""
    if _indexed(root_url) != list(manifests):
        data = gzip.compress(RawIndex(shards=list(manifests)).to_json(), compresslevel=6, mtime=0)
        objects.write_bytes(objects.join(root_url, RAW_INDEX), data)


def load_raw_manifests(root_url: str | Path) -> list[RawShardManifest]:
    """The manifests of all raw shards, sorted by name. Empty if there are none.

    They come from the index if it was written after all of them, otherwise from one GET each.
    """
    found = _indexed(root_url)
    return load_shard_manifests(root_url, RawShardManifest) if found is None else found


def _indexed(root_url: str | Path) -> list[RawShardManifest] | None:
    url = objects.join(root_url, RAW_INDEX)
    written = objects.list_times(url.rpartition("/")[0]).get(url)
    if written is None:
        return None
    times = shard_times(root_url)
    if written <= max(times.values(), default=0.0):
        return None
    try:
        index = parse(RawIndex, gzip.decompress(objects.read_bytes(url)), url)
    except (OSError, EOFError, zlib.error, DataError) as error:
        log.warning("%s cannot be used, so all manifests are read: %s", url, error)
        return None
    return index.shards if sorted(times) == [manifest.shard for manifest in index.shards] else None
