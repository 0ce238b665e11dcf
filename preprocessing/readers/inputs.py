"""Inputs of ingest: a folder of images, WebDataset tars (including img2dataset's) or parquet files, cut into shards."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from dalle_ds.data.raw import IMAGE_EXTENSIONS, Dropped, RawSample, RawShard, distinct_names, read_raw_shard
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from preprocessing.configs import ColumnsConfig
from preprocessing.readers.folder import Entry
from preprocessing.readers.parquet import read_parquet


@dataclass(frozen=True)
class FolderPart:
    """A part of a folder's images: the input of one shard."""

    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """Size of the images that are not yet dropped."""
        return sum(entry.bytes for entry in self.entries if not entry.reason)

    def samples(self) -> Iterator[RawSample | Dropped]:
        for entry in self.entries:
            data, reason = read_entry(entry) if not entry.reason else (b"", entry.reason)
            extension = entry.url.rsplit(".", 1)[-1].lower()
            yield Dropped(entry.key, reason) if reason else RawSample(entry.key, entry.group, entry.caption, data, extension)


@dataclass(frozen=True)
class TarPart:
    """One WebDataset tar. Its `name` is the prefix of each key, since keys of different tars may be equal."""

    name: str
    url: str
    bytes: int

    def samples(self) -> Iterator[RawSample | Dropped]:
        for sample in read_raw_shard(RawShard(self.name, self.url, self.bytes)):
            key = f"{self.name}/{sample.key}"
            if isinstance(sample, Dropped):
                yield replace(sample, key=key)
            else:
                yield replace(sample, key=key, group=key if sample.group == sample.key else sample.group)


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


def list_parts(url: str, columns: ColumnsConfig) -> list[TarPart | ParquetPart]:
    """The tars or parquet files at `url` (a file, or a folder of files), sorted by path. Empty for a folder of images.

    img2dataset writes a parquet file and NNNNN_stats.json next to each tar or folder of images. They are its download log, not
    samples, and are ignored.

    Raises:
        DataError: the folder contains both tars and images.
    """
    if url.endswith((".tar", ".parquet")) and objects.exists(url):
        files = {url: objects.size(url)}
    else:
        files = objects.list_sizes(url)
    has_images = any(file.lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)) for file in files)
    tars = _named(url, files, ".tar")
    if tars and has_images:
        raise DataError(f"{url}: contains both tars and loose images; expected only one kind in `ingest.images`")
    if tars or has_images:
        return [TarPart(name, file, files[file]) for file, name in tars.items()]
    return [ParquetPart(name, file, files[file], columns) for file, name in _named(url, files, ".parquet").items()]


def _named(url: str, files: Mapping[str, int], suffix: str) -> dict[str, str]:
    chosen = [file for file in sorted(files) if file.endswith(suffix)]
    return distinct_names(url, {file: _name(file.removeprefix(url) or file.rsplit("/", 1)[-1]) for file in chosen})


def _name(path: str) -> str:
    return re.sub(r"[^\w/-]+", "_", path.strip("/").removesuffix(".tar").removesuffix(".parquet"))


def read_entry(entry: Entry) -> tuple[bytes, str | None]:
    """Returns (the image's bytes, None), or (b"", the reason why they cannot be read)."""
    try:
        return objects.read_bytes(entry.url), None
    except FileNotFoundError:
        return b"", "missing image"
    except PermissionError:
        return b"", "not allowed to read"
