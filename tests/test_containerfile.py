"""The image's file passes its linter, runs as another user than root, and names one version of everything."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import kubernetes
from tests.support.launching import ROOT

FILE = ROOT / "launchers" / "Containerfile"


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.*)$", FILE.read_text(), re.MULTILINE)


def constraints() -> dict[str, str]:
    lines = (ROOT / "launchers" / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), FILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_process_is_not_roots_and_pods_share_its_group() -> None:
    assert instructions("USER") == ["10001"]
    for file in ("train_prior.yaml", "encode.yaml"):
        assert kubernetes.job(file)["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
    assert kubernetes.job("train_prior.yaml")["spec"]["template"]["spec"]["securityContext"]["fsGroup"] == 10001


def test_base_and_torch_have_one_version() -> None:
    (base,) = instructions("FROM")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (python,) = re.findall(r"/python:(\d+\.\d+\.\d+)-", base)
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python)
    (pin,) = re.findall(r'TORCH_PIN="(torch==[\d.]+)"', (ROOT / "launchers" / "setup.sh").read_text())
    assert pin in FILE.read_text()
    assert pin == f"torch=={constraints()['torch']}"


def test_constraints_name_a_fitting_version_of_every_package_that_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = constraints()
    extras = project["optional-dependencies"]
    asked = [Requirement(text) for text in project["dependencies"] + extras["clip"] + extras["ray"]]
    for name in pinned:
        if name != "torch":  # names the packages of CUDA, which another build of it does not install
            asked += map(Requirement, metadata.requires(name) or ())
    for requirement in asked:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = pinned.get(canonicalize_name(requirement.name))
            assert version is not None, requirement
            assert requirement.specifier.contains(version), f"{requirement}, pinned {version}"
