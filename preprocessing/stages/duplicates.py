"""Dedup: put near-duplicates, and images that training data and evaluation sets share, on drop lists of raw shards."""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import accumulate, islice
from typing import Final

import numpy as np

from dalle_ds.console import Outcome, progress
from dalle_ds.data.images import ImageProblem
from dalle_ds.data.raw.metadata import N_READERS, iterate_sample_rows, sample_rows
from dalle_ds.data.raw.shards import (
    DROP_LISTS,
    LISTED_REASONS,
    DropLists,
    RawShard,
    list_raw_shards,
    load_drop_lists,
    read_reasons,
    without_drop_list,
)
from dalle_ds.errors import DataError, UserError
from dalle_ds.storage import objects
from dalle_ds.storage.hashing import sha256_of_bytes
from dalle_ds.storage.scratch import scratch_folder
from preprocessing.configs import DuplicatesConfig
from preprocessing.executors.local import n_cores
from preprocessing.metadata.compare_hashes import Duplicate, HashComparison
from preprocessing.metadata.examples import draw_examples

log = logging.getLogger(__name__)

# R duplicates of one step

NEAR_DUPLICATE, IN_EVALUATION, IN_TRAINING = LISTED_REASONS
N_EXAMPLES: Final = 24
DISK_BYTES: Final = 60  # an image, in the scratch folder


def run(config: DuplicatesConfig) -> Outcome:
    """Find images close to an earlier image by the hashes in the metadata, and publish drop lists, which all readers follow.

    Near-duplicates within the training data are on the list of `config.raw`. An image that is both in the training data and in
    an evaluation set is on the evaluation set's list, as in the paper, or with `drop: training` on that of `config.raw`.

    Raises:
        DataError: there are no raw shards made by ingest, they lack metadata, `config.raw` is also an evaluation set, the disk
            is too small, the drop list of an evaluation set cannot be written, or an old drop list is missing or damaged.
    """
    started = time.monotonic()
    if config.raw in config.against:
        raise DataError(f"{config.raw}: is both the training data and an evaluation set, so every image would be dropped")
    roots = [*config.against, config.raw] if config.drop == "training" else [config.raw, *config.against]
    shards_of = {root: [without_drop_list(shard) for shard in list_raw_shards(root)] for root in roots}
    for root, found in shards_of.items():
        if any(shard.checksum is None for shard in found):
            raise DataError(f"{root}: has tars without manifests; convert them to raw shards with `dalle-ds data ingest`")
    placed = [(root, shard) for root in roots for shard in shards_of[root]]
    starts = [0, *accumulate(shard.n_samples or 0 for _, shard in placed)]  # number of each shard's first image
    n_training = sum(shard.n_samples or 0 for shard in shards_of[config.raw])
    publication = _Publication(config, placed, starts)
    with scratch_folder() as folder:
        objects.check_disk_space(folder, DISK_BYTES * starts[-1], "the comparison of hashes")
        with HashComparison(folder, int(config.memory_gib * 2**30), config.workers or n_cores()) as comparison:
            _add_hashes(comparison, placed)
            if config.drop == "training":
                result = comparison.find(config.max_distance, starts[-1] - n_training, "first")
            else:
                result = comparison.find(config.max_distance, n_training, "all first")
            reasons = publication.publish(comparison.duplicates())
            examples = comparison.most_distant(N_EXAMPLES)
    return Outcome(
        {
            "raw": config.raw,
            "images": n_training,
            "evaluation_images": starts[-1] - n_training,
            "too_plain_to_compare": result.n_plain,
            "compared_in_part": result.n_capped,
            "groups": result.n_groups,
            "dropped": dict(sorted(reasons.items())),
            "dropped_by_distance": result.by_distance,
            "examples": _draw(config.raw, examples, [shard for _, shard in placed], starts),
            "seconds": time.monotonic() - started,
        }
    )


def _draw(root: str, examples: list[Duplicate], shards: list[RawShard], starts: list[int]) -> str | None:
    """Draw the picture of examples, which alone reads the tars. The lists are the result, so its failure is only a warning."""
    url = objects.join(root, "duplicates/examples.png")
    try:
        draw_examples(url, examples, shards, starts)
        return url
    except (UserError, OSError, ImageProblem) as error:
        log.warning("no picture of example duplicates: %s", error)
    with suppress(UserError, OSError):
        objects.delete(url)  # of an earlier comparison
    return None


def _add_hashes(comparison: HashComparison, placed: list[tuple[str, RawShard]]) -> None:
    with progress(total=len(placed), what="read hashes", unit="shard") as bar:
        for shard, rows in iterate_sample_rows([shard for _, shard in placed], ["phash"]):
            if len(rows) != shard.n_samples:
                raise DataError(f"{shard.metadata}: {len(rows)} samples, expected {shard.n_samples} as in the manifest")
            comparison.add(rows["phash"].to_numpy())
            bar.update(1)


