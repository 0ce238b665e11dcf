"""`dalle-ds mlflow-sync`: after an outage, send the entries left in a run's spool to MLflow."""

from dalle_ds.commands.settings import MlflowSyncConfig
from dalle_ds.console import Outcome
from dalle_ds.tracking.tracker import replay


def run(config: MlflowSyncConfig) -> Outcome:
    is_delivered = replay(config.folder, uri=config.mlflow_uri)
    return Outcome({"folder": str(config.folder), "delivered": is_delivered}, is_delivered)
