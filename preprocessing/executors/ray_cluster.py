"""Workers on a Ray cluster: one actor per worker or GPU, replaced when the actor or its node is lost.

Ray transfers only the shards' descriptions and results; an actor reads images from storage. On every node, the environment of
`ray start` must have this project installed, access to storage, and AWS_* set: the driver sends neither code nor variables.
"""

import logging
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import Future
from typing import Any, Final

from dalle_ds.errors import ClusterUnreachable, UserError
from preprocessing.executors.crew import Job, Report, perform

log = logging.getLogger(__name__)

JOIN_SECONDS: Final = 60.0  # joining takes seconds; Ray waits 30 s for a node that it starts, after its head
REFUSALS: Final = ("AuthenticationError", "ValueError", "Version mismatch")  # parts of Ray's errors that no later start mends


def join_cluster() -> Any:
    """Returns the `ray` module, connected to the cluster of RAY_ADDRESS, to a running local cluster, or to a new local one.

    Raises:
        UserError: ray is not installed, or refuses the address, the token or the versions.
        ClusterUnreachable: no cluster could be joined or started.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine ray: the package ray is not installed; run pip install 'dalle-ds[ray]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        cluster = f"the cluster at RAY_ADDRESS={address}" if address else "a cluster of this machine (RAY_ADDRESS is not set)"
        try:
            _initialized(ray).result(JOIN_SECONDS)
        except Exception as error:  # Ray raises a plain Exception when a node does not start
            raise _failure(cluster, error) from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGTERM, signal.getsignal(signal.SIGTERM)
            )  # Ray's library has put one that aborts in its place
    return ray


def _failure(cluster: str, error: Exception) -> UserError:
    without_traceback = re.sub(r"Traceback .*\n(?: .*\n)+", "", str(error.__cause__ or error))
    reason = " ".join(without_traceback.split()) or f"no answer within {JOIN_SECONDS:.0f} s"
    told = f"engine ray: {cluster} cannot be joined: {reason}"
    if any(refusal in f"{type(error).__name__}: {reason}" for refusal in REFUSALS):
        return UserError(told)
    return ClusterUnreachable(f"{told}. Expected a head node that answers; the same command then goes on where this one ended")


def _initialized(ray: Any) -> Future[None]:
    """Call `ray.init` on a thread of its own: without a head it blocks for longer than we wait, and no signal interrupts it."""
    done: Future[None] = Future()

    def initialize() -> None:
        try:
            ray.init(logging_level=logging.WARNING)
        except Exception as error:
            done.set_exception(error)
            return
        done.set_result(None)
        threading.Event().wait()  # with the thread that started them, Linux would end the processes of a new cluster

    # Ray warns that it sets no handler of SIGTERM on this thread. The command has one, which Ray's would replace.
    logging.getLogger("ray._private.worker").addFilter(lambda record: "SIGTERM handler" not in str(record.msg))
    threading.Thread(target=initialize, daemon=True).start()
    return done


def n_of(resource: str) -> int:
    """Number of CPUs or GPUs in the cluster; `resource` is "CPU" or "GPU"."""
    return int(join_cluster().cluster_resources().get(resource, 0))


def n_places(n_cpus: int, n_gpus: int) -> int:
    """Number of workers with so many CPUs and GPUs that the cluster's nodes have room for.

    Raises:
        UserError: no node has room for one: its worker would wait forever.
    """
    sizes = [node["Resources"] for node in join_cluster().nodes() if node["Alive"]]
    rooms = [int(min(size.get("CPU", 0) // n_cpus, size.get("GPU", 0) // n_gpus if n_gpus else float("inf"))) for size in sizes]
    if not any(rooms):
        found = ", ".join(f"{size.get('CPU', 0):.0f} CPUs and {size.get('GPU', 0):.0f} GPUs" for size in sizes)
        raise UserError(f"engine ray: a worker takes {n_cpus} CPUs and {n_gpus} GPUs; the nodes have {found or 'nothing'}")
    return sum(rooms)


class Actors:
    """An actor per worker. Workers beyond the cluster's capacity start when nodes join it."""

    def __init__(self, job: Job, n_cpus: int, n_gpus: int) -> None:
        self._ray = join_cluster()
        self._class = self._ray.remote(num_cpus=n_cpus, num_gpus=n_gpus, max_restarts=0)(_Worker)
        self._job, self._n_cpus = job, n_cpus
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, tuple[int, bool]] = {}  # reference -> (worker, whether this is its start)

    def start(self, worker: int) -> None:
        actor = self._actors[worker] = self._class.remote(self._job)
        self._pending[actor.start.remote(self._n_cpus)] = worker, True

    def assign(self, worker: int, shard: Any, upcoming: Any | None) -> None:
        self._pending[self._actors[worker].work.remote(shard, upcoming)] = worker, False

    def wait(self, seconds: float | None) -> list[Report]:
        if not self._pending:  # all are idle: other machines have the shards that are left
            time.sleep(seconds or 0)
            return []
        done, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=seconds)
        return [self._report(reference) for reference in done]

    def _report(self, reference: Any) -> Report:
        worker, is_start = self._pending.pop(reference)
        try:
            value, error = self._ray.get(reference)
            return Report(worker, is_start, value=value, error=error)
        except (self._ray.exceptions.RayTaskError, self._ray.exceptions.RaySystemError) as unexpected:
            return Report(worker, is_start, error=unexpected)  # a bug of ours; a result that cannot be unpickled
        except self._ray.exceptions.RayError as lost:  # of the actor, or of its node with a result too large to be sent at once
            log.warning("a worker was lost: %s", str(lost).partition("\n")[0])
            self._ray.kill(self._actors[worker])  # an unreachable actor may still be alive
            return Report(worker, is_start, is_lost=True)

    def stop(self, worker: int) -> None:
        self._ray.kill(self._actors.pop(worker))

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)


class _Worker:
    """An actor. Returns expected errors as values, since Ray would wrap them."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def start(self, n_threads: int) -> tuple[str | None, Exception | None]:
        try:
            self._work = self._job.start(n_threads)
        except (UserError, OSError) as error:
            return None, error
        return f"process {os.getpid()} on {socket.gethostname()}", None

    def work(self, shard: Any, upcoming: Any | None) -> tuple[Any, Exception | None]:
        try:
            return perform(self._work, shard, upcoming), None
        except (UserError, OSError) as error:
            return None, error
