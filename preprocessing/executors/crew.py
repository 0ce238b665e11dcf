"""What the workers of a run are to it: they start, take a shard at a time, and report. Processes or actors of a Ray cluster."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


class Job(Protocol):
    """Task of a worker, pickled once per worker. `start` loads models and returns the function for one shard."""

    def start(self, n_threads: int) -> Callable[[Any], Any]: ...


@runtime_checkable
class LooksAhead(Protocol):
    """A function for one shard that can prepare the next one meanwhile."""

    def expect(self, shard: Any) -> None:
        """Begin to read `shard`, in the background. It is probably the next one, not surely."""
        ...


def perform(work: Callable[[Any], Any], shard: Any, upcoming: Any | None) -> Any:
    """Work on `shard`, and let the worker know which shard probably follows."""
    if upcoming is not None and isinstance(work, LooksAhead):
        work.expect(upcoming)
    return work(shard)


@dataclass(frozen=True)
class Report:
    """What became of a worker's start, or of its shard."""

    worker: int
    is_start: bool = False
    value: Any = None  # the shard's result; at the start, where the worker is, for messages
    error: Exception | None = None
    is_lost: bool = False  # the worker is gone: it must be started again


class Crew(Protocol):
    """Workers, numbered from 0."""

    def start(self, worker: int) -> None:
        """Start the worker, or another one in its place."""
        ...

    def assign(self, worker: int, shard: Any, upcoming: Any | None) -> None:
        """Give an idle worker a shard, and tell it which one probably follows."""
        ...

    def wait(self, seconds: float | None) -> list[Report]:
        """Wait for the next reports. Empty if none came in this time."""
        ...

    def stop(self, worker: int) -> None:
        """Dismiss an idle worker."""
        ...

    def close(self) -> None:
        """Dismiss all workers; what they work on is lost."""
        ...
