"""Image prompts: every sample starts with the top rows of a given image, as in the paper's image-to-image (figure 2d)."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dalle_ds.data.images import MAX_PIXELS, ImageProblem, decode_image, prior_crop, seed_of
from dalle_ds.data.raw.sample import MAX_MEMBER_BYTES
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.sampling.export import Export
from dalle_ds.storage.bounded import read_bounded
from dalle_ds.storage.samples_record import PromptRecord

log = logging.getLogger(__name__)

MAX_ASPECT = 2
"""Longer side / shorter side, above which a warning says what the crop of an image prompt leaves."""
PAPER_SHARE = 15 / 32
"""Fraction of the rows of the token grid that the paper's image-to-image keeps."""


@dataclass(frozen=True)
class ImagePrompt:
    """A cropped image, its codes, and the number of rows of codes that are kept."""

    image: Image.Image
    """Square crop in the dVAE's size."""
    codes_N: Tensor
    rows: int
    sha256: str
    """SHA-256 of the image file."""

    @property
    def prime_codes_P(self) -> Tensor:
        """The kept codes."""
        grid = round(len(self.codes_N) ** 0.5)
        return self.codes_N[: self.rows * grid]


def make_image_prompt(export: Export, data: bytes, rows: int | None = None, *, max_pixels: int = MAX_PIXELS) -> ImagePrompt:
    """Crop an image file as in the training data, and encode it.

    Args:
        data: bytes of the image file.
        max_pixels: pixels of a larger image are not decoded.
        rows: rows of codes to keep from the top, 0 to grid - 1. If None, the paper's fraction: 15 of 32.

    Raises:
        ConfigError: `rows` out of range.
        DataError: not an image, smaller than the model's images, or larger than `max_pixels`.
    """
    config = export.dvae.config
    rows = round(PAPER_SHARE * config.grid) if rows is None else rows
    if not 0 <= rows < config.grid:
        raise ConfigError(f"rows {rows}: expected 0 to {config.grid - 1}, because the token grid has {config.grid} rows")
    digest = hashlib.sha256(data).hexdigest()
    try:
        image = decode_image(data, max_pixels=max_pixels)
        crop_HWC = prior_crop(image, config.image_size, seed_of(digest))
    except ImageProblem as problem:
        raise DataError(
            f"the image prompt is {problem.reason}: expected an image file of {config.image_size} pixels a side or more and of "
            f"{max_pixels / 1e6:g} megapixels or less"
        ) from None
    if max(image.size) > MAX_ASPECT * min(image.size):
        log.warning("the image prompt has %d x %d pixels: most of it lies outside its square crop", *image.size)
    with torch.inference_mode():
        image_BCHW = torch.from_numpy(crop_HWC).permute(2, 0, 1)[None].to(export.device)
        codes_N = export.dvae.tokens(image_BCHW)[0].cpu()
    return ImagePrompt(Image.fromarray(crop_HWC), codes_N, rows, digest)


def repeat_image_prompt(export: Export, entry: PromptRecord, file: Path) -> ImagePrompt:
    """The image prompt of a record of samples, from the crop in `file`. Raises DataError if it does not fit the export."""
    config = export.dvae.config
    n_codes, grid, side = config.n_codes, config.grid, config.image_size
    if len(entry.codes) != grid**2 or max(entry.codes) >= n_codes or entry.rows >= grid:
        found = f"{len(entry.codes)} codes, the largest {max(entry.codes, default=None)}, of which {entry.rows} rows are kept"
        raise DataError(f"{file}: its record has {found}; expected {grid**2} codes below {n_codes} and fewer than {grid} rows")
    try:
        image = decode_image(read_bounded(file, MAX_MEMBER_BYTES), max_pixels=side**2)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    except ImageProblem as problem:
        raise DataError(f"{file} is {problem.reason}: expected the crop of an image prompt, {side} x {side} pixels") from None
    if image.size != (side, side):
        raise DataError(f"{file} has {image.width} x {image.height} pixels, expected {side} x {side}")
    return ImagePrompt(image, torch.tensor(entry.codes), entry.rows, entry.sha256)


def read_image_prompt(export: Export, file: Path, rows: int | None = None) -> ImagePrompt:
    """`make_image_prompt` of a file. Raises ConfigError and DataError as there; a DataError names the file."""
    try:
        return make_image_prompt(export, read_bounded(file, MAX_MEMBER_BYTES), rows)
    except OSError as error:
        raise DataError(f"image {file} cannot be read: {error.strerror or error}") from None
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
