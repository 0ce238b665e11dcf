"""Fetch: download a folder of real captioned images for the demo, from the first available source."""

import json
import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dalle_ds.console import Outcome, progress
from dalle_ds.errors import DataError
from dalle_ds.storage.bounded import read_bounded
from dalle_ds.storage.text import parse_json
from preprocessing.configs import FetchConfig
from preprocessing.demo.downloads import SourceUnavailable
from preprocessing.demo.families import settings_of_families, write_families
from preprocessing.demo.scene_set import N_SCENES, write_scenes
from preprocessing.demo.sources import SOURCES, Source, write_source

log = logging.getLogger(__name__)

Write = Callable[[Path, Path], dict[str, Any]]  # (empty folder for the images, folder for scratch files) -> source.json


def run(config: FetchConfig) -> Outcome:
    """Create the folder atomically: it is complete or absent.

    Raises:
        DataError: `out` has other content, or no source is available.
    """
    started = time.monotonic()
    out = Path(config.out.removeprefix("file://"))
    record = _already_there(out, config)
    if record is not None:
        log.info("%s: already fetched (%s); nothing to do", out, record["source"])
        return _outcome(out, record, started)
    failures = []
    for name, write in _writers(config).items():
        try:
            _fetch(name, write, out, config.limit)
            return _outcome(out, json.loads((out / "source.json").read_text()), started)
        except SourceUnavailable as error:
            failures.append(f"{name}: {error}")
            log.warning("source %s is not available: %s", name, error)
    raise DataError("no images could be fetched:\n  " + "\n  ".join(failures))


def _writers(config: FetchConfig) -> dict[str, Write]:
    # what fills a folder with images and returns what source.json says, of each source to try
    if config.source == "scenes":
        return {"scenes": lambda folder, _: write_scenes(folder, config.limit or N_SCENES, config.scenes)}
    if config.source == "families":
        return {"families": partial(write_families, config)}
    wanted = [source for source in SOURCES if config.source in ("auto", source.name)]
    return {source.name: partial(_write_source, source, config.limit) for source in wanted}


def _write_source(source: Source, limit: int | None, folder: Path, scratch: Path) -> dict[str, Any]:
    return write_source(source, folder, scratch, limit, partial(progress, what=f"fetch {source.name}", unit="image"))


def _fetch(name: str, write: Write, out: Path, limit: int | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.part-", dir=out.parent) as around:
        folder, scratch = Path(around) / "images", Path(around) / "scratch"
        folder.mkdir()
        scratch.mkdir()
        record = {"source": name, **write(folder, scratch), "limit": limit}
        (folder / "source.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        folder.rename(out)  # `out` is absent or empty; the rename fails if another process has filled it meanwhile


def _already_there(out: Path, config: FetchConfig) -> dict[str, Any] | None:
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        record = parse_json(read_bounded(out / "source.json"))
        there, limit, settings = record["source"], record["limit"], record.get(config.source)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise DataError(
            f"{out}: not empty and not created by fetch (no source.json, or none of fetch); choose another `fetch.out`. "
            "To use your own images, set `ingest.images` to their folder"
        ) from None
    if config.source not in ("auto", there) or config.limit != limit:
        raise DataError(
            f"{out}: contains {there} images (limit {limit}), expected {config.source} "
            f"(limit {config.limit}); choose another `fetch.out`"
        )
    wanted = {"scenes": config.scenes.model_dump(), "families": settings_of_families(config)}.get(config.source)
    if wanted is not None and settings != wanted:
        raise DataError(f"{out}: contains {config.source} of {settings}, expected {wanted}; choose another `fetch.out`")
    return record


def _outcome(out: Path, record: dict[str, Any], started: float) -> Outcome:
    return Outcome({"out": str(out), **record, "seconds": time.monotonic() - started})
