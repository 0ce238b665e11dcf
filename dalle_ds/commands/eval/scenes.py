"""`dalle-ds eval scenes`: images of scenes against their captions, by the exact judge, beside real scenes through a dVAE.

B images, S side in pixels, C channels.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dalle_ds.commands.eval.reports import require_replaceable
from dalle_ds.commands.settings import ScenesConfig
from dalle_ds.console import Outcome, progress
from dalle_ds.errors import DataError
from dalle_ds.evaluation.image_sets import ImageSet, decode, open_images
from dalle_ds.evaluation.usable_images import require_usable, survey
from dalle_ds.models.dvae import DVAE
from dalle_ds.ops.devices import resolve_device
from dalle_ds.sampling.decode import decode_images
from dalle_ds.sampling.export_record import read_export_record
from dalle_ds.scenes.captions import meaning_of
from dalle_ds.scenes.charts import judged_sheet, score_chart
from dalle_ds.scenes.judge import verdict
from dalle_ds.scenes.render import MIN_SIDE
from dalle_ds.scenes.score import Found, Report, found_in, score, score_found
from dalle_ds.scenes.table import table
from dalle_ds.scenes.trial import Trial, try_judge
from dalle_ds.scenes.vocabulary import GROUNDS
from dalle_ds.storage import objects
from dalle_ds.storage.names import DVAE_FILE
from dalle_ds.tracking.export_run import track
from preprocessing.encoding.encode_shard import load_dvae

log = logging.getLogger(__name__)

SCORES, CHART, SHEET = "scenes.json", "scenes.png", "judged.png"
SHOWN = 500  # images on the sheet
BATCH = 256
NO_SCENE = "with a caption that is none of a scene"


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
        dvae: its reconstructions of drawn scenes of the same captions are judged as well. They are no upper bound: a choice
            among samples may take one whose codes decode well.
        export: what drew the images: its MLflow run gets scores and charts.
        limit: images at most, chosen by hash of their names.
        seed: of the drawn scenes, and of the captions that give the chance level.
        textured, n_grounds: of the drawn scenes, as `scene_of`: those of the dVAE's training data.
        name: first part of the names of metrics and charts in the MLflow run.

    Raises:
        DataError: no image with a caption of a scene, an image without any caption, one that is not square; a dVAE of too
            small images.
        ConfigError: `out` has the scores of other images.
    """
    if dvae is not None and dvae.config.image_size < MIN_SIDE:
        raise DataError(f"the dVAE's images have {dvae.config.image_size} pixels a side: expected {MIN_SIDE} or more")
    record = None if export is None else read_export_record(export)
    read = _read(images, limit)
    captions = read.captions
    report = score_found(read.found, captions, seed=seed)
    result: dict[str, Any] = {
        "images": images,
        "images_fingerprint": read.images.fingerprint,
        "out": str(out),
        "n_images": len(captions),
        "n_left_out": len(read.left_out),
        "left_out": {images: read.left_out} if read.left_out else {},
        "seed": seed,
    }
    require_replaceable(out / SCORES, result, "images_fingerprint", "images", "n_images")
    side = read.side if dvae is None else dvae.config.image_size
    trial = try_judge(captions, side, seed=seed, textured=textured, n_grounds=n_grounds)
    reconstructed = None if dvae is None else _reconstructed(dvae, trial, seed)
    out.mkdir(parents=True, exist_ok=True)
    result |= {
        "judge": {"n_drawn": len(trial.captions), "drawn_right": trial.drawn_right, "spoiled_refused": trial.spoiled_refused},
        **report.to_dict(),
    }
    if reconstructed is not None:
        result["reconstructed"] = reconstructed.to_dict()
    verdicts = [{"file": key, **one.to_dict()} for key, one in zip(read.keys, report.judged, strict=True)]
    objects.write_bytes(out / SCORES, json.dumps({**result, "judged": verdicts}, indent=1).encode())
    charts = {f"{name}/scores": score_chart(report, reconstructed), f"{name}/judged": read.sheet(report)}
    for file, chart in zip((CHART, SHEET), charts.values(), strict=True):
        chart.save(out / file)
    if record is not None and export is not None:
        metrics = {f"{name}/{row}": value for row, value in report.metrics().items()}
        if reconstructed is not None:
            means = {row: value for row, value in reconstructed.metrics().items() if row.endswith("/mean")}
            metrics |= {f"{name}/reconstructed/{row}": value for row, value in means.items()}
        result["tracked"] = track(export, record, out, metrics, charts, [out / SCORES], name)
    judge = f"the judge itself: {trial.drawn_right:.1%} of {len(trial.captions)} drawn scenes right, "
    judge += f"{trial.spoiled_refused:.1%} of spoiled ones refused"
    parts = [table(report, reconstructed), ""]
    if reconstructed is not None:
        parts.append(
            "reconstructed: real scenes of these captions through the dVAE; the best of several samples may score higher"
        )
    if read.left_out:
        parts.append(f"left out: {len(read.left_out)} images {NO_SCENE}")
    return Outcome(result, text="\n".join([*parts, judge, f"{out / SCORES}, {CHART}, {SHEET}"]))


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


