"""Image batches for the dVAE: an endless stream, determined by seed and position, prefetched by a thread."""

# B batch or a rank's part of it, C channels, H and W pixels

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
    """Position of the next sample in the stream. A resumed run starts there without reading earlier samples."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


START = Position()


class ImageBatch(NamedTuple):
    images_BCHW: Tensor  # uint8
    next_position: Position
    n_unusable: int  # unusable images since this process began the stream; the sum over ranks counts each image once


class ImageStream:
    """Iterates over training batches. `close()` ends the thread.

    An epoch distributes all shards, in a new order, over windows that fit in memory, and shuffles the images of each window.
    If all shards fit in one window, they are read once and stay in memory. A batch consists of the next `global_batch`
    positions of this order. An unusable image is replaced by the next usable image of its window, with a different crop.

    Each rank decodes only its own `places`, the range of indices in every batch (all, if None). Every rank still reads all
    shards and holds the whole window, because any image may be assigned to any rank and the order is known only once the
    window has been read.
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
        """Total time that training has waited for images."""
        return self._batches.wait_seconds

    def close(self) -> None:
        """Stop making batches."""
        self._batches.close()


class _BatchMaker:
    def __init__(self, data: DVAEDataConfig, image_size: int, global_batch: int, seed: int, mine: range) -> None:
        self.data, self.image_size, self.global_batch, self.seed, self.mine = data, image_size, global_batch, seed, mine
        self.shards = list_raw_shards(data.raw)
        self.fits_in_one = sum(shard.bytes for shard in self.shards) <= data.window_mb * 2**20
        self.samples: list[RawSample] = []  # of the current window
        self.order = np.arange(0)  # permutation of `samples`
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
        # While a position is yielded, `samples` and `order` are those of its window.
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
                raise DataError(f"{self.data.raw}: no image in the training split; unusable: {dict(self.unusable)}")

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
        self.samples = []  # free the old window first: memory may not hold two
        for shard in shards:
            for sample in read_raw_shard(shard):
                if not isinstance(sample, RawSample):
                    self.unusable[sample.reason] += 0 in self.mine  # all ranks read it, one counts it
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
                if step == 0:  # an unusable substitute is counted at its own position
                    self._count(sample, problem.reason)
        raise DataError(
            f"{self.data.raw}: none of {len(self.order)} images is usable, expected at least one in each window "
            f"(data.window_mb {self.data.window_mb}); unusable: {dict(self.unusable)}"
        )

    def _count(self, sample: RawSample, reason: str) -> None:
        if not self.unusable[reason]:
            log.warning("image %s is unusable and skipped: %s; further such images are only counted", sample.key, reason)
        self.unusable[reason] += 1


class _DecodedCache:
    """Decoded images by key, up to `n_bytes`. Nothing is evicted: every epoch reads each image once, so it would not help."""

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
    """Validation images (B, C, H, W) uint8, with the same crop as for the prior; at most `limit` of them.

    Raises:
        DataError: no image is usable.
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
