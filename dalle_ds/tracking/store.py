"""The MLflow store: which one a run uses, its client, and the SQLite file that is the default."""

import fcntl
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from dalle_ds.errors import DataError
from dalle_ds.lazy import large_imports
from dalle_ds.places import check_output, check_store
from dalle_ds.redaction import redacted


def resolve_uri(uri: str | None, folder: Path, known: str | None = None) -> str:
    """The store to use: `uri`, else MLFLOW_TRACKING_URI, else the store `known` of the folder's run, else a SQLite file beside
    the folder. A SQLite store that no longer exists is not used again.

    Raises:
        DataError: the name is not that of a store, or the path of the SQLite file cannot be part of a url.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        check_store(chosen)
        return chosen
    if known is not None:
        database = sqlite_file(known)
        if database is None or database.exists():  # a folder moved to another machine gets a new store
            return known
    beside = folder.resolve().parent
    if any(character in str(beside) for character in "?%"):  # MLflow would create the file elsewhere
        raise DataError(
            f"{beside}: the url of a SQLite store cannot contain ? or %; expected another folder, or a store for MLflow in "
            "tracking.uri or MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{beside / 'mlflow.db'}"


def make_client(uri: str) -> Any:
    """Return an MlflowClient with short timeouts and without telemetry or printed URLs. Creates a missing SQLite store.

    Raises:
        DataError: `uri` does not name a store.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # by default mlflow retries for minutes inside one call; here the spool does the retries
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    check_store(uri)
    database = sqlite_file(uri)
    if database is not None:
        create_sqlite_store(database)
    with large_imports():
        from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return MlflowClient(given if given and redacted(given) == uri else uri)


def store_problem(uri: str, seconds: float) -> str | None:
    """Why a store cannot be used: it is asked for one experiment, as a run does. None: it answers, or it can be created.

    Args:
        seconds: maximum time for the answer.
    """
    with large_imports():
        import mlflow  # noqa: F401 - takes seconds that are not the store's

    found: list[str] = []

    def ask() -> None:
        try:
            database = sqlite_file(uri)
            if database is not None and not database.exists():
                check_output(database, "file")
            else:
                make_client(uri).search_experiments(max_results=1)
        except Exception as error:  # each kind of store has its own errors
            found.append(redacted(f"{type(error).__name__}: {error}")[:300])

    thread = threading.Thread(target=ask, name="mlflow", daemon=True)  # of a store that never answers, it ends with the process
    thread.start()
    thread.join(seconds)
    return f"no answer within {seconds:g} s" if thread.is_alive() else next(iter(found), None)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store. None for other stores."""
    found = re.match(r"sqlite:///(.+?)(\?.*)?$", uri)
    return Path(found[1]).resolve() if found and not found[1].startswith(":memory:") else None


def create_sqlite_store(database: Path) -> None:
    """Create `database` with MLflow's tables if the file does not exist.

    - The file is renamed to `database` only when complete: a kill during MLflow's migrations leaves a file that MLflow cannot
      repair.
    - The migrations run in their own process: for ten seconds they would hold the GIL, which the training needs.
    - A file lock is held, because two stages may start at the same time.

    Raises:
        RuntimeError: the migrations failed. Contains their output.
    """
    if database.exists():
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(database.with_name(f".{database.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if database.exists():
            return
        unfinished = database.with_name(f".{database.name}.new")
        for leftover in database.parent.iterdir():  # not glob: the name of the database is no pattern
            if leftover.name.startswith(unfinished.name):
                leftover.unlink()
        program = "import sys; from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as S; S(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", program, f"sqlite:///{unfinished}", (database.parent / "mlartifacts").as_uri()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            raise RuntimeError(f"MLflow could not create its tables in {database}: {done.stdout[-1500:]}")
        unfinished.replace(database)
