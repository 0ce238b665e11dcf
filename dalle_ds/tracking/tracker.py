"""Track a run in MLflow without waiting: calls append to a spool on disk, one thread makes images, and one delivers."""

import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_ds.errors import DataError
from dalle_ds.redaction import redacted
from dalle_ds.tracking.drawing import Drawing
from dalle_ds.tracking.mlflow_sink import REFUSED, RUN_FILE, MlflowSink, RunRef, read_run, write_run
from dalle_ds.tracking.spool import Spool
from dalle_ds.tracking.store import resolve_uri

log = logging.getLogger(__name__)

SPOOL = "mlflow_spool"
DRAIN_EVERY_S = 2.0  # seconds between deliveries, so that one request carries many metrics
MAX_BACKOFF_S = 60.0
BATCH_RECORDS = 200
COPY_UP_TO = 64 << 20  # larger artifacts are not copied to the spool but uploaded from their original path
PIPELINE = "DALLE_DS_PIPELINE"
"""Environment variable with a path. Runs that begin with the same value are children of one run, named by its last part."""
STATES = ("FINISHED", "FAILED", "KILLED")
ENDED_FILE = "ended"
"""File in the spool's folder with the final status, once that is a record of the spool."""


class NullTracker:
    """A tracker that discards everything: for ranks other than the main one, and for tests."""

    run: RunRef | None = None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of a step. Values may be anything that float() accepts."""

    def image(self, name: str, image: Image.Image | Callable[[], Image.Image], step: int | None = None) -> None:
        """Log an image. With a step, the images of one name appear on a slider over steps.

        Args:
            image: an image that nobody changes afterwards, or a function that makes it, which is called on a thread. An error
                of the function is logged as a warning.
        """

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Upload a file or a folder to artifact folder `folder`. A file of at most 64 MiB is copied at once; a larger file or a
        folder must stay where it is until it is uploaded."""

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags, which are searchable. A new value replaces the old one."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Log the run's parameters. If a restart changes a value, the new value is logged as tag `changed.NAME`."""

    def input_dataset(self, name: str, source_url: str, digest: str, context: str = "training") -> None:
        """Log an input of the run (data set, dVAE, tokenizer) with its fingerprint `digest`."""

    def close(self, status: str = "FINISHED", timeout: float = 60.0) -> bool:
        """Deliver the pending records, then set the run's status. Returns whether everything that was logged was delivered.

        Args:
            status: one of STATES.
            timeout: maximum seconds to wait.
        """
        return True


