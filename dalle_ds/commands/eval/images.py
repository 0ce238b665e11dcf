"""`dalle-ds eval images`: FID and Inception Score over the paper's blur radii, and the CLIP score.

B images per batch, N images in all, H and W pixels, D features, K classes.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_ds.commands.eval.reports import require_replaceable
from dalle_ds.commands.settings import ImagesConfig
from dalle_ds.console import progress
from dalle_ds.data.images import decode_image
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.bootstrap import mean_interval
from dalle_ds.evaluation.caption_gap import caption_classes
from dalle_ds.evaluation.caption_retrieval import score_among
from dalle_ds.evaluation.fid import fid_interval, frechet_distance, moments
from dalle_ds.evaluation.image_sets import Entry, ImageSet, blurred_by, cut, decode, open_images
from dalle_ds.evaluation.inception_score import inception_score
from dalle_ds.evaluation.statistics import Measure, Statistics, cache_path, require_comparable
from dalle_ds.evaluation.usable_images import require_usable, survey
from dalle_ds.figures import new_figure
from dalle_ds.ops.devices import resolve_device
from dalle_ds.pretrained.clip import Clip
from dalle_ds.pretrained.inception import Inception
from dalle_ds.sampling.export_record import ExportRecord, read_export_record
from dalle_ds.storage import objects
from dalle_ds.tracking.export_run import track

log = logging.getLogger(__name__)

PAPER_RADII = (0.0, 1.0, 2.0, 4.0, 8.0)  # figure 9
IS_SPLITS = 10  # published Inception Scores use ten splits
METRICS, CHART = "image_metrics.json", "image_metrics.png"
WORKERS = 4  # decoding threads; the extractor takes most of the time


@dataclass(frozen=True)
class Extractor:
    """A feature extractor.

    `features` maps uint8 images (B, H, W, 3) to features (B, D) and logits (B, K). The logits of an extractor without classes
    are None.
    """

    name: str
    fingerprint: str
    features: Callable[[np.ndarray], tuple[Tensor, Tensor | None]]


def load_extractor(name: str, *, inception_weights: Path | None = None, device: str = "cpu") -> Extractor:
    """Load the extractor `name`: "inception" or "clip:PATH".

    Args:
        inception_weights: torch-fidelity's weights file. "inception" requires it.

    Raises:
        ConfigError: another name, or "inception" without weights.
    """
    if name == "inception":
        if inception_weights is None:
            raise ConfigError("extractor inception needs --inception-weights, the path of torch-fidelity's weights file")
        network = Inception(inception_weights, device)
        return Extractor(name, network.fingerprint, network.features)
    kind, _, path = name.partition(":")
    if kind != "clip" or not path:
        raise ConfigError(f"extractor {name!r}: expected inception or clip:PATH")
    clip = Clip.load(path, device)
    return Extractor("clip", clip.fingerprint, lambda images_BHWC: (clip.image_features(images_BHWC), None))


def evaluate_images(
    images: str,
    out: Path,
    *,
    reference: Sequence[str] = (),
    extractor: Extractor | None = None,
    clip: Clip | None = None,
    among: int | None = None,
    alike: str | None = None,
    radii: Sequence[float] = PAPER_RADII,
    size: int | None = None,
    limit: int | None = None,
    validation_fraction: float | None = None,
    with_overlap: bool = False,
    cache: Path | None = None,
    n_resamples: int = 20,
    batch: int = 32,
    seed: int = 0,
    export: str | None = None,
    max_failure_rate: float = 0.0,
) -> dict[str, Any]:
    """Score a set of images. Writes image_metrics.json and a chart over blur radii to `out`. Returns the content of the JSON.

    Args:
        images: samples to score, a source as in `image_sets.open_images`.
        reference: real images, a source as in `image_sets.open_images`; or .npz files of statistics, one for each radius.
        extractor: with a reference, measures FID; if the extractor has classes, also measures the Inception Score.
        clip: measures the CLIP score. Every sample needs a caption.
        among: with `clip`, measures retrieval among this number of captions, of the samples and of the reference.
        alike: as in `caption_retrieval.candidates_of`.
        radii: radii of the blur, applied to samples and reference. The scores at the first radius are the headline scores.
        size: side in pixels that samples and reference are cropped to. If None: the short side of the first sample.
        limit: maximum number of samples, and maximum number of reference images.
        validation_fraction: if the reference is raw shards, use only their validation split at this fraction.
        with_overlap: use also reference images that `dalle-ds data dedup` found in the training data.
        cache: folder where the reference's statistics are kept.
        export: export that the samples come from. Its MLflow run gets the scores and the chart.
        max_failure_rate: fraction of the samples, and of the reference, that may be left out because they cannot be used.

    Raises:
        ConfigError: neither `extractor` nor `clip`, a reference without an extractor or `among`, or `among` without `clip`;
            or `out` has the metrics of other images.
        DataError: unusable images, or statistics made with another extractor, size or blur.
    """
    if extractor is None and clip is None:
        raise ConfigError("no score to compute: expected --extractor, --clip or both")
    if reference and extractor is None and among is None:
        raise ConfigError("--reference needs --extractor or --among: FID compares features of an extractor")
    if among is not None and clip is None:
        raise ConfigError("--among needs --clip, which finds the caption of an image")
    if alike is not None and among is None:
        raise ConfigError("--alike needs --among: it says which captions are drawn")
    record = None if export is None else read_export_record(export)
    real = _open_reference(reference, limit, validation_fraction, with_overlap)
    checked = [survey(open_images(images, limit=limit), size=size, needs_caption=clip is not None, is_sized_by_first=True)]
    size = size or checked[0].side
    if isinstance(real, ImageSet):
        checked.append(survey(real, size=size, needs_caption=among is not None))
    require_usable(checked, max_failure_rate)  # of both sides, before hours of extraction
    samples = checked[0].usable
    result: dict[str, Any] = {"images": images, "images_fingerprint": samples.fingerprint, "seed": seed}
    result["left_out"] = {one.images.source: one.problems for one in checked if one.problems}
    require_replaceable(out / METRICS, result, "images_fingerprint", "images")
    if extractor is not None and size is not None:
        target = _Reference(checked[1].usable if isinstance(real, ImageSet) else real, extractor, size, radii, cache, batch)
    if clip is not None:
        sets = {"images": captioned(clip, samples, batch=batch)}
        result |= clip_score(clip, sets["images"], batch=batch, seed=seed)
        if among is not None:
            if isinstance(real, ImageSet):
                sets["reference"] = captioned(clip, checked[1].usable, batch=batch)
            result |= retrieval(clip, sets, among, alike, batch=batch, seed=seed)
    if extractor is not None and size is not None:
        rows = []
        extracted = extract(extractor, samples, size, radii, batch=batch)
        statistics = target.at(radii)
        for blur in radii:
            row = {"blur": blur, **_scores(*extracted[blur], statistics.get(blur), n_resamples=n_resamples, seed=seed)}
            rows.append(row)
            log.info("%s", ", ".join(f"{key} {row[key]:.4g}" for key in ("blur", "fid", "inception_score") if key in row))
        result |= {
            "reference": list(reference),
            "extractor": extractor.name,
            "extractor_fingerprint": extractor.fingerprint,
            "size": size,
            "resamples": n_resamples,
            "by_blur": rows,
            **{key: value for key, value in rows[0].items() if key != "blur"},
        }
    out.mkdir(parents=True, exist_ok=True)
    objects.write_bytes(out / METRICS, json.dumps(result, indent=1).encode())
    if result.get("by_blur") and any(key in result for key in ("fid", "inception_score")):
        _draw_chart(result["by_blur"], f"{result['n']} images, features of {result['extractor']}", out / CHART)
    if export is not None:
        result["tracked"] = _track(export, record, out, result)
    return result


def run(config: ImagesConfig) -> dict[str, Any]:
    device = str(resolve_device(config.device))
    extractor = None
    if config.extractor:
        extractor = load_extractor(config.extractor, inception_weights=config.inception_weights, device=device)
    return evaluate_images(
        config.images,
        config.out,
        reference=config.reference,
        extractor=extractor,
        clip=Clip.load(config.clip, device) if config.clip else None,
        among=config.among,
        alike=config.alike,
        radii=config.blur,
        size=config.size,
        limit=config.limit,
        validation_fraction=config.validation_fraction,
        with_overlap=config.with_overlap,
        cache=config.cache,
        n_resamples=config.resamples,
        batch=config.batch,
        seed=config.seed,
        export=config.export,
        max_failure_rate=config.max_failure_rate,
    )


def _track(export: str, record: ExportRecord, out: Path, result: dict[str, Any]) -> bool:
    names = ("fid", "inception_score", "clip_score")
    metrics = {f"images/{name}": result[name] for name in names if name in result}
    for name in ("retrieval_images", "retrieval_reference"):
        if name in result:
            metrics[f"images/{name}"] = result[name]["top1"]
    for row in result.get("by_blur", ()):
        metrics |= {f"images/{name}_blur_{row['blur']:g}": row[name] for name in names if name in row}
    charts = {}
    if (out / CHART).exists():
        charts["images/scores_by_blur"] = decode_image((out / CHART).read_bytes())
    return track(export, record, out, metrics, charts, [out / METRICS], "image_metrics")


def extract(
    extractor: Extractor, images: ImageSet, size: int, radii: Sequence[float], *, batch: int = 32
) -> dict[float, tuple[np.ndarray, np.ndarray | None]]:
    """Extract features (N, D) and logits (N, K) of all images at each blur radius, both fp32, in one pass over the images. The
    logits of an extractor without classes are None.

    At most two batches of pixels are in memory, and the features at all radii.

    Raises:
        DataError: fewer than two images, or features that are not finite.
    """
    features: dict[float, list[np.ndarray]] = {blur: [] for blur in radii}
    logits: dict[float, list[np.ndarray]] = {blur: [] for blur in radii}
    with ThreadPoolExecutor(WORKERS) as pool, progress(what=f"features of {images.source}", unit="image") as bar:
        for entries in _batches(images, batch):
            cropped = list(pool.map(lambda entry: cut(entry, size), entries))  # decoded once for all radii
            for blur in features:
                blurred = pool.map(partial(blurred_by, blur=blur), cropped)
                features_BD, logits_BK = extractor.features(np.stack(list(blurred)))
                features[blur].append(features_BD.float().cpu().numpy())
                if logits_BK is not None:
                    logits[blur].append(logits_BK.float().cpu().numpy())
            bar.update(len(entries))
    found = {}
    for blur, parts in features.items():
        features_ND = np.concatenate(parts) if parts else np.empty((0, 0))
        if len(features_ND) < 2 or not np.isfinite(features_ND).all():
            raise DataError(f"{images.source}: {len(features_ND)} images, expected two or more with finite features")
        found[blur] = features_ND, np.concatenate(logits[blur]) if logits[blur] else None
    return found


@dataclass(frozen=True)
class Captioned:
    """CLIP's features of images, unit vectors on its device, and their captions."""

    images_ND: Tensor
    captions: list[str]


