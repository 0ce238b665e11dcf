"""Fetch: download a folder of real captioned images for the demo, from the first available source."""

import json
import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from dalle_ds.console import Outcome, progress
from dalle_ds.errors import DataError
from preprocessing.configs import FetchConfig
from preprocessing.demo.scene_set import N_SCENES, write_scenes
from preprocessing.demo.sources import SOURCES, Source, SourceUnavailable, source_named, write_source

log = logging.getLogger(__name__)


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
    if config.source == "scenes":
        _fetch_scenes(out, config)
        return _outcome(out, json.loads((out / "source.json").read_text()), started)
    sources = SOURCES if config.source == "auto" else (source_named(config.source),)
    failures = []
    for source in sources:
        try:
            _fetch(source, out, config.limit)
            return _outcome(out, json.loads((out / "source.json").read_text()), started)
        except SourceUnavailable as error:
            failures.append(f"{source.name}: {error}")
            log.warning("source %s is not available: %s", source.name, error)
    raise DataError("no images could be fetched:\n  " + "\n  ".join(failures))


def _fetch(source: Source, out: Path, limit: int | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.part-", dir=out.parent) as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        write_source(source, folder, limit, partial(progress, what=f"fetch {source.name}", unit="image"))
        folder.rename(out)  # `out` is absent or empty; the rename fails if another process has filled it meanwhile


def _fetch_scenes(out: Path, config: FetchConfig) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.part-", dir=out.parent) as scratch:
        folder = Path(scratch) / "scenes"
        folder.mkdir()
        record = write_scenes(folder, config.limit or N_SCENES, config.scenes, partial(progress, what="scenes", unit="scene"))
        record = {"source": "scenes", **record, "limit": config.limit}
        (folder / "source.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        folder.rename(out)  # as in _fetch


def _already_there(out: Path, config: FetchConfig) -> dict[str, Any] | None:
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        record = json.loads((out / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(
            f"{out}: not empty and not created by fetch (no source.json); choose another `fetch.out`. "
            "To use your own images, set `ingest.images` to their folder"
        ) from None
    if config.source not in ("auto", record["source"]) or config.limit != record["limit"]:
        raise DataError(
            f"{out}: contains {record['source']} images (limit {record['limit']}), expected {config.source} "
            f"(limit {config.limit}); choose another `fetch.out`"
        )
    if config.source == "scenes" and record["scenes"] != config.scenes.model_dump():
        raise DataError(
            f"{out}: contains scenes of {record['scenes']}, expected {config.scenes.model_dump()}; choose another `fetch.out`"
        )
    return record


def _outcome(out: Path, record: dict[str, Any], started: float) -> Outcome:
    return Outcome({"out": str(out), **record, "seconds": time.monotonic() - started})
