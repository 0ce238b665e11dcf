"""Fixtures for all test folders."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dalle_ds.tracking.store import create_sqlite_store
from tests.support.fault_proxy import FaultProxy
from tests.support.s3_server import BUCKET, S3Server

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # `auto` means the CPU even on a machine with GPUs; GPU tests name their device


@dataclass(frozen=True)
class S3:
    """An empty prefix on the running server. A test may kill `server`; it is restarted before the next test."""

    url: str
    server: S3Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for the whole session. The first test that needs it starts it."""
    server = S3Server(tmp_path_factory.mktemp("weed"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An empty s3:// prefix. The AWS_* variables point to the server, for child processes too."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    yield S3(f"s3://{BUCKET}/{tmp_path.name}", s3_server)
    if not s3_server.is_running:
        s3_server.start()


@pytest.fixture
def s3_requests(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The requests to the server of `s3` so far, children's too, as "GET /bucket/key". A test may clear the list."""
    with FaultProxy(s3.server.endpoint, every=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy.requests


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, created once per session because the migrations take about ten seconds."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    create_sqlite_store(database)
    return database


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A root on local disk, then on S3: the test runs twice."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3").url


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `long`, unless -m names it. Run long files, and files that wait for servers, first: in parallel
    with others, they don't delay the end."""
    if "long" not in config.getoption("markexpr"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    marks: dict[Path, set[str]] = {}
    for item in items:
        marks.setdefault(item.path, set()).update(mark.name for mark in item.iter_markers())
    items.sort(key=lambda item: [mark not in marks[item.path] for mark in ("e2e", "launch", "kernels", "s3", "mlflow")])