def _of_shards(pairs: Iterator[np.ndarray], starts: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts arrays of duplicates (R, 2), sorted by image, at the first images of the shards: (number of the shard, its rows)."""
    held = np.zeros((0, 2), np.int64)
    number = 0
    for found in pairs:
        held = np.concatenate([held, found])
        while len(held) and held[-1, 0] >= starts[number + 1]:  # all duplicates of this shard have arrived
            end = int(np.searchsorted(held[:, 0], starts[number + 1]))
            yield number, held[:end]
            held, number = held[end:], number + 1
    yield number, held
    yield from ((empty, held[:0]) for empty in range(number + 1, len(starts) - 1))


class _Publication:
    """Replaces this comparison's records in the drop lists of all roots, shard by shard. Records of other comparisons stay.

    Raises:
        DataError: an old drop list is missing or damaged.
    """

    def __init__(self, config: DuplicatesConfig, placed: list[tuple[str, RawShard]], starts: list[int]) -> None:
        self._config, self._placed, self._starts = config, placed, starts
        self._before = {root: load_drop_lists(root) for root in dict.fromkeys(root for root, _ in placed)}
        # Read before the comparison, which takes long: a missing list is told at once.
        self._others: list[list[dict[str, str]]] = []
        with ThreadPoolExecutor(N_READERS) as pool, progress(total=len(placed), what="old drop lists", unit="shard") as bar:
            for records in pool.map(self._other_records, placed):
                self._others.append(records)
                bar.update(1)
        self._lists: dict[str, dict[str, str]] = {root: {} for root in self._before}
        self._reasons: Counter[str] = Counter()

    def publish(self, pairs: Iterator[np.ndarray]) -> Counter[str]:
        """Write the lists of all shards, then those of the roots that name them. Returns the number of records by reason.

        Raises:
            DataError: the drop list of an evaluation set cannot be written.
        """
        parts = _of_shards(pairs, self._starts)
        with ThreadPoolExecutor(N_READERS) as pool, progress(total=len(self._placed), what="drop lists", unit="shard") as bar:
            while some := list(islice(parts, 4 * N_READERS)):
                written = pool.map(self._write_list, *zip(*some, strict=True))
                for (number, _), (path, reasons) in zip(some, written, strict=True):
                    root, shard = self._placed[number]
                    self._reasons.update(reasons)
                    if path:
                        self._lists[root][shard.name] = path
                bar.update(len(some))
        for root, before in self._before.items():
            after = DropLists(max_distance=self._config.max_distance, lists=self._lists[root])
            if before != after and (before or after.lists or root == self._config.raw):
                with self._told(root):
                    objects.write_bytes(objects.join(root, DROP_LISTS), after.to_json())
        return self._reasons

    def _write_list(self, number: int, pairs_R2: np.ndarray) -> tuple[str | None, Counter[str]]:
        """Write one shard's drop list. Returns its path below the root, None without records, and the new ones by reason."""
        root, shard = self._placed[number]
        new = self._new_records(root, shard, self._starts[number], pairs_R2)
        reasons = Counter(record["reason"] for record in new)
        others = self._others[number]
        keys = {record["key"] for record in others}
        records = others + [record for record in new if record["key"] not in keys]
        if not records:
            return None, reasons
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        path = f"duplicates/{shard.name}-{sha256_of_bytes(data)[:16]}.jsonl"
        with self._told(root):
            objects.write_bytes(objects.join(root, path), data)
        return path, reasons

    def _other_records(self, place: tuple[str, RawShard]) -> list[dict[str, str]]:
        """The records of other comparisons in a shard's old drop list, which stay."""
        root, shard = place
        before = self._before[root]
        if before is None or shard.name not in before.lists:
            return []
        remedy = (
            f"records of other comparisons are lost: remove {objects.join(root, DROP_LISTS)}, then run `dalle-ds data dedup` "
            "for this set, and for each training set that it was compared with"
        )
        records = read_reasons(objects.join(root, before.lists[shard.name]), "drop list", remedy)
        return [record for record in records if not _is_ours(record, root, self._config)]

    def _new_records(self, root: str, shard: RawShard, start: int, pairs_R2: np.ndarray) -> list[dict[str, str]]:
        if not len(pairs_R2):
            return []
        keys = sample_rows(shard, ["key"])["key"].take(pairs_R2[:, 0] - start).to_pylist()
        if root != self._config.raw:
            return [{"key": key, "reason": IN_TRAINING, "training": self._config.raw} for key in keys]
        kept_shards = np.searchsorted(self._starts, pairs_R2[:, 1], side="right") - 1
        reasons = [NEAR_DUPLICATE if self._placed[kept][0] == root else IN_EVALUATION for kept in kept_shards.tolist()]
        return [{"key": key, "reason": reason} for key, reason in zip(keys, reasons, strict=True)]

    @contextmanager
    def _told(self, root: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            is_training = root == self._config.raw
            hint = "" if is_training else "; --drop training drops the images from the training data instead"
            raise DataError(f"{root}: its drop list cannot be written ({error}){hint}") from None


def _is_ours(record: dict[str, str], root: str, config: DuplicatesConfig) -> bool:
    if record["reason"] == IN_TRAINING:
        return record.get("training") == config.raw
    return root == config.raw
