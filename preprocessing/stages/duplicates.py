"""Dedup: put images that resemble an earlier image or an image of an evaluation set on the raw shards' drop list."""

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import imagehash
import numpy as np
from PIL import Image, ImageDraw

from dalle_ds.console import Outcome
from dalle_ds.data.images import ImageProblem, decode_image
from dalle_ds.data.raw import (
    DROP_LISTS,
    LISTED_REASONS,
    DropLists,
    RawSample,
    RawShard,
    list_raw_shards,
    read_raw_shard,
    without_drop_list,
)
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from preprocessing.configs import DuplicatesConfig
from preprocessing.executors.local import n_cores, run_shards

# N images, starting with those of the evaluation sets; U unique hashes

HASH_RULE: Final = "phash-64/v1"  # part of the file names of stored hashes
MIN_CONTRAST: Final = 2.0  # standard deviation of 32x32 grey levels; below it a hash carries no information
NOT_COMPARED: Final = 0
NEAR_DUPLICATE, IN_EVALUATION = LISTED_REASONS
N_EXAMPLES: Final = 24
TILE: Final = 128  # pixels


@dataclass(frozen=True)
class HashJob:
    """One worker's task. Writes one file of hashes per shard below `out`, so that a restart computes only missing ones."""

    out: str

    def start(self, n_threads: int) -> Callable[[RawShard], str]:
        return lambda shard: hash_shard(shard, hashes_url(self.out, shard))


def run(config: DuplicatesConfig) -> Outcome:
    """Hash all images, find images close to an earlier image, and publish the drop list.

    Every reader of the raw shards skips the samples on the list. Memory: about 140 bytes an image. Time: decoding every
    image, plus one comparison for each pair of hashes that agree in one of max_distance + 1 bands of bits. At a distance of 3
    the number of comparisons grows with the square of the number of images: acceptable for 20 million, while 250 million need
    a distance of 2 or less.

    Raises:
        DataError: there are no raw shards made by ingest, or `config.raw` is also an evaluation set.
    """
    started = time.monotonic()
    roots = [*config.against, config.raw]
    if config.raw in config.against:
        raise DataError(f"{config.raw}: is both the training data and an evaluation set, so every image would be dropped")
    shards_of = {root: [without_drop_list(shard) for shard in list_raw_shards(root)] for root in roots}
    for root, found in shards_of.items():
        if any(shard.checksum is None for shard in found):
            raise DataError(f"{root}: has tars without manifests; convert them to raw shards with `dalle-ds data ingest`")
    shards = [shard for root in roots for shard in shards_of[root]]
    todo = [shard for shard in shards if not objects.exists(hashes_url(config.raw, shard))]
    _, failures = run_shards(
        HashJob(config.raw),
        todo,
        n_workers=config.workers or n_cores(),
        name=lambda shard: shard.url,
        size=lambda shard: shard.n_samples or 0,
        what="hash",
        unit="image",
    )
    if failures:  # publish no drop list: an incomplete comparison would look complete
        return Outcome({"raw": config.raw, "failed_shards": failures}, is_complete=False)
    per_shard = [_load(config.raw, shard)[0] for shard in shards]
    hashes_N = np.concatenate([np.zeros(0, np.uint64), *per_shard])
    n_against = sum(map(len, per_shard[: len(shards) - len(shards_of[config.raw])]))
    starts = np.cumsum([0, *map(len, per_shard)])
    earlier_N = find_duplicates(hashes_N, n_against, config.max_distance)
    reasons: Counter[str] = Counter()
    lists: dict[str, str] = {}
    for shard, start, end in zip(shards, starts, starts[1:], strict=False):
        here = (start + np.flatnonzero(earlier_N[start:end] >= 0)).tolist()
        if not here:
            continue
        _, keys = _load(config.raw, shard)
        records = [
            {"key": keys[index - start], "reason": IN_EVALUATION if earlier_N[index] < n_against else NEAR_DUPLICATE}
            for index in here
        ]
        reasons.update(record["reason"] for record in records)
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        lists[shard.name] = f"duplicates/{shard.name}-{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
        objects.write_bytes(objects.join(config.raw, lists[shard.name]), data)
    dropped_N = np.flatnonzero(earlier_N >= 0)
    distances = Counter(np.bitwise_count(hashes_N[dropped_N] ^ hashes_N[earlier_N[dropped_N]]).tolist())
    examples = objects.join(config.raw, "duplicates/examples.png")
    _draw_examples(examples, shards, starts, hashes_N, earlier_N)
    found = DropLists(max_distance=config.max_distance, lists=lists)
    objects.write_bytes(objects.join(config.raw, DROP_LISTS), found.to_json())
    return Outcome(
        {
            "raw": config.raw,
            "images": len(hashes_N) - n_against,
            "evaluation_images": n_against,
            "too_plain_to_compare": int((hashes_N == NOT_COMPARED).sum()),
            "groups": len(np.unique(earlier_N[dropped_N])),
            "dropped": dict(sorted(reasons.items())),
            "dropped_by_distance": dict(sorted(distances.items())),
            "examples": examples,
            "seconds": time.monotonic() - started,
        }
    )


def perceptual_hash(image: Image.Image) -> int:
    """64-bit pHash, nearly invariant to size, format, colours and sharpness. NOT_COMPARED if the contrast is too low."""
    grey = image.convert("L")
    if np.asarray(grey.resize((32, 32), Image.Resampling.BOX)).std() < MIN_CONTRAST:
        return NOT_COMPARED
    return int(str(imagehash.phash(grey)), 16)


