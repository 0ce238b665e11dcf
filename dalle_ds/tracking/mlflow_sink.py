"""Deliver tracking records to MLflow: one run per folder, across restarts, outages and lost stores."""

import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dalle_ds.data.images import ImageProblem, decode_image
from dalle_ds.redaction import redacted
from dalle_ds.storage.atomic import atomic_write
from dalle_ds.storage.text import parse_json
from dalle_ds.tracking.store import make_client, sqlite_file

log = logging.getLogger(__name__)

LATEST_IMAGES = "latest_images"
"""Artifact folder of images without a step. It must not be MLflow's own folder "images": the page would show no image chart."""
RUN_FILE = "mlflow_run.json"
REFUSED = "mlflow_refused.jsonl"
"""File of the records that the store refuses, with the reasons."""
NOTE_TAG, PARENT_TAG = "mlflow.note.content", "mlflow.parentRunId"
NOTE_HASH_TAG = "dalle_ds.note_hash"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # else the page assumes chats and traces
KEY_TAG = "dalle_ds.run_key"  # finds the run after a kill between creating it and storing its id
MAX_METRICS, MAX_ENTITIES = 1000, 100  # MLflow's limits for one log_batch request
MAX_PARAM, MAX_TAG = 6000, 8000

ABOUT = ("params", "tags", "description", "dataset")
"""Kinds of records that describe a run, and that a run which replaces a deleted one needs too."""
PERMANENT = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "MALFORMED_REQUEST",
    "NOT_IMPLEMENTED",
}


class Refused(Exception):
    """The store refuses a record permanently. Sending it again would not help."""


class RunDeleted(Exception):
    """The run or its experiment was deleted while it was in use. The next attempt sends the same records to another run."""


@dataclass(frozen=True)
class RunRef:
    """The MLflow run of a folder (mlflow_run.json). `run_id` is None until the store has answered once."""

    uri: str
    run_id: str | None = None
    experiment_id: str | None = None
    experiment: str = ""
    run_name: str = ""
    key: str = ""
    pipeline: str = ""


