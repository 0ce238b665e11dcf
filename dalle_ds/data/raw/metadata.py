"""Metadata of raw shards: a parquet file beside each tar, so that passes over captions and hashes never read the pixels.

A file has one row for each input of the shard, in stored order. `reason` is null in the rows of samples, and in the other rows
all but `key` and `reason` are null.
"""

import io
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dalle_ds.data.manifest import StoredFile
from dalle_ds.data.raw.shards import IN_TRAINING, RawSample, RawShard, read_drop_list, read_raw_shard
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.hashing import sha256_of_bytes, sha256_of_file

SCHEMA: Final = pa.schema(
    {
        "key": pa.string(),
        "caption": pa.string(),
        "group": pa.string(),
        "width": pa.int32(),  # of the decoded image, in pixels
        "height": pa.int32(),
        "language": pa.string(),  # null: too short to classify
        "language_score": pa.float32(),
        "phash": pa.uint64(),  # 64-bit perceptual hash; 0: too little contrast to compare
        "offset": pa.int64(),  # of the encoded image in the tar
        "bytes": pa.int32(),  # of the encoded image
        "crc32": pa.uint32(),  # of the encoded image
        "reason": pa.string(),  # why the input was dropped
    }
)
CAPTIONS: Final = ("key", "caption", "group")
"""Columns that tars without metadata have too."""
N_READERS: Final = 16  # the cost of a small file on object storage is latency


def write_metadata(rows: dict[str, list[object]], file: Path, path: str) -> StoredFile:
    """Write columns of `SCHEMA` to a local file. Equal rows give equal bytes. `path` is the path below the root.

    Raises:
        ValueError: a column is missing, or the columns have different lengths.
    """
    table = pa.table(rows, schema=SCHEMA)
    delta = dict.fromkeys(("phash", "crc32"), "PLAIN") | {"offset": "DELTA_BINARY_PACKED", "key": "DELTA_BYTE_ARRAY"}
    pq.write_table(
        table,
        file,
        compression="zstd",
        use_dictionary=["language", "language_score", "reason", "width", "height"],
        column_encoding=delta,
        write_statistics=False,
    )
    return StoredFile(path=path, bytes=file.stat().st_size, checksum=sha256_of_file(file))


def read_metadata(shard: RawShard, columns: Sequence[str]) -> pa.Table:
    """Some columns of all rows.

    Raises:
        DataError: the shard has no metadata, or the file is missing or is not the one that the manifest names.
    """
    if shard.metadata is None or shard.metadata_checksum is None:
        raise DataError(
            f"{shard.url}: has no metadata of its images (captions, sizes, hashes); `dalle-ds data ingest` again, with the "
            "same settings, adds it to finished shards"
        )
    try:
        data = objects.read_bytes(shard.metadata)
    except FileNotFoundError:
        raise DataError(f"{shard.metadata}: the manifest names this object, but it does not exist") from None
    digest = sha256_of_bytes(data)
    if digest != shard.metadata_checksum:
        raise DataError(f"{shard.metadata}: SHA-256 {digest}, expected {shard.metadata_checksum} as in its manifest")
    return pq.read_table(io.BytesIO(data), columns=list(columns), use_threads=False)


def sample_rows(shard: RawShard, columns: Sequence[str], *, with_overlap: bool = False) -> pa.Table:
    """Some columns of the samples that `read_raw_shard` yields, in its order. `with_overlap` is as there.

    The tar is read only if the shard has no metadata and `columns` are among CAPTIONS.

    Raises:
        DataError: as `read_metadata`, or as `read_raw_shard` if the tar is read.
    """
    if shard.metadata is None and set(columns) <= set(CAPTIONS):
        found = (sample for sample in read_raw_shard(shard, with_overlap=with_overlap) if isinstance(sample, RawSample))
        texts = [{name: getattr(sample, name) for name in columns} for sample in found]
        return pa.Table.from_pylist(texts, pa.schema([SCHEMA.field(name) for name in columns]))
    rows = read_metadata(shard, dict.fromkeys([*columns, "key", "reason"]))
    rows = rows.filter(pc.is_null(rows["reason"]))
    if shard.drop_list:
        listed = read_drop_list(shard.drop_list)
        dropped = [key for key, reason in listed.items() if not (with_overlap and reason == IN_TRAINING)]
        rows = rows.filter(pc.invert(pc.is_in(rows["key"], pa.array(dropped, pa.string()))))
    return rows.select(list(columns))


def iterate_sample_rows(
    shards: Iterable[RawShard], columns: Sequence[str], *, with_overlap: bool = False
) -> Iterator[tuple[RawShard, pa.Table]]:
    """`sample_rows` of each shard, in order. Files of metadata are read ahead; tars are read one at a time."""
    shards = list(shards)
    n_readers = N_READERS if all(shard.metadata for shard in shards) else 1
    ahead: deque[tuple[RawShard, Future[pa.Table]]] = deque()
    with ThreadPoolExecutor(n_readers) as pool:
        try:
            for shard in shards:
                ahead.append((shard, pool.submit(sample_rows, shard, columns, with_overlap=with_overlap)))
                if len(ahead) > 2 * n_readers:
                    first, rows = ahead.popleft()
                    yield first, rows.result()
            while ahead:
                first, rows = ahead.popleft()
                yield first, rows.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_image(shard: RawShard, offset: int, n_bytes: int, crc32: int) -> bytes:
    """The encoded image of one row, by one ranged read of the tar.

    Raises:
        DataError: the tar is missing, or has other bytes there.
    """
    try:
        data = objects.read_range(shard.url, offset, n_bytes)
    except FileNotFoundError:
        raise DataError(f"{shard.url}: the shard does not exist") from None
    if zlib.crc32(data) != crc32:
        raise DataError(
            f"{shard.url}: {n_bytes} bytes at offset {offset} have CRC-32 {zlib.crc32(data):08x}, expected {crc32:08x} as in "
            "its metadata; the shard is damaged"
        )
    return data
