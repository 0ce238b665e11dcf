"""Read parquet files batch by batch, encoded images with captions or texts alone, and count every damaged row."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute  # noqa: F401 (makes pa.compute available)
import pyarrow.parquet as pq

from dalle_ds.data.images import extension_of
from dalle_ds.data.raw.captions import draw_caption
from dalle_ds.data.raw.sample import MAX_MEMBER_BYTES, Dropped, RawSample, short_key
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from preprocessing.configs import ColumnsConfig

BATCH_ROWS: Final = 32  # rows in memory at the same time, with their images
BATCH_BYTES: Final = 64 * 2**20  # fewer rows, if their images are larger on average
TEXT_ROWS: Final = 1024  # rows in memory of a table without images
MAX_ROWS: Final = 10**8  # a footer with more rows is treated as damaged
FREE_BYTES: Final = 256 * 2**20  # a column of a row group may unpack to this size with any ratio
MAX_EXPANSION: Final = 50  # encoded images hardly shrink; a bomb shrinks ten thousandfold


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
                yield Dropped(short_key(name), "damaged shard")
                return
            with file:
                if file.metadata.num_rows > MAX_ROWS:
                    yield Dropped(short_key(name), "damaged shard")
                    return
                yield from _read_rows(file, name, _pick(file, columns.image, url), _pick(file, columns.caption, url))
    except FileNotFoundError:
        raise DataError(f"{url}: the file does not exist") from None


def has_images(url: str, columns: ColumnsConfig) -> bool:
    """Whether the file has an image column: a log of downloads has none. A damaged file counts as one with images."""
    with objects.local_copy(url) as path:
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError):
            return True
    found = _find(schema, columns.image)
    return found is not None and _is_bytes(_value_type(schema.field(found).type))


def text_rows(file: pq.ParquetFile, columns: list[str]) -> Iterator[dict[str, str | list[str | None] | None] | None]:
    """The rows of a table of texts, with lists for list columns. A row that is damaged or too large is None."""
    for group in range(file.num_row_groups):
        n_left = file.metadata.row_group(group).num_rows
        reason, _ = _batch_rows(file.metadata.row_group(group), set(columns))
        with suppress(pa.ArrowException, OSError):
            for batch in () if reason else file.iter_batches(TEXT_ROWS, row_groups=[group], columns=columns):
                texts = [_values(_as_text(batch[column])) for column in columns]
                for values in zip(*texts, strict=True):
                    n_left -= 1
                    decoded = [[text if text is None else text.decode(errors="replace") for text in found] for found in values]
                    yield {
                        column: found if _is_list(batch[column].type) else found[0]
                        for column, found in zip(columns, decoded, strict=True)
                    }
        yield from [None] * n_left


def _as_text(column: pa.Array) -> pa.Array:
    return column if _is_bytes(_value_type(column.type)) else column.cast(pa.string())  # a group may be a number


def _read_rows(file: pq.ParquetFile, name: str, image: str, caption: str) -> Iterator[RawSample | Dropped]:
    row = 0
    for group in range(file.num_row_groups):
        end = row + file.metadata.row_group(group).num_rows
        reason, n_rows = _batch_rows(file.metadata.row_group(group), {image, caption})
        try:
            batches = file.iter_batches(n_rows, row_groups=[group], columns=[image, caption]) if not reason else ()
            for batch in batches:
                for data, texts in zip(_values(batch[image]), _values(batch[caption]), strict=True):
                    yield _sample(short_key(f"{name}/{row:08d}"), data, texts)
                    row += 1
        except (pa.ArrowException, OSError):
            pass  # a damaged page: the remaining rows of its row group are dropped, and the next row group is read
        for lost in range(row, end):
            yield Dropped(short_key(f"{name}/{lost:08d}"), reason or "damaged shard")
        row = end


def _batch_rows(group: Any, names: set[str]) -> tuple[str, int]:
    # Returns (reason to skip the row group or "", rows per batch).
    chunks = [group.column(number) for number in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in names]
    if any(chunk.total_uncompressed_size > max(FREE_BYTES, MAX_EXPANSION * chunk.total_compressed_size) for chunk in chunks):
        return "too large", BATCH_ROWS
    n_bytes = sum(chunk.total_uncompressed_size for chunk in chunks)
    if n_bytes > BATCH_BYTES and any(chunk.has_dictionary_page for chunk in chunks):
        return "", 1  # many rows may refer to one large image of the dictionary
    return "", max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(1, n_bytes)))


def _sample(key: str, images: list[bytes | None], captions: list[bytes | None]) -> RawSample | Dropped:
    found = [image for image in images if image]
    texts = [caption for caption in captions if caption is not None]
    if len(found) != 1:
        return Dropped(key, "several images" if found else "no image")
    if len(found[0]) > MAX_MEMBER_BYTES:
        return Dropped(key, "too large")
    if not texts:
        return Dropped(key, "no caption")
    try:
        text = draw_caption([caption.decode() for caption in texts], key)
    except UnicodeDecodeError:
        return Dropped(key, "unreadable caption")
    return RawSample(key, key, text, found[0], extension_of(found[0]) or "jpg")


def _values(column: pa.Array) -> list[list[bytes | None]]:
    # The values of each row: one, or those of a list. Read as bytes: a string column may contain invalid UTF-8, which Arrow
    # does not check.
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_list(column.type):
        flat = iter(_plain(column.flatten()))
        return [[next(flat) for _ in range(length or 0)] for length in pa.compute.list_value_length(column).to_pylist()]
    return [[value] for value in _plain(column)]


def _plain(column: pa.Array) -> list[bytes | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_struct(column.type):
        column = pa.compute.struct_field(column, "bytes")
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.binary_view())
    return column.cast(pa.large_binary()).to_pylist()


def _pick(file: pq.ParquetFile, names: tuple[str, ...], url: str) -> str:
    schema = file.schema_arrow
    found = _find(schema, names)
    if found is None:
        field = "image" if "image" in names or "jpg" in names else "caption"
        raise DataError(
            f"{url}: the columns are {schema.names}; expected one of {list(names)}; name another with ingest.columns.{field}"
        )
    if schema.names.count(found) > 1:
        raise DataError(f"{url}: column {found!r} stands {schema.names.count(found)} times; expected it once")
    kind = _value_type(schema.field(found).type)
    if not _is_bytes(kind):
        raise DataError(f"{url}: column {found!r} has the type {kind}; expected bytes or text, or lists of them")
    return found


def _find(schema: pa.Schema, names: tuple[str, ...]) -> str | None:
    # Upper and lower case are equal if the exact name is missing: LAION writes TEXT.
    exact = [name for name in names if name in schema.names]
    similar = [column for name in names for column in schema.names if column.lower() == name.lower()]
    return next(iter(exact + similar), None)


def _value_type(kind: pa.DataType) -> pa.DataType:
    while True:
        if _is_list(kind) or pa.types.is_dictionary(kind):
            kind = kind.value_type
        elif pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        else:
            return kind


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    of = pa.types
    checks = (of.is_binary, of.is_large_binary, of.is_binary_view, of.is_string, of.is_large_string, of.is_string_view)
    return any(check(kind) for check in checks)
