"""Show an export: sample or evaluate it, and put the outcome into the MLflow run that it came from."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle_ds.console import progress
from dalle_ds.data import storage
from dalle_ds.errors import ConfigError
from dalle_ds.evaluation.caption_gap import caption_classes, derangement, gap_of_file, position_map, save_losses
from dalle_ds.sampling.export import Export, load_export
from dalle_ds.sampling.held_out import choose_held_out, read_held_out
from dalle_ds.sampling.likelihood import image_losses
from dalle_ds.sampling.sampler import GRID, RECORD, SampleSettings, read_captions, repeat, sample
from dalle_ds.training.charts import position_heatmap
from dalle_ds.training.tracking import NullTracker, Tracker
from dalle_ds.training.tracking_mlflow import read_run

log = logging.getLogger(__name__)

TRACKING_FOLDER = ".tracking"  # below the output folder: the spool, should MLflow be away
EVALUATION, LOSSES = "evaluate.json", "losses.npz"


def sample_export(
    url: str,
    out: Path,
    settings: SampleSettings,
    *,
    captions: Sequence[str] = (),
    captions_file: Path | None = None,
    n_held_out: int = 0,
    data_url: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Pictures for captions from exactly one of three sources; files as `sampling.sampler.sample`. Returns the summary."""
    if sum((bool(captions), captions_file is not None, n_held_out > 0)) != 1:
        raise ConfigError("captions come from exactly one of --caption, --captions and --held-out")
    export = load_export(url, choose_device(device))
    if n_held_out:
        held_out = choose_held_out(export, n_held_out, data_url=data_url, seed=settings.seed)
        about = {"held_out_keys": held_out.keys}
        record = sample(export, held_out.captions, settings, out, real_codes_CN=held_out.image_SN, about=about)
    else:
        record = sample(export, list(captions) if captions_file is None else read_captions(captions_file), settings, out)
    return _sample_summary(export, record, out)


def repeat_export(url: str, record_file: Path, out: Path, *, device: str = "auto") -> dict[str, Any]:
    """Draw the pictures of a samples.json again. Returns the summary."""
    export = load_export(url, choose_device(device))
    return _sample_summary(export, repeat(export, record_file, out), out, is_tracked=False)


def evaluate_export(
    url: str,
    out: Path,
    *,
    data_url: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 16,
    device: str = "auto",
) -> dict[str, Any]:
    """Held-out image loss with the right captions and with shuffled ones; writes losses, evaluate.json, charts to `out`."""
    export = load_export(url, choose_device(device))
    held_out = read_held_out(export, data_url, limit)
    order = derangement(caption_classes(held_out.captions, held_out.groups), seed)
    with progress(total=2 * len(held_out), what="evaluate", unit="sample") as bar:
        options: dict[str, Any] = {"batch": batch, "progress": bar.update}
        right_SN = image_losses(export.prior, held_out.text_ST, held_out.image_SN, **options)
        wrong_SN = image_losses(export.prior, held_out.text_ST[torch.from_numpy(order)], held_out.image_SN, **options)
    out.mkdir(parents=True, exist_ok=True)
    marks = {"keys": held_out.keys, "captions": held_out.captions, "groups": held_out.groups}
    save_losses(out / LOSSES, nll_SN=right_SN, nll_shuffled_SN=wrong_SN, order_S=order, **marks)

    gap = gap_of_file(out / LOSSES, seed=seed)
    loss_map, gap_map = position_map(right_SN), position_map(wrong_SN - right_SN)
    result = {
        "export": url,
        "export_fingerprint": export.fingerprint,
        "data": data_url or export.data_url,
        "seed": seed,
        **gap.to_dict(),
        "position_nll": loss_map.tolist(),
        "position_gap": gap_map.tolist(),
    }
    (out / EVALUATION).write_text(json.dumps(result, indent=1), encoding="utf-8")
    charts = {
        "held_out/loss_by_position": position_heatmap(loss_map),
        "held_out/gap_by_position": position_heatmap(gap_map, "What captions tell, by position", diverging=True),
    }
    for name, chart in charts.items():
        chart.save(out / f"{name.rpartition('/')[2]}.png")
    metrics = {
        "held_out/image_nll": gap.image_nll,
        "held_out/image_nll_shuffled": gap.image_nll_shuffled,
        "held_out/caption_gap": gap.gap,
        "held_out/caption_gap_low": gap.gap_low,
        "held_out/caption_gap_high": gap.gap_high,
    }
    is_tracked = _track(export, out, metrics, charts, [out / EVALUATION], "evaluation")
    return {"export": url, "out": str(out), **gap.to_dict(), "right_captions_win": gap.gap_low > 0, "tracked": is_tracked}


def choose_device(name: str) -> str:
    """ "auto" takes the first GPU where there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def tracker_of(export: Export, out: Path) -> NullTracker:
    """A tracker that adds to the export's own MLflow run; one that keeps nothing where config.json names no run."""
    run = export.info.get("mlflow")
    uri, run_id = (run["uri"], run["run_id"]) if run else (None, None)
    if run and run_id is None and export.info.get("checkpoint"):
        # the store had not answered yet when the checkpoint was saved: the id is beside the checkpoints by now
        checkpoint = export.info["checkpoint"]
        known = None if storage.is_s3(checkpoint) else read_run(Path(checkpoint).parents[1])
        uri, run_id = (known.uri, known.run_id) if known else (uri, None)
    if uri is None or run_id is None:
        log.info("export %s names no MLflow run: nothing is tracked", export.url)
        return NullTracker()
    return Tracker.attach(out / TRACKING_FOLDER, uri=uri, run_id=run_id)


def _track(
    export: Export, out: Path, metrics: dict[str, float], pictures: dict[str, Image.Image], files: Sequence[Path], folder: str
) -> bool:
    tracker, step = tracker_of(export, out), int(export.info.get("update") or 0)
    if metrics:
        tracker.metrics(metrics, step)
    for name, picture in pictures.items():
        tracker.picture(name, picture, step)
    for file in files:
        tracker.artifact(file, folder)
    return tracker.close() and isinstance(tracker, Tracker)


def _sample_summary(export: Export, record: dict[str, Any], out: Path, *, is_tracked: bool = True) -> dict[str, Any]:
    if is_tracked:
        with Image.open(out / GRID) as grid:
            is_tracked = _track(export, out, {}, {"samples": grid.convert("RGB")}, [out / RECORD], "samples")
    return {
        "out": str(out),
        "grid": str(out / GRID),
        "record": str(out / RECORD),
        "pictures": len(record["images"]),
        "captions": len(record["captions"]),
        "export_fingerprint": record["export_fingerprint"],
        "tracked": is_tracked,
    }
