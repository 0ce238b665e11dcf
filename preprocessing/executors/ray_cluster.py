"""Shards over a Ray cluster: an actor a worker or GPU, replaced when it or its node is lost.

Ray carries the shards' names and their manifests; images go from storage to the actor that encodes them. Where the cluster's
nodes were started (`ray start`), the project is installed, storage is in reach and AWS_* are set: the driver sends neither.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from dalle_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

MAX_LOST = 3  # actors: at one shard, or in a row before they took a shard


def join_cluster() -> Any:
    """The `ray` module, connected to the cluster of RAY_ADDRESS, to one that runs on this machine, or to a new one.

    Raises:
        UserError: ray is not installed, or the cluster is not in reach.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine ray: the package ray is not installed; pip install 'dalle-ds[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(logging_level=logging.WARNING)
        except ConnectionError as error:
            raise UserError(f"engine ray: no cluster in reach: {error}") from None
    return ray


def n_of(resource: str) -> int:
    """How many "CPU" or "GPU" the cluster has."""
    return int(join_cluster().cluster_resources().get(resource, 0))


def settle_on_ray(
    job: Any,
    shards: Sequence[Any],
    n_workers: int,
    gpus_each: int,
    name: Callable[[Any], str],
    settle: Callable[[Any, Callable[[], Any]], None],
) -> None:
    """Settle every shard. Workers beyond what the cluster can hold begin when nodes join it.

    Raises:
        UserError: as a worker's start raised it, or workers are lost before they take a shard.
    """
    ray = join_cluster()
    left = deque(shards)
    n_lost: Counter[str] = Counter()
    n_lost_at_start = 0
    busy: dict[Any, tuple[Any, Any]] = {}  # reference -> (actor, the shard it works on; None while it starts)
    actor_class = ray.remote(num_cpus=1, num_gpus=gpus_each, max_restarts=0)(_Worker)

    def hire() -> None:
        actor = actor_class.remote(job)
        busy[actor.start.remote()] = (actor, None)

    try:
        for _ in range(min(n_workers, len(left))):
            hire()
        # A shard is given only to an actor that has begun: one that waits for a place in the cluster would keep it for ever.
        while left or any(shard is not None for _, shard in busy.values()):
            (reference,), _ = ray.wait(list(busy), num_returns=1)
            actor, shard = busy.pop(reference)
            try:
                result, error = ray.get(reference)
            except ray.exceptions.RayActorError as lost:
                ray.kill(actor)  # out of reach is not yet dead
                what = "before it had begun" if shard is None else f"at shard {name(shard)}"
                log.warning("a worker was lost %s: %s", what, str(lost).partition("\n")[0])
                if shard is None:
                    n_lost_at_start += 1
                    if n_lost_at_start == MAX_LOST:
                        raise UserError(f"engine ray: {MAX_LOST} workers were lost before they had begun: {lost}") from None
                else:
                    n_lost[name(shard)] += 1
                    if n_lost[name(shard)] < MAX_LOST:
                        left.append(shard)
                    else:
                        settle(shard, _raising(DataError(f"{MAX_LOST} workers were lost at it (memory?)")))
                if left:
                    hire()
                continue
            except ray.exceptions.RayTaskError as unexpected:
                if shard is None:
                    raise
                result, error = None, unexpected
            if shard is None and error is not None:
                raise error
            n_lost_at_start = 0
            if shard is not None:
                settle(shard, _raising(error) if error is not None else lambda result=result: result)
            if left:
                shard = left.popleft()
                busy[actor.work.remote(shard)] = (actor, shard)
    finally:
        for actor, _ in busy.values():
            ray.kill(actor)


def _raising(error: Exception) -> Callable[[], Any]:
    def outcome() -> Any:
        raise error

    return outcome


class _Worker:
    """An actor: what a process of the local pool is. Expected errors are values here: Ray would wrap them."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def start(self) -> tuple[None, Exception | None]:
        try:
            self._work = self._job.start(1)
        except (UserError, OSError) as error:
            return None, error
        return None, None

    def work(self, shard: Any) -> tuple[Any, Exception | None]:
        try:
            return self._work(shard), None
        except (UserError, OSError) as error:
            return None, error