class Tracker(NullTracker):
    """Logs to MLflow. See NullTracker for the calls. Only `close` waits for the server, and no call raises because of it.

    A folder has one MLflow run, kept over all restarts. Its id is in FOLDER/mlflow_run.json; records not yet delivered are in
    FOLDER/mlflow_spool. After a kill, the last records may be sent again with the same step and time; MLflow stores them once.
    """

    def __init__(self, folder: Path, sink: MlflowSink, session: str | None) -> None:
        self.folder, self._sink, self._session = folder, sink, session
        # two spools: an artifact store that refuses uploads must not hold back the metrics
        self._lanes = {"values": Spool(folder / SPOOL / "values"), "files": Spool(folder / SPOOL / "files")}
        self._append_lock = threading.Lock()
        self._wake, self._closing, self._closed = threading.Event(), threading.Event(), False
        self._disk_is_full, self._n_lost = False, 0
        self._drawing = Drawing()
        self._thread = threading.Thread(target=self._drain, name="mlflow", daemon=True)

    @classmethod
    def start(
        cls,
        folder: str | Path,
        *,
        uri: str | None = None,
        experiment: str = "dalle_ds",
        run_name: str = "",
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        description: str = "",
    ) -> "Tracker":
        """Create or resume the folder's MLflow run.

        Args:
            folder: the run folder, on a local disk. Created if missing.
            uri: MLflow store. None: MLFLOW_TRACKING_URI, else the store that the folder used before, else
                sqlite:///FOLDER.parent/mlflow.db with the artifacts beside it.
            description: Markdown for the run's page; RUN_ID is replaced by the run's id. It replaces the description of an
                earlier start, unless a user has edited that on the page.
        """
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        known = read_run(folder)
        uri = resolve_uri(uri, folder, known and known.uri)
        if known is None:
            known = RunRef(
                uri=redacted(uri),
                experiment=experiment,
                run_name=run_name or folder.name,
                key=uuid.uuid4().hex,
                pipeline=os.environ.get(PIPELINE, ""),
            )
            write_run(folder, known)
        tracker = cls(folder, MlflowSink(folder, uri), session=uuid.uuid4().hex)
        (folder / SPOOL / ENDED_FILE).unlink(missing_ok=True)
        tracker.params(params or {})
        tracker.tags(tags or {})
        if description:
            tracker._append("values", {"kind": "description", "text": redacted(description)})
        tracker._thread.start()
        return tracker

    @classmethod
    def attach(cls, folder: str | Path, *, uri: str, run_id: str) -> "Tracker":
        """Log to an existing run, e.g. samples of an exported model, with the spool in `folder`. Keeps the run's status."""
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, RunRef(uri=redacted(uri), run_id=run_id))
        tracker = cls(folder, MlflowSink(folder, uri, attach_only=True), session=uuid.uuid4().hex)
        tracker._thread.start()
        return tracker

    @property
    def run(self) -> RunRef | None:  # type: ignore[override]
        """The folder's MLflow run. Its id is None until the store has answered."""
        return read_run(self.folder)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._append(
            "values",
            {"kind": "metrics", "step": int(step), "values": {_name(key): float(value) for key, value in values.items()}},
        )

    def image(self, name: str, image: Image.Image | Callable[[], Image.Image], step: int | None = None) -> None:
        now = _milliseconds()

        def make() -> None:
            self._spool_image(_name(name), image if isinstance(image, Image.Image) else image(), step, now)

        self._drawing.add(name, make)

    def _spool_image(self, name: str, image: Image.Image, step: int | None, now: int) -> None:
        stem = name.replace("/", "_") if step is None else f"{name.replace('/', '_')}-{step:08d}"
        folder = Path(SPOOL) / "images" / uuid.uuid4().hex[:8]
        try:
            (self.folder / folder).mkdir(parents=True)
            image.save(self.folder / folder / f"{stem}.png")
        except OSError as error:
            self._say_disk_is_full(error)
            return
        self._append("files", {"kind": "image", "name": name, "step": step, "file": str(folder / f"{stem}.png"), "time": now})

    def artifact(self, path: str | Path, folder: str = "") -> None:
        path = Path(path).resolve()
        file, is_copy = str(path), path.is_file() and path.stat().st_size <= COPY_UP_TO
        if is_copy:  # the caller may change or delete the original before it is uploaded
            copied = Path(SPOOL) / "artifacts" / uuid.uuid4().hex / path.name
            try:
                (self.folder / copied).parent.mkdir(parents=True)
                shutil.copyfile(path, self.folder / copied)
            except OSError as error:
                self._say_disk_is_full(error)
                return
            file = str(copied)
        self._append("files", {"kind": "artifact", "file": file, "folder": folder, "is_copy": is_copy})

    def tags(self, values: Mapping[str, Any]) -> None:
        if values:
            self._append("values", {"kind": "tags", "values": _texts(values)})

    def params(self, values: Mapping[str, Any]) -> None:
        if values:
            self._append("values", {"kind": "params", "values": _texts(values)})

    def input_dataset(self, name: str, source_url: str, digest: str, context: str = "training") -> None:
        source = redacted(source_url)
        self._append("values", {"kind": "dataset", "name": name, "source": source, "digest": digest, "context": context})

    def close(self, status: str = "FINISHED", timeout: float = 60.0) -> bool:
        if self._closed:
            return True
        if status not in STATES:
            raise ValueError(f"status {status!r}: expected one of {', '.join(STATES)}")
        began = time.monotonic()
        self._drawing.finish(timeout)
        self._append("values", {"kind": "status", "status": status, "session": self._session})
        with suppress(OSError):  # a full disk, which `_append` has told
            (self.folder / SPOOL / ENDED_FILE).write_text(status, encoding="utf-8")
        return self._flush_and_stop(max(0.0, timeout - (time.monotonic() - began)))

    def _flush_and_stop(self, timeout: float) -> bool:
        self._closed = True
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        n_left = sum(lane.n_waiting() for lane in self._lanes.values())
        if n_left:
            log.warning(
                "%d tracking records are not yet delivered to %s and stay in %s; the next start of this run sends them, "
                "or: dalle-ds mlflow-sync %s",
                n_left,
                redacted(self._sink.uri),
                self.folder / SPOOL,
                self.folder,
            )
        n_lost = self._n_lost + self._drawing.n_lost
        if n_lost:
            log.warning("%d tracking records are lost: the disk was full, or images could not be drawn in time", n_lost)
        if self._sink.n_refused:
            log.warning("MLflow refused %d tracking records: %s lists them", self._sink.n_refused, self.folder / REFUSED)
        if not self._thread.is_alive():
            for lane in self._lanes.values():
                lane.close()
        return n_left == n_lost == self._sink.n_refused == 0

    def _append(self, lane: str, record: dict[str, Any]) -> None:
        record.setdefault("time", _milliseconds())
        with self._append_lock:
            try:
                self._lanes[lane].append(record)
                self._disk_is_full = False
            except OSError as error:
                self._say_disk_is_full(error)

    def _say_disk_is_full(self, error: OSError) -> None:
        self._n_lost += 1
        if not self._disk_is_full:  # warn once, not at every step
            log.warning("tracking records are lost: %s cannot be written: %s", self.folder / SPOOL, error)
        self._disk_is_full = True

    def _drain(self) -> None:
        """Body of the delivery thread: drains the spools in turn, each with its own back-off."""
        lanes = [_Lane(name, spool, self._sink, self._session) for name, spool in self._lanes.items()]
        while True:
            for lane in lanes:
                lane.drain(hurry=self._closing.is_set())
            if self._closing.is_set() and all(lane.is_done for lane in lanes):
                return
            self._wake.wait(0.2 if self._closing.is_set() else DRAIN_EVERY_S)


