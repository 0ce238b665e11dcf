"""The wheels for a node without a package registry include all packages that the steps import."""

import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from dalle_ds.acceptance.table import STEPS
from dalle_ds.acceptance.wheels import CARRIED, requirements
from tests.support.launching import ROOT

PROGRAM = """
import sys
blocked = set(sys.argv[1].split(","))
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"not carried: {name}", name=name)
sys.meta_path.insert(0, Blocked())
import importlib
for name in sys.argv[2].split(","):
    importlib.import_module(name)
"""


def installed_with(names):
    """Returns the packages `names` with all their dependencies, as pip would install them."""
    found, queue = set(), list(names)
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        needs = map(Requirement, lines)
        queue += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def test_the_steps_import_nothing_that_is_not_carried():
    carried = installed_with([*CARRIED, "torch", "triton"])
    others = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not any(owner.lower().replace("_", "-") in carried for owner in owners)
    } - {"dalle_ds", "preprocessing", "tests"}
    assert {"mlflow", "s3fs", "matplotlib", "skimage", "webdataset", "pyarrow"} <= others
    modules = ["dalle_ds.cli", "dalle_ds.acceptance.report", *(step.module for step in STEPS)]
    command = [sys.executable, "-c", PROGRAM, ",".join(sorted(others)), ",".join(modules)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=None)
    assert done.returncode == 0, done.stderr[-2000:]


def test_versions_are_those_of_the_project():
    wanted = requirements()
    assert tuple(wanted) == CARRIED and wanted["deepspeed"].startswith("deepspeed>=0.19")
    for line in wanted.values():
        need = Requirement(line)
        assert need.specifier.contains(metadata.version(need.name), prereleases=True)


@pytest.mark.parametrize("name", ["torch", "mlflow", "s3fs"])
def test_what_stays_behind(name):
    assert name not in requirements()
