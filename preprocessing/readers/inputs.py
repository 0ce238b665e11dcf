"""Inputs of ingest: a folder of images, WebDataset tars (including img2dataset's) or parquet files, cut into shards."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from dalle_ds.data.images import extension_of
from dalle_ds.data.raw.compressed import TAR_ENDINGS, tar_stem
from dalle_ds.data.raw.sample import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, SAME_FORMAT, Dropped, RawSample, with_prefix
from dalle_ds.data.raw.shards import RawShard, distinct_names, read_raw_shard
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from preprocessing.configs import ColumnsConfig
from preprocessing.readers.caption_files import is_caption_file
from preprocessing.readers.folder import Entry
from preprocessing.readers.listing import Listing, extension_of_path
from preprocessing.readers.parquet import has_images, read_parquet

log = logging.getLogger(__name__)

ARCHIVES = (
    "zip",
    "br",
    "zst",
    "tzst",
    "7z",
    "rar",
    "lz4",
    "gz",
    "bz2",
    "xz",
)  # besides tars; they may hold samples, so they are counted


@dataclass(frozen=True)
class FolderPart:
    """A part of a folder's images: the input of one shard."""

    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """Size of the images that are not yet dropped."""
        return sum(entry.bytes for entry in self.entries if not entry.reason)

    def samples(self) -> Iterator[RawSample | Dropped]:
        """The samples. Of byte-identical images, the first with a usable caption is kept; those of other parts are found by
        `dalle-ds data dedup`: to compare all images, the plan would have to read them."""
        n_of_size = Counter(entry.bytes for entry in self.entries if not entry.reason)
        seen: set[bytes] = set()
        for entry in self.entries:
            data, reason = read_entry(entry) if not entry.reason else (b"", entry.reason)
            if not reason and n_of_size[entry.bytes] > 1:  # equal files have equal sizes
                digest = hashlib.sha256(data).digest()
                reason = "duplicate image" if digest in seen else None
                seen.add(digest)
            extension: str | None = extension_of_path(entry.url)
            if not reason and extension not in IMAGE_EXTENSIONS:  # the content decides: image.heic may be a JPEG
                extension = extension_of(data)
                reason = None if extension else "unsupported image format"
            yield (
                Dropped(entry.key, reason)
                if reason
                else RawSample(entry.key, entry.group, entry.caption, data, SAME_FORMAT.get(str(extension), str(extension)))
            )


@dataclass(frozen=True)
class TarPart:
    """One WebDataset tar. Its `name` is the prefix of each key, since keys of different tars may be equal."""

    name: str
    url: str
    bytes: int

    def samples(self) -> Iterator[RawSample | Dropped]:
        for sample in read_raw_shard(RawShard(self.name, self.url, self.bytes)):
            yield with_prefix(sample, self.name)


@dataclass(frozen=True)
class ParquetPart:
    """One parquet file. Keys are NAME/ROW."""

    name: str
    url: str
    bytes: int
    columns: ColumnsConfig

    def samples(self) -> Iterator[RawSample | Dropped]:
        return read_parquet(self.url, self.name, self.columns)


Part = FolderPart | TarPart | ParquetPart


def list_parts(listing: Listing, columns: ColumnsConfig) -> list[Part]:
    """The tars and parquet files of the input, sorted by path. Empty for a folder of images.

    img2dataset writes a parquet file and NNNNN_stats.json next to each tar or folder of images. They are its download log, not
    samples, and are ignored. A parquet file next to tars or images is a log if it has no column of images.

    Raises:
        DataError: the input is another kind of file, or the folder contains both tars or parquet files and loose images.
    """
    tars = [path for path in sorted(listing.files) if tar_stem(path) is not None]
    parquet = [path for path in sorted(listing.files) if extension_of_path(path) == "parquet"]
    images = [path for path in listing.files if extension_of_path(path) in IMAGE_EXTENSIONS]
    if listing.is_file and not tars and not parquet:
        endings = ", ".join((*TAR_ENDINGS, ".parquet"))
        raise DataError(f"{listing.root} is one file; expected a folder, or a file ending in {endings}")
    if images:  # metadata.parquet of an imagefolder
        parquet = [path for path in parquet if not is_caption_file(path)]
    if tars or images:
        parquet = [path for path in parquet if not _is_log(path, listing) and has_images(listing.url(path), columns)]
    if images and (tars or parquet):
        kinds = f"both {'tars' if tars else 'parquet files'} and loose images"
        raise DataError(
            f"{listing.root}: contains {kinds}, among its {listing.told()}; expected only one kind in `ingest.images`: move "
            "the others to a folder of their own and ingest them separately"
        )
    if not tars and not parquet:
        return []
    named = distinct_names("", {path: re.sub(r"[^\w/-]+", "_", _without_ending(path)) for path in (*tars, *parquet)})
    problems = listing.problems | {
        path: "unsupported archive" for path in listing.files if path not in named and extension_of_path(path) in ARCHIVES
    }
    others = [path for path in listing.files if path not in named and path not in problems]
    if others:
        log.info("%s: not part of the input, beside tars or parquet files: %s", listing.root, listing.told(others))
    parts: list[Part] = []
    for path in sorted(named):
        url, size = listing.url(path), listing.files[path]
        parts.append(
            TarPart(named[path], url, size) if tar_stem(path) is not None else ParquetPart(named[path], url, size, columns)
        )
    if problems:
        parts.append(FolderPart(tuple(Entry(path, path, "", "", 0, why) for path, why in sorted(problems.items()))))
    return parts


def _is_log(path: str, listing: Listing) -> bool:
    return f"{path[: -len('.parquet')]}_stats.json" in listing.files


def _without_ending(path: str) -> str:
    return tar_stem(path) or path[: -len(".parquet")]


def read_entry(entry: Entry) -> tuple[bytes, str | None]:
    """Returns (the image's bytes, None), or (b"", the reason why they cannot be read)."""
    if entry.bytes > MAX_MEMBER_BYTES:
        return b"", "too large"
    try:
        return objects.read_bytes(entry.url), None
    except FileNotFoundError:
        return b"", "missing image"
    except PermissionError:
        return b"", "not allowed to read"
