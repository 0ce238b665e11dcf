"""Image batches for the dVAE: an endless stream, determined by seed and cursors, prefetched by a thread."""

# B images of this rank's parts of a batch, C channels, H and W pixels

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalle_ds.data.images import ImageProblem, decode_image, prior_crop, seed_of
from dalle_ds.data.raw.decoded_batches import DecodedBatch, DecodedBatches
from dalle_ds.data.raw.sample import RawSample
from dalle_ds.data.raw.shards import RawShard, split_of
from dalle_ds.data.raw.streams import Cursors, Reading
from dalle_ds.data.tokens.prefetch import Prefetch
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.training.dvae.augmentation import Augmentation
from dalle_ds.training.dvae.config import DVAERunConfig
from dalle_ds.training.validation_set import validation_set


class ImageBatch(NamedTuple):
    images_BCHW: Tensor  # uint8
    cursors: Cursors
    n_unusable: int  # unusable images since this process began the stream; the sum over ranks counts each image once


def reading_of(recipe: DVAERunConfig, shards: Sequence[RawShard]) -> Reading:
    """The order in which a run reads its images."""
    data, augmentation = recipe.data, _augmentation(recipe)

    def problem_of(sample: RawSample) -> str | None:
        try:
            augmentation.crop(augmentation.decode(sample.image), (0,))
        except ImageProblem as problem:
            return problem.reason
        return None

    return Reading(
        shards=shards,
        n_parts=recipe.n_parts,
        part_size=recipe.part_size,
        window_bytes=data.window_mb * 2**20,
        seed=recipe.seed,
        keeps=lambda sample: split_of(sample.group, data.validation_fraction) == "train",
        problem_of=problem_of,
    )


def _augmentation(recipe: DVAERunConfig) -> Augmentation:
    return Augmentation(recipe.model.image_size, recipe.data.min_zoom, recipe.data.max_zoom)


class ImageStream:
    """Iterates over the training batches of some parts. `close()` ends its threads and processes.

    Args:
        cursors: of all parts, from a checkpoint. None: a new run.
    """

    def __init__(self, recipe: DVAERunConfig, reading: Reading, parts: range, cursors: Cursors | None = None) -> None:
        data = recipe.data
        order = reading.start(parts, cursors)
        self.cursors = order.cursors
        """Of these parts, before the first batch."""
        self._decoded = DecodedBatches(
            order,
            _augmentation(recipe),
            n_processes=data.decoders,
            n_ahead=data.prefetch,
            decoded_bytes=data.decoded_mb * 2**20 if reading.is_whole else 0,
        )
        self._batches = Prefetch(map(_batch, self._decoded), data.prefetch, "dvae-images")

    def __iter__(self) -> Iterator[ImageBatch]:
        return self

    def __next__(self) -> ImageBatch:
        return next(self._batches)

    @property
    def wait_seconds(self) -> float:
        """Total time that training has waited for images."""
        return self._batches.wait_seconds

    def close(self) -> None:
        """Stop making batches."""
        self._decoded.close()
        self._batches.close()


def _batch(decoded: DecodedBatch) -> ImageBatch:
    images_BCHW = torch.from_numpy(decoded.pixels_SHWC).permute(0, 3, 1, 2)
    return ImageBatch(images_BCHW, decoded.cursors, decoded.n_unusable)


def validation_images(recipe: DVAERunConfig, shards: Sequence[RawShard], folder: Path, ranks: Ranks = ALONE) -> Tensor:
    """Validation images (B, C, H, W) uint8, with the same crop as for the prior; at most `validation.samples` of them.

    All ranks must call it together. The images are kept in `folder`, see `validation_set`.

    Raises:
        DataError: no image is usable.
    """
    size = recipe.model.image_size

    def pixels_of(sample: RawSample) -> np.ndarray | None:
        try:
            return prior_crop(decode_image(sample.image), size, seed_of(sample.key))
        except ImageProblem:
            return None

    limit, fraction = recipe.validation.samples, recipe.data.validation_fraction
    found = validation_set(folder, shards, pixels_of, limit=limit, validation_fraction=fraction, image_size=size, ranks=ranks)
    return found.images_SHWC.permute(0, 3, 1, 2)
