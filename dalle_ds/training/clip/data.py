"""Batches of images and captions for CLIP. A batch is a function of seed and update, so checkpoints store no data position."""

# B batch, S samples, H and W pixels, C channels

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from dalle_ds.data.images import ImageProblem, decode_image, prior_crop, seed_of
from dalle_ds.data.raw import RawSample, load_images
from dalle_ds.errors import DataError
from dalle_ds.storage.hashing import hash_to_integer
from dalle_ds.training.clip.config import ClipDataConfig

KEPT_SCALE = 2
"""Images are kept in memory at this multiple of the model's image size: crops are resized to the model's image size, so the
detail of larger images would be lost anyway."""


class Captioned(NamedTuple):
    """A decoded image, shrunk to `KEPT_SCALE` times the model's image size, with its caption."""

    key: str
    group: str
    caption: str
    pixels_HWC: np.ndarray


class CaptionedBatch(NamedTuple):
    images_BHWC: np.ndarray  # uint8
    captions: list[str]


def read_split(data: ClipDataConfig, split: str, image_size: int) -> list[Captioned]:
    """Load all usable images of a split into memory; from the training split, only those of the fold.

    Raises:
        DataError: no image is usable, or the shards hold more than 8 GiB.
    """
    samples = load_images(data.raw, split, data.validation_fraction)
    if split == "train":
        samples = [sample for sample in samples if _fold_of(sample.group, data.folds) == data.fold]
    with ThreadPoolExecutor(os.cpu_count(), "clip-decode") as pool:  # Pillow releases the GIL
        found = list(pool.map(lambda sample: _decoded(sample, image_size), samples))
    usable = [sample for sample in found if sample is not None]
    if not usable:
        raise DataError(
            f"{data.raw}: no usable image in the {split} split (fold {data.fold} of {data.folds}, validation_fraction "
            f"{data.validation_fraction}); images must be at least {image_size} pixels wide and high"
        )
    return usable


def one_of_each_group(samples: Sequence[Captioned]) -> list[Captioned]:
    """Keep the first image of every group and, among these, one for every caption. Each image then has exactly one match."""
    first = {sample.group: sample for sample in reversed(samples)}
    return list({sample.caption.lower(): sample for sample in first.values()}.values())


def crops(samples: Sequence[Captioned], image_size: int) -> np.ndarray:
    """Crop each image as for the prior's data. Returns uint8 (S, H, W, C)."""
    return np.stack([prior_crop(sample.pixels_HWC, image_size, seed_of(sample.key)) for sample in samples])


def batches(
    samples: Sequence[Captioned], global_batch: int, image_size: int, seed: int, start: int
) -> Iterator[CaptionedBatch]:
    """Iterate over the batches of the updates from `start` on, without end.

    An epoch takes one image of every group, so that no batch holds two images of a group. Each image has its own random crop.

    Raises:
        DataError: there are fewer groups than `global_batch`.
    """
    groups: dict[str, list[Captioned]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    members = list(groups.values())
    per_epoch = len(members) // global_batch
    if per_epoch == 0:
        raise DataError(f"{len(members)} groups of images, expected at least global_batch {global_batch}")
    update = start
    while True:
        epoch, step = divmod(update, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(members))
        rng = np.random.default_rng((seed, epoch, step))
        chosen = []
        for group in order[step * global_batch : (step + 1) * global_batch]:
            chosen.append(members[group][rng.integers(len(members[group]))])
        images = [prior_crop(sample.pixels_HWC, image_size, int(rng.integers(2**63))) for sample in chosen]
        yield CaptionedBatch(np.stack(images), [sample.caption for sample in chosen])
        update += 1


def _decoded(sample: RawSample, image_size: int) -> Captioned | None:
    try:
        image = decode_image(sample.image)
    except ImageProblem:
        return None
    if min(image.size) < image_size:
        return None
    factor = KEPT_SCALE * image_size / min(image.size)
    if factor < 1:
        size = (round(image.width * factor), round(image.height * factor))
        image = image.resize(size, Image.Resampling.BOX)
    return Captioned(sample.key, sample.group, sample.caption, np.asarray(image))


def _fold_of(group: str, folds: int) -> int:
    return hash_to_integer(f"fold:{group}") % folds
