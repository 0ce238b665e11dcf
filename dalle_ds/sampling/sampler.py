"""Captions to a folder of pictures that says how to repeat each of them bit for bit."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from dalle_ds.console import progress
from dalle_ds.data.fingerprint import require_same
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.recipes import Config
from dalle_ds.sampling.decode import decode_pictures
from dalle_ds.sampling.export import Export
from dalle_ds.sampling.generate import generate
from dalle_ds.sampling.grid import picture_grid

RECORD, CODES, GRID = "samples.json", "codes.npy", "grid.png"


class SampleSettings(Config):
    """What decides a picture, beside the export and the caption."""

    n: int = Field(4, ge=1, description="candidates for each caption")
    temperature: float = Field(1.0, ge=0, description="the paper's is 1; 0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="0 keeps all tokens, as the paper")
    top_p: float = Field(1.0, gt=0, le=1)
    guidance: float = Field(1.0, ge=0, description="of captions over none; 1 leaves it out, as the paper")
    seed: int = Field(0, ge=0)
    batch: int = Field(32, ge=1, description="pictures at once")


def seed_of(seed: int, caption: str, candidate: int) -> int:
    """The seed of one picture: it depends neither on the other captions nor on how many candidates are drawn."""
    digest = hashlib.sha256(f"{seed}\0{candidate}\0{caption}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample(
    export: Export,
    captions: Sequence[str],
    settings: SampleSettings,
    out: Path,
    *,
    real_codes_CN: Tensor | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Draw `settings.n` pictures for each caption; write PNGs, codes.npy, samples.json and grid.png into `out`.

    Args:
        real_codes_CN: codes of the captions' real pictures; decoded as the first column of the grid.
        about: further entries for samples.json (where captions came from).

    Returns:
        The content of samples.json.
    """
    captions = list(captions)
    if not captions or not all(caption.strip() for caption in captions):
        raise DataError(
            f"{len(captions)} captions, {sum(not caption.strip() for caption in captions)} of them empty: expected some"
        )
    if settings.guidance != 1 and export.caption_dropout == 0:
        raise ConfigError(
            f"guidance {settings.guidance:g} needs a prior that knows pictures without a caption, but {export.url} was trained "
            "with data.caption_dropout 0, expected above 0; sample with guidance 1"
        )
    codes_CKN = _draw(export, captions, settings)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    images = []
    for c, caption in enumerate(captions):
        pictures = decode_pictures(export.dvae, codes_CKN[c])
        rows.append(pictures)
        for k, picture in enumerate(pictures):
            name = f"{c:03d}-{_slug(caption)}-{k:03d}.png"
            picture.save(out / name)
            images.append(
                {"file": name, "caption": caption, "row": c, "candidate": k, "seed": seed_of(settings.seed, caption, k)}
            )
    _sheet(export, rows, captions, settings, real_codes_CN).save(out / GRID)
    np.save(out / CODES, codes_CKN.numpy().astype(np.uint16))
    record = {
        "schema": 1,
        "export": export.url,
        "export_fingerprint": export.fingerprint,
        "dvae": export.info["dvae"],
        "tokenizer": export.info["tokenizer"],
        "settings": settings.model_dump(),
        "captions": captions,
        "codes": CODES,
        "grid": GRID,
        "torch": torch.__version__,
        "device": str(export.device),
        **(about or {}),
        "images": images,
    }
    (out / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    return record


def repeat(export: Export, record_file: Path, out: Path) -> dict[str, Any]:
    """Draw the pictures of a samples.json again, into `out`.

    Raises:
        DataError: not such a file. FingerprintMismatch: `export` is another model.
    """
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        settings, captions = SampleSettings(**record["settings"]), record["captions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record_file} is not a record of samples ({error}); `dalle-ds sample` writes samples.json") from None
    require_same(
        f"prior of export {export.url}", record["export_fingerprint"], export.fingerprint, f"{record_file} is another one's."
    )
    require_same(f"dVAE of export {export.url}", record["dvae"], export.info["dvae"])
    return sample(export, captions, settings, out, about={"repeats": str(record_file)})


def read_captions(path: Path) -> list[str]:
    """One caption a line; empty lines are skipped. Raises DataError where the file can't be read or holds none."""
    try:
        captions = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"captions file {path}: {error}") from None
    captions = [caption for caption in captions if caption]
    if not captions:
        raise DataError(f"captions file {path} holds no caption; expected one a line")
    return captions


def _draw(export: Export, captions: list[str], settings: SampleSettings) -> Tensor:
    """Codes (C, K, N) in batches of at most `settings.batch` pictures: several captions, or a part of one's candidates."""
    n_image, n = export.prior.config.n_image, settings.n
    text_CT = export.text(captions)
    codes_CKN = torch.empty(len(captions), n, n_image, dtype=torch.int64)
    captions_at_once, candidates_at_once = max(1, settings.batch // n), min(n, settings.batch)
    with progress(total=len(captions) * n * n_image, what="sample", unit="token") as bar:
        for c in range(0, len(captions), captions_at_once):
            for k in range(0, n, candidates_at_once):
                rows, columns = slice(c, c + captions_at_once), range(k, min(k + candidates_at_once, n))
                seeds_CK = [[seed_of(settings.seed, caption, candidate) for candidate in columns] for caption in captions[rows]]
                codes_CKN[rows, columns.start : columns.stop] = generate(
                    export.prior,
                    text_CT[rows],
                    seeds_CK,
                    temperature=settings.temperature,
                    top_k=settings.top_k,
                    top_p=settings.top_p,
                    guidance=settings.guidance,
                    on_token=lambda _, codes_BN: bar.update(len(codes_BN)),
                )
    return codes_CKN


def _sheet(
    export: Export, rows: list[list[Image.Image]], captions: list[str], settings: SampleSettings, real_codes_CN: Tensor | None
) -> Image.Image:
    titles: list[str] = []
    if real_codes_CN is not None:
        real = decode_pictures(export.dvae, real_codes_CN)
        rows = [[picture, *row] for picture, row in zip(real, rows, strict=True)]
        titles = ["real, by its codes", *(f"sample {k + 1}" for k in range(settings.n))]
    limits = [f"guidance {settings.guidance:g}"] * (settings.guidance != 1)
    limits += [f"top-k {settings.top_k}"] * (settings.top_k > 0) + [f"top-p {settings.top_p}"] * (settings.top_p < 1)
    title = ", ".join([f"Temperature {settings.temperature:g}", *limits, f"seed {settings.seed}"])
    return picture_grid(rows, captions, title=title, column_titles=titles)


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:40] or "caption"
