"""Where a run of any stage is tracked: the part that all recipes have."""

from pydantic import Field

from dalle_ds.recipes import Config


class TrackingConfig(Config):
    uri: str | None = Field(None, description="MLflow store; unset: MLFLOW_TRACKING_URI, else a SQLite file beside the folder")
    experiment: str = "dalle_ds"
    run_name: str = Field(description="of the run in MLflow")
    every: int = Field(ge=1, description="updates between metrics")
