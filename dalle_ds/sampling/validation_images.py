"""The crops that the codes of validation samples were made from, read again from the raw shards."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dalle_ds.data.images import ImageProblem, decode_image, prior_crop, seed_of
from dalle_ds.data.manifest import InputIdentity
from dalle_ds.data.raw.shards import RawSample, RawShard, list_raw_shards, read_raw_shard
from dalle_ds.data.tokens.dataset_files import load_index
from dalle_ds.errors import DataError
from dalle_ds.models.dvae import DVAE
from dalle_ds.sampling.validation_samples import ValidationSamples
from dalle_ds.storage import objects

MIN_SAME_CODES = 0.95
"""Another device or number format may change codes whose best two are nearly tied. Another image changes nearly all codes."""


def read_images(
    validation: ValidationSamples, data_urls: Sequence[str], dvae: DVAE, n: int, raw: str | None = None
) -> tuple[list[int], np.ndarray]:
    """Read the crops of at most `n` samples, shard after shard, so that as few raw shards as possible are read.

    Args:
        data_urls: the data sets that the samples come from.
        raw: root of the raw shards. If None: each raw shard is read where it was encoded; raw shards that no longer exist are
            left out.

    Returns:
        The rows of the samples in `validation`, and their crops (rows, H, W, 3), uint8. Both are empty if no raw shard exists.

    Raises:
        DataError: a raw shard is damaged or is not the one that was encoded, or `raw` has no such shard.
    """
    made_of = dict(entry for url in data_urls for entry in _inputs_of(url))
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, shard in enumerate(validation.shards):
        rows_of[shard].append(row)
    elsewhere = {shard.name: shard for shard in list_raw_shards(raw)} if raw else {}
    found: dict[int, np.ndarray] = {}
    for shard, rows in rows_of.items():
        source = _source(*made_of[shard], elsewhere, raw)
        if source is None:
            continue
        found |= _crops(source, validation, rows[: n - len(found)], dvae)
        if len(found) >= n:
            break
    chosen = sorted(found)
    return chosen, np.stack([found[row] for row in chosen]) if chosen else np.empty((0, 0, 0, 3), dtype=np.uint8)


def _inputs_of(url: str) -> Iterator[tuple[str, tuple[str, InputIdentity]]]:
    """(tar of codes, (name of the shard, raw shard that it was made from)) of each part of the validation split."""
    index = load_index(url)[1]
    inputs, parts = dict(index.inputs()), index.parts("validation")
    for number, shard in enumerate(parts.shards):
        yield objects.join(url, parts.without_blocks(number).path), (shard, inputs[shard])


def _source(shard: str, made_of: InputIdentity, elsewhere: dict[str, RawShard], raw: str | None) -> RawShard | None:
    url = made_of.path
    if raw is not None:
        if shard not in elsewhere:
            raise DataError(f"{raw}: has no raw shard {shard}, which the data set was encoded from")
        url = elsewhere[shard].url
    if not objects.exists(url):
        return None
    return RawShard(shard, url, made_of.bytes, made_of.checksum)


def _crops(source: RawShard, validation: ValidationSamples, rows: list[int], dvae: DVAE) -> dict[int, np.ndarray]:
    row_of = {validation.keys[row]: row for row in rows}
    crops: dict[int, np.ndarray] = {}
    for sample in _samples(source, row_of):
        row = row_of.pop(sample.key)
        try:
            crop_HWC = prior_crop(decode_image(sample.image), dvae.config.image_size, seed_of(sample.key))
        except ImageProblem as problem:
            raise DataError(f"{source.url}, sample {sample.key}: its image is {problem.reason}") from None
        same = _same_codes(dvae, crop_HWC, validation.image_SN[row])
        if same < MIN_SAME_CODES:
            raise DataError(
                f"{source.url}, sample {sample.key}: {same:.1%} of its codes equal those of the data set, expected at least "
                f"{MIN_SAME_CODES:.0%}: it is another image"
            )
        crops[row] = crop_HWC
    if row_of:
        raise DataError(f"{source.url}: does not contain sample {next(iter(row_of))}, which the data set was encoded from")
    return crops


def _samples(source: RawShard, wanted: dict[str, int]) -> Iterator[RawSample]:
    for sample in read_raw_shard(source):
        if not wanted:
            return
        if isinstance(sample, RawSample) and sample.key in wanted:
            yield sample


def _same_codes(dvae: DVAE, crop_HWC: np.ndarray, codes_N: Tensor) -> float:
    device = next(dvae.parameters()).device
    images_1CHW = torch.from_numpy(crop_HWC)[None].permute(0, 3, 1, 2).to(device)
    return float((dvae.tokens(images_1CHW)[0].cpu() == codes_N).float().mean())
