"""Ray engine on a real cluster of two nodes on this machine; one node is killed during the run."""

import functools
import http.server
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from dalle_ds.data.manifest import RawShardManifest, load_shard_manifests
from dalle_ds.errors import UserError
from preprocessing.configs import IngestConfig, VerifyConfig
from preprocessing.executors import local
from preprocessing.executors.local import run_shards
from preprocessing.executors.ray_cluster import Actors
from preprocessing.stages import encode, ingest, verify
from tests.preprocessing.conftest import N_IMAGES, N_SHARDS, World, part_checksums
from tests.preprocessing.test_disturbances import killing_progress
from tests.support.ray_jobs import Large, OneFull

pytestmark = pytest.mark.launch

SAMPLES_PER_SHARD = N_IMAGES // N_SHARDS
CPUS = {"head": 5, "worker": 7}  # different, so that a test can choose the node
START_SECONDS = 300  # beside other work, a node takes more than Ray's 30 s


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head node and another one. All their processes are gone at the end, also if they have not started well."""
    import ray
    from ray.cluster_utils import Cluster

    before = set(psutil.Process().children(recursive=True))
    # a folder of its own: otherwise every ray.init() on this machine would join this cluster
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name, value in {"TMPDIR": folder, "USAGE_STATS_ENABLED": 0, "raylet_start_wait_time_s": START_SECONDS}.items():
            patch.setenv(f"RAY_{name}", str(value))
        stack.callback(end_processes, before)
        # port 0: any free one; those not named here are free ones by default
        args = {"include_dashboard": False, "dashboard_agent_listen_port": 0, "object_store_memory": 80 << 20, "wait": False}
        running = Cluster()
        stack.callback(running.shutdown)
        stack.callback(ray.shutdown)  # first: a cluster does not end while this process is in it
        for cpus in CPUS.values():
            running.add_node(num_cpus=cpus, **args)
        running.wait_for_nodes(START_SECONDS)
        ray.init(address=running.address, log_to_driver=False)
        yield running


def end_processes(before: set[psutil.Process]) -> None:
    started = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(started, timeout=30)
    for process in alive:
        process.kill()


def kill_worker_node(cluster: Any) -> None:
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)


def test_ingest_makes_the_same_shards(world: World, cluster: object, tmp_path: Path) -> None:
    out = str(tmp_path / "raw")
    config = IngestConfig(images=str(world.images), out=out, samples_per_shard=SAMPLES_PER_SHARD, engine="ray", workers=4)
    assert ingest.run(config).summary["samples"] == N_IMAGES
    here, there = (load_shard_manifests(root, RawShardManifest) for root in (world.raw, out))
    assert [shard.checksum for shard in there] == [shard.checksum for shard in here]


def test_one_bad_actor_of_twelve_is_retired(cluster: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    results, failures = run_shards(
        OneFull(str(tmp_path), wrong=57),
        range(60),
        n_workers=sum(CPUS.values()),
        name=str,
        size=lambda _: 1,
        what="test",
        unit="shard",
        engine="ray",
        looks_ahead=True,
    )
    assert failures == {"57": "ZeroDivisionError: a bug of ours"}
    assert sorted(shard for shard, _ in results) == sorted({*range(60)} - {57})
    assert sum(was_expected for _, was_expected in results) > 20, "an actor knows its next shard while it has one"
    retried = [record.args for record in caplog.records if record.msg.endswith("another worker tries it")]
    assert len([args for args in retried if "No space left" in str(args)]) == 3, "what a bad actor costs"
    assert caplog.text.count("is retired") == 1


def test_workers_that_fit_on_no_node_are_refused(world: World, cluster: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a worker takes 99 CPUs and 0 GPUs; the nodes have"):
        encode.run(world.config(tmp_path / "tokens", engine="ray", workers=None, worker_cpus=99))


@pytest.fixture
def raw_on_the_web(world: World) -> Iterator[str]:
    """The raw shards on a web server: actors read ahead what is not on a disk."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=world.raw)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_lost_node_costs_nothing_but_time(
    world: World,
    undisturbed: dict[str, dict[str, str]],
    cluster: object,
    raw_on_the_web: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An actor on each node, with four cores. The node that is left does the rest."""
    out = str(tmp_path / "tokens")
    with monkeypatch.context() as patch:
        patch.setattr(local, "progress", killing_progress(lambda: kill_worker_node(cluster), after=4))
        outcome = encode.run(world.config(out, raw=raw_on_the_web, engine="ray", workers=None, worker_cpus=4))
    assert not cluster.worker_nodes
    assert outcome.is_complete
    assert part_checksums(out) == undisturbed
    assert verify.run(VerifyConfig(root=out, workers=1)).summary["n_problems"] == 0


def test_a_result_that_is_lost_with_its_node(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=9, object_store_memory=80 << 20)
    crew = Actors(Large(str(tmp_path / "done")), 9, 0)
    crew.start(0)
    (started,) = crew.wait(None)
    assert started.is_start and not started.error
    crew.assign(0, 1 << 20, None)
    crew._ray.wait(list(crew._pending), fetch_local=False)
    cluster.remove_node(node, allow_graceful=False)
    (report,) = crew.wait(None)
    assert report.is_lost
    crew.close()


def test_without_ray_the_engine_is_refused(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"ray is not installed; run pip install 'dalle-ds\[ray\]'"):
        encode.run(world.config(tmp_path / "tokens", engine="ray"))
