"""Pods of launchers/kubernetes/encode.yaml, as processes: the index of a pod is its machine."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.preprocessing.conftest import World
from tests.support import kubernetes, launching

FILE = "encode.yaml"


def words(world: World, out: Path) -> list[str]:
    set_here = world.config(out).model_dump(mode="json", exclude_unset=True)
    return [f"{key}={value}" for key, value in set_here.items()]


def test_the_index_of_a_pod_is_its_machine(tmp_path: Path) -> None:
    command, variables = kubernetes.pod(FILE, 3, [*kubernetes.container(FILE)["args"], "--show-config"])
    done = launching.run(command, tmp_path, variables)
    assert done.returncode == 0, done.stderr
    encode = yaml.safe_load(done.stdout)["encode"]
    assert (encode["machine"], encode["machines"]) == (3, 16)


@pytest.mark.launch
def test_two_pods_encode_all_shards(world: World, is_undisturbed: Callable[[str], bool], tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    with ExitStack() as stack:
        pods = []
        for index in range(2):
            command, variables = kubernetes.pod(FILE, index, words(world, out), MACHINES="2")
            pods.append(stack.enter_context(launching.started(command, tmp_path, variables)))
        for pod in pods:
            _, err = pod.communicate(timeout=900)
            assert pod.returncode == 0, err[-4000:]
    assert is_undisturbed(str(out))
