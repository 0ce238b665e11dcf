"""Mask of a token data set: the samples that drop lists name since their shards were encoded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from dalle_ds.data.manifest import SPLITS, ShardManifest, Split, iterate_shards, load_shard_manifest
from dalle_ds.data.raw.metadata import sample_rows
from dalle_ds.data.raw.shards import LISTED_REASONS, RawShard, read_drop_list, split_of, without_drop_list
from dalle_ds.data.tokens.index import TokenIndex
from dalle_ds.errors import DataError


@dataclass(frozen=True)
class ShardMask:
    """What a changed drop list means for one finished shard."""

    shard: str
    is_masked: dict[Split, np.ndarray]
    """Bool, one entry per sample in stored order; a split without masked samples is left out."""
    n_absent: int
    """Number of samples that a list named when the shard was encoded, and that none names now."""


def mask_index(
    index: TokenIndex, root: str, shards: Mapping[str, RawShard], names: Iterable[str], validation_fraction: float
) -> tuple[TokenIndex, int, int]:
    """Compare the drop lists of raw shards with what was left out when they were encoded.

    Args:
        root: of the token data set.
        shards: the raw shards by name.
        names: the finished shards that have a drop list, or had one when they were encoded.

    Returns:
        (the index with its mask, number of masked samples, number of samples that are absent although no list names them now).

    Raises:
        DataError: a drop list or metadata is missing or damaged, or a shard has other samples than its raw shard.
    """
    places: dict[tuple[str, Split], tuple[int, int]] = {}
    totals: dict[Split, int] = {}
    for split in SPLITS:
        parts = index.parts(split)
        sizes = [parts.without_blocks(number).n_samples for number in range(len(parts))]
        starts = [0, *np.cumsum(sizes).tolist()]
        places |= {(name, split): (start, size) for name, start, size in zip(parts.shards, starts, sizes, strict=False)}
        totals[split] = starts[-1]
    masks: dict[Split, np.ndarray] = {}
    n_masked = n_absent = 0
    read = partial(_shard_mask, root, shards, validation_fraction)
    for mask in iterate_shards(sorted(names), read):
        n_absent += mask.n_absent
        for split, is_masked in mask.is_masked.items():
            start, size = places.get((mask.shard, split), (0, 0))
            if len(is_masked) != size:
                raise DataError(
                    f"{root}: shard {mask.shard} has {size} samples in its {split} split, expected {len(is_masked)} as in the "
                    "metadata of its raw shard"
                )
            masks.setdefault(split, np.zeros(totals[split], bool))[start : start + size] = is_masked
            n_masked += int(is_masked.sum())
    return index.with_mask(masks), n_masked, n_absent


def _shard_mask(root: str, shards: Mapping[str, RawShard], validation_fraction: float, name: str) -> ShardMask:
    raw = shards[name]
    listed = read_drop_list(raw.drop_list) if raw.drop_list else {}
    left_out = dict(load_shard_manifest(root, ShardManifest, name).read_details(root).dropped_samples)
    n_absent = sum(reason in LISTED_REASONS and key not in listed for key, reason in left_out.items())
    new = listed.keys() - left_out.keys()
    if not new:
        return ShardMask(name, {}, n_absent)
    of_split: dict[Split, list[bool]] = {split: [] for split in SPLITS}
    rows = sample_rows(without_drop_list(raw), ["key", "group"])
    for key, group in zip(rows["key"].to_pylist(), rows["group"].to_pylist(), strict=True):
        if key not in left_out:
            of_split[split_of(group, validation_fraction)].append(key in new)
    return ShardMask(name, {split: np.array(flags) for split, flags in of_split.items() if any(flags)}, n_absent)
