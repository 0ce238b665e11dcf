"""Download a model that `dalle-ds register` put into the MLflow model registry."""

from pathlib import Path

from dalle_ds.errors import DataError
from dalle_ds.tracking.store import make_client, sqlite_file

SCHEME = "models:/"


def fetch_registered(uri: str, folder: Path) -> dict[str, Path]:
    """Download a registered model into `folder`. Returns the path of each artifact by name: "export" and, if present, "clip".

    Args:
        uri: models:/NAME/VERSION or models:/NAME@ALIAS, in the store of MLFLOW_TRACKING_URI or `mlflow.set_tracking_uri`.

    Raises:
        DataError: MLflow cannot be reached, it has no such model, or `dalle-ds register` did not make the model.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    store = mlflow.get_tracking_uri()
    database = sqlite_file(store)
    if database is not None and not database.exists():  # do not create a store only to read from it
        raise DataError(f"{uri}: there is no MLflow store {store}; expected MLFLOW_TRACKING_URI to name the model's store")
    make_client(store)  # sets MLflow's timeouts and turns off its output
    try:
        local = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
        entries = Model.load(str(local)).flavors.get("python_function", {}).get("artifacts") or {}
    except (MlflowException, OSError) as error:
        raise DataError(f"{uri} cannot be fetched from MLflow at {store}: {error}") from None
    if "export" not in entries:
        raise DataError(
            f"{uri} at {store} has {', '.join(entries) or 'no artifacts'}, expected an export; "
            "`dalle-ds register` makes such a model"
        )
    return {name: local / entry["path"] for name, entry in entries.items()}
