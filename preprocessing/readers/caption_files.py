"""Read captions.jsonl, .csv, .tsv and .parquet: each line names an image with its captions, or is counted with a reason."""

import csv
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from dalle_ds.data.raw.captions import CAPTION_FIELDS, CaptionProblem, captions_in, field_of, group_in
from dalle_ds.data.raw.sample import MAX_TEXT_BYTES
from dalle_ds.storage import objects
from dalle_ds.storage.text import BYTE_ORDER_MARK, encoding_of
from preprocessing.readers.parquet import text_rows

# metadata.*: as Hugging Face's imagefolder. Paths in a file are relative to its folder.
CAPTION_FILES: Final = tuple(
    f"{stem}.{kind}" for stem in ("captions", "metadata") for kind in ("jsonl", "tsv", "csv", "parquet")
)
FILE_FIELDS: Final = ("file", "file_name", "filename", "image")
BAD_LINE: Final = "bad caption line"
NO_COLUMN: Final = "no caption column"
NumberedLine = tuple[int, str | None]  # from 1; None: longer than MAX_TEXT_BYTES
MAX_RECORD_LINES: Final = 100  # a quoted csv field may contain line ends; an open quote would take in the whole file

csv.field_size_limit(MAX_TEXT_BYTES)  # the default is 131,072 characters, and a longer field would be an error


@dataclass(frozen=True, slots=True)
class CaptionLine:
    """One line, or one row. `source` is its file and number. `path` is the image as written; empty if there is a `reason`."""

    source: str
    path: str = ""
    captions: tuple[str, ...] = ()
    group: str = ""
    reason: str | None = None


def is_caption_file(path: str) -> bool:
    return PurePosixPath(path).name.lower() in CAPTION_FILES


def read_caption_file(url: str, name: str, is_image: Callable[[str], bool]) -> tuple[list[CaptionLine], str]:
    """The lines of a file. `name` starts their sources. `is_image` tells whether the folder has an image of this name.

    Memory: the lines that are kept, and one further line of at most MAX_TEXT_BYTES.

    Returns:
        (lines, what is wrong with the whole file or "").
    """
    kind = name.lower().rpartition(".")[2]
    with objects.local_copy(url) as file:
        if kind == "parquet":
            return _parquet_lines(file, name)
        with file.open("rb") as opened:
            encoding = encoding_of(opened.read(4))
        # A JSON line ends at \n alone. Tables may come from old Macs, whose lines end at \r.
        newline = "\n" if kind == "jsonl" else ""
        with Path(file).open(encoding=encoding, errors="replace", newline=newline) as text:
            if kind == "jsonl":
                return _json_lines(text, name)
            return _table_lines(text, name, kind, is_image)


def _json_lines(text: IO[str], name: str) -> tuple[list[CaptionLine], str]:
    lines, first = [], None
    for number, line in _lines(text):
        if line is not None and not line.strip():
            continue
        first = line if first is None else first
        lines.append(_caption_line(f"{name}:{number}", _parse_json(line) if line is not None else None))
    if any(line.path for line in lines) or first is None:
        return lines, ""
    expected = '{"file": "NAME.jpg", "caption": "..."} and, if samples belong together, "group"'
    return lines, f"no line names an image with its caption; the first is {first.strip()[:100]!r}; expected {expected}"


def _table_lines(text: IO[str], name: str, kind: str, is_image: Callable[[str], bool]) -> tuple[list[CaptionLine], str]:
    # In tsv files a quote is an ordinary character; csv files quote as Excel does, which separates by ; in many countries.
    header = next(_lines(text), (1, ""))[1] or ""
    if kind == "tsv":
        separator, columns = "\t", header.rstrip("\r\n").split("\t")
    else:
        separator = max(",;\t", key=header.count)  # the first of equals
        columns = next(csv.reader([header], delimiter=separator), [])
    columns = [column.strip() for column in columns]
    if problem := _column_problem(columns):
        return [CaptionLine(name, reason=NO_COLUMN)], f"the first line has the columns {columns}, {problem}"
    if kind == "tsv":
        rows = ((n, line.rstrip("\r\n").split("\t") if line is not None else None) for n, line in _lines(text, 2))
    else:
        rows = _csv_rows(
            _lines(text, 2), separator, lambda row: is_image(str(field_of(_record(columns, row) or {}, FILE_FIELDS)))
        )
    lines = [
        _caption_line(f"{name}:{number}", _record(columns, row) if row is not None else None)
        for number, row in rows
        if row is None or any(row)
    ]
    if any(line.path for line in lines) or not lines:
        return lines, ""
    return lines, f"no line has a value for each of the columns {columns} and none beyond them; the first is {lines[0].source}"


