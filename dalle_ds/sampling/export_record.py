"""The record in an export folder: config.json."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from dalle_ds.errors import DataError
from dalle_ds.sampling.settings import PriorSamplingConfig
from dalle_ds.storage import objects
from dalle_ds.storage.record import Record, read_record

RECORD_FILE = "config.json"


class MlflowRun(Record):
    """The MLflow run of a training run. `run_id` is None if the store had not answered yet when the record was written."""

    uri: str
    run_id: str | None = None


class ExportRecord(Record):
    """Provenance of an export's parts. `fingerprint` is the fingerprint of the prior's weights."""

    format: Literal[3]
    fingerprint: str
    dvae: str
    tokenizer: str
    update: int
    ema: bool
    caption_dropout: float
    """Fraction of captions dropped in training. Above 0, the prior has also learned images without a caption."""
    data_fingerprint: str
    data_content: str
    data_urls: tuple[str, ...] = Field(min_length=1)
    """Urls of the token data sets during training: one, or several of a mix."""
    checkpoint: str
    mlflow: MlflowRun | None = None
    sampling: PriorSamplingConfig | None = None
    """Settings that samples are meant for: the defaults of `dalle-ds sample`. None: written by a version without them."""


def read_export_record(url: str | Path) -> ExportRecord:
    """Read the record of the export at `url`. Raises DataError if it is missing or was not written by `dalle-ds export`."""
    file = objects.join(url, RECORD_FILE)
    if not objects.exists(file):
        raise DataError(f"{url} is not an export folder: it has no {RECORD_FILE}; `dalle-ds export` writes one")
    return read_record(ExportRecord, file)
