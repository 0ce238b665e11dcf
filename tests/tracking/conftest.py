"""What tests of tracked runs share."""

import shutil

import pytest


@pytest.fixture
def database(tmp_path, empty_store, monkeypatch):
    """An SQLite store of its own, where runs below tmp_path look for it by default."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return shutil.copy(empty_store, tmp_path / "mlflow.db")
