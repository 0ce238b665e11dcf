"""Batches of images and captions for CLIP: from memory, or from streams of shards if the data set is too large for it."""

# b images of this rank's part of a batch, S samples, H and W pixels, C channels

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalle_ds.data.images import ImageProblem, prior_crop, seed_of
from dalle_ds.data.raw.decoded_batches import DecodedBatch, DecodedBatches
from dalle_ds.data.raw.sample import RawSample
from dalle_ds.data.raw.shards import RawShard, read_raw_shard, split_of
from dalle_ds.data.raw.streams import Cursors, Reading
from dalle_ds.data.tokens.prefetch import Prefetch
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.storage.hashing import hash_to_integer
from dalle_ds.training.clip.config import ClipRunConfig
from dalle_ds.training.clip.crops import ClipCrops
from dalle_ds.training.clip.damage import DamagedCopies, damaged_copies
from dalle_ds.training.validation_set import Chosen, ValidationSet, validation_set

BATCHES_AHEAD = 4
MAX_TOKENIZER_CAPTIONS = 200_000
"""Captions of a streamed data set from which the tokenizer learns."""


class Captioned(NamedTuple):
    """A decoded image, shrunk, with its caption."""

    key: str
    group: str
    caption: str
    pixels_HWC: np.ndarray


class CaptionedBatch(NamedTuple):
    images_bHWC: np.ndarray  # uint8
    captions: list[str]
    groups_b: np.ndarray  # int64, equal for images of the same group
    cursors: Cursors  # after this batch; empty if the data set is in memory, where a batch is a function of the update
    damaged: DamagedCopies | None = None


def reading_of(recipe: ClipRunConfig, shards: Sequence[RawShard]) -> Reading:
    """The order in which a run reads its shards, if they don't fit into memory."""
    data, crops = recipe.data, ClipCrops(recipe.model.image_size)

    def problem_of(sample: RawSample) -> str | None:
        try:
            crops.decode(sample.image)
        except ImageProblem as problem:
            return problem.reason
        return None

    return Reading(
        shards=shards,
        n_parts=data.streams,
        part_size=recipe.global_batch // data.streams,
        window_bytes=data.window_mb * 2**20,
        seed=recipe.seed,
        keeps=lambda sample: _is_trained_on(recipe, sample.group),
        problem_of=problem_of,
    )


