"""Recipe schema of the `tracking` section, common to all stages."""

from pydantic import Field

from dalle_ds.recipes import Config, OptionalStore


class TrackingConfig(Config):
    uri: OptionalStore = Field(
        None,
        description="MLflow store; unset: MLFLOW_TRACKING_URI, else the store of an earlier start, else a SQLite file beside "
        "the folder",
    )
    experiment: str = Field("dalle_ds", description="MLflow experiment; created if it does not exist")
    run_name: str = Field(description="name of the MLflow run")
    every: int = Field(ge=1, description="updates between logged metrics")
