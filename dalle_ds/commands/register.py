"""`dalle-ds register`: register an export, with code and requirements, as a version of an MLflow model."""

import os
import re
import tempfile
import uuid
from contextlib import ExitStack
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import dalle_ds
from dalle_ds.commands.settings import RegisterConfig
from dalle_ds.errors import ConfigError, UserError
from dalle_ds.sampling.export_record import ExportRecord, read_export_record
from dalle_ds.sampling.settings import SampleOptionsConfig
from dalle_ds.storage import objects
from dalle_ds.tracking.export_run import run_of_export
from dalle_ds.tracking.store import make_client

FOLDER = "model"
NOT_NEEDED = ("deepspeed", "webdataset", "py3langid", "imagehash", "scikit-image")
"""Requirements that only training and preprocessing need."""


def register_export(url: str, name: str, *, clip: str | None = None, uri: str | None = None) -> dict[str, Any]:
    """Upload an export, code and requirements to the export's MLflow run, and register the upload as a version of model `name`.

    Args:
        url: export folder, a path or s3:// url.
        clip: folder of a CLIP that ranks candidates. If None, the model returns all candidates.
        uri: MLflow store. If None: the store that the export names.

    Raises:
        DataError: `url` is not an export.
        ConfigError: the export names no MLflow run.
        UserError: MLflow is unreachable or rejects the request, or the run was deleted: its files are removed some day.
    """
    record = read_export_record(url)
    known_uri, run_id = run_of_export(record)
    uri = uri or known_uri
    if uri is None or run_id is None:
        raise ConfigError(f"export {url} names no MLflow run: expected an export of a run that was tracked in MLflow")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")  # the server answers only after storing a file of gigabytes
    client = make_client(uri)
    from mlflow.exceptions import MlflowException

    with ExitStack() as until_sent:
        folder = Path(until_sent.enter_context(tempfile.TemporaryDirectory()))
        artifacts = {"export": _on_disk(url, folder / "export")}
        if clip is not None:
            artifacts["clip"] = _on_disk(clip, folder / "clip")
        _save(folder / FOLDER, artifacts, record)
        try:
            place = f"{FOLDER}/{uuid.uuid4().hex[:12]}"  # a folder per version: a later version must not overwrite these files
            run = client.get_run(run_id).info
            if run.lifecycle_stage != "active":  # the store would take the files all the same
                raise UserError(
                    f"MLflow at {uri}: run {run_id} of {url} was deleted; restore it on its page, then register again"
                )
            source = f"{run.artifact_uri}/{place}"
            client.log_artifacts(run_id, str(folder / FOLDER), place)
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            tags = {"export": str(url), "export_fingerprint": record.fingerprint, "update": str(record.update)}
            version = client.create_model_version(name, source, run_id=run_id, tags=tags, await_creation_for=60).version
        except MlflowException as error:
            raise UserError(f"MLflow at {uri} cannot register {url} as {name!r}: {error}") from None
    return {"model": f"models:/{name}/{version}", "run_id": run_id, "export_fingerprint": record.fingerprint}


def run(config: RegisterConfig) -> dict[str, Any]:
    return register_export(config.export, config.name, clip=config.clip, uri=config.mlflow_uri)


def _save(folder: Path, artifacts: dict[str, str], record: ExportRecord) -> None:
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    # MLflow has no parameter without a value: keep 0 keeps all
    defaults = {**SampleOptionsConfig().for_prior(record.sampling).model_dump(), "keep": 0}
    types = {int: "long", float: "double"}
    outputs = {"caption": "string", "candidate": "long", "seed": "long", "score": "double", "png": "binary"}
    signature = ModelSignature(
        Schema([ColSpec("string", "caption")]),
        Schema([ColSpec(kind, column, required=column != "score") for column, kind in outputs.items()]),
        ParamSchema([ParamSpec(key, types[type(value)], value) for key, value in defaults.items()]),
    )
    package = Path(dalle_ds.__file__).parent
    save_model(
        str(folder),
        python_model=str(package / "sampling" / "serving" / "mlflow_model.py"),
        artifacts=artifacts,
        code_paths=[str(package)],
        signature=signature,
        input_example=(pd.DataFrame({"caption": ["a red heart", "a blue house"]}), defaults),
        pip_requirements=_requirements(),
        metadata={"export_fingerprint": record.fingerprint},
    )


def _requirements() -> list[str]:
    own = [requirement for requirement in requires("dalle-ds") or () if "extra ==" not in requirement]
    return [requirement for requirement in own if re.match(r"[\w.-]+", requirement)[0] not in NOT_NEEDED]  # type: ignore[index]


def _on_disk(url: str, copy: Path) -> str:
    """Returns the absolute path of a local folder. A folder on object storage is first downloaded to `copy`."""
    if not objects.is_s3(url):
        return str(Path(url).resolve())
    copy.mkdir()
    for found in objects.list_files(url):
        with objects.local_copy(found) as file:
            (copy / found.rpartition("/")[2]).write_bytes(Path(file).read_bytes())
    return str(copy)
