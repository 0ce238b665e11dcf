"""Distribute shards over a Ray cluster: one actor per worker or GPU, replaced when the actor or its node is lost.

Ray transfers only the shards' descriptions and manifests; an actor reads images from storage. On every node, the environment of
`ray start` must have this project installed, access to storage, and AWS_* set: the driver sends neither code nor variables.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from dalle_ds.errors import DataError, UserError

log = logging.getLogger(__name__)

MAX_LOST = 3  # lost actors: on one shard, or consecutive ones before they took a shard


def join_cluster() -> Any:
    """Returns the `ray` module, connected to the cluster of RAY_ADDRESS, to a running local cluster, or to a new local one.

    Raises:
        UserError: ray is not installed, or the cluster is not reachable.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine ray: the package ray is not installed; run pip install 'dalle-ds[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(logging_level=logging.WARNING)
        except ConnectionError as error:
            raise UserError(f"engine ray: no cluster is reachable: {error}") from None
    return ray


def n_of(resource: str) -> int:
    """Number of CPUs or GPUs in the cluster; `resource` is "CPU" or "GPU"."""
    return int(join_cluster().cluster_resources().get(resource, 0))


def settle_on_ray(
    job: Any,
    shards: Sequence[Any],
    n_workers: int,
    gpus_each: int,
    name: Callable[[Any], str],
    settle: Callable[[Any, Callable[[], Any]], None],
) -> None:
    """Process every shard and pass its result to `settle`. Workers beyond the cluster's capacity start when nodes join it.

    Raises:
        UserError: a worker's start raised it, or workers were lost before they took a shard.
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
        # A shard is assigned only to a running actor: an actor that waits for resources would hold it forever.
        while left or any(shard is not None for _, shard in busy.values()):
            (reference,), _ = ray.wait(list(busy), num_returns=1)
            actor, shard = busy.pop(reference)
            try:
                result, error = ray.get(reference)
            except ray.exceptions.RayActorError as lost:
                ray.kill(actor)  # an unreachable actor may still be alive
                what = "before it had started" if shard is None else f"on shard {name(shard)}"
                log.warning("a worker was lost %s: %s", what, str(lost).partition("\n")[0])
                if shard is None:
                    n_lost_at_start += 1
                    if n_lost_at_start == MAX_LOST:
                        raise UserError(f"engine ray: {MAX_LOST} workers were lost before they had started: {lost}") from None
                else:
                    n_lost[name(shard)] += 1
                    if n_lost[name(shard)] < MAX_LOST:
                        left.append(shard)
                    else:
                        settle(shard, _raising(DataError(f"{MAX_LOST} workers were lost while processing it (out of memory?)")))
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
    """An actor, the counterpart of a local worker process. Returns expected errors as values, since Ray would wrap them."""

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
