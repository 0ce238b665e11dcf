"""Progress records of a run for `status`, next to its output: the number of shards, and why shards failed."""

import socket
import time
from pathlib import Path

from dalle_ds.storage import objects
from dalle_ds.storage.record import Record, parse

FAILED, PLAN = "status/failed", "status/plan.json"


class Plan(Record):
    """Total number of shards of the output, including finished ones."""

    n_shards: int


class Failure(Record):
    """Why a shard's last attempt failed."""

    shard: str
    reason: str
    host: str
    at: float  # seconds since 1970


class Journal:
    """Writes the progress records of a run below `root`. All runs with the same output write the same plan."""

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
    """The stored plan. None if no run has started."""
    url = objects.join(root, PLAN)
    try:
        return parse(Plan, objects.read_bytes(url), url)
    except FileNotFoundError:
        return None


def failed_shards(root: str | Path) -> list[str]:
    """Names of the shards whose last attempt failed, sorted. May include a shard that another run has finished since."""
    start = objects.join(root, FAILED, "")
    return [url.removeprefix(start).removesuffix(".json") for url in _failure_urls(root)]


def load_failure(root: str | Path, shard: str) -> Failure | None:
    """Why the shard failed. None if another run has finished it since it was listed."""
    url = objects.join(root, FAILED, f"{shard}.json")
    try:
        return parse(Failure, objects.read_bytes(url), url)
    except FileNotFoundError:
        return None


def _failure_urls(root: str | Path) -> list[str]:
    return objects.list_files(objects.join(root, FAILED), ".json")
