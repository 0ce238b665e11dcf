"""`dalle-ds eval scenes`: images of scenes against their captions, by the exact judge, beside the ceiling that a dVAE leaves.

B images, S side in pixels, C channels.
"""

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dalle_ds.commands.settings import ScenesConfig
from dalle_ds.console import Outcome, progress
from dalle_ds.errors import DataError
from dalle_ds.evaluation.image_sets import decode, open_images
from dalle_ds.evaluation.usable_images import require_usable, survey
from dalle_ds.models.dvae import DVAE
from dalle_ds.ops.devices import resolve_device
from dalle_ds.sampling.decode import decode_images
from dalle_ds.sampling.export_record import read_export_record
from dalle_ds.scenes.charts import judged_sheet, score_chart
from dalle_ds.scenes.render import MIN_SIDE
from dalle_ds.scenes.score import Found, Report, found_in, require_meaning, score, score_found
from dalle_ds.scenes.table import table
from dalle_ds.scenes.trial import Trial, try_judge
from dalle_ds.scenes.vocabulary import GROUNDS
from dalle_ds.storage import objects
from dalle_ds.storage.names import DVAE_FILE
from dalle_ds.tracking.export_run import track
from preprocessing.encoding.encode_shard import load_dvae

log = logging.getLogger(__name__)

SCORES, CHART, SHEET = "scenes.json", "scenes.png", "judged.png"
SHOWN = 96  # images on the sheet
BATCH = 256


def evaluate_scenes(
    images: str,
    out: Path,
    *,
    dvae: DVAE | None = None,
    export: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    textured: float = 0.25,
    n_grounds: int = len(GROUNDS),
    name: str = "scenes",
) -> Outcome:
    """Judge images by their captions; writes scenes.json (each verdict in it), a chart and a sheet of images to `out`.

    Args:
        images: as `image_sets.open_images`.
        dvae: its reconstructions of drawn scenes of the same captions are judged as well: the ceiling.
        export: what drew the images: its MLflow run gets scores and charts.
        limit: images at most, chosen by hash of their names.
        seed: of the drawn scenes, and of the captions that give the chance level.
        textured, n_grounds: of the drawn scenes, as `scene_of`: those of the dVAE's training data.
        name: first part of the names of metrics and charts in the MLflow run.

    Raises:
        DataError: no images, one without a caption or with a caption that is none of a scene, one that is not square; a dVAE
            of too small images.
    """
    if dvae is not None and dvae.config.image_size < MIN_SIDE:
        raise DataError(f"the dVAE's images have {dvae.config.image_size} pixels a side: expected {MIN_SIDE} or more")
    record = None if export is None else read_export_record(export)
    captions, found, shown = _read(images, limit)
    report = score_found(found, captions, seed=seed)
    side = shown[0].width if dvae is None else dvae.config.image_size
    trial = try_judge(captions, side, seed=seed, textured=textured, n_grounds=n_grounds)
    ceiling = None if dvae is None else _ceiling(dvae, trial, seed)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "images": images,
        "out": str(out),
        "n_images": len(captions),
        "seed": seed,
        "judge": {"n_drawn": len(trial.captions), "drawn_right": trial.drawn_right, "spoiled_refused": trial.spoiled_refused},
        **report.to_dict(),
    }
    if ceiling is not None:
        result["ceiling"] = ceiling.to_dict()
    verdicts = [one.to_dict() for one in report.judged]
    objects.write_bytes(out / SCORES, json.dumps({**result, "judged": verdicts}, indent=1).encode())
    charts = {
        f"{name}/scores": score_chart(report, ceiling),
        f"{name}/judged": judged_sheet(shown, report.judged[: len(shown)]),
    }
    for file, chart in zip((CHART, SHEET), charts.values(), strict=True):
        chart.save(out / file)
    if record is not None and export is not None:
        metrics = {f"{name}/{row}": value for row, value in report.metrics().items()}
        if ceiling is not None:
            metrics |= {f"{name}/ceiling/{row}": value for row, value in ceiling.metrics().items() if row.endswith("/mean")}
        result["tracked"] = track(export, record, out, metrics, charts, [out / SCORES], name)
    judge = f"the judge itself: {trial.drawn_right:.1%} of {len(trial.captions)} drawn scenes right, "
    judge += f"{trial.spoiled_refused:.1%} of spoiled ones refused"
    return Outcome(result, text=f"{table(report, ceiling)}\n\n{judge}\n{out / SCORES}, {CHART}, {SHEET}")


def run(config: ScenesConfig) -> Outcome:
    device = str(resolve_device(config.device))
    if config.dvae is not None:
        url: str | None = config.dvae
    else:
        url = None if config.export is None else objects.join(config.export, DVAE_FILE)
    dvae = None if url is None else load_dvae(url)[0].to(device).eval().requires_grad_(False)
    return evaluate_scenes(
        config.images,
        config.out,
        dvae=dvae,
        export=config.export,
        limit=config.limit,
        seed=config.seed,
        textured=config.textured,
        n_grounds=config.n_grounds,
        name=config.name,
    )


def _read(images: str, limit: int | None) -> tuple[list[str], list[Found], list[Image.Image]]:
    """Captions, what each image shows, and the first images themselves."""
    captions: list[str] = []
    found: list[Found] = []
    shown: list[Image.Image] = []
    checked = survey(open_images(images, limit=limit), needs_caption=True)
    require_usable([checked], 0.0)
    entries = iter(checked.images)
    with progress(what="judge", unit="image") as bar:
        while batch := list(islice(entries, BATCH)):
            for entry in batch:
                require_meaning(str(entry.caption))
                captions.append(str(entry.caption))
            decoded = [decode(entry) for entry in batch]
            found += found_in(decoded)
            shown += decoded[: SHOWN - len(shown)]
            bar.update(len(batch))
    return captions, found, shown


def _ceiling(dvae: DVAE, trial: Trial, seed: int) -> Report:
    device = next(dvae.parameters()).device
    decoded: list[Image.Image] = []
    with torch.inference_mode():
        for pixels_BSSC in np.array_split(trial.images_BSSC, -(-len(trial.images_BSSC) // BATCH)):
            images_BCSS = torch.from_numpy(pixels_BSSC).to(device).permute(0, 3, 1, 2)
            decoded += decode_images(dvae, dvae.tokens(images_BCSS))
    return score(decoded, trial.captions, seed=seed)