def read_run(folder: Path) -> RunRef | None:
    """Read the folder's MLflow run. Returns None before the first Tracker.start there, or if the file is not readable."""
    try:
        return RunRef(**parse_json((folder / RUN_FILE).read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s is not readable (%s): a new MLflow run will be created", folder / RUN_FILE, error)
        return None


def write_run(folder: Path, run: RunRef) -> None:
    """Replace mlflow_run.json atomically."""
    with atomic_write(folder / RUN_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(run), indent=1), encoding="utf-8")


class MlflowSink:
    """Sends records to one MLflow run. Every method may raise. Refused is permanent; after any other error, try again later.

    The first delivery imports mlflow (seconds) and may create a SQLite store (about ten seconds), in the caller's thread.
    """

    def __init__(self, folder: Path, uri: str, *, attach_only: bool = False) -> None:
        """`attach_only`: log only to the run in mlflow_run.json. Never create another run or change the status of this one."""
        self.folder, self.uri, self.attach_only = folder, uri, attach_only
        self._client: Any = None
        self._run_id: str | None = None  # None: not connected
        self._known_run_id: str | None = None  # of the last connection
        self._params: dict[str, str] = {}
        self._parent_id: str | None = None
        self._about: list[dict[str, Any]] = []  # sent records of ABOUT
        self.n_refused = 0
        """Number of records that the store refused in this process. They are in REFUSED of the folder."""

    def deliver(self, records: Sequence[dict[str, Any]], *, session: str | None) -> None:
        """Send `records` in order. A record that the store refuses is logged as a warning and written to REFUSED.

        Args:
            session: the tracker's session. Run statuses of earlier sessions are out of date and skipped; None sends them too.

        Raises:
            RunDeleted: the run was deleted. Another call sends `records` to another run.
        """
        self.connect()
        with self._answers_translated():
            self._deliver(records, session)
        self._about += [record for record in records if record["kind"] in ABOUT]

    def connect(self) -> str:
        """Find or create the run. Returns its id."""
        if self._run_id is not None:
            return self._run_id
        with self._answers_translated():
            self._client = self._client or make_client(self.uri)
            self._run_id = self._find_or_create()
            data = self._client.get_run(self._run_id).data
            self._params, self._parent_id = dict(data.params), data.tags.get(PARENT_TAG)
            if not self.attach_only:
                self._of_parent(self._client.update_run, status="RUNNING")
            if self._known_run_id not in (None, self._run_id):
                self._deliver(self._about, session=None)
            self._known_run_id = self._run_id
        return self._run_id

    def _deliver(self, records: Sequence[dict[str, Any]], session: str | None) -> None:
        metrics = [record for record in records if record["kind"] == "metrics"]
        try:
            self._send_metrics(metrics)
        except Refused:
            for record in metrics:  # at least one record is refused: send each alone to find it
                self._or_drop(self._send_metrics, [record])
        for record in records:
            match record["kind"]:
                case "params":
                    self._or_drop(self._send_params, record["values"])
                case "tags":
                    self._or_drop(self._send_tags, record["values"])
                case "description":
                    self._or_drop(self._send_description, record["text"])
                case "dataset":
                    self._or_drop(self._send_dataset, record)
                case "image":
                    self._or_drop(self._send_image, record)
                case "artifact":
                    self._or_drop(self._send_artifact, record)
                case "status" if not self.attach_only and session in (None, record["session"]):
                    self._or_drop(self._send_status, record)

    def _or_drop(self, send: Any, record: Any) -> None:
        try:
            with self._answers_translated():
                send(record)
        except Refused as refusal:
            self.n_refused += 1
            kept = self.folder / REFUSED
            log.warning("MLflow refuses a record, which goes to %s: %s; the record: %.300s", kept, refusal, record)
            with contextlib.suppress(OSError), kept.open("a", encoding="utf-8") as file:
                file.write(redacted(json.dumps({"reason": str(refusal), "record": record})) + "\n")

    def _send_metrics(self, records: Sequence[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, record["time"], record["step"])
            for record in records
            for name, value in record["values"].items()
        ]
        with self._answers_translated():
            for start in range(0, len(metrics), MAX_METRICS):
                self._client.log_batch(self._run_id, metrics=metrics[start : start + MAX_METRICS], synchronous=True)

    def _send_params(self, values: dict[str, str]) -> None:
        from mlflow.entities import Param

        values = {name: value[:MAX_PARAM] for name, value in values.items()}
        new = [Param(name, value) for name, value in values.items() if name not in self._params]
        # MLflow parameters cannot change. A value changed by a restart goes to a tag, so that the page shows both.
        changed = {f"changed.{name}": value for name, value in values.items() if self._params.get(name, value) != value}
        for start in range(0, len(new), MAX_ENTITIES):
            self._client.log_batch(self._run_id, params=new[start : start + MAX_ENTITIES], synchronous=True)
        self._params.update({param.key: param.value for param in new})
        self._send_tags(changed)

    def _send_tags(self, values: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, value[:MAX_TAG]) for name, value in values.items()]
        for start in range(0, len(tags), MAX_ENTITIES):
            self._client.log_batch(self._run_id, tags=tags[start : start + MAX_ENTITIES], synchronous=True)

    def _send_description(self, text: str) -> None:
        note = text.replace("RUN_ID", str(self._run_id))[:MAX_TAG]
        tags = self._client.get_run(self._run_id).data.tags
        # the hash tells our own note, which a restart brings up to date, from one that a user has edited on the page
        if NOTE_TAG not in tags or tags.get(NOTE_HASH_TAG) == _short_hash(tags[NOTE_TAG]):
            self._send_tags({NOTE_TAG: note, NOTE_HASH_TAG: _short_hash(note)})

    def _send_dataset(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source_type = urlsplit(record["source"]).scheme or "local"
        dataset = Dataset(
            name=record["name"][:500],
            digest=record["digest"][:36],
            source_type=source_type,
            source=json.dumps({"uri": record["source"]}),
        )
        self._client.log_inputs(self._run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])])])

    def _send_image(self, record: dict[str, Any]) -> None:
        path = self.folder / record["file"]
        if not path.is_file():
            raise Refused(f"{path} no longer exists")
        if record["step"] is None:
            self._client.log_artifact(self._run_id, str(path), LATEST_IMAGES)
        else:  # MLflow's page shows images with the same name and different steps on a slider
            try:
                image = decode_image(path.read_bytes())
            except ImageProblem as problem:
                raise Refused(f"{path} is {problem.reason}") from problem
            self._client.log_image(
                self._run_id, image, key=record["name"], step=record["step"], timestamp=record["time"], synchronous=True
            )
        self._require_run()
        path.unlink(missing_ok=True)

    def _send_artifact(self, record: dict[str, Any]) -> None:
        path = self.folder / record["file"]  # if `file` is absolute, the result is `file`
        if not path.exists():
            raise Refused(f"{path} no longer exists")
        if path.is_dir():
            self._client.log_artifacts(self._run_id, str(path), record["folder"] or path.name)
        else:
            self._client.log_artifact(self._run_id, str(path), record["folder"] or None)
        self._require_run()
        if record["is_copy"]:
            path.unlink(missing_ok=True)
            path.parent.rmdir()

    def _send_status(self, record: dict[str, Any]) -> None:
        self._client.set_terminated(self._run_id, record["status"], end_time=record["time"])
        self._of_parent(self._client.set_terminated, record["status"], end_time=record["time"])

    def _of_parent(self, update: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Apply `update` to the parent run, if any. If the parent was deleted, it is ignored from then on."""
        from mlflow.exceptions import MlflowException

        try:
            if self._parent_id is not None:
                update(self._parent_id, *args, **options)
        except MlflowException as error:
            if error.error_code not in {*PERMANENT, "RESOURCE_DOES_NOT_EXIST"}:
                raise
            self._parent_id = None

    def _require_run(self) -> None:
        """Check that the run was not deleted: the store takes files for a deleted run too, where nobody sees them.

        Raises:
            RunDeleted: it was deleted.
        """
        if self._is_deleted():
            self._run_id = None
            raise RunDeleted("the run was deleted")

    def _is_deleted(self) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(self._run_id).info.lifecycle_stage != "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return True

    def _find_or_create(self) -> str:
        run = read_run(self.folder) or RunRef(uri=redacted(self.uri))
        found = self._look_up(run)
        if found is None and not self.attach_only and run.run_id is not None:
            self._experiment_id(run.experiment)  # restoring a deleted experiment restores its runs
            found = self._look_up(run)
        if found is None and self.attach_only:
            raise Refused(f"run {run.run_id} does not exist in {run.uri}")
        if found is None:
            if run.run_id is not None:
                log.warning("MLflow run %s is not in %s: logging goes to a new run", run.run_id, redacted(self.uri))
            found = self._create(run)
        elif found.info.status != "RUNNING" and not self.attach_only:
            self._client.update_run(found.info.run_id, status="RUNNING")
        if not self.attach_only:
            write_run(
                self.folder,
                replace(run, uri=redacted(self.uri), run_id=found.info.run_id, experiment_id=found.info.experiment_id),
            )
        return found.info.run_id

    def _look_up(self, run: RunRef) -> Any:
        from mlflow.exceptions import MlflowException

        if run.run_id is not None:
            try:
                found = self._client.get_run(run.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
            return found if found.info.lifecycle_stage == "active" else None
        if run.key and (experiment := self._client.get_experiment_by_name(run.experiment)) is not None:
            found = self._client.search_runs([experiment.experiment_id], f"tags.`{KEY_TAG}` = '{run.key}'", max_results=1)
            return found[0] if found else None
        return None

    def _create(self, run: RunRef) -> Any:
        key = uuid.uuid4().hex if run.run_id is not None or not run.key else run.key
        tags = {KEY_TAG: key}
        if run.run_id is not None:
            tags["dalle_ds.continues"] = run.run_id
        experiment_id = self._experiment_id(run.experiment)
        if run.pipeline:
            tags[PARENT_TAG] = self._pipeline_run(run.pipeline, experiment_id)
        # store the key before creating the run: if the process is killed in between, the next start finds the run by its key
        write_run(self.folder, replace(run, uri=redacted(self.uri), run_id=None, key=key))
        return self._client.create_run(experiment_id, tags=tags, run_name=run.run_name)

    def _pipeline_run(self, pipeline: str, experiment_id: str) -> str:
        """Return the id of the pipeline's run, the parent of the runs of all stages. The first stage creates it."""
        key = _short_hash(pipeline)
        found = self._client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        if found:
            return found[0].info.run_id
        note = f"All stages of `{pipeline}`: the child runs of this run."
        tags = {KEY_TAG: key, "stage": "pipeline", "pipeline": pipeline, NOTE_TAG: note}
        return self._client.create_run(experiment_id, tags=tags, run_name=Path(pipeline).name).info.run_id

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage != "active":
            self._client.restore_experiment(experiment.experiment_id)
        if experiment is not None:
            return experiment.experiment_id
        database = sqlite_file(self.uri)
        location = (database.parent / "mlartifacts").as_uri() if database else None
        try:
            return self._client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._client.get_experiment_by_name(name).experiment_id  # another stage has just created it

    @contextlib.contextmanager
    def _answers_translated(self) -> Any:
        """Context in which permanent errors of the store are raised as Refused. Other errors are raised unchanged."""
        try:
            yield
        except Exception as error:
            code = getattr(error, "error_code", None)
            if code == "RESOURCE_DOES_NOT_EXIST":
                # the run was deleted, or the server restarted with another database: find or create the run again
                self._run_id = None
            if code in PERMANENT:
                if self._run_id is not None:
                    self._require_run()  # a deleted run refuses every record, with the same code as a bad record
                raise Refused(f"{code}: {error}") from error
            raise


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
