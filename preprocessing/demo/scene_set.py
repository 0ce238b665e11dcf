"""Training scenes as WebDataset tars, with the captions of their evaluation: what `fetch.source=scenes` writes."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Final

from dalle_ds.scenes.mixture import evaluation_captions, training_scene
from dalle_ds.scenes.png import png_of
from dalle_ds.scenes.render import render
from preprocessing.configs import SceneDrawingConfig

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


def write_scenes(
    folder: Path, n_scenes: int, config: SceneDrawingConfig, progress: Callable[[Iterable[int]], Iterable[int]]
) -> dict[str, Any]:
    """Put `n_scenes` training scenes as tars, and the captions of the evaluation one a line, into an empty folder.

    Each scene is a PNG and a JSON with caption and group. Scenes that mean the same have one group, so that they lie on one
    side of the split. Returns what source.json says about them.
    """
    captions = evaluation_captions(config.evaluation_captions)
    (folder / CAPTIONS_FILE).write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    indices = iter(progress(range(n_scenes)))
    for number in range(-(-n_scenes // SCENES_PER_TAR)):
        with tarfile.open(folder / f"scenes-{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in islice(indices, SCENES_PER_TAR):
                _add(tar, index, config)
    return {**CREDIT, "n_images": n_scenes, "n_captions": n_scenes, "scenes": config.model_dump()}


def _add(tar: tarfile.TarFile, index: int, config: SceneDrawingConfig) -> None:
    drawn = training_scene(config.seed, index, textured=config.textured)
    image = png_of(render(drawn.scene, config.image_size))
    record = json.dumps({"caption": drawn.caption, "group": drawn.meaning.key}).encode()
    for extension, data in (("png", image), ("json", record)):
        member = tarfile.TarInfo(f"scene{index:08d}.{extension}")  # time and owner stay 0: equal scenes give equal bytes
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
