"""Duplicates among perceptual hashes, in bounded memory: DuckDB sorts and joins on disk, `near_pairs` compares buckets.

1. Equal hashes: `hashes` has each distinct hash with its first image.
2. Near hashes: `hashes` is sorted by each band of bits in turn, and `pairs` collects the pairs of its buckets.
3. Which images go: a pass over the pairs in the order of their later image. An image whose hash is near that of an earlier
   image that stays is a duplicate of the first such image.

Images are compared with kept images only, as union-find would not: a chain of small differences would join images that do not
resemble each other, and drop all but one.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Final, Literal, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from dalle_ds.console import progress
from preprocessing.filters.perceptual_hash import NOT_COMPARED
from preprocessing.metadata.near_pairs import bands, near_pairs

# N images, R rows of one step

ROWS: Final = 1 << 20  # rows at a time
MAX_BUCKET: Final = 1 << 23  # hashes of one bucket that are held in memory; later ones are left out of this band
THREAD_BYTES: Final = 128 << 20  # that DuckDB needs for each thread
OWN_BYTES: Final = 768 << 20  # what Python, numpy and Arrow hold besides DuckDB's buffers, for ROWS rows and a byte an image


class Found(NamedTuple):
    """Counts of a comparison."""

    n_groups: int
    """Number of kept images that have duplicates."""
    by_distance: dict[int, int]
    """Number of duplicates by the number of differing bits."""
    n_plain: int
    """Number of images without enough contrast to compare."""
    n_capped: int
    """Number of hashes that were compared with a part of a bucket only."""


class Duplicate(NamedTuple):
    """An image, the kept image that it duplicates, and the number of bits in which their hashes differ."""

    image: int
    kept: int
    distance: int


class HashComparison:
    """Images by consecutive numbers, compared by their hashes. Use it as a context manager.

    Args:
        folder: local folder for the database and for what exceeds memory: about 60 bytes an image.
        memory_bytes: DuckDB's memory and OWN_BYTES together.
        n_threads: number of threads if there is memory for so many: THREAD_BYTES of DuckDB's memory for each.
    """

    def __init__(self, folder: Path, memory_bytes: int, n_threads: int) -> None:
        self.n_images = 0
        self._db = duckdb.connect(str(folder / "hashes.duckdb"))
        db_bytes = max(2 * THREAD_BYTES, memory_bytes - OWN_BYTES)
        self._db.execute(f"SET memory_limit = '{db_bytes}B'")
        spill = str(folder / "spill").replace("'", "''")  # the path of a person's TMPDIR may have an apostrophe
        self._db.execute(f"SET temp_directory = '{spill}'")
        self._db.execute(f"SET threads = {min(n_threads, db_bytes // THREAD_BYTES)}")
        self._db.execute("SET preserve_insertion_order = false")
        self._db.execute("SET enable_progress_bar = false")  # it writes to stdout, where the summary goes
        self._db.execute("CREATE TABLE images (image BIGINT, hash UBIGINT)")

    def __enter__(self) -> "HashComparison":
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def add(self, hashes_R: np.ndarray) -> None:
        """Add the next images by their hashes, uint64."""
        images_R = np.arange(self.n_images, self.n_images + len(hashes_R))
        self._insert("images", image=images_R, hash=hashes_R.astype(np.uint64))
        self.n_images += len(hashes_R)

    def find(self, max_distance: int, n_first: int, kept: Literal["first", "all first"]) -> Found:
        """Compare all images.

        Args:
            n_first: number of the images that come first.
            kept: "first": the first images are never dropped, the others if they resemble an earlier kept image.
                "all first": the first images are dropped if they resemble an earlier kept one. The others are dropped if they
                resemble any of the first, dropped or not, but not if they resemble one another.
        """
        self._db.execute(
            "CREATE TABLE hashes AS SELECT hash, min(image) AS first, count(*) AS n FROM images "
            f"WHERE hash <> {NOT_COMPARED} GROUP BY hash"
        )
        self._db.execute("CREATE TABLE pairs (later BIGINT, earlier BIGINT, distance UTINYINT)")
        # At a distance of 0, equal hashes are all there is to find.
        n_capped = sum(self._compare(band, max_distance) for band in bands(64, max_distance) if max_distance)
        self._db.execute("CREATE TABLE near (first BIGINT, kept BIGINT, distance UTINYINT)")
        self._keep_earliest(n_first, kept)
        self._list_duplicates(n_first, kept)
        by_distance = self._db.execute("SELECT distance, count(*) FROM duplicates GROUP BY 1 ORDER BY 1").fetchall()
        return Found(
            n_groups=self._number("SELECT count(DISTINCT kept) FROM duplicates"),
            by_distance=dict(by_distance),
            n_plain=self._number(f"SELECT count(*) FROM images WHERE hash = {NOT_COMPARED}"),
            n_capped=n_capped,
        )

    def duplicates(self) -> Iterator[np.ndarray]:
        """After `find`: the duplicates in ascending order, as arrays (R, 2) of image and kept image."""
        for rows in self._stream("SELECT image, kept FROM duplicates ORDER BY image", "image", "kept"):
            yield np.stack(rows, axis=1)

    def most_distant(self, n: int) -> list[Duplicate]:
        """After `find`: the most distant duplicate of each kept image, of the `n` kept images with the most distant ones."""
        found = self._db.execute(
            "SELECT arg_min(image, (-distance::INTEGER, image)) AS image, kept, max(distance) AS distance FROM duplicates "
            "GROUP BY kept ORDER BY distance DESC, image LIMIT ?",
            [n],
        )
        return [Duplicate(*row) for row in found.fetchall()]

    def _compare(self, band: tuple[int, int], max_distance: int) -> int:
        """Fill `pairs` from the buckets of one band. Returns the number of hashes compared with a part of a bucket only."""
        low, high = band
        value = f"(hash >> {low}) & {2 ** (high - low) - 1}"
        n_hashes, n_capped = self._number("SELECT count(*) FROM hashes"), 0
        held_hashes, held_images = np.zeros(0, np.uint64), np.zeros(0, np.int64)  # of the last bucket, which may go on
        rows = self._stream(f"SELECT hash, first FROM hashes ORDER BY {value}, first", "hash", "first")
        with progress(total=n_hashes, what=f"compare bits {low} to {high - 1}", unit="hash") as bar:
            for hashes_R, images_R in chain(rows, [(held_hashes, held_images)]):  # the empty end completes the last bucket
                hashes, images = np.concatenate([held_hashes, hashes_R]), np.concatenate([held_images, images_R])
                values = (hashes >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
                end = int(np.searchsorted(values, values[-1])) if len(hashes_R) else len(hashes)
                pairs = near_pairs(hashes[:end], images[:end], band, max_distance)
                n_capped += pairs.n_capped + max(0, len(hashes) - end - MAX_BUCKET)
                held_hashes, held_images = hashes[end:][:MAX_BUCKET], images[end:][:MAX_BUCKET]
                self._insert("pairs", later=pairs.later_P, earlier=pairs.earlier_P, distance=pairs.distance_P)
                bar.update(len(hashes_R))
        return n_capped

    def _keep_earliest(self, n_first: int, kept: str) -> None:
        is_dropped_N = np.zeros(self.n_images, bool)
        last = -1
        first_to_drop = n_first if kept == "first" else 0
        query = f"SELECT later, earlier, distance FROM pairs WHERE later >= {first_to_drop} ORDER BY later, earlier"
        for rows in self._stream(query, "later", "earlier", "distance"):
            found = []
            for later, earlier, distance in zip(*(column.tolist() for column in rows), strict=True):
                if later == last:
                    continue
                if kept == "all first" and later >= n_first:
                    is_duplicate = earlier < n_first
                else:
                    is_duplicate = not is_dropped_N[earlier]
                if is_duplicate:
                    last = later
                    is_dropped_N[later] = True
                    found.append((later, earlier, distance))
            if found:
                first, kept_image, distance = np.array(found).T
                self._insert("near", first=first, kept=kept_image, distance=distance.astype(np.uint8))

    def _list_duplicates(self, n_first: int, kept: str) -> None:
        # Of two images with equal hashes, the later one has the duplicate of the first, or the first itself.
        choice = "coalesce(near.kept, hashes.first)"
        wanted = f"image >= {n_first}"
        if kept == "all first":
            equal = f"image >= {n_first} AND hashes.first < {n_first}"
            choice = f"CASE WHEN {equal} THEN hashes.first ELSE {choice} END"
            wanted = f"image < {n_first} OR kept < {n_first}"
        self._db.execute(
            f"CREATE TABLE duplicates AS SELECT image, kept, CASE WHEN kept = first THEN 0 ELSE distance END AS distance FROM "
            f"(SELECT image, hashes.first, {choice} AS kept, near.distance FROM images JOIN hashes USING (hash) "
            f"LEFT JOIN near ON near.first = hashes.first WHERE hashes.n > 1 OR near.kept IS NOT NULL) "
            f"WHERE image <> kept AND ({wanted})"
        )

    def _insert(self, table: str, **columns: np.ndarray) -> None:
        if len(next(iter(columns.values()))):
            rows = pa.table(columns)
            self._db.register("rows", rows)
            self._db.execute(f"INSERT INTO {table} SELECT * FROM rows")
            self._db.unregister("rows")

    def _stream(self, query: str, *columns: str) -> Iterator[tuple[np.ndarray, ...]]:
        # A cursor of its own: `_insert` may run between two steps.
        with self._db.cursor() as cursor:
            for batch in cursor.sql(query).to_arrow_reader(ROWS):
                yield tuple(batch[name].to_numpy() for name in columns)

    def _number(self, query: str) -> int:
        ((number,),) = self._db.execute(query).fetchall()
        return int(number)
