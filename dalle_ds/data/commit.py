"""The commit protocol: write data objects under an attempt id, then create the manifest, which only one attempt can do."""

import uuid
from collections.abc import Mapping
from pathlib import Path

from dalle_ds.data.manifest import manifest_url
from dalle_ds.storage import objects
from dalle_ds.storage.record import SealedRecord


def new_attempt() -> str:
    """An id that is unique among all attempts at all shards, on all machines."""
    return uuid.uuid4().hex[:12]


def commit_shard(root_url: str, shard: str, files: Mapping[str, Path], manifest: SealedRecord) -> bool:
    """Publish a shard atomically. If several attempts commit the same shard, only the first succeeds.

    Args:
        files: path below the root (which contains the attempt id) -> finished local file.

    Returns:
        True if this attempt committed the shard. False if another attempt's manifest already exists; the objects of this
        attempt, which no manifest names, are then deleted.
    """
    for path, local in files.items():
        objects.put_file(local, objects.join(root_url, path))
    if objects.create_exclusive(manifest_url(root_url, shard), manifest.to_json()):
        return True
    for path in files:
        objects.delete(objects.join(root_url, path))
    return False
