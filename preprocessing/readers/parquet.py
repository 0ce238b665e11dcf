"""Read parquet files of encoded images with captions batch by batch, and count every damaged row."""

from collections.abc import Iterator
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from dalle_ds.data.images import extension_of
from dalle_ds.data.raw import MAX_MEMBER_BYTES, Dropped, RawSample
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from preprocessing.configs import ColumnsConfig

BATCH_ROWS: Final = 32  # rows in memory at the same time, with their images
MAX_ROWS: Final = 10**8  # a footer with more rows is treated as damaged


def read_parquet(url: str, name: str, columns: ColumnsConfig) -> Iterator[RawSample | Dropped]:
    """The rows of a file in stored order. A row that cannot become a sample is a Dropped. Keys are NAME/ROW.

    Memory: a few pages of the file. A writer with default settings puts up to 1024 images into a page.

    Raises:
        DataError: the file or one of its columns is missing, or a column has the wrong type.
    """
    try:
        with objects.local_copy(url) as path:
            try:
                # With buffer_size, each column is read page by page; otherwise a whole row group of images is in memory.
                file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            except (pa.ArrowException, OSError):
                yield Dropped(name, "damaged shard")
                return
            if file.metadata.num_rows > MAX_ROWS:
                yield Dropped(name, "damaged shard")
                return
            with file:
                yield from _read_rows(file, name, _pick(file, columns.image, url), _pick(file, columns.caption, url))
    except FileNotFoundError:
        raise DataError(f"{url}: the file does not exist") from None


def _read_rows(file: pq.ParquetFile, name: str, image: str, caption: str) -> Iterator[RawSample | Dropped]:
    row = 0
    for group in range(file.num_row_groups):
        end = row + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[image, caption]):
                for data, text in zip(_values(batch[image]), _values(batch[caption]), strict=True):
                    yield _sample(f"{name}/{row:08d}", data, text)
                    row += 1
        except (pa.ArrowException, OSError):
            pass  # a damaged page: the remaining rows of its row group are dropped, and the next row group is read
        for lost in range(row, end):
            yield Dropped(f"{name}/{lost:08d}", "damaged shard")
        row = end


def _sample(key: str, image: Any, caption: Any) -> RawSample | Dropped:
    if not image:
        return Dropped(key, "no image")
    if len(image) > MAX_MEMBER_BYTES:
        return Dropped(key, "too large")
    if caption is None:
        return Dropped(key, "no caption")
    try:
        text = caption.decode()
    except UnicodeDecodeError:
        return Dropped(key, "unreadable caption")
    return RawSample(key, key, text.strip(), image, extension_of(image))


def _values(column: pa.Array) -> list[bytes | None]:
    # Read as bytes: a string column may contain invalid UTF-8, which Arrow does not check.
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_struct(column.type):
        column = column.field("bytes")
    return column.cast(pa.large_binary()).to_pylist()


def _pick(file: pq.ParquetFile, names: tuple[str, ...], url: str) -> str:
    schema = file.schema_arrow
    found = next((name for name in names if name in schema.names), None)
    if found is None:
        raise DataError(f"{url}: the columns are {schema.names}; expected one of {list(names)}")
    kind = schema.field(found).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(
        check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string)
    ):
        raise DataError(f"{url}: column {found!r} has the type {kind}; expected bytes or text")
    return found