@dataclass
class _Read:
    """Images with captions of scenes, in their order, and what each of them shows."""

    images: ImageSet
    side: int = 0
    """Width of the first image, in pixels."""
    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Reason by key."""
    kept: dict[bool, dict[int, Image.Image]] = field(default_factory=lambda: {False: {}, True: {}})
    """The first `SHOWN` wrong images and the first right ones, by their place."""

    def sheet(self, report: Report) -> Image.Image:
        """The images with their verdicts, the wrong ones first."""
        shown = [*self.kept[False].items(), *self.kept[True].items()][:SHOWN]
        n, n_wrong = len(report.judged), sum(not one.verdict.is_right for one in report.judged)
        title = f"{n_wrong} of {n} images are wrong: red frames, first"
        if len(shown) < n:
            title += f"; {len(shown)} are shown"
        return judged_sheet([image for _, image in shown], [report.judged[i] for i, _ in shown], title)


def _read(source: str, limit: int | None) -> _Read:
    checked = survey(open_images(source, limit=limit), needs_caption=True)
    require_usable([checked], 0.0)
    read = _Read(checked.images)
    strange: Counter[str] = Counter()
    entries = iter(checked.images)
    with progress(what="judge", unit="image") as bar:
        while batch := list(islice(entries, BATCH)):
            images: list[Image.Image] = []
            meanings = []
            for entry in batch:
                caption = str(entry.caption)
                meaning = meaning_of(caption)
                if meaning is None:
                    read.left_out[entry.key] = NO_SCENE
                    strange[caption] += 1
                    continue
                read.keys.append(entry.key)
                read.captions.append(caption)
                images.append(decode(entry))
                meanings.append(meaning)
            found = found_in(images)
            for i, (image, objects_there, meaning) in enumerate(zip(images, found, meanings, strict=True), len(read.found)):
                kept = read.kept[verdict(objects_there, meaning).is_right]
                if len(kept) < SHOWN:
                    kept[i] = image
                read.side = read.side or image.width
            read.found += found
            bar.update(len(batch))
    some = ", ".join(f"{caption[:100]!r} ({n})" for caption, n in strange.most_common(10))
    if len(strange) > 10:
        some += ", ..."
    if not read.captions:
        raise DataError(
            f"{source}: none of its {len(read.left_out)} images has a caption of a scene, such as 'a red heart above a small "
            f"blue star' or 'three green rings', so that none can be judged; its captions are {some}"
        )
    if strange:
        log.warning(
            "left out: %d of %d images, %s: %s", len(read.left_out), len(read.left_out) + len(read.captions), NO_SCENE, some
        )
    read.images = checked.images.without(read.left_out)
    return read


def _reconstructed(dvae: DVAE, trial: Trial, seed: int) -> Report:
    device = next(dvae.parameters()).device
    decoded: list[Image.Image] = []
    with torch.inference_mode():
        for pixels_BSSC in np.array_split(trial.images_BSSC, -(-len(trial.images_BSSC) // BATCH)):
            images_BCSS = torch.from_numpy(pixels_BSSC).to(device).permute(0, 3, 1, 2)
            decoded += decode_images(dvae, dvae.tokens(images_BCSS))
    return score(decoded, trial.captions, seed=seed)
