"""Read a folder of images with captions, and report every image without a caption and every caption without an image."""

import logging
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import PurePosixPath
from typing import Final

from dalle_ds.data.raw.captions import CAPTION_EXTENSIONS, CaptionProblem, caption_beside, draw_caption
from dalle_ds.data.raw.sample import IMAGE_EXTENSIONS, MAX_TEXT_BYTES, OTHER_IMAGE_EXTENSIONS, short_key
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from preprocessing.readers.caption_files import (
    BAD_LINE,
    CAPTION_FILES,
    NO_COLUMN,
    CaptionLine,
    is_caption_file,
    read_caption_file,
)
from preprocessing.readers.listing import Listing, extension_of_path

log = logging.getLogger(__name__)

# Files that are no samples: they are named in the log and not counted. parquet: img2dataset's download log.
DOCUMENTS: Final = ("json", "jsonl", "md", "html", "yaml", "yml", "log", "py", "sh", "ini", "db", "parquet")

READ_AHEAD: Final = 4096  # captions that are read at a time; a future of each takes a kilobyte

_WITHOUT_CAPTION: Final = ("no caption", BAD_LINE, NO_COLUMN)


@dataclass(frozen=True, slots=True)
class Entry:
    """One input sample. If `reason` is set, the sample is already dropped."""

    key: str
    group: str
    caption: str
    url: str
    bytes: int
    reason: str | None = None


def read_folder(listing: Listing) -> list[Entry]:
    """All samples of a folder, sorted by url.

    Captions come from captions.jsonl ({"file", "caption", "group"}), captions.tsv, .csv or .parquet (the same columns), from
    Hugging Face's metadata files, or from NAME.txt or NAME.json next to NAME.jpg. Every other file becomes an entry with a
    reason, except documents.

    Raises:
        DataError: there are no images or no captions.
    """
    files = listing.files
    caption_files = [path for path in sorted(files) if is_caption_file(path)]
    texts = _Texts(path for path in files if not is_caption_file(path))
    images = [path for path in sorted(files) if extension_of_path(path) in IMAGE_EXTENSIONS or texts.belong_to(path)]
    if not images:
        raise DataError(f"{listing.root}: no images among its {listing.told()}; expected {', '.join(IMAGE_EXTENSIONS)}")
    named_by_lines = chain((path for path in files if not texts.has(path)), listing.problems) if caption_files else ()
    names = _Names(listing.root, named_by_lines)
    lines: list[CaptionLine] = []
    problems: list[str] = []
    for path in caption_files:
        url, folder = listing.url(path), posixpath.dirname(path)
        found, problem = read_caption_file(url, path, lambda name, folder=folder: names.find(folder, name) is not None)
        lines += [replace(line, path=names.find(folder, line.path) or line.path) for line in found]
        problems += [f"{url}: {problem}"] if problem else []
    named = {line.path for line in lines if not line.reason}
    images = sorted({*images, *(path for path in named if path in files)})
    keys = _keys_of(images)
    entries = _from_lines(lines, keys, listing)
    beside = [path for path in images if path not in named]
    entries += _from_texts(beside, keys, texts, listing)
    if all(entry.reason in _WITHOUT_CAPTION for entry in entries):
        expected = f"expected {', '.join(CAPTION_FILES)}, or NAME.txt next to each image"
        raise DataError(problems[0] if problems else f"{listing.root}: no captions: {expected}, among its {listing.told()}")
    entries += [
        Entry(path, path, "", "", 0, reason)
        for path, reason in (
            _rest(listing, images, texts, caption_files)
            | {path: reason for path, reason in listing.problems.items() if path not in named}
        ).items()
    ]
    return sorted(entries, key=lambda entry: (entry.url, entry.key))


def _from_lines(lines: Iterable[CaptionLine], keys: Mapping[str, str], listing: Listing) -> list[Entry]:
    entries, captioned = [], set()
    for line in lines:
        reason = line.reason or ("second caption" if line.path in captioned else listing.problems.get(line.path))
        if not reason and line.path not in keys:
            reason = "missing image"  # also of a path that leads out of the folder: it is not in the listing and never opened
        if reason:
            entries.append(Entry(line.source, line.source, "".join(line.captions[:1]).strip(), "", 0, reason))
            continue
        captioned.add(line.path)
        key, caption = keys[line.path], draw_caption(line.captions, keys[line.path])
        entries.append(Entry(key, line.group or key, caption, listing.url(line.path), listing.files[line.path]))
    return entries


