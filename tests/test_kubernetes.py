"""The files in launchers/kubernetes are valid, and what stands in several places of them agrees.

Their commands run in tests/distributed/test_train_prior.py and tests/preprocessing/test_pods.py.
"""

import re

import kubernetes_validate
import pytest

from dalle_ds.training.preemption import EXIT_STOPPED
from tests.support import kubernetes

FILES = sorted(file.name for file in kubernetes.FOLDER.glob("*.yaml"))
TRAIN = "train_prior.yaml"


@pytest.mark.parametrize("file", FILES)
def test_objects_follow_the_published_schema(file: str) -> None:
    for thing in kubernetes.objects(file):
        kubernetes_validate.validate(thing, "1.31", strict=True)


@pytest.mark.parametrize("file, count", [(TRAIN, "NODES"), ("encode.yaml", "MACHINES")])
def test_the_number_of_pods_is_that_of_their_command(file: str, count: str) -> None:
    spec = kubernetes.job(file)["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(kubernetes.variables(file)[count])


@pytest.mark.parametrize("file", FILES)
def test_only_mistakes_end_a_job_and_preemptions_cost_no_retry(file: str) -> None:
    spec, container = kubernetes.job(file)["spec"], kubernetes.container(file)
    codes, conditions = {}, {}
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"]
            codes |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
        else:
            conditions |= {condition["type"]: rule["action"] for condition in rule["onPodConditions"]}
    assert codes == {2: "FailJob", EXIT_STOPPED: "Ignore"}
    assert conditions == {"DisruptionTarget": "Ignore"}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # Kubernetes requires it with a podFailurePolicy


def test_pods_of_training_find_the_first_one_and_have_time_to_save() -> None:
    service, job = kubernetes.objects(TRAIN)
    name, pods = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pods["subdomain"] == service["metadata"]["name"]
    assert kubernetes.variables(TRAIN)["FIRST"].startswith(f"{name}-0.{pods['subdomain']}:")
    container = kubernetes.container(TRAIN)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(kubernetes.variables(TRAIN)["GPUS"])
    (waits,) = re.findall(r"--shutdown_timeout (\d+)", container["command"][2])
    assert pods["terminationGracePeriodSeconds"] > int(waits)
