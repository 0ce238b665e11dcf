"""`dalle-ds eval loss`: validation loss with right and with shuffled captions, and the bound of the whole model."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_ds.commands.eval.reports import require_replaceable
from dalle_ds.commands.settings import LossConfig
from dalle_ds.console import progress
from dalle_ds.evaluation.caption_gap import caption_classes, derangement, gap_of_file, position_map, save_losses
from dalle_ds.evaluation.joint_bound import LEAVES_OUT, JointBound, joint_bound
from dalle_ds.ops.devices import resolve_device
from dalle_ds.sampling.agreement import fp16_agreement
from dalle_ds.sampling.export import Export, load_export
from dalle_ds.sampling.likelihood import caption_losses, image_losses, pixel_losses
from dalle_ds.sampling.validation_images import read_images
from dalle_ds.sampling.validation_samples import ValidationSamples, read_validation
from dalle_ds.storage import objects
from dalle_ds.tracking.charts import position_heatmap
from dalle_ds.tracking.export_run import track

log = logging.getLogger(__name__)

EVALUATION, LOSSES = "evaluate.json", "losses.npz"


def evaluate_export(
    url: str,
    out: Path,
    *,
    data_url: str | None = None,
    limit: int | None = None,
    bound_pairs: int = 512,
    raw: str | None = None,
    fp16_samples: int = 64,
    seed: int = 0,
    batch: int = 16,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure the validation image loss with right and with shuffled captions, and the bound of the whole model.

    Writes the losses, evaluate.json and charts to `out`. Returns the summary.

    Args:
        url: export folder, a path or s3:// url.
        data_url: root of a token data set. If None: the data sets that the export names.
        limit: maximum number of validation samples. If None: all.
        bound_pairs: maximum number of pairs for the bound on ln p(image, caption). 0: none.
        raw: root of the raw shards. If None: where they were when they were encoded. If they are gone, there is no bound.
        fp16_samples: maximum number of samples for the agreement of tokens sampled in fp16 with those in fp32. 0: none.
        seed: seed of the shuffled captions and of the confidence intervals.
        batch: samples per forward pass.

    Raises:
        ConfigError: `out` has the losses of another export.
    """
    export = load_export(url, str(resolve_device(device)))
    validation = read_validation(export, data_url, limit)
    data_urls = [data_url] if data_url else list(export.record.data_urls)
    data = " + ".join(data_urls)
    about = {"export": url, "export_fingerprint": export.fingerprint, "data": data}
    require_replaceable(out / EVALUATION, about, "export_fingerprint", "export", "data")
    classes_S = caption_classes(validation.captions, validation.groups)
    order = derangement(classes_S, seed)
    rows, images_RHWC = read_images(validation, data_urls, export.dvae, bound_pairs, raw) if bound_pairs else ([], np.empty(0))
    if bound_pairs and not rows:
        log.warning("no bound on ln p(image, caption): the raw shards of %s no longer exist; set --raw", data)
    with progress(total=2 * len(validation), what="right and shuffled captions", unit="caption") as bar:
        options: dict[str, Any] = {"batch": batch, "progress": bar.update}
        right_SN = image_losses(export.prior, validation.text_ST, validation.image_SN, **options)
        wrong_SN = image_losses(export.prior, validation.text_ST[torch.from_numpy(order)], validation.image_SN, **options)
    bound = _bound(export, validation, right_SN, rows, images_RHWC, classes_S, batch, seed) if rows else None
    some = validation.take(list(range(min(fp16_samples, len(validation)))))
    # comes last, because it leaves the prior in fp16
    agreement = fp16_agreement(export.prior, some.text_ST, some.image_SN, seed=seed) if len(some) else None
    out.mkdir(parents=True, exist_ok=True)
    marks = {"keys": validation.keys, "captions": validation.captions, "groups": validation.groups}
    save_losses(out / LOSSES, nll_SN=right_SN, nll_shuffled_SN=wrong_SN, order_S=order, **marks)

    gap = gap_of_file(out / LOSSES, seed=seed)
    loss_map, gap_map = position_map(right_SN), position_map(wrong_SN - right_SN)
    result = {
        **about,
        "seed": seed,
        **gap.to_dict(),
        "bound": bound.to_dict() if bound else None,
        "fp16_token_agreement": agreement,
        "fp16_samples": len(some),
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
    metrics = {**gap.metrics(), **(bound.metrics() if bound else {})}
    is_tracked = track(export.url, export.record, out, metrics, charts, [out / EVALUATION], "evaluation")
    return {
        "export": url,
        "out": str(out),
        **gap.to_dict(),
        **({**bound.metrics(), "bound_pairs": bound.n_pairs, "bound_leaves_out": "; ".join(LEAVES_OUT)} if bound else {}),
        **({} if agreement is None else {"fp16_token_agreement": agreement}),
        "right_captions_win": gap.gap_low > 0,
        "tracked": is_tracked,
    }


def _bound(
    export: Export,
    validation: ValidationSamples,
    right_SN: np.ndarray,
    rows: list[int],
    images_RHWC: np.ndarray,
    classes_S: np.ndarray,
    batch: int,
    seed: int,
) -> JointBound:
    """The bound on the R pairs of `rows`."""
    chosen = validation.take(rows)
    caption_R = caption_losses(export.prior, chosen.text_ST, chosen.image_SN, batch=batch)
    pixels_R = pixel_losses(export.dvae, images_RHWC, chosen.image_SN, export.ln_b_min, batch=batch)
    codes_R = right_SN[rows].sum(1, dtype=np.float64)
    return joint_bound(caption_R, codes_R, pixels_R, images_RHWC[0].size, classes_S[rows], seed=seed)


def run(config: LossConfig) -> dict[str, Any]:
    return evaluate_export(
        config.export,
        config.out,
        data_url=config.data,
        limit=config.limit,
        bound_pairs=config.bound_pairs,
        raw=config.raw,
        fp16_samples=config.fp16_samples,
        seed=config.seed,
        batch=config.batch,
        device=config.device,
    )
