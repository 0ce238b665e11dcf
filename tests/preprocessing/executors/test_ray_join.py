"""A Ray cluster that is away, hangs or does not start ends the command soon, with one message and exit code 75."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from dalle_ds.cli import app
from tests.support.images import draw_folder

COMMAND = """
from dalle_ds.cli import app
from preprocessing.executors import ray_cluster
ray_cluster.JOIN_SECONDS = {seconds}
app()
"""


def ingest(folder: Path) -> list[str]:
    return ["data", "ingest", str(draw_folder(folder / "images", 2)), str(folder / "raw"), "--engine", "ray", "--workers", "1"]


def start_ingest(folder: Path, address: str, seconds: float) -> "subprocess.Popen[str]":
    """Ingest in a process of its own: there, `ray.init` still blocks a thread when the command gives up."""
    command = [sys.executable, "-c", COMMAND.format(seconds=seconds), *ingest(folder)]
    return subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": address}, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def silent() -> Iterator[str]:
    """Address of a head that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.launch
@pytest.mark.parametrize("head", ["closed", "silent"])
def test_a_head_that_does_not_answer(tmp_path: Path, head: str, request: pytest.FixtureRequest) -> None:
    address = request.getfixturevalue(head)
    with start_ingest(tmp_path, address, seconds=2) as process:
        _, said = process.communicate(timeout=240)
    assert process.returncode == 75, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"the cluster at RAY_ADDRESS={address} cannot be joined: no answer within 2 s. Expected a head node" in line
    assert "Traceback" not in said and "SIGTERM handler" not in said


def refused_token() -> Exception:
    """As Ray 2.60 says it: a traceback within the message, before the reason."""
    trace = 'Traceback (most recent call last):\n  File "node.py", line 996\n    client = GcsClient(\n'
    error = ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:6379")
    error.__cause__ = RuntimeError(f"Failed to connect to GCS. {trace}ray.exceptions.AuthenticationError: InvalidAuthToken\n")
    return error


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (Exception("The current node timed out during startup."), 75, "The current node timed out during startup."),
        (refused_token(), 2, "Failed to connect to GCS. ray.exceptions.AuthenticationError: InvalidAuthToken\n"),
        (RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9"), 2, "Version mismatch: The cluster"),
    ],
)
def test_errors_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, reason: str) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fail)
    done = CliRunner().invoke(app, ingest(tmp_path))
    assert done.exit_code == code, done.exception
    assert f"a cluster of this machine (RAY_ADDRESS is not set) cannot be joined: {reason}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_address_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    done = CliRunner().invoke(app, ingest(tmp_path))
    assert done.exit_code == 2, done.exception
    assert "RAY_ADDRESS=nonsense cannot be joined: Invalid address format: nonsense" in done.stderr
