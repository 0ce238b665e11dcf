"""Fixtures for tests of tracked runs."""

import shutil

import pytest


@pytest.fixture
def database(tmp_path, empty_store, monkeypatch):
    """A new SQLite store, at the default path for runs in tmp_path."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return shutil.copy(empty_store, tmp_path / "mlflow.db")
