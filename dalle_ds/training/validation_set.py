"""The validation images of a dVAE or CLIP run: chosen at its first start, and kept as one small file in the run folder."""

# S images, H and W pixels, C channels

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.data.images import CROP_RULE
from dalle_ds.data.raw.sample import RawSample
from dalle_ds.data.raw.shards import RawShard, read_raw_shard, split_of
from dalle_ds.errors import DataError, UserError
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.storage.atomic import atomic_write
from dalle_ds.storage.fingerprint import fingerprint

VALIDATION_FILE = "validation.safetensors"
MAX_READERS = 8
"""Shards that a rank reads at the same time."""


class Chosen(NamedTuple):
    """A validation image."""

    group: str
    caption: str
    pixels_HWC: np.ndarray


class ValidationSet(NamedTuple):
    images_SHWC: Tensor  # uint8
    captions: list[str]


Select = Callable[[list[Chosen]], list[Chosen]]
"""Drops images. What it keeps of a list begins with what it keeps of the list's beginning."""


def validation_set(
    folder: Path,
    shards: Sequence[RawShard],
    pixels_of: Callable[[RawSample], np.ndarray | None],
    *,
    limit: int,
    validation_fraction: float,
    image_size: int,
    select: Select = list,
    ranks: Ranks = ALONE,
) -> ValidationSet:
    """The first `limit` usable images of the validation split, in the order of the shards.

    The first call looks into shards, divided among the ranks, until it has found them (at 0.24 % of the groups, in 186 shards
    of 10,000 samples for 4,096 images) and writes VALIDATION_FILE. Of shards with metadata it reads these images only, of
    others the whole tars. Later calls open the file. All ranks must call it together.

    Args:
        pixels_of: (H, W, C) of the model's size. None: the image is unusable.

    Raises:
        DataError: no image is usable.
        UserError: the file cannot be written.
    """
    stamp = fingerprint(
        {
            "shards": [[shard.name, shard.bytes, shard.checksum] for shard in shards],
            "settings": [limit, validation_fraction, image_size, select.__name__, CROP_RULE],
        }
    )
    path = folder / VALIDATION_FILE

    def write(chosen: list[Chosen]) -> None:
        if not chosen:
            raise _nothing_usable(shards, validation_fraction, image_size)
        _write(path, chosen, stamp)

    if ranks.from_main(ranks.is_main and _read(path, stamp) is None):
        chosen = _choose(shards, pixels_of, limit, validation_fraction, select, ranks)
        ranks.once(lambda: write(chosen))
    found = _read(path, stamp)
    for rank, has_found in enumerate(ranks.gather_objects(found is not None)):
        if not has_found:
            raise UserError(f"rank {rank} does not find {path}, which rank 0 has written: all ranks must share {folder}")
    return cast(ValidationSet, found)


def _choose(
    shards: Sequence[RawShard],
    pixels_of: Callable[[RawSample], np.ndarray | None],
    limit: int,
    validation_fraction: float,
    select: Select,
    ranks: Ranks,
) -> list[Chosen]:
    """The images, on the main rank. The others return an empty list: 4,096 images of 256 pixels are 0.8 GB."""

    def chosen_in(shard: RawShard) -> list[Chosen]:
        found = []
        for sample in _held_out(shard, validation_fraction):
            pixels_HWC = pixels_of(sample)
            if pixels_HWC is not None:
                found.append(Chosen(sample.group, sample.caption, pixels_HWC))
        return found

    chosen: list[Chosen] = []
    start, n_readers, are_enough = 0, 1, False
    with ThreadPoolExecutor(MAX_READERS, "validation") as pool:
        while start < len(shards) and not are_enough:
            read = shards[start : start + ranks.world_size * n_readers]
            of_ranks = ranks.each_to_main(partial(list, pool.map(chosen_in, read[ranks.rank :: ranks.world_size])))
            if ranks.is_main:
                for number in range(len(read)):
                    chosen += of_ranks[number % ranks.world_size][number // ranks.world_size]
                chosen = select(chosen)
            are_enough = ranks.from_main(len(chosen) >= limit)
            start, n_readers = start + len(read), min(2 * n_readers, MAX_READERS)
    return chosen[:limit]


def _held_out(shard: RawShard, validation_fraction: float) -> Iterator[RawSample]:
    if shard.metadata is None:
        found = (sample for sample in read_raw_shard(shard) if isinstance(sample, RawSample))
        yield from (sample for sample in found if split_of(sample.group, validation_fraction) == "validation")
        return
    from dalle_ds.data.raw.metadata import read_image, sample_rows  # pyarrow: needed at the first start only

    rows = sample_rows(shard, ["key", "caption", "group", "offset", "bytes", "crc32"])
    for number, group in enumerate(rows["group"].to_pylist()):
        if split_of(group, validation_fraction) == "validation":
            row = rows.slice(number, 1).to_pylist()[0]
            image = read_image(shard, row["offset"], row["bytes"], row["crc32"])
            yield RawSample(row["key"], group, row["caption"], image, "")


def _nothing_usable(shards: Sequence[RawShard], validation_fraction: float, image_size: int) -> DataError:
    where = f"{len(shards)} raw shards ({shards[0].url}, ...)"
    if any(True for shard in shards for _ in _held_out(shard, validation_fraction)):
        return DataError(
            f"{where}: no usable image in the validation split at validation_fraction {validation_fraction}; images must be at "
            f"least {image_size} pixels wide and high"
        )
    counts = [shard.n_samples for shard in shards]
    n = "the" if None in counts else f"the {sum(filter(None, counts))}"  # plain tars do not tell
    return DataError(
        f"{where}: the validation split is empty: validation_fraction {validation_fraction} holds out none of {n} samples; "
        "expected more samples or a larger fraction"
    )


def _write(path: Path, chosen: list[Chosen], stamp: str) -> None:
    images_SHWC = torch.from_numpy(np.ascontiguousarray(np.stack([image.pixels_HWC for image in chosen])))
    about = {"of": stamp, "captions": json.dumps([image.caption for image in chosen])}
    try:
        with atomic_write(path, one_writer=True) as temporary:
            save_file({"images": images_SHWC}, temporary, about)
    except (OSError, SafetensorError) as error:  # safetensors' own error, if the disk is full
        raise UserError(f"{path} cannot be written: {error}") from None


def _read(path: Path, stamp: str) -> ValidationSet | None:
    """None if the file is missing, damaged or of other data."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("of") != stamp:
                return None
            images_SHWC = file.get_tensor("images").clone()  # not mapped: a disk that fails would kill the process
            return ValidationSet(images_SHWC, json.loads(about["captions"]))
    except (OSError, SafetensorError):
        return None