def find_duplicates(hashes_N: np.ndarray, n_against: int, max_distance: int) -> np.ndarray:
    """For each image, the index of the earlier kept image that it duplicates, or -1 if the image is kept: (N,) int64.

    The first `n_against` images are always kept. A duplicate differs in at most `max_distance` bits from a kept image.
    Comparing only with kept images prevents chains of small differences from joining dissimilar images.
    """
    earlier_N = np.full(len(hashes_N), -1, np.int64)
    compared = np.flatnonzero(hashes_N != NOT_COMPARED)
    hashes_U, first, inverse = np.unique(hashes_N[compared], return_index=True, return_inverse=True)
    first_U = compared[first]  # np.unique returns the first index of each value
    pairs = [np.zeros((0, 2), np.int64)]
    for one, other in _near_pairs(hashes_U, max_distance):
        swap = first_U[one] > first_U[other]
        pairs.append(np.stack([np.where(swap, one, other), np.where(swap, other, one)], axis=1))  # (later, earlier)
    found = np.unique(np.concatenate(pairs), axis=0)
    found = found[first_U[found[:, 0]] >= n_against]
    found = found[np.lexsort((first_U[found[:, 1]], first_U[found[:, 0]]))]
    leader_U = np.arange(len(hashes_U))
    for later, earlier in found.tolist():
        if leader_U[later] == later and leader_U[earlier] == earlier:
            leader_U[later] = earlier
    earlier_N[compared] = first_U[leader_U[inverse]]
    earlier_N[earlier_N == np.arange(len(hashes_N))] = -1
    earlier_N[:n_against] = -1
    return earlier_N


def _near_pairs(hashes_U: np.ndarray, max_distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    # Two hashes that differ in at most d bits agree in at least one of d + 1 bands. Compare only pairs that agree in a band.
    n_bands = max_distance + 1
    edges = [64 * band // n_bands for band in range(n_bands + 1)]
    for low, high in zip(edges, edges[1:], strict=False):
        band_U = (hashes_U >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(band_U)
        hashes, band = hashes_U[order], band_U[order]
        end = np.searchsorted(band, band, side="right")
        active, step = np.arange(len(order)), 1
        while (active := active[active + step < end[active]]).size:
            near = active[np.bitwise_count(hashes[active] ^ hashes[active + step]) <= max_distance]
            yield order[near], order[near + step]
            step += 1


def hashes_url(root: str, shard: RawShard) -> str:
    mark = hashlib.sha256(f"{HASH_RULE} {shard.url} {shard.checksum}".encode()).hexdigest()[:16]
    return objects.join(root, f"duplicates/hashes/{mark}.npz")


def hash_shard(shard: RawShard, out_url: str) -> str:
    """Write the perceptual hash and the key of each sample of a shard, in stored order. Returns `out_url`."""
    hashes, keys = [], []
    for sample in read_raw_shard(shard):
        if isinstance(sample, RawSample):
            keys.append(sample.key)
            hashes.append(_hash(sample))
    buffer = io.BytesIO()
    np.savez(buffer, hashes=np.array(hashes, np.uint64), keys=np.frombuffer("\n".join(keys).encode(), np.uint8))
    objects.write_bytes(out_url, buffer.getvalue())
    return out_url


def _hash(sample: RawSample) -> int:
    try:
        return perceptual_hash(decode_image(sample.image))
    except ImageProblem:
        return NOT_COMPARED


def _load(root: str, shard: RawShard) -> tuple[np.ndarray, list[str]]:
    with np.load(io.BytesIO(objects.read_bytes(hashes_url(root, shard)))) as stored:
        return stored["hashes"], stored["keys"].tobytes().decode().split("\n")


def _draw_examples(url: str, shards: list[RawShard], starts: np.ndarray, hashes_N: np.ndarray, earlier_N: np.ndarray) -> None:
    # Kept image left, dropped image right. One pair per group, its most distant; pairs are sorted by descending distance, so
    # the first rows show whether `max_distance` is too large.
    dropped = np.flatnonzero(earlier_N >= 0)
    distance = np.bitwise_count(hashes_N[dropped] ^ hashes_N[earlier_N[dropped]])
    dropped = dropped[np.argsort(-distance.astype(int), kind="stable")]
    _, first = np.unique(earlier_N[dropped], return_index=True)
    chosen = dropped[np.sort(first)][:N_EXAMPLES]
    wanted: dict[int, Image.Image] = {}
    for index in sorted({*chosen.tolist(), *earlier_N[chosen].tolist()}):
        number = int(np.searchsorted(starts, index, side="right")) - 1
        samples = (sample for sample in read_raw_shard(shards[number]) if isinstance(sample, RawSample))
        wanted[index] = decode_image(next(islice(samples, int(index - starts[number]), None)).image)
    n_columns = 4
    sheet = Image.new("RGB", (n_columns * (2 * TILE + 16), max(1, -(-len(chosen) // n_columns)) * (TILE + 20)), "white")
    for place, index in enumerate(chosen.tolist()):
        left, top = place % n_columns * (2 * TILE + 16), place // n_columns * (TILE + 20)
        for offset, member in ((0, int(earlier_N[index])), (TILE, index)):
            thumbnail = wanted[member].copy()
            thumbnail.thumbnail((TILE - 4, TILE - 4))
            sheet.paste(thumbnail, (left + offset, top))
        bits = int(np.bitwise_count(hashes_N[index] ^ hashes_N[earlier_N[index]]))
        ImageDraw.Draw(sheet).text((left, top + TILE), f"{bits} bits", fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    objects.write_bytes(url, buffer.getvalue())