def _from_texts(paths: list[str], keys: Mapping[str, str], texts: "_Texts", listing: Listing) -> list[Entry]:
    def entry(path: str) -> Entry:
        key, url, size = keys[path], listing.url(path), listing.files[path]
        record, text = texts.of(path)
        if any(listing.files[found] > MAX_TEXT_BYTES for found in (record, text) if found):
            return Entry(key, key, "", url, size, "too large")
        try:
            data = {found: objects.read_bytes(listing.url(found)) for found in (record, text) if found}
            caption, group = caption_beside(key, data.get(record), [data[text]] if text else [], "replace")
        except CaptionProblem as problem:
            return Entry(key, key, "", url, size, problem.reason)
        except FileNotFoundError:
            return Entry(key, key, "", url, size, "no caption")
        except PermissionError:
            return Entry(key, key, "", url, size, "not allowed to read")
        return Entry(key, group, caption, url, size)

    with ThreadPoolExecutor(max_workers=16) as pool:  # on s3:// the cost is latency
        chunks = (paths[start : start + READ_AHEAD] for start in range(0, len(paths), READ_AHEAD))
        return [found for chunk in chunks for found in pool.map(entry, chunk)]


def _rest(listing: Listing, images: list[str], texts: "_Texts", caption_files: list[str]) -> dict[str, str]:
    # Every file that is neither an image with its captions nor a document, with the reason.
    used = {*images, *caption_files, *(found for path in [*images, *listing.problems] for found in texts.of(path) if found)}
    with_captions = {posixpath.dirname(path) for path in caption_files}
    rest: dict[str, str] = {}
    ignored: list[str] = []
    for path in sorted(listing.files.keys() - used):
        extension = extension_of_path(path)
        if extension in CAPTION_EXTENSIONS and posixpath.dirname(path) not in with_captions:
            rest[path] = "missing image"
        elif extension in OTHER_IMAGE_EXTENSIONS:
            rest[path] = "unsupported image format"
        elif extension in (*DOCUMENTS, *CAPTION_EXTENSIONS):
            ignored.append(path)
        else:
            rest[path] = "unknown file type"
    if ignored:
        log.info("%s: not part of the input: %s", listing.root, listing.told(ignored))
    return rest


def _keys_of(images: list[str]) -> dict[str, str]:
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for path in images:
        base = re.sub(r"[^\w-]+", "_", str(PurePosixPath(path).with_suffix("")))  # WebDataset cuts a key at its first dot
        key, number = short_key(base), 2
        while key in taken:
            key, number = short_key(f"{base}-{number}"), number + 1
        keys[path] = key
        taken.add(key)
    return keys


class _Texts:
    """The .txt, .caption and .json files of a folder, by the image that they belong to: NAME.txt or NAME.jpg.txt."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths: dict[str, str | list[str]] = {}  # normal name -> path, or the paths that differ in case or composition
        for path in sorted(path for path in paths if self.has(path)):
            name = _normal(path)
            if name not in self._paths:
                self._paths[path if name == path else name] = path  # mostly they are equal: one string less
            else:
                there = self._paths[name]
                self._paths[name] = [*([there] if isinstance(there, str) else there), path]

    def has(self, path: str) -> bool:
        return extension_of_path(path) in ("json", *CAPTION_EXTENSIONS)

    def of(self, path: str) -> tuple[str | None, str | None]:
        """The .json and the text of an image."""
        record, *texts = (self._of(path, extension) for extension in ("json", *CAPTION_EXTENSIONS))
        return record, next(filter(None, texts), None)

    def _of(self, path: str, extension: str) -> str | None:
        # NAME.txt comes before NAME.jpg.txt, and the exact name before another that is as similar.
        for stem in (_stem(path), path):
            found = self._paths.get(_normal(f"{stem}.{extension}"))
            if isinstance(found, list):
                found = next((one for one in found if _stem(one) == stem), None)
            if found is not None:
                return found
        return None

    def belong_to(self, path: str) -> bool:
        """Whether a file of any type is an image by its text: NAME.heic, or NAME, beside NAME.txt."""
        is_other = not self.has(path) and extension_of_path(path) not in DOCUMENTS and not is_caption_file(path)
        return is_other and self.of(path)[1] is not None


class _Names:
    """Finds the file that a caption line means, if disk and line write its name in different ways."""

    def __init__(self, root: str, paths: Iterable[str]) -> None:
        self._root = root
        self._paths = set(paths)
        self._by_name: dict[str, str | None] = {}
        for path in self._paths:
            name = _normal(path)
            self._by_name[path if name == path else name] = None if name in self._by_name else path  # None: ambiguous

    def find(self, folder: str, name: str) -> str | None:
        """The path of `name` below `folder`, also if case, the composition of letters or the kind of slashes differs."""
        for spelling in (name, name.replace("\\", "/")):
            below = spelling.removeprefix(f"{self._root}/") if spelling.startswith("/") or "://" in spelling else spelling
            path = posixpath.normpath(posixpath.join("" if below != spelling else folder, below))
            if path in self._paths:
                return path
            if found := self._by_name.get(_normal(path)):
                return found
        return None


def _normal(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
