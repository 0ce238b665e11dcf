"""`dalle-ds mlflow-sync`: what a run's spool still holds goes to MLflow, after an outage."""

from dalle_ds.commands.settings import MlflowSyncConfig
from dalle_ds.console import Outcome
from dalle_ds.tracking.tracker import replay


def run(config: MlflowSyncConfig) -> Outcome:
    is_delivered = replay(config.folder, uri=config.uri)
    return Outcome({"folder": str(config.folder), "delivered": is_delivered}, is_delivered)
