"""Training scenes as WebDataset tars, with the captions of their evaluation: what `fetch.source=scenes` writes."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from dalle_ds.errors import DataError
from dalle_ds.scenes.mixture import evaluation_captions, training_scene
from dalle_ds.scenes.png import png_of
from dalle_ds.scenes.render import render
from preprocessing.configs import SceneDrawingConfig
from preprocessing.executors.local import n_cores, run_shards

N_SCENES: Final = 20_000
SCENES_PER_TAR: Final = 1024  # ingest makes each tar one shard: small, so that every core has work
CAPTIONS_FILE: Final = "evaluation_captions.txt"
CREDIT: Final = {
    "title": "Scenes of coloured shapes, drawn by this program",
    "licence": "MIT",
    "package": "dalle_ds.scenes",
    "checksum": "none",
    "captions": "of the program",
}


@dataclass(frozen=True)
class DrawJob:
    """Draws tars, each given as the indices of its scenes."""

    folder: Path
    config: SceneDrawingConfig

    def start(self, n_threads: int) -> Callable[[range], None]:
        return partial(_write_tar, self.folder, self.config)


def write_scenes(folder: Path, n_scenes: int, config: SceneDrawingConfig) -> dict[str, Any]:
    """Put `n_scenes` training scenes as tars, and the captions of the evaluation one a line, into an empty folder.

    Each scene is a PNG and a JSON with caption and group. Scenes that mean the same have one group, so that they lie on one
    side of the split. All cores draw. Returns what source.json says about the scenes.

    Raises:
        DataError: a tar cannot be written.
    """
    captions = evaluation_captions(config.evaluation_captions)
    (folder / CAPTIONS_FILE).write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    tars = [range(first, min(first + SCENES_PER_TAR, n_scenes)) for first in range(0, n_scenes, SCENES_PER_TAR)]
    job = DrawJob(folder, config)
    _, failures = run_shards(job, tars, n_workers=n_cores(), name=_name, size=len, what="scenes", unit="scene")
    if failures:
        name, reason = next(iter(failures.items()))
        raise DataError(f"{len(failures)} of {len(tars)} tars of scenes could not be written, such as {name}: {reason}")
    return {**CREDIT, "n_images": n_scenes, "n_captions": n_scenes, "scenes": config.model_dump()}


def _write_tar(folder: Path, config: SceneDrawingConfig, indices: range) -> None:
    with tarfile.open(folder / _name(indices), "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            _add(tar, index, config)


def _name(indices: range) -> str:
    return f"scenes-{indices.start:08d}.tar"


def _add(tar: tarfile.TarFile, index: int, config: SceneDrawingConfig) -> None:
    drawn = training_scene(config.seed, index, textured=config.textured, n_grounds=config.n_grounds)
    image = png_of(render(drawn.scene, config.image_size))
    record = json.dumps({"caption": drawn.caption, "group": drawn.meaning.key}).encode()
    for extension, data in (("png", image), ("json", record)):
        member = tarfile.TarInfo(f"scene{index:08d}.{extension}")  # time and owner stay 0: equal scenes give equal bytes
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
