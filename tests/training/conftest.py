"""What tests of tracked runs share."""

import shutil

import pytest

from dalle_ds.training.tracking_mlflow import create_sqlite_store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """MLflow's tables, made once: the migrations take about ten seconds."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    create_sqlite_store(database)
    return database


@pytest.fixture
def database(tmp_path, empty_store, monkeypatch):
    """An SQLite store of its own, where runs below tmp_path look for it by default."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return shutil.copy(empty_store, tmp_path / "mlflow.db")