def captioned(clip: Clip, images: ImageSet, *, batch: int = 32) -> Captioned:
    """Compute CLIP's features of captioned images. Raises DataError for an image without a caption."""
    parts, captions = [], []
    with progress(what="CLIP features", unit="image") as bar:
        for entries in _batches(images, batch):
            for entry in entries:
                if entry.caption is None:
                    raise DataError(f"{images.source}: image {entry.key} has no caption; CLIP needs one per image")
                captions.append(entry.caption)
            parts.append(clip.image_features([decode(entry) for entry in entries]))
            bar.update(len(entries))
    return Captioned(torch.cat(parts), captions)


def _text_features(clip: Clip, captions: Sequence[str], batch: int) -> Tensor:
    return torch.cat([clip.text_features(captions[n : n + batch]) for n in range(0, len(captions), batch)])


def clip_score(clip: Clip, samples: Captioned, *, batch: int = 32, seed: int = 0) -> dict[str, Any]:
    """CLIP score: mean of 100 x cosine similarity between image and caption, with a 95 % interval.

    The interval resamples captions: images of one caption are not independent.
    """
    texts_ND = _text_features(clip, samples.captions, batch)
    scores_N = 100 * (samples.images_ND * texts_ND).sum(1).double().cpu().numpy()
    low, high = mean_interval(scores_N, caption_classes(samples.captions, samples.captions), seed=seed)
    about = {"clip_fingerprint": clip.fingerprint, "clip_n": len(scores_N)}
    return {"clip_score": float(scores_N.mean()), "clip_score_low": low, "clip_score_high": high, **about}


