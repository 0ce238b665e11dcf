"""`dalle-ds eval loss`: validation loss of an export with the right captions and with shuffled captions."""

import json
from pathlib import Path
from typing import Any

import torch

from dalle_ds.commands.settings import LossConfig
from dalle_ds.console import progress
from dalle_ds.evaluation.caption_gap import caption_classes, derangement, gap_of_file, position_map, save_losses
from dalle_ds.ops.devices import resolve_device
from dalle_ds.sampling.export import load_export
from dalle_ds.sampling.likelihood import image_losses
from dalle_ds.sampling.validation_samples import read_validation
from dalle_ds.storage import objects
from dalle_ds.tracking.charts import position_heatmap
from dalle_ds.tracking.export_run import track

EVALUATION, LOSSES = "evaluate.json", "losses.npz"


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
    """Measure the validation image loss with the right captions and with shuffled captions.

    Writes the losses, evaluate.json and charts to `out`. Returns the summary.

    Args:
        url: export folder, a path or s3:// url.
        data_url: root of a token data set. If None: the data sets that the export names.
        limit: maximum number of validation samples. If None: all.
        seed: seed of the shuffled captions and of the confidence interval.
        batch: samples per forward pass.
    """
    export = load_export(url, str(resolve_device(device)))
    validation = read_validation(export, data_url, limit)
    order = derangement(caption_classes(validation.captions, validation.groups), seed)
    with progress(total=2 * len(validation), what="right and shuffled captions", unit="caption") as bar:
        options: dict[str, Any] = {"batch": batch, "progress": bar.update}
        right_SN = image_losses(export.prior, validation.text_ST, validation.image_SN, **options)
        wrong_SN = image_losses(export.prior, validation.text_ST[torch.from_numpy(order)], validation.image_SN, **options)
    out.mkdir(parents=True, exist_ok=True)
    marks = {"keys": validation.keys, "captions": validation.captions, "groups": validation.groups}
    save_losses(out / LOSSES, nll_SN=right_SN, nll_shuffled_SN=wrong_SN, order_S=order, **marks)

    gap = gap_of_file(out / LOSSES, seed=seed)
    loss_map, gap_map = position_map(right_SN), position_map(wrong_SN - right_SN)
    result = {
        "export": url,
        "export_fingerprint": export.fingerprint,
        "data": data_url or " + ".join(export.record.data_urls),
        "seed": seed,
        **gap.to_dict(),
        "loss_by_position": loss_map.tolist(),
        "caption_gap_by_position": gap_map.tolist(),
    }
    objects.write_bytes(out / EVALUATION, json.dumps(result, indent=1).encode())
    charts = {
        "loss/by_position": position_heatmap(loss_map),
        "caption_gap/by_position": position_heatmap(gap_map, "Caption gap by position", diverging=True),
    }
    for name, chart in charts.items():
        chart.save(out / f"{name.replace('/', '_')}.png")
    is_tracked = track(export.url, export.record, out, gap.metrics(), charts, [out / EVALUATION], "evaluation")
    return {"export": url, "out": str(out), **gap.to_dict(), "right_captions_win": gap.gap_low > 0, "tracked": is_tracked}


def run(config: LossConfig) -> dict[str, Any]:
    return evaluate_export(
        config.export,
        config.out,
        data_url=config.data,
        limit=config.limit,
        seed=config.seed,
        batch=config.batch,
        device=config.device,
    )