class ClipBatches:
    """Iterates over this rank's parts of the batches, from update `start` on. `close()` ends threads and processes.

    Args:
        cursors: from a checkpoint, if the data set does not fit into memory.

    Raises:
        ConfigError: the batch does not divide among the streams or the ranks.
        DataError: there are too few images.
    """

    def __init__(
        self, recipe: ClipRunConfig, reading: Reading, start: int, cursors: Cursors | None = None, ranks: Ranks = ALONE
    ) -> None:
        self.samples: list[Captioned] | None = None
        """All training images, if they fit into memory."""
        self.cursors: Cursors = {}
        self._decoded: DecodedBatches | None = None
        n_divided = recipe.global_batch if reading.is_whole else recipe.data.streams
        if n_divided % ranks.world_size or (not reading.is_whole and recipe.global_batch % recipe.data.streams):
            raise ConfigError(
                f"global_batch {recipe.global_batch} in {n_divided} parts on {ranks.world_size} ranks: expected parts of equal "
                "size, and the same number of them on every rank (set global_batch, or data.streams)"
            )
        mine = range(n_divided * ranks.rank // ranks.world_size, n_divided * (ranks.rank + 1) // ranks.world_size)
        if reading.is_whole:
            self.samples = read_split(recipe, reading.shards)
            source = batches(self.samples, recipe, start, mine)
        else:
            order = reading.start(mine, cursors)
            self.cursors = order.cursors
            crops = ClipCrops(recipe.model.image_size)
            self._decoded = DecodedBatches(order, crops, n_processes=recipe.data.decoders, n_ahead=BATCHES_AHEAD)
            source = map(_of_stream, self._decoded)
        if recipe.data.damaged_copies:
            source = _with_copies(source, recipe.seed, start)
        self._batches = Prefetch(source, BATCHES_AHEAD, "clip-images")

    def __next__(self) -> CaptionedBatch:
        return next(self._batches)

    @property
    def wait_seconds(self) -> float:
        """Total time that training has waited for images."""
        return self._batches.wait_seconds

    def close(self) -> None:
        if self._decoded is not None:
            self._decoded.close()
        self._batches.close()


def read_split(recipe: ClipRunConfig, shards: Sequence[RawShard], split: str = "train") -> list[Captioned]:
    """Load all usable images of a split into memory; from the training split, only those of the fold.

    Raises:
        DataError: no image is usable.
    """
    data, image_size = recipe.data, recipe.model.image_size
    crops = ClipCrops(image_size)

    def decoded(sample: RawSample) -> Captioned | None:
        try:
            return Captioned(sample.key, sample.group, sample.caption, crops.decode(sample.image))
        except ImageProblem:
            return None

    usable: list[Captioned] = []
    n_in_split = 0
    with ThreadPoolExecutor(os.cpu_count(), "clip-decode") as pool:  # Pillow releases the GIL
        for shard in shards:
            found = (sample for sample in read_raw_shard(shard) if isinstance(sample, RawSample))
            if split == "train":
                chosen = [sample for sample in found if _is_trained_on(recipe, sample.group)]
            else:
                chosen = [sample for sample in found if split_of(sample.group, data.validation_fraction) == split]
            n_in_split += len(chosen)
            usable += [sample for sample in pool.map(decoded, chosen) if sample is not None]
    if not usable:
        which = f"fold {data.fold} of {data.folds}, validation_fraction {data.validation_fraction}"
        if not n_in_split:
            raise DataError(f"{data.raw}: the {split} split is empty ({which}); expected more samples or another fraction")
        raise DataError(
            f"{data.raw}: no usable image in the {split} split ({which}); images must be at least {image_size} pixels wide and "
            "high"
        )
    return usable


def tokenizer_captions(recipe: ClipRunConfig, reading: Reading) -> list[str]:
    """Captions of the training split of a data set that is streamed: of shards in random order, until there are enough."""
    from dalle_ds.data.raw.metadata import iterate_sample_rows  # pyarrow: needed at the first start only

    captions: list[str] = []
    shards = [reading.shards[n] for n in np.random.default_rng(recipe.seed).permutation(len(reading.shards))]
    for _, rows in iterate_sample_rows(shards, ["caption", "group"]):
        captions += [row["caption"] for row in rows.to_pylist() if _is_trained_on(recipe, row["group"])]
        if len(captions) >= MAX_TOKENIZER_CAPTIONS:
            break
    return captions


def validation_pairs(recipe: ClipRunConfig, shards: Sequence[RawShard], folder: Path, ranks: Ranks = ALONE) -> ValidationSet:
    """The validation images with captions, cropped as for the prior's data; each image matches exactly one caption.

    All ranks must call it together. The images are kept in `folder`, see `validation_set`.
    """
    crops = ClipCrops(recipe.model.image_size)

    def pixels_of(sample: RawSample) -> np.ndarray | None:
        try:
            return prior_crop(crops.decode(sample.image), recipe.model.image_size, seed_of(sample.key))
        except ImageProblem:
            return None

    return validation_set(
        folder,
        shards,
        pixels_of,
        limit=recipe.validation.samples,
        validation_fraction=recipe.data.validation_fraction,
        image_size=recipe.model.image_size,
        select=one_of_each_group,
        ranks=ranks,
    )


def one_of_each_group(samples: list[Chosen]) -> list[Chosen]:
    """Keep an image whose group and caption no earlier one has. Each image then has exactly one match."""
    groups, captions, kept = set(), set(), []
    for sample in samples:
        if sample.group not in groups and sample.caption.lower() not in captions:
            groups.add(sample.group)
            captions.add(sample.caption.lower())
            kept.append(sample)
    return kept


def batches(samples: Sequence[Captioned], recipe: ClipRunConfig, start: int, mine: range) -> Iterator[CaptionedBatch]:
    """Iterate over parts of the batches of the updates from `start` on, without end.

    An epoch takes one image of every group, so that no batch holds two images of a group. Each image has its own random crop.

    Args:
        mine: which of the pairs of every batch.

    Raises:
        DataError: there are fewer groups than `global_batch`.
    """
    global_batch, image_size = recipe.global_batch, recipe.model.image_size
    groups: dict[str, list[Captioned]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    members = list(groups.values())
    per_epoch = len(members) // global_batch
    if per_epoch == 0:
        raise DataError(f"{len(members)} groups of images, expected at least global_batch {global_batch}")
    update, ordered, order = start, -1, np.arange(0)
    while True:
        epoch, step = divmod(update, per_epoch)
        if epoch != ordered:
            ordered, order = epoch, np.random.default_rng((recipe.seed, epoch)).permutation(len(members))
        rng = np.random.default_rng((recipe.seed, epoch, step))
        chosen = []
        for group in order[step * global_batch : (step + 1) * global_batch]:
            chosen.append(members[group][rng.integers(len(members[group]))])
        seeds = [int(rng.integers(2**63)) for _ in chosen]
        images = [prior_crop(chosen[n].pixels_HWC, image_size, seeds[n]) for n in mine]
        own = [chosen[n] for n in mine]
        yield CaptionedBatch(np.stack(images), [sample.caption for sample in own], _numbers_of(own), {})
        update += 1


def _of_stream(batch: DecodedBatch) -> CaptionedBatch:
    captions = [sample.caption for sample in batch.samples]
    return CaptionedBatch(batch.pixels_SHWC, captions, _numbers_of(batch.samples), batch.cursors)


def _with_copies(source: Iterator[CaptionedBatch], seed: int, start: int) -> Iterator[CaptionedBatch]:
    """Add damaged copies to the batches of the updates from `start` on."""
    for update, batch in enumerate(source, start):
        yield batch._replace(damaged=damaged_copies(batch.images_bHWC, (seed, update)))


def _numbers_of(samples: Sequence[Captioned] | Sequence[RawSample]) -> np.ndarray:
    return np.array([hash_to_integer(sample.group) >> 1 for sample in samples], dtype=np.int64)


def _is_trained_on(recipe: ClipRunConfig, group: str) -> bool:
    data = recipe.data
    return split_of(group, data.validation_fraction) == "train" and hash_to_integer(f"fold:{group}") % data.folds == data.fold
