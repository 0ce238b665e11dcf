"""Ray engine on a real cluster with two nodes on this machine; one node is killed during the run."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dalle_ds.errors import UserError
from preprocessing.configs import IngestConfig, VerifyConfig
from preprocessing.executors import local
from preprocessing.stages import encode, ingest, verify
from tests.preprocessing.conftest import N_IMAGES, N_SHARDS, World
from tests.preprocessing.test_disturbances import killing_progress

RAW_SAMPLES = N_IMAGES // N_SHARDS


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'dalle-ds[ray]'")
    from ray.cluster_utils import Cluster

    memory = 80 << 20
    running = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": memory}
    )
    for _ in range(2):
        running.add_node(num_cpus=1, object_store_memory=memory)
    ray.init(address=running.address, log_to_driver=False)
    yield running
    ray.shutdown()
    running.shutdown()


def kill_the_node_at_work(cluster: object) -> None:
    from ray._private.state import actors

    (at_work,) = [actor["Address"]["NodeID"] for actor in actors().values() if actor["State"] == "ALIVE"]
    (node,) = [node for node in cluster.worker_nodes if node.node_id == at_work]
    cluster.remove_node(node, allow_graceful=False)


def test_a_lost_node_costs_nothing_but_time(
    world: World, cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_undisturbed: Callable[[str], bool]
) -> None:
    out = str(tmp_path / "tokens")
    with monkeypatch.context() as patch:
        patch.setattr(local, "progress", killing_progress(lambda: kill_the_node_at_work(cluster), after=4))
        outcome = encode.run(world.config(out, engine="ray", workers=1))  # the other node is idle and takes over
    assert outcome.is_complete
    assert len(cluster.worker_nodes) == 1
    assert is_undisturbed(out)
    assert verify.run(VerifyConfig(root=out, workers=1)).summary["n_problems"] == 0

    # On the remaining node: a failed shard is reported as without Ray, and ingest runs too.
    raw = str(tmp_path / "raw")
    assert (
        ingest.run(IngestConfig(images=str(world.images), out=raw, samples_per_shard=RAW_SAMPLES, engine="ray")).summary[
            "samples"
        ]
        == N_IMAGES
    )
    tar = next(Path(raw, "data").glob("00002-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1])
    outcome = encode.run(world.config(tmp_path / "again", raw=raw, engine="ray", workers=None))
    assert list(outcome.summary["failed_shards"]) == ["00002"]
    assert "truncated" in outcome.summary["failed_shards"]["00002"]


def test_without_ray_the_engine_is_refused(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"ray is not installed; run pip install 'dalle-ds\[ray\]'"):
        encode.run(world.config(tmp_path / "tokens", engine="ray"))