def _column_problem(columns: list[str]) -> str:
    expected = "expected `file`, `caption` and, if samples belong together, `group`"
    for names in (FILE_FIELDS, CAPTION_FIELDS):
        found = field_of({column: column for column in columns}, names)
        if found is None:
            return expected
        if columns.count(found) > 1:
            return f"and {found!r} stands twice; {expected}"
    return ""


def _parquet_lines(file: Path, name: str) -> tuple[list[CaptionLine], str]:
    try:
        table = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError):
        return [CaptionLine(name, reason=BAD_LINE)], "damaged parquet file"
    with table:
        columns = table.schema_arrow.names
        if problem := _column_problem(columns):
            return [CaptionLine(name, reason=NO_COLUMN)], f"the columns are {columns}, {problem}"
        fields = (FILE_FIELDS, CAPTION_FIELDS, ("group",))
        used = [column for names in fields if (column := field_of({column: column for column in columns}, names))]
        return [_caption_line(f"{name}:{number}", row) for number, row in enumerate(text_rows(table, used), 1)], ""


def _csv_rows(
    lines: Iterator[NumberedLine], separator: str, names_image: Callable[[list[str]], bool]
) -> Iterator[tuple[int, list[str] | None]]:
    # Yields (number of the first line, row). The row is None if the line is bad; then the next line starts a row again.
    ahead: deque[NumberedLine] = deque()
    while first := (ahead.popleft() if ahead else next(lines, None)):
        used = [first]

        def feed(used: list[NumberedLine] = used) -> Iterator[str]:
            while used[-1][1] is not None:
                yield used[-1][1]
                following = (ahead.popleft() if ahead else next(lines, None)) if len(used) < MAX_RECORD_LINES else None
                if following is None:
                    return
                used.append(following)

        try:
            row = next(csv.reader(feed(), strict=True, delimiter=separator), None)
        except csv.Error:
            row = None
        # A row of several lines is one caption with line ends, or an open quote that takes in the next images' lines.
        if len(used) > 1 and any(
            line is None or names_image(next(csv.reader([line], delimiter=separator), [])) for _, line in used[1:]
        ):
            row = None
        if row is None:
            ahead.extendleft(reversed(used[1:]))
        yield first[0], row


def _record(columns: list[str], row: list[str]) -> dict[str, str] | None:
    # Surplus fields come from an unquoted separator inside a caption, which would be cut. Excel writes empty ones.
    return None if any(row[len(columns) :]) else dict(zip(columns, row, strict=False))


def _caption_line(source: str, record: object) -> CaptionLine:
    if not isinstance(record, Mapping):
        return CaptionLine(source, reason=BAD_LINE)
    path, value = field_of(record, FILE_FIELDS), field_of(record, CAPTION_FIELDS)
    try:
        captions, group = captions_in(value), group_in(record)
    except CaptionProblem:
        return CaptionLine(source, reason=BAD_LINE)
    if not isinstance(path, str) or not path.strip() or value is None:
        return CaptionLine(source, reason=BAD_LINE)
    try:
        "".join([path, *captions, group]).encode()
    except UnicodeEncodeError:  # an unpaired surrogate: JSON can express it, UTF-8 cannot
        return CaptionLine(source, reason="damaged caption")
    return CaptionLine(source, path.strip().lstrip(BYTE_ORDER_MARK), tuple(captions), group)


def _lines(text: IO[str], first: int = 1) -> Iterator[NumberedLine]:
    # Yields (number, line). A line that is too long is None.
    number = first
    while line := text.readline(MAX_TEXT_BYTES):
        is_whole = len(line) < MAX_TEXT_BYTES or line.endswith(("\n", "\r"))
        rest = "" if is_whole else text.readline(MAX_TEXT_BYTES)
        while rest and not rest.endswith(("\n", "\r")):
            rest = text.readline(MAX_TEXT_BYTES)
        yield number, line if is_whole else None
        number += 1


def _parse_json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
