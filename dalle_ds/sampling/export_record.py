"""What an export says of itself: its config.json."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.record import Record, read_record

RECORD_FILE = "config.json"


class MlflowRun(Record):
    """The MLflow run of a training. `run_id` is unknown as long as the store has not answered."""

    uri: str
    run_id: str | None = None


class ExportRecord(Record):
    """Where the parts of an export come from; `fingerprint` is that of the prior's weights."""

    format: Literal[1]
    fingerprint: str
    dvae: str
    tokenizer: str
    update: int
    ema: bool
    caption_dropout: float
    """Share of captions left out in training; above 0 the prior knows images without a caption."""
    data_fingerprint: str
    data_content: str
    data_urls: tuple[str, ...] = Field(min_length=1)
    """Token data sets where they were in training: several of a mix."""
    checkpoint: str
    mlflow: MlflowRun | None = None


def read_export_record(url: str | Path) -> ExportRecord:
    """The record of the export at `url`. Raises DataError where there is none, or not one that `dalle-ds export` writes."""
    file = objects.join(url, RECORD_FILE)
    if not objects.exists(file):
        raise DataError(f"{url} is not an export folder: it has no {RECORD_FILE}; `dalle-ds export` writes one")
    return read_record(ExportRecord, file)
