"""Show an export: sample or evaluate it, and put the outcome into the MLflow run that it came from."""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle_ds.console import progress
from dalle_ds.errors import ConfigError
from dalle_ds.evaluation.caption_gap import caption_classes, derangement, gap_of_file, position_map, save_losses
from dalle_ds.ops.devices import default_device
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.parallel.watch import RankWatch
from dalle_ds.sampling.export import Export, load_export
from dalle_ds.sampling.folder import GRID, RECORD, SampleFolder, captions_of, read_captions, repeat
from dalle_ds.sampling.given import read_picture
from dalle_ds.sampling.held_out import choose_held_out, read_held_out
from dalle_ds.sampling.likelihood import image_losses
from dalle_ds.sampling.sampler import Request, Rows, SampleSettings, Unit
from dalle_ds.sampling.scorer import load_scorer
from dalle_ds.training.charts import position_heatmap
from dalle_ds.training.lifetime import EXIT_STOPPED, RunLock, StopFlag
from dalle_ds.training.registry import run_of_export
from dalle_ds.training.tracking import NullTracker, Tracker

log = logging.getLogger(__name__)

TRACKING_FOLDER = ".tracking"  # below the output folder: the spool, should MLflow be away
EVALUATION, LOSSES = "evaluate.json", "losses.npz"
STDIN = Path("-")
WAIT_SECONDS = 86_400.0  # of ranks for the others: their shares are equal, but their hosts may not be
ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class SampleSource:
    """Where captions come from, exactly one of the first three (none will do for a given picture); and the given picture."""

    captions: Sequence[str] = ()
    captions_file: Path | None = None
    """`STDIN` reads standard input."""
    n_held_out: int = 0
    data_url: str | None = None
    image: Path | None = None
    rows: int | None = None

    def check(self) -> None:
        """Raises ConfigError."""
        n_sources = sum((bool(self.captions), self.captions_file is not None, self.n_held_out > 0))
        if n_sources > 1 or (n_sources == 0 and self.image is None):
            raise ConfigError("captions come from exactly one of --caption, --captions and --held-out")
        if self.rows is not None and self.image is None:
            raise ConfigError(f"--rows {self.rows} says how much of a picture is kept: give it by --image")

    def read(self, export: Export, seed: int) -> tuple[list[str], Tensor | None, dict[str, Any]]:
        """Captions, codes of their real pictures where there are some, and what the record says about them."""
        if self.n_held_out:
            held_out = choose_held_out(export, self.n_held_out, data_url=self.data_url, seed=seed)
            return held_out.captions, held_out.image_SN, {"held_out_keys": held_out.keys}
        if self.captions_file == STDIN:
            return captions_of(sys.stdin.read(), "standard input"), None, {}
        if self.captions_file is not None:
            return read_captions(self.captions_file), None, {}
        return list(self.captions) or [""], None, {}


def sample_export(
    url: str,
    out: Path,
    settings: SampleSettings,
    source: SampleSource,
    *,
    clip: str | None = None,
    device: str = "auto",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Draw pictures into `out`, or go on with it; files as `sampling.folder.sample`. Returns the summary, on every rank.

    Ranks share the batches out and meet in `out`: their pictures are those of one rank. Each holds the whole model.

    Args:
        clip: folder or hub name of the CLIP that scores.

    Raises:
        UserError: what cannot be sampled. RankLost: another rank died. SystemExit(143): asked to stop.
    """
    source.check()
    device = choose_device(device) if ranks.world_size == 1 else str(ranks.device)
    with StopFlag() as stop, RankWatch(ranks, WAIT_SECONDS):
        export = load_export(url, device)
        scorer = None if clip is None else load_scorer(clip, device)
        captions, real_codes_CN, about = ranks.from_main(source.read(export, settings.seed) if ranks.is_main else None)
        given = None if source.image is None else read_picture(export, source.image, source.rows)
        request = Request(tuple(captions), settings, given)
        folder = SampleFolder(export, request, out, scorer, real_codes_CN=real_codes_CN, about=about)

        def end_if_asked(_: Rows) -> None:
            if stop.requested:
                log.info("asked to stop (%s); the same command goes on with %s", stop.reason, out)
                raise SystemExit(EXIT_STOPPED)

        # only the main rank holds the lock: the others are its own
        with RunLock(out) if ranks.is_main else nullcontext():
            # it looks what is left to do before any rank adds to it
            found, todo = ranks.from_main(_what_is_left(folder) if ranks.is_main else None)
            if found is None:
                folder.draw(todo[ranks.rank :: ranks.world_size], on_rows=end_if_asked, shown=ranks.is_main)
                ranks.gather_objects(None)  # all batches are there
            finished = found or ranks.from_main(folder.finish() if ranks.is_main else None)
    is_tracked = found is None and ranks.is_main
    return _sample_summary(export, finished, out, is_tracked=is_tracked)


def _what_is_left(folder: SampleFolder) -> tuple[dict[str, Any] | None, list[Unit]]:
    finished = folder.finished()
    return finished, [] if finished else folder.missing()


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
        "data": data_url or " + ".join(export.data_urls),
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
    is_tracked = track(export.url, export.info, out, metrics, charts, [out / EVALUATION], "evaluation")
    return {"export": url, "out": str(out), **gap.to_dict(), "right_captions_win": gap.gap_low > 0, "tracked": is_tracked}


def choose_device(name: str) -> str:
    """ "auto" takes the first GPU where there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return default_device()
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def tracker_of(url: str, info: dict[str, Any], out: Path) -> NullTracker:
    """A tracker that adds to the own MLflow run of an export; one that keeps nothing where its config.json names no run."""
    uri, run_id = run_of_export(info)
    if uri is None or run_id is None:
        log.info("export %s names no MLflow run: nothing is tracked", url)
        return NullTracker()
    return Tracker.attach(out / TRACKING_FOLDER, uri=uri, run_id=run_id)


def track(
    url: str,
    info: dict[str, Any],
    out: Path,
    metrics: dict[str, float],
    pictures: dict[str, Image.Image],
    files: Sequence[Path],
    folder: str,
) -> bool:
    """Add to the run of the export at `url`, whose config.json is `info` -> whether it is there."""
    tracker, step = tracker_of(url, info, out), int(info.get("update") or 0)
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
            is_tracked = track(export.url, export.info, out, {}, {"samples": grid.convert("RGB")}, [out / RECORD], "samples")
    return {
        "out": str(out),
        "grid": str(out / GRID),
        "record": str(out / RECORD),
        "pictures": len(record["images"]),
        "captions": len(record["captions"]),
        "export_fingerprint": record["export_fingerprint"],
        "tracked": is_tracked,
    }