def retrieval(
    clip: Clip, sets: Mapping[str, Captioned], among: int, alike: str | None, *, batch: int = 32, seed: int = 0
) -> dict[str, Any]:
    """Whether CLIP finds each image's own caption among others that are drawn from all sets. See `caption_retrieval`.

    Raises:
        DataError: too few captions.
    """
    pool = sorted({caption for found in sets.values() for caption in found.captions})
    texts_PD = _text_features(clip, pool, batch).cpu().numpy()
    scores = {
        f"retrieval_{name}": score_among(found.images_ND.cpu().numpy(), found.captions, texts_PD, pool, among, alike, seed=seed)
        for name, found in sets.items()
    }
    return {"among": among, "chance": 1 / among, **scores}


def _open_reference(
    sources: Sequence[str], limit: int | None, validation_fraction: float | None, with_overlap: bool
) -> ImageSet | list[Statistics] | None:
    files = [Statistics.load(Path(source)) for source in sources if source.endswith(".npz")]
    if len(sources) > 1 and len(files) < len(sources):
        raise ConfigError(f"references {', '.join(sources)}: expected one set of images, or .npz files of statistics")
    if files or not sources:
        return files or None
    return open_images(sources[0], limit=limit, validation_fraction=validation_fraction, with_overlap=with_overlap)


