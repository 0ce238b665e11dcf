"""Near pairs of hashes that agree in one band of bits: exact where buckets can be split, bounded where they cannot.

Two hashes that differ in at most d bits agree in at least one of d + 1 bands of their bits. If hashes are sorted by the values
of each band in turn, every near pair is once in a bucket of equal values. A bucket of m hashes has m^2 / 2 pairs, and the bits
of real images are not uniform: popular buckets may be a thousand times larger than others. But two hashes of a bucket that
differ in at most d bits again agree in one of d + 1 bands of their other bits. So buckets above SPLIT hashes are split by these
bands, up to MAX_SPLITS times, which loses no pair. In a bucket that is still large, each hash is compared with the first
MAX_COMPARED only, which are the earliest images.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

# N hashes of one or more buckets, P pairs

SPLIT: Final = 64
MAX_SPLITS: Final = 2
MAX_COMPARED: Final = 1000


class Pairs(NamedTuple):
    """Pairs of hashes, by the numbers of their images, and the number of bits in which they differ."""

    later_P: np.ndarray
    earlier_P: np.ndarray
    distance_P: np.ndarray
    n_capped: int
    """Number of hashes that were not compared with all others of a bucket."""


def bands(n_bits: int, max_distance: int) -> list[tuple[int, int]]:
    """The ranges of bits (first, end) of max_distance + 1 bands of nearly equal width."""
    edges = [n_bits * band // (max_distance + 1) for band in range(max_distance + 2)]
    return list(zip(edges, edges[1:], strict=False))


def near_pairs(hashes_N: np.ndarray, images_N: np.ndarray, band: tuple[int, int], max_distance: int) -> Pairs:
    """Pairs that differ in at most `max_distance` bits and agree in a band.

    Args:
        hashes_N: distinct, uint64, sorted by the value of the band, then by `images_N`.
        images_N: number of each hash's first image, int64 below 2^32.
    """
    values_N = _bits(hashes_N, *band)
    found = list(_pairs(values_N, _without(hashes_N, *band), images_N, 64 - (band[1] - band[0]), max_distance, MAX_SPLITS))
    if not found:
        return Pairs(*np.zeros((2, 0), np.int64), np.zeros(0, np.uint8), 0)
    pairs = Pairs(*(np.concatenate([part[i] for part in found]) for i in range(3)), sum(part.n_capped for part in found))
    _, first = np.unique(pairs.later_P << 32 | pairs.earlier_P, return_index=True)
    return Pairs(pairs.later_P[first], pairs.earlier_P[first], pairs.distance_P[first], pairs.n_capped)


def _pairs(
    buckets_N: np.ndarray, rest_N: np.ndarray, images_N: np.ndarray, n_bits: int, max_distance: int, n_splits: int
) -> Iterator[Pairs]:
    """Pairs within buckets. `rest_N` holds the `n_bits` bits in which the hashes of a bucket may differ."""
    is_first_N = np.ones(len(buckets_N), bool)
    is_first_N[1:] = buckets_N[1:] != buckets_N[:-1]
    starts = np.flatnonzero(is_first_N)
    sizes = np.diff(np.append(starts, len(buckets_N)))
    is_large = sizes > SPLIT
    if n_splits == 0 or n_bits < 2 * (max_distance + 1):
        is_large[:] = False
    start_N = np.repeat(starts, sizes)
    yield from _compare(rest_N, images_N, start_N, ~np.repeat(is_large, sizes) & ~is_first_N, max_distance)
    rows = np.flatnonzero(np.repeat(is_large, sizes))
    if not len(rows):
        return
    number_of_bucket = np.repeat(np.arange(is_large.sum(), dtype=np.uint64), sizes[is_large])
    for low, high in bands(n_bits, max_distance):
        buckets = number_of_bucket << np.uint64(high - low) | _bits(rest_N[rows], low, high)
        order = np.argsort(buckets, kind="stable")  # equal values stay in the order of their images
        split = rows[order]
        rest = _without(rest_N[split], low, high)
        yield from _pairs(buckets[order], rest, images_N[split], n_bits - (high - low), max_distance, n_splits - 1)


def _compare(
    rest_N: np.ndarray, images_N: np.ndarray, start_N: np.ndarray, is_compared_N: np.ndarray, max_distance: int
) -> Iterator[Pairs]:
    # Step k compares the hashes of all buckets with the k-th hash of their bucket.
    active = np.flatnonzero(is_compared_N)
    place = active - start_N[active]
    for k in range(MAX_COMPARED):
        if not len(active):
            return
        other = start_N[active] + k
        distance = np.bitwise_count(rest_N[active] ^ rest_N[other])
        near = distance <= max_distance
        if near.any():
            yield Pairs(images_N[active[near]], images_N[other[near]], distance[near], 0)
        active, place = active[place > k + 1], place[place > k + 1]
    if len(active):
        yield Pairs(*np.zeros((2, 0), np.int64), np.zeros(0, np.uint8), len(active))


def _bits(values: np.ndarray, low: int, high: int) -> np.ndarray:
    return (values >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)


def _without(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """The values without some of their bits; higher bits move down."""
    above = values >> np.uint64(high) << np.uint64(low) if high < 64 else np.uint64(0)
    return above | (values & np.uint64(2**low - 1))
