"""Edit JSON as a program that knows its digest would: tests of what comes after the digest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle_ds.storage import objects
from dalle_ds.storage.record import DIGEST, seal


def edit_json(url: str | Path, change: Callable[[dict[str, Any]], object] = lambda _: None, **changes: object) -> None:
    """Apply `change` to a stored JSON object, then replace the keys of `changes`. A digest is computed again."""
    tree = json.loads(objects.read_bytes(url))
    is_sealed = tree.pop(DIGEST, None) is not None
    change(tree)
    tree.update(changes)
    objects.write_bytes(url, seal(tree) if is_sealed else json.dumps(tree).encode())