class _Reference:
    """Statistics of the real images at each blur radius: read from .npz files or from the cache, or extracted."""

    def __init__(
        self,
        source: ImageSet | list[Statistics] | None,
        extractor: Extractor,
        size: int,
        radii: Sequence[float],
        cache: Path | None,
        batch: int,
    ) -> None:
        self.extractor, self.size, self.cache, self.batch = extractor, size, cache, batch
        self.files = source if isinstance(source, list) else []
        self.images = source if isinstance(source, ImageSet) else None
        for blur in radii if self.files else ():  # fail before hours of extraction
            self._of_files(self.measure(blur))

    def measure(self, blur: float) -> Measure:
        return Measure(self.extractor.name, self.extractor.fingerprint, self.size, blur)

    def at(self, radii: Sequence[float]) -> dict[float, Statistics]:
        """The statistics at each radius, if there is a reference. The images are read once for all radii that need them."""
        if self.files:
            return {blur: self._of_files(self.measure(blur)) for blur in radii}
        if self.images is None:
            return {}
        paths = {blur: cache_path(self.cache, self.measure(blur), self.images.fingerprint) for blur in radii if self.cache}
        found = {}
        for blur, path in paths.items():
            if path.exists():
                found[blur] = Statistics.load(path)
                require_comparable(self.measure(blur), found[blur].measure, path)
                log.info("statistics of %s read from %s", self.images.source, path)
        missing = [blur for blur in radii if blur not in found]
        for blur, (features_ND, _) in (
            extract(self.extractor, self.images, self.size, missing, batch=self.batch).items() if missing else ()
        ):
            found[blur] = Statistics(self.measure(blur), self.images.source, self.images.fingerprint, moments(features_ND))
            if blur in paths:
                found[blur].save(paths[blur])
        return found

    def _of_files(self, measure: Measure) -> Statistics:
        nearest = next((statistics for statistics in self.files if statistics.measure.blur == measure.blur), self.files[0])
        require_comparable(measure, nearest.measure, nearest.source)
        return nearest


def _scores(
    features_ND: np.ndarray, logits_NK: np.ndarray | None, reference: Statistics | None, *, n_resamples: int, seed: int
) -> dict[str, Any]:
    """The scores of the samples at one radius."""
    n, n_features = features_ND.shape
    row: dict[str, Any] = {"n": n}
    if reference is not None:
        fewest = min(n, reference.moments.n)
        if fewest < n_features:
            log.warning(
                "%d images for %d features: the FID is biased far upwards, compare it only at equal numbers of images",
                fewest,
                n_features,
            )
        fid = frechet_distance(moments(features_ND), reference.moments)
        low, high = fid_interval(features_ND, reference.moments, fid, n_resamples=n_resamples, seed=seed)
        row |= {"n_reference": reference.moments.n, "reference_fingerprint": reference.images}
        row |= {"fid": fid, "fid_low": low, "fid_high": high}
    if logits_NK is not None and n < 2 * IS_SPLITS:
        log.warning("no Inception Score: %d images, expected %d or more", n, 2 * IS_SPLITS)
    elif logits_NK is not None:
        score = inception_score(logits_NK, n_splits=IS_SPLITS, seed=seed)
        row |= {"inception_score": score.score, "inception_score_std": score.std}
        row |= {"inception_score_low": score.low, "inception_score_high": score.high}
    return row


def _batches(entries: ImageSet, size: int) -> Iterator[list[Entry]]:
    iterator = iter(entries)
    while batch := list(islice(iterator, size)):
        yield batch


def _draw_chart(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    names = {"fid": "FID (lower is better)", "inception_score": "Inception Score (higher is better)"}
    shown = [key for key in names if key in rows[0]]
    figure = new_figure(5.2 * len(shown), 4.2)
    figure.suptitle(title)
    for axes, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        values, low, high = (np.array([row[name] for row in rows]) for name in (key, f"{key}_low", f"{key}_high"))
        axes.errorbar([row["blur"] for row in rows], values, np.abs([values - low, high - values]), marker=".", capsize=3)
        axes.set(xlabel="blur radius, pixels", ylabel=names[key])
        axes.grid(alpha=0.25)
    figure.savefig(path)
