"""Open a trained model or a scorer from a folder, a url or the MLflow model registry."""

from dataclasses import replace
from pathlib import Path

from dalle_ds.interface.model import Model, open_scorer
from dalle_ds.ops.devices import resolve_device
from dalle_ds.places import check_place
from dalle_ds.sampling import scorer as scorers
from dalle_ds.sampling.export import Export, load_export
from dalle_ds.sampling.scorer import ClipScorer, Scorer
from dalle_ds.storage import objects
from dalle_ds.storage.scratch import scratch_folder
from dalle_ds.tracking.registered import SCHEME, fetch_registered


def load(source: str | Path, device: str = "auto", *, scorer: str | Path | Scorer | None = None) -> Model:
    """Open a trained model.

    Args:
        source: an export of `dalle-ds export`: a folder, an s3:// url, or another url that fsspec can read. Or
            models:/NAME/VERSION, a model that `dalle-ds register` registered in the MLflow store of MLFLOW_TRACKING_URI.
        device: "cpu", "cuda", "cuda:1"; "auto" uses a GPU if there is one.
        scorer: scorer that `Model.sample` ranks candidates with: a CLIP's folder or hub name, or an object with the methods of
            `dalle_ds.Scorer`. If None: the CLIP that was registered with the model; a model without one has no scorer.

    Raises:
        UserError: `source` does not exist or is damaged, its parts do not belong together, or there is no such device.
    """
    url, place = str(source), str(resolve_device(device))
    own: Scorer | None = None
    if url.startswith(SCHEME):
        export, own = _load_registered(url, place)
    else:
        check_place(url)
        export = load_export(url, place)
    return Model(export, own if scorer is None else open_scorer(scorer, place))


def load_scorer(source: str | Path, device: str = "auto") -> ClipScorer:
    """Open a CLIP that scores samples. Several models can share it.

    Args:
        source: a folder written by `dalle-ds train clip` or by `transformers`, or hf://OWNER/MODEL of the hub.
        device: as in `load`.

    Raises:
        UserError: `source` does not exist or is not a CLIP, or `transformers` is not installed.
    """
    return scorers.load_scorer(source, resolve_device(device))


def _load_registered(uri: str, device: str) -> tuple[Export, Scorer | None]:
    with scratch_folder() as folder:
        artifacts = fetch_registered(uri, folder)
        export = load_export(artifacts["export"], device)
        scorer = scorers.load_scorer(artifacts["clip"], device) if "clip" in artifacts else None
    if scorer is not None:
        scorer.name = objects.join(uri, "clip")
    return replace(export, url=uri), scorer
