"""Batches of images for the dVAE: an endless order, a function of seed and position, made on a thread ahead of the step."""

# B batch, or a rank's part of it, C channels, H and W pixels

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
from dalle_ds.data.raw import RawSample, RawShard, iterate_images, list_raw_shards, read_raw_shard, split_of
from dalle_ds.errors import DataError
from dalle_ds.training.dvae.config import DVAEDataConfig

log = logging.getLogger(__name__)


class Position(NamedTuple):
    """Where the next sample is taken: a resumed run goes on there without reading what came before."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


START = Position()


class ImageBatch(NamedTuple):
    images_BCHW: Tensor  # uint8
    next_position: Position
    n_unusable: int  # images passed over since the stream began, in this process; the sum over ranks counts each once


class ImageStream:
    """Iterate over training batches; `close()` ends the thread.

    An epoch deals all shards, in a new order, into windows that fit in memory, and shuffles the images of each window.
    Where everything fits one window it is read once and stays. A batch is the next `global_batch` places of this order,
    whatever they hold; for an unusable image the next usable one of its window stands in, in a crop of its own.

    Of several ranks each makes only its `places` of every batch (all, if None), and decodes no other images. It reads all
    shards, and holds the window: any image may fall to any rank, and the order is known once the window is read.
    """

    def __init__(
        self,
        data: DVAEDataConfig,
        image_size: int,
        global_batch: int,
        seed: int,
        start: Position = START,
        places: range | None = None,
    ) -> None:
        self._maker = _BatchMaker(data, image_size, global_batch, seed, range(global_batch) if places is None else places)
        self._batches = Prefetch(self._maker.batches(start), data.prefetch, "dvae-images")

    def __iter__(self) -> Iterator[ImageBatch]:
        return self

    def __next__(self) -> ImageBatch:
        return next(self._batches)

    @property
    def wait_seconds(self) -> float:
        """How long the step has waited for images, in all."""
        return self._batches.wait_seconds

    def close(self) -> None:
        """Stop making batches."""
        self._batches.close()


class _BatchMaker:
    def __init__(self, data: DVAEDataConfig, image_size: int, global_batch: int, seed: int, mine: range) -> None:
        self.data, self.image_size, self.global_batch, self.seed, self.mine = data, image_size, global_batch, seed, mine
        self.shards = list_raw_shards(data.raw)
        self.fits_in_one = sum(shard.bytes for shard in self.shards) <= data.window_mb * 2**20
        self.samples: list[RawSample] = []  # of one window
        self.order = np.arange(0)  # of these
        self.decoded = _DecodedCache(data.decoded_mb * 2**20 if self.fits_in_one else 0)
        self.unusable: Counter[str] = Counter()

    def batches(self, start: Position) -> Iterator[ImageBatch]:
        places = self._places(start)
        while True:
            images = []
            for n, place in enumerate(itertools.islice(places, self.global_batch)):
                if n in self.mine:
                    images.append(self._image(place))
            stacked_BHWC = torch.from_numpy(np.stack(images))
            yield ImageBatch(stacked_BHWC.permute(0, 3, 1, 2), place._replace(offset=place.offset + 1), self.unusable.total())

    def _places(self, start: Position) -> Iterator[Position]:
        # Each while `samples` and `order` are of its window.
        for epoch in itertools.count(start.epoch):
            n_places = 0
            for window, shards in enumerate(self._windows(epoch)):
                if (epoch, window) < start[:2]:
                    continue
                self._read(shards)
                self.order = np.random.default_rng((self.seed, epoch, window)).permutation(len(self.samples))
                for offset in range(start.offset if (epoch, window) == start[:2] else 0, len(self.samples)):
                    n_places += 1
                    yield Position(epoch, window, offset)
            if n_places == 0 and epoch > start.epoch:
                raise DataError(f"{self.data.raw}: no image in the train split; passed over: {dict(self.unusable)}")

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

    def _read(self, shards: list[RawShard]) -> None:
        if self.fits_in_one and self.samples:
            return
        self.samples = []  # first: two windows need not fit
        for shard in shards:
            for sample in read_raw_shard(shard):
                if not isinstance(sample, RawSample):
                    self.unusable[sample.reason] += 0 in self.mine  # all ranks read it
                elif split_of(sample.group, self.data.validation_fraction) == "train":
                    self.samples.append(sample)

    def _image(self, place: Position) -> np.ndarray:
        rng = np.random.default_rng((self.seed, *place))
        for step in range(len(self.order)):
            sample = self.samples[self.order[(place.offset + step) % len(self.order)]]
            try:
                pixels_HWC = self.decoded.get(sample)
                return dvae_augment(pixels_HWC, self.image_size, rng, min_zoom=self.data.min_zoom, max_zoom=self.data.max_zoom)
            except ImageProblem as problem:
                if step == 0:  # others are counted at their own places
                    self._count(sample, problem.reason)
        raise DataError(
            f"{self.data.raw}: none of {len(self.order)} images is usable, which are all of a window "
            f"(data.window_mb {self.data.window_mb}); passed over: {dict(self.unusable)}"
        )

    def _count(self, sample: RawSample, reason: str) -> None:
        if not self.unusable[reason]:
            log.warning("%s is passed over: %s; further ones of this kind are only counted", sample.key, reason)
        self.unusable[reason] += 1


class _DecodedCache:
    """Decoded images by key, until `n_bytes` are full: where every epoch reads all once, eviction would gain nothing."""

    def __init__(self, n_bytes: int) -> None:
        self.room = n_bytes
        self.images: dict[str, np.ndarray] = {}

    def get(self, sample: RawSample) -> np.ndarray:
        found = self.images.get(sample.key)
        if found is None:
            found = np.asarray(decode_image(sample.image))
            if found.nbytes <= self.room:
                self.images[sample.key] = found
                self.room -= found.nbytes
        return found


def validation_images(data: DVAEDataConfig, limit: int, image_size: int) -> Tensor:
    """Validation images (B, C, H, W) uint8, cropped as they will be for the prior.

    Raises:
        DataError: none is usable.
    """
    images = []
    for sample in iterate_images(data.raw, "validation", data.validation_fraction):
        try:
            images.append(prior_crop(decode_image(sample.image), image_size, seed_of(sample.key)))
        except ImageProblem:
            continue
        if len(images) == limit:
            break
    if not images:
        raise DataError(
            f"{data.raw}: no usable image in the validation split at validation_fraction {data.validation_fraction}; "
            f"images must be at least {image_size} pixels wide and high"
        )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
