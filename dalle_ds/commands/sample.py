"""`dalle-ds sample`: sample images for captions, in one process or on all ranks of a launcher."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dalle_ds.commands.settings import SampleConfig
from dalle_ds.data.images import decode_image
from dalle_ds.ops.devices import resolve_device
from dalle_ds.parallel.failure_detection import RankWatch
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.pretrained.clip import find_clip
from dalle_ds.sampling.captions import SampleSource
from dalle_ds.sampling.export import Export, load_export
from dalle_ds.sampling.folder import GRID, SampleFolder
from dalle_ds.sampling.image_prompt import read_image_prompt
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.sampler import RowsDecoded
from dalle_ds.sampling.scorer import load_scorer
from dalle_ds.sampling.settings import SampleOptionsConfig
from dalle_ds.storage.names import SAMPLES_FILE
from dalle_ds.storage.samples_record import read_samples_record
from dalle_ds.tracking.export_run import track
from dalle_ds.training.folder_lock import RunLock
from dalle_ds.training.preemption import EXIT_STOPPED, StopFlag

log = logging.getLogger(__name__)

_FORMATS = {"fp32": None, "fp16": use_fp16_branches}
WAIT_SECONDS = 86_400.0  # collective timeout: ranks draw equally many batches, but hosts may differ in speed


def sample_export(
    url: str,
    out: Path,
    options: SampleOptionsConfig,
    source: SampleSource,
    *,
    clip: str | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Sample images into `out`, or resume an unfinished `out`. Writes the files of `SampleFolder.run`.

    The batches are distributed over the ranks, and `out` must be shared by them. Each rank holds the whole model. The images do
    not depend on the number of ranks. Returns the summary on every rank.

    Args:
        url: export folder, a path or s3:// url.
        options: where one is not set, the value that the export is meant for.
        clip: folder or hub name of the CLIP that scores the images.
        dtype: format of the prior's residual branches, "fp32" or "fp16".

    Raises:
        UserError: invalid input.
        RankLost: another rank died.
        SystemExit: code 143, the process was asked to stop.
    """
    source.check()
    device = str(resolve_device(device)) if ranks.world_size == 1 else str(ranks.device)
    with StopFlag() as stop, RankWatch(ranks, WAIT_SECONDS):
        if ranks.is_main:
            source.read_texts()
            if clip is not None:
                find_clip(clip)
        export = load_export(url, device, _FORMATS[dtype], ranks)
        settings = options.for_prior(export.record.sampling)
        scorer = None if clip is None else load_scorer(clip, device, ranks)
        captions, real_codes_CN, about = ranks.once(lambda: source.read(export, settings.seed))
        prompt = read_image_prompt(export, source.image_prompt, source.prompt_rows) if source.image_prompt else None
        request = Request(tuple(captions), settings, prompt)
        folder = SampleFolder(export, request, out, scorer, real_codes_CN=real_codes_CN, about=about)

        def end_if_asked(_: RowsDecoded) -> None:
            if stop.requested:
                log.info("asked to stop (%s); run the same command again to resume %s", stop.reason, out)
                raise SystemExit(EXIT_STOPPED)

        # only the main rank takes the lock: it would shut out the other ranks of this job
        with RunLock(out) if ranks.is_main else nullcontext():
            is_tracked = ranks.is_main and not (out / SAMPLES_FILE).exists()  # once, by the process that finishes the folder
            record = folder.run(ranks, on_rows=end_if_asked)
            summary = None if record is None else _sample_summary(export, record, out, is_tracked=is_tracked)
            return ranks.from_main(summary)  # not the record, which may have millions of scores


def repeat_export(url: str, record_file: Path, out: Path, *, device: str = "auto") -> dict[str, Any]:
    """Sample the images of a samples.json again, bit for bit. Returns the summary."""
    dtype = read_samples_record(record_file).dtype or "fp32"
    export = load_export(url, str(resolve_device(device)), _FORMATS[dtype])
    return _sample_summary(export, SampleFolder.repeating(export, record_file, out).run(), out, is_tracked=False)


def _sample_summary(export: Export, record: dict[str, Any], out: Path, *, is_tracked: bool = True) -> dict[str, Any]:
    if is_tracked:
        images, files = {"samples": decode_image((out / GRID).read_bytes())}, [out / SAMPLES_FILE]
        is_tracked = track(export.url, export.record, out, {}, images, files, "samples")
    return {
        "out": str(out),
        "grid": str(out / GRID),
        "record": str(out / SAMPLES_FILE),
        "images": len(record["images"]),
        "captions": len(record["captions"]),
        "temperature": record["settings"]["temperature"],
        "guidance": record["settings"]["guidance"],
        "export_fingerprint": record["export_fingerprint"],
        "tracked": is_tracked,
    }


def run(config: SampleConfig, ranks: Ranks) -> dict[str, Any]:
    if config.repeat is not None:
        return repeat_export(config.export, config.repeat, config.out, device=config.device)
    source = SampleSource(
        config.caption, config.captions, config.validation, config.data, config.image_prompt, config.prompt_rows
    )
    return sample_export(
        config.export, config.out, config, source, clip=config.clip, device=config.device, dtype=config.dtype, ranks=ranks
    )
