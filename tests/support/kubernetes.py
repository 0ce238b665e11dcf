"""The files in launchers/kubernetes, and the command of a pod as it stands there, with the variables that Kubernetes sets."""

from collections.abc import Sequence
from typing import Any

import yaml

from tests.support.launching import ROOT

FOLDER = ROOT / "launchers" / "kubernetes"


def objects(file: str) -> list[dict[str, Any]]:
    """Returns the objects of a file, such as "encode.yaml"."""
    return list(yaml.safe_load_all((FOLDER / file).read_text()))


def job(file: str) -> dict[str, Any]:
    """Returns the one Job of a file."""
    (found,) = (thing for thing in objects(file) if thing["kind"] == "Job")
    return found


def container(file: str) -> dict[str, Any]:
    """Returns the one container of the file's Job."""
    (found,) = job(file)["spec"]["template"]["spec"]["containers"]
    return found


def variables(file: str) -> dict[str, str]:
    """Returns the environment variables that the container sets."""
    return {variable["name"]: variable["value"] for variable in container(file)["env"]}


def pod(file: str, index: int, arguments: Sequence[str], **changed: str) -> tuple[list[str], dict[str, str]]:
    """Returns command and variables of the pod with this index.

    Args:
        arguments: instead of the file's `args`.
        changed: other values of the container's variables.
    """
    assert changed.keys() <= variables(file).keys()
    set_by_kubernetes = {"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"{job(file)['metadata']['name']}-{index}"}
    return [*container(file)["command"], *arguments], {**variables(file), **changed, **set_by_kubernetes}
