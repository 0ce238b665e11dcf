"""Log samples and evaluations of an export to the MLflow run of its training."""

import logging
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dalle_ds.sampling.export_record import ExportRecord
from dalle_ds.storage import objects
from dalle_ds.tracking.mlflow_sink import read_run
from dalle_ds.tracking.tracker import NullTracker, Tracker

log = logging.getLogger(__name__)

TRACKING_FOLDER = ".tracking"  # in the output folder: the spool, in case MLflow cannot be reached


def run_of_export(record: ExportRecord) -> tuple[str | None, str | None]:
    """(store, run id) of the MLflow run that trained the export. Both are None if the training was not tracked."""
    if record.mlflow is None:
        return None, None
    uri, run_id = record.mlflow.uri, record.mlflow.run_id
    if run_id is None and not objects.is_s3(record.checkpoint):
        # when the checkpoint was saved, the store had not yet assigned an id; by now the run folder may have it
        known = read_run(Path(record.checkpoint).parents[1])
        uri, run_id = (known.uri, known.run_id) if known else (uri, None)
    return uri, run_id


def tracker_of(url: str, record: ExportRecord, out: Path) -> NullTracker:
    """A tracker that logs to the MLflow run of the export at `url`. Returns a NullTracker if the export has no MLflow run."""
    uri, run_id = run_of_export(record)
    if uri is None or run_id is None:
        log.info("export %s has no MLflow run: nothing is logged to MLflow", url)
        return NullTracker()
    return Tracker.attach(out / TRACKING_FOLDER, uri=uri, run_id=run_id)


def track(
    url: str,
    record: ExportRecord,
    out: Path,
    metrics: dict[str, float],
    images: dict[str, Image.Image],
    files: Sequence[Path],
    folder: str,
) -> bool:
    """Log metrics, images and files to the MLflow run of the export at `url`, at the update of its checkpoint.

    Args:
        out: output folder, which gets the spool.
        folder: artifact folder for `files`.

    Returns:
        Whether everything was delivered to the store.
    """
    tracker, step = tracker_of(url, record, out), record.update
    if metrics:
        tracker.metrics(metrics, step)
    for name, image in images.items():
        tracker.image(name, image, step)
    for file in files:
        tracker.artifact(file, folder)
    return tracker.close() and isinstance(tracker, Tracker)
