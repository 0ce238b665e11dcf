"""Read a folder of images with captions, and report every image without a caption and every caption without an image."""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from dalle_ds.data.raw import IMAGE_EXTENSIONS
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.text import decode_text, lines_of

CAPTION_FILES: Final = ("captions.jsonl", "captions.tsv", "captions.csv")
FILE_COLUMNS: Final = ("file", "file_name", "filename", "image")
CAPTION_COLUMNS: Final = ("caption", "text")


@dataclass(frozen=True)
class Entry:
    """One input sample. If `reason` is set, the sample is already dropped."""

    key: str
    group: str
    caption: str
    url: str
    bytes: int
    reason: str | None = None


def read_folder(folder_url: str) -> list[Entry]:
    """All samples of a folder, sorted by path.

    Captions come from captions.jsonl ({"file", "caption", "group"}), captions.tsv or captions.csv (the same columns), or from
    NAME.txt next to NAME.jpg. Caption lines without an image and images without a caption become entries with a reason.

    Raises:
        DataError: the folder, its images or its captions are missing.
    """
    files = {url.removeprefix(folder_url).lstrip("/"): (url, size) for url, size in objects.list_sizes(folder_url).items()}
    if not files:
        raise DataError(f"{folder_url}: the folder does not exist or is empty; expected images with captions")
    images = {path: found for path, found in files.items() if _extension(path) in IMAGE_EXTENSIONS}
    if not images:
        raise DataError(f"{folder_url}: no images among its {len(files)} files; expected {', '.join(IMAGE_EXTENSIONS)}")
    caption_file = next((name for name in CAPTION_FILES if name in files), None)
    if caption_file:
        lines = list(_read_captions(objects.join(folder_url, caption_file)))
    else:
        lines = list(_read_text_files(images, files))
    if not any(line.path for line in lines):
        raise DataError(f"{folder_url}: no captions: expected {', '.join(CAPTION_FILES)}, or NAME.txt next to each image")
    return _pair(images, lines)


@dataclass(frozen=True)
class _Line:
    source: str  # file and line of the caption, for the list of dropped samples
    path: str = ""
    caption: str = ""
    group: str = ""
    reason: str | None = None


def _pair(images: dict[str, tuple[str, int]], lines: list[_Line]) -> list[Entry]:
    entries: list[Entry] = []
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for path in sorted(images):
        key = base = re.sub(r"[^\w-]+", "_", str(PurePosixPath(path).with_suffix("")))  # WebDataset cuts a key at its first dot
        number = 2
        while key in taken:
            key, number = f"{base}-{number}", number + 1
        keys[path] = key
        taken.add(key)
    captioned: set[str] = set()
    for line in lines:
        if line.reason or line.path not in images or line.path in captioned:
            reason = line.reason or ("second caption" if line.path in captioned else "missing image")
            entries.append(Entry(line.source, line.source, line.caption, "", 0, reason))
            continue
        captioned.add(line.path)
        url, size = images[line.path]
        key = keys[line.path]
        entries.append(Entry(key, line.group or key, line.caption, url, size))
    for path in images.keys() - captioned:
        url, size = images[path]
        entries.append(Entry(keys[path], keys[path], "", url, size, "no caption"))
    return sorted(entries, key=lambda entry: (entry.url, entry.key))


def _extension(path: str) -> str:
    return PurePosixPath(path).suffix.lower().lstrip(".")


def _read_text_files(images: dict[str, tuple[str, int]], files: dict[str, tuple[str, int]]) -> Iterator[_Line]:
    for path in sorted(images):
        text_path = str(PurePosixPath(path).with_suffix(".txt"))
        if text_path in files:
            yield _Line(text_path, path, decode_text(objects.read_bytes(files[text_path][0]), "replace").strip())


def _read_captions(url: str) -> Iterator[_Line]:
    text = decode_text(objects.read_bytes(url), "replace")
    name = PurePosixPath(url).name
    if name.endswith(".jsonl"):
        records = ((n, _parse_json(line)) for n, line in enumerate(lines_of(text), start=1) if line.strip())
    else:
        # In tsv files a quote is an ordinary character; csv files quote as Excel does.
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if name.endswith(".tsv") else {}
        reader = csv.DictReader(io.StringIO(text, newline=""), **style)  # type: ignore[arg-type]
        columns = set(reader.fieldnames or ())
        if not columns & set(FILE_COLUMNS) or not columns & set(CAPTION_COLUMNS):
            raise DataError(
                f"{url}: the first line has the columns {sorted(columns)}; expected `file`, `caption` and, "
                "if samples belong together, `group`"
            )
        records = enumerate(reader, start=2)
    for number, record in records:
        yield _line(f"{name}:{number}", record)


def _parse_json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # an unpaired surrogate: JSON can express it, UTF-8 cannot
        return False
    return True


def _line(source: str, record: object) -> _Line:
    if not isinstance(record, dict):
        return _Line(source, reason="bad caption line")
    path = next((record[name] for name in FILE_COLUMNS if record.get(name)), None)
    caption = next((record[name] for name in CAPTION_COLUMNS if record.get(name) is not None), None)
    group = record.get("group") or ""
    if not isinstance(path, str) or not isinstance(caption, str) or not isinstance(group, str):
        return _Line(source, reason="bad caption line")
    if not _is_text(path + caption + group):
        return _Line(source, reason="damaged caption")
    # A path outside the folder is not in the listing, so it is dropped as a missing image and never opened.
    return _Line(source, str(PurePosixPath(path)), caption.strip(), group)