class _Lane:
    """Delivers one spool to MLflow. Delivered records are acknowledged; after a failure it waits, with exponential back-off."""

    def __init__(self, name: str, spool: Spool, sink: MlflowSink, session: str | None) -> None:
        self.name, self.spool, self.sink, self.session = name, spool, sink, session
        self.is_done = False
        self._n_failures, self._n_failures_in_a_hurry, self._not_before = 0, 0, 0.0

    def drain(self, hurry: bool) -> None:
        """Deliver all pending records. With `hurry` the back-off is half a second, and the third failure ends the attempts."""
        if self.is_done or (not hurry and time.monotonic() < self._not_before):
            return
        if not self.spool.lock():
            self._failed(hurry, "another process is delivering the records of this run")
            return
        try:
            while True:
                records, position = self.spool.read(BATCH_RECORDS if self.name == "values" else 1)
                if not records:
                    break
                self.sink.deliver(records, session=self.session)
                self.spool.acknowledge(position)
                if self._n_failures:
                    log.info("MLflow answers again after %d failed attempts", self._n_failures)
                    self._n_failures = 0
        except Exception as error:  # an error of tracking must not stop training
            self._failed(hurry, f"{type(error).__name__}: {redacted(str(error))[:300]}")
            return
        self.is_done = hurry

    def _failed(self, hurry: bool, reason: str) -> None:
        self._n_failures += 1
        if hurry:
            self._n_failures_in_a_hurry += 1
            self.is_done = self._n_failures_in_a_hurry >= 3
            time.sleep(0.5)
        pause = min(MAX_BACKOFF_S, 2.0 ** min(self._n_failures, 10))
        self._not_before = time.monotonic() + pause
        if self._n_failures in (1, 5) or self._n_failures % 20 == 0:
            log.warning(
                "MLflow delivery failed (attempt %d, %s): records stay in %s", self._n_failures, reason, self.spool.folder
            )


def has_ended(folder: str | Path, status: str) -> bool:
    """Whether the MLflow run of a folder has ended with `status` and all its records are delivered, or was never started.

    False after a kill before `close` was done. Does not ask the server.
    """
    folder = Path(folder)
    if read_run(folder) is None:
        return True
    try:
        if (folder / SPOOL / ENDED_FILE).read_text(encoding="utf-8") != status:
            return False
    except (OSError, UnicodeDecodeError):
        return False
    return not any(Spool(folder / SPOOL / lane).n_waiting() for lane in ("values", "files"))


def replay(folder: str | Path, *, uri: str | None = None, timeout: float = 300.0) -> bool:
    """Deliver the records that an ended run left in its spool. Returns whether all were delivered.

    Raises:
        DataError: no run was tracked in `folder`.
    """
    folder = Path(folder).resolve()
    known = read_run(folder)
    if known is None:
        raise DataError(f"{folder / RUN_FILE} does not exist: no run was tracked in this folder")
    tracker = Tracker(folder, MlflowSink(folder, uri or known.uri, attach_only=not known.experiment), session=None)
    tracker._thread.start()
    return tracker._flush_and_stop(timeout)


def _milliseconds() -> int:
    return int(time.time() * 1000)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {_name(key): redacted(str(value)) for key, value in values.items()}


def _name(key: str) -> str:
    """Replace the characters that MLflow does not allow in names (allowed: letters, digits, space and _-./)."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", str(key))[:250]
