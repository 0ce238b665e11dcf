"""The MLflow run that an export came from, and adding to it what was made of the export."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_ds.storage import objects
from dalle_ds.tracking.mlflow_sink import read_run
from dalle_ds.tracking.tracker import NullTracker, Tracker

log = logging.getLogger(__name__)

TRACKING_FOLDER = ".tracking"  # below the output folder: the spool, should MLflow be away


def run_of_export(info: dict[str, Any]) -> tuple[str | None, str | None]:
    """(store, run id) of the training that an export's config.json tells of; None where it tells of none."""
    run = info.get("mlflow") or {}
    uri, run_id, checkpoint = run.get("uri"), run.get("run_id"), info.get("checkpoint")
    if uri and run_id is None and checkpoint and not objects.is_s3(checkpoint):
        # the store had not answered yet when the checkpoint was saved: the id is beside the checkpoints by now
        known = read_run(Path(checkpoint).parents[1])
        uri, run_id = (known.uri, known.run_id) if known else (uri, None)
    return uri, run_id


def tracker_of(url: str, info: dict[str, Any], out: Path) -> NullTracker:
    """A tracker that adds to the own MLflow run of an export; one that keeps nothing where its config.json names no run."""
    uri, run_id = run_of_export(info)
    if uri is None or run_id is None:
        log.info("export %s names no MLflow run: nothing is tracked", url)
        return NullTracker()
    return Tracker.attach(out / TRACKING_FOLDER, uri=uri, run_id=run_id)


def track(
    url: str,
    info: dict[str, Any],
    out: Path,
    metrics: dict[str, float],
    pictures: dict[str, Image.Image],
    files: Sequence[Path],
    folder: str,
) -> bool:
    """Add to the run of the export at `url`, whose config.json is `info` -> whether it is there."""
    tracker, step = tracker_of(url, info, out), int(info.get("update") or 0)
    if metrics:
        tracker.metrics(metrics, step)
    for name, picture in pictures.items():
        tracker.picture(name, picture, step)
    for file in files:
        tracker.artifact(file, folder)
    return tracker.close() and isinstance(tracker, Tracker)
