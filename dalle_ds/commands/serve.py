"""`dalle-ds serve`: serve a web page that samples from an export."""

from dalle_ds.commands.settings import ServeConfig
from dalle_ds.ops.devices import resolve_device
from dalle_ds.sampling.export import Export, load_export
from dalle_ds.sampling.sampler import Sampler
from dalle_ds.sampling.scorer import load_scorer
from dalle_ds.sampling.serving.page import build_page, launch_page
from dalle_ds.sampling.settings import PageLimitsConfig
from dalle_ds.tracking.export_run import run_of_export


def serve_export(
    url: str, limits: PageLimitsConfig, *, clip: str | None, host: str, port: int, mlflow_url: str | None, device: str
) -> None:
    """Serve the web page of an export until the process is stopped.

    Args:
        mlflow_url: MLflow server that holds the training run. If None: the server that tracked the run, if the run was tracked
            by a server.
    """
    place = str(resolve_device(device))
    sampler = Sampler(load_export(url, place), load_scorer(clip, place) if clip else None)
    launch_page(build_page(sampler, limits, run_link(sampler.export, mlflow_url)), limits, host, port)


def run_link(export: Export, server: str | None) -> str | None:
    """URL of the training run's page in MLflow, on `server` or else on the server that tracked the run.

    Returns None if there is no server or the export names no run.
    """
    known_server, run_id = run_of_export(export.record)
    server = server or known_server or ""
    is_known = server.startswith("http") and run_id is not None
    return f"{server.rstrip('/')}/#/runs/{run_id}" if is_known else None


def run(config: ServeConfig) -> None:
    serve_export(
        config.export,
        config.limits(),
        clip=config.clip,
        host=config.host,
        port=config.port,
        mlflow_url=config.mlflow_url,
        device=config.device,
    )
