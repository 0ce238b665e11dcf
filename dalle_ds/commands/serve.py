"""`dalle-ds serve`: serve a web page that samples from an export."""

import logging
from pathlib import Path

from dalle_ds.commands.settings import ServeConfig
from dalle_ds.errors import UserError
from dalle_ds.ops.devices import resolve_device
from dalle_ds.redaction import redacted
from dalle_ds.sampling.captions import read_captions
from dalle_ds.sampling.export import Export, load_export
from dalle_ds.sampling.sampler import Sampler
from dalle_ds.sampling.scorer import load_scorer
from dalle_ds.sampling.serving.page import LOOPBACK, build_page, launch_page
from dalle_ds.sampling.settings import PageLimitsConfig
from dalle_ds.sampling.validation_samples import example_captions
from dalle_ds.tracking.export_run import run_of_export

log = logging.getLogger(__name__)

N_EXAMPLES = 6


def serve_export(
    url: str,
    limits: PageLimitsConfig,
    *,
    clip: str | None,
    examples: Path | None,
    host: str,
    port: int,
    mlflow_url: str | None,
    device: str,
) -> None:
    """Serve the web page of an export until the process is stopped.

    Args:
        examples: file of captions to click. If None: `examples_of`.
        mlflow_url: MLflow server that holds the training run. If None: the server that tracked the run, if the run was tracked
            by a server.
    """
    captions = None if examples is None else read_captions(examples)
    place = str(resolve_device(device))
    sampler = Sampler(load_export(url, place), load_scorer(clip, place) if clip else None)
    export = sampler.export
    captions = examples_of(export) if captions is None else captions
    # visitors from other machines cannot use this machine's paths, and need not know them
    page = build_page(sampler, limits, run_link(export, mlflow_url), captions, shows_paths=host in LOOPBACK)
    launch_page(page, limits, host, port)


def examples_of(export: Export) -> list[str]:
    """Returns some validation captions of the data that the export was trained on; none if that data cannot be read here."""
    try:
        return example_captions(export, N_EXAMPLES)
    except (UserError, OSError) as error:
        log.warning("the page has no examples to click, because the export's data cannot be read (%s); see --examples", error)
        return []


def run_link(export: Export, server: str | None) -> str | None:
    """URL of the training run's page in MLflow, on `server` or else on the server that tracked the run.

    Returns None if there is no server or the export names no run.
    """
    known_server, run_id = run_of_export(export.record)
    server = server or known_server or ""
    is_known = server.startswith("http") and run_id is not None
    return f"{redacted(server).rstrip('/')}/#/runs/{run_id}" if is_known else None


def run(config: ServeConfig) -> None:
    serve_export(
        config.export,
        config.limits(),
        clip=config.clip,
        examples=config.examples,
        host=config.host,
        port=config.port,
        mlflow_url=config.mlflow_url,
        device=config.device,
    )
