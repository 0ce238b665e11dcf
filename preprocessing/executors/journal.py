"""What a run leaves beside its output for `status`: how many shards there will be, and why some failed."""

import socket
import time
from pathlib import Path

from dalle_ds.data.manifest import Record, parse
from dalle_ds.storage import objects

FAILED, PLAN = "status/failed", "status/plan.json"


class Plan(Record):
    """All shards of the work, the finished ones included."""

    n_shards: int


class Failure(Record):
    """Why a shard stayed open, at its last attempt."""

    shard: str
    reason: str
    host: str
    at: float  # seconds since 1970


class Journal:
    """The notes of a run that writes below `root`; every run on the same work writes the same plan."""

    def __init__(self, root: str, n_shards: int) -> None:
        self._root = root
        self._recorded = set(_failure_urls(root))
        plan = Plan(n_shards=n_shards)
        if load_plan(root) != plan:
            objects.write_bytes(objects.join(root, PLAN), plan.to_json())

    def failed(self, shard: str, reason: str) -> None:
        failure = Failure(shard=shard, reason=reason, host=socket.gethostname(), at=time.time())
        objects.write_bytes(self._url(shard), failure.to_json())
        self._recorded.add(self._url(shard))

    def succeeded(self, shard: str) -> None:
        if self._url(shard) in self._recorded:
            objects.delete(self._url(shard))

    def _url(self, shard: str) -> str:
        return objects.join(self._root, FAILED, f"{shard}.json")


def load_plan(root: str | Path) -> Plan | None:
    """None where no run has begun."""
    url = objects.join(root, PLAN)
    return parse(Plan, objects.read_bytes(url), url) if objects.exists(url) else None


def load_failures(root: str | Path) -> list[Failure]:
    """In the order of the shards' names. A shard that another run has done since may still be among them."""
    return [parse(Failure, objects.read_bytes(url), url) for url in _failure_urls(root)]


def _failure_urls(root: str | Path) -> list[str]:
    return objects.list_files(objects.join(root, FAILED), ".json")
