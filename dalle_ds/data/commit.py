"""The commit protocol: data objects under an attempt id first, then the shard's manifest, which only one attempt can create."""

import uuid
from collections.abc import Mapping
from pathlib import Path

from dalle_ds.data.manifest import Record, manifest_url
from dalle_ds.storage import objects


def new_attempt() -> str:
    """An id that no other attempt at any shard has, on any machine."""
    return uuid.uuid4().hex[:12]


def commit_shard(root_url: str, shard: str, files: Mapping[str, Path], manifest: Record) -> bool:
    """Publish a shard: whole or not at all, and once, however many workers try.

    Args:
        files: path below the root (it holds the attempt id) -> finished local file.

    Returns:
        False if another attempt's manifest was there first; then our objects, which nothing names, are removed.
    """
    for path, local in files.items():
        objects.put_file(local, objects.join(root_url, path))
    if objects.create_exclusive(manifest_url(root_url, shard), manifest.to_json()):
        return True
    for path in files:
        objects.delete(objects.join(root_url, path))
    return False
