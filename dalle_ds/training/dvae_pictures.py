"""Batches of pictures for the dVAE: an endless order, a function of seed and position, made on a thread ahead of the step."""

# B batch, C channels, H and W pixels

import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalle_ds.data.images import ImageProblem, decode_image, dvae_augment, prior_crop, seed_of
from dalle_ds.data.prefetch import Prefetch
from dalle_ds.data.raw import RawSample, RawShard, iterate_pictures, list_raw_shards, read_raw_shard, split_of
from dalle_ds.errors import DataError
from dalle_ds.training.dvae_config import PictureSection

log = logging.getLogger(__name__)


class Position(NamedTuple):
    """Where the next sample is taken: a resumed run goes on there without reading what came before."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


START = Position()


class PictureBatch(NamedTuple):
    images_BCHW: Tensor  # uint8
    next_position: Position
    n_unusable: int  # pictures passed over since the stream began, in this process


class PictureStream:
    """Iterate over training batches; `close()` ends the thread.

    An epoch deals all shards, in a new order, into windows that fit in memory, and shuffles the pictures of each window.
    Where everything fits one window it is read once and stays.
    """

    def __init__(self, data: PictureSection, image_size: int, batch_size: int, seed: int, start: Position = START) -> None:
        self._maker = _BatchMaker(data, image_size, batch_size, seed)
        self._batches = Prefetch(self._maker.batches(start), data.prefetch, "dvae-pictures")

    def __iter__(self) -> Iterator[PictureBatch]:
        return self

    def __next__(self) -> PictureBatch:
        return next(self._batches)

    @property
    def wait_seconds(self) -> float:
        """How long the step has waited for pictures, in all."""
        return self._batches.wait_seconds

    def close(self) -> None:
        """Stop making batches."""
        self._batches.close()


class _BatchMaker:
    def __init__(self, data: PictureSection, image_size: int, batch_size: int, seed: int) -> None:
        self.data, self.image_size, self.batch_size, self.seed = data, image_size, batch_size, seed
        self.shards = list_raw_shards(data.raw)
        self.fits_in_one = sum(shard.bytes for shard in self.shards) <= data.window_mb * 2**20
        self.kept: list[RawSample] | None = None
        self.decoded = _DecodedCache(data.decoded_mb * 2**20 if self.fits_in_one else 0)
        self.unusable: Counter[str] = Counter()

    def batches(self, start: Position) -> Iterator[PictureBatch]:
        images: list[np.ndarray] = []
        for image, position in self._pictures(start):
            images.append(image)
            if len(images) == self.batch_size:
                stacked_BHWC = torch.from_numpy(np.stack(images))
                yield PictureBatch(stacked_BHWC.permute(0, 3, 1, 2), position, self.unusable.total())
                images = []

    def _pictures(self, start: Position) -> Iterator[tuple[np.ndarray, Position]]:
        for epoch in itertools.count(start.epoch):
            n_usable = 0
            for window, shards in enumerate(self._windows(epoch)):
                if (epoch, window) < start[:2]:
                    continue
                samples = self._read(shards)
                order = np.random.default_rng((self.seed, epoch, window)).permutation(len(samples))
                for offset in range(start.offset if (epoch, window) == start[:2] else 0, len(samples)):
                    rng = np.random.default_rng((self.seed, epoch, window, offset))
                    image = self._augmented(samples[order[offset]], rng)
                    if image is not None:
                        n_usable += 1
                        yield image, Position(epoch, window, offset + 1)
            if n_usable == 0 and epoch > start.epoch:
                raise DataError(f"{self.data.raw}: an epoch without one usable picture: {dict(self.unusable)}")

    def _windows(self, epoch: int) -> list[list[RawShard]]:
        if self.fits_in_one:
            return [self.shards]
        windows: list[list[RawShard]] = []
        room = 0
        for index in np.random.default_rng((self.seed, epoch)).permutation(len(self.shards)):
            shard = self.shards[index]
            if not windows or shard.bytes > room:
                windows.append([])
                room = self.data.window_mb * 2**20
            windows[-1].append(shard)
            room -= shard.bytes
        return windows

    def _read(self, shards: list[RawShard]) -> list[RawSample]:
        if self.kept is not None:
            return self.kept
        samples = []
        for shard in shards:
            for sample in read_raw_shard(shard):
                if not isinstance(sample, RawSample):
                    self.unusable[sample.reason] += 1
                elif split_of(sample.group, self.data.validation_fraction) == "train":
                    samples.append(sample)
        if self.fits_in_one:
            if not samples:
                raise DataError(f"{self.data.raw}: no picture in the train split; passed over: {dict(self.unusable)}")
            self.kept = samples
        return samples

    def _augmented(self, sample: RawSample, rng: np.random.Generator) -> np.ndarray | None:
        try:
            pixels_HWC = self.decoded.get(sample)
            return dvae_augment(
                pixels_HWC, self.image_size, rng, min_zoom=self.data.min_zoom, max_zoom=self.data.max_zoom
            )
        except ImageProblem as problem:
            if not self.unusable[problem.reason]:
                log.warning("%s is passed over: %s; further ones of this kind are only counted", sample.key, problem.reason)
            self.unusable[problem.reason] += 1
            return None


class _DecodedCache:
    """Decoded pictures by key, until `n_bytes` are full: where every epoch reads all once, eviction would gain nothing."""

    def __init__(self, n_bytes: int) -> None:
        self.room = n_bytes
        self.pictures: dict[str, np.ndarray] = {}

    def get(self, sample: RawSample) -> np.ndarray:
        found = self.pictures.get(sample.key)
        if found is None:
            found = np.asarray(decode_image(sample.image))
            if found.nbytes <= self.room:
                self.pictures[sample.key] = found
                self.room -= found.nbytes
        return found


def validation_pictures(data: PictureSection, image_size: int) -> Tensor:
    """Held-out pictures (B, C, H, W) uint8, cropped as they will be for the prior.

    Raises:
        DataError: none is usable.
    """
    images = []
    for sample in iterate_pictures(data.raw, "validation", data.validation_fraction):
        try:
            images.append(prior_crop(decode_image(sample.image), image_size, seed_of(sample.key)))
        except ImageProblem:
            continue
        if len(images) == data.validation_pictures:
            break
    if not images:
        raise DataError(
            f"{data.raw}: no usable picture in the validation split at validation_fraction {data.validation_fraction}; "
            f"pictures must be at least {image_size} pixels wide and high"
        )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
