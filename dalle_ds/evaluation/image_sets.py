"""Sets of images to score: a folder, a samples.json, or raw shards. Images are streamed and prepared in the same way."""

import errno
import hashlib
import heapq
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from dalle_ds.data.images import ImageProblem, center_crop, decode_image
from dalle_ds.data.manifest import iterate_shards
from dalle_ds.data.raw.metadata import iterate_sample_rows, read_image, sample_rows
from dalle_ds.data.raw.sample import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, MAX_TEXT_BYTES, OTHER_IMAGE_EXTENSIONS
from dalle_ds.data.raw.shards import RawSample, RawShard, list_raw_shards, read_raw_shard, split_of
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.bounded import read_bounded
from dalle_ds.storage.fingerprint import fingerprint
from dalle_ds.storage.hashing import sha256_of_file
from dalle_ds.storage.names import SAMPLES_FILE
from dalle_ds.storage.samples_record import read_named_images
from dalle_ds.storage.text import decode_text

log = logging.getLogger(__name__)

PREPARATION = "centre crop by Lanczos, then a Gaussian filter/v2"  # increase the version when `prepare` changes


class Entry(NamedTuple):
    """An encoded image. The caption is None if there is none."""

    key: str
    caption: str | None
    data: bytes
    problem: str | None = None
    """Why the image cannot be used, if that is known before it is decoded."""


@dataclass(frozen=True)
class ImageSet:
    """Images from one source. `fingerprint` covers their names and bytes."""

    source: str
    fingerprint: str
    entries: Callable[[], Iterator[Entry]]
    left_out: frozenset[str] = frozenset()
    """Keys of images that are not iterated over."""

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entry in self.entries() if entry.key not in self.left_out)

    def without(self, keys: Iterable[str]) -> "ImageSet":
        """The set without some images."""
        left_out = self.left_out | frozenset(keys)
        mark = fingerprint({"images": self.fingerprint, "left_out": sorted(left_out)}) if left_out else self.fingerprint
        return replace(self, left_out=left_out, fingerprint=mark)


class _Found(NamedTuple):
    """An image file, its caption if a record has it, and why it is not read."""

    path: Path
    caption: str | None = None
    problem: str | None = None


def open_images(
    source: str | Path,
    *,
    limit: int | None = None,
    validation_fraction: float | None = None,
    with_overlap: bool = False,
    follow_links: bool = True,
) -> ImageSet:
    """Open a set of images.

    Args:
        source: a samples.json or its folder; the root of raw shards (path or s3:// url); or a folder of images, where the
            caption of an image is in a .txt file with the same name, if there is one.
        limit: maximum number of images. They are chosen by a hash of their names, so the choice is the same each time and does
            not depend on the order of the source.
        validation_fraction: if the source is raw shards, use only their validation split at this fraction.
        with_overlap: if the source is raw shards, use also images that `dalle-ds data dedup` found in the training data.
        follow_links: if the source is a folder, read what links in it lead to outside of it. Where images are shown to others,
            a link of the folder's author must not lead to images that only the user of this program may read.

    Raises:
        DataError: `source` does not exist, has no images, or is a samples.json that names missing files; or
            `validation_fraction` is given and the source is not raw shards.
    """
    local = objects.local_path(source)
    if local is not None and (local.name == SAMPLES_FILE or (local / SAMPLES_FILE).is_file()):
        files = _of_record(local if local.name == SAMPLES_FILE else local / SAMPLES_FILE)
    elif local is None or any(local.glob("*.tar")) or (local / "manifests").is_dir():
        return _of_shards(str(source), limit, validation_fraction, with_overlap)
    elif local.is_dir():
        files = {str(found.path.relative_to(local)): found for found in sorted(_images_below(local, follow_links))}
    else:
        raise DataError(f"{source}: expected a folder or {SAMPLES_FILE}, found neither")
    if validation_fraction is not None:
        raise DataError(f"{source} has no raw shards: only raw shards have a validation split")
    if with_overlap:
        raise DataError(f"{source} has no raw shards, so no list of images in the training data; expected with_overlap false")
    if limit is not None:
        files = {key: files[key] for key in _chosen(files, limit)}
    if not files:
        raise DataError(f"{source}: no images; expected files ending in {', '.join(IMAGE_EXTENSIONS)}, or raw shards")
    digests = {key: _digest(found) for key, found in files.items()}
    return ImageSet(str(source), fingerprint({"images": digests}), lambda: (_read(key, *found) for key, found in files.items()))


def _images_below(folder: Path, follow_links: bool) -> Iterator[_Found]:
    """The images below a folder, and folders that cannot be read. Linked folders are searched too, each folder once. Hidden
    names are left out, such as the ._NAME that macOS adds to each file."""
    top, seen, pending = os.path.realpath(folder), set(), [folder]
    while pending:
        here = pending.pop()
        if (real := os.path.realpath(here)) in seen:
            continue
        seen.add(real)
        try:
            paths = sorted(here.iterdir())
        except OSError as error:
            yield _Found(here, None, f"unreadable ({error.strerror})")
            continue
        for path in (path for path in paths if not path.name.startswith(".")):
            extension, is_folder = path.suffix[1:].lower(), path.is_dir()
            is_named_as_image = extension in (*IMAGE_EXTENSIONS, *OTHER_IMAGE_EXTENSIONS)
            if not is_folder and not is_named_as_image:
                continue
            links = () if follow_links else tuple(one for one in (path, path.with_suffix(".txt")) if one.is_symlink())
            if not all(Path(os.path.realpath(link)).is_relative_to(top) for link in links):
                yield _Found(path, None, "a link out of the folder, or its caption is")
                continue
            if is_folder:
                pending.append(path)
            if is_named_as_image:  # a folder of such a name is no image either
                yield _Found(path, None, "of a format that is not read" if extension in OTHER_IMAGE_EXTENSIONS else None)


def _digest(found: _Found) -> str:
    """SHA-256 of an image that is read, "" of the others."""
    try:
        is_read = found.problem is None and found.path.is_file() and found.path.stat().st_size <= MAX_MEMBER_BYTES
        return sha256_of_file(found.path) if is_read else ""
    except OSError:
        return ""


def _read(key: str, path: Path, caption: str | None, problem: str | None) -> Entry:
    if problem is not None:
        return Entry(key, caption, b"", problem)
    if not path.is_file():
        return Entry(key, caption, b"", "a broken link" if path.is_symlink() else "not a file")
    try:
        image = read_bounded(path, MAX_MEMBER_BYTES)
    except OSError as error:
        return Entry(key, caption, b"", "too large" if error.errno == errno.EFBIG else f"unreadable ({error.strerror})")
    try:
        return Entry(key, caption if caption is not None else _caption_beside(path), image)
    except UnicodeDecodeError:
        return Entry(key, None, b"", "with a caption that is not UTF-8")
    except OSError as error:
        return Entry(key, None, b"", f"with a caption that cannot be read ({error.strerror})")


def decode(entry: Entry) -> Image.Image:
    """Decode an image to RGB. Raises DataError, which names the key, if the image cannot be read."""
    if entry.problem is not None:
        raise DataError(f"image {entry.key} is {entry.problem}")
    try:
        return decode_image(entry.data)
    except ImageProblem as problem:
        raise DataError(f"image {entry.key} is {problem.reason}") from None


def cut(entry: Entry, size: int) -> np.ndarray:
    """Decode and crop to a square of `size` pixels per side. Returns uint8 (size, size, 3).

    Raises:
        DataError: the image cannot be read, or its short side is less than `size`.
    """
    try:
        return center_crop(decode(entry), size)
    except ImageProblem as problem:
        raise DataError(f"image {entry.key} is {problem.reason}; expected a short side of {size} pixels or more") from None


def blurred_by(pixels_HWC: np.ndarray, blur: float) -> np.ndarray:
    """Blur an image. Returns uint8 (H, W, 3).

    `blur` is the radius of a Gaussian filter: its standard deviation in pixels of the cropped image. 0 does not blur. Pixels at
    the edge are repeated outwards. The paper (section 3.1, figure 9) blurs real images and samples, to ignore the high
    frequencies that a dVAE loses. Pillow's GaussianBlur would approximate the Gaussian by three box filters.
    """
    if not blur:
        return pixels_HWC
    blurred_HWC = gaussian_filter(pixels_HWC.astype(np.float32), (blur, blur, 0), mode="nearest")
    return np.rint(blurred_HWC).astype(np.uint8)


def prepare(entry: Entry, size: int, blur: float) -> np.ndarray:
    """Decode, crop and blur an image. Raises DataError as `cut`."""
    return blurred_by(cut(entry, size), blur)


def _of_record(file: Path) -> dict[str, _Found]:
    record = read_named_images(file)
    paths = record.files(file)
    return {image.file: _Found(paths[image.file], image.caption) for image in record.images}


def _of_shards(root: str, limit: int | None, validation_fraction: float | None, with_overlap: bool) -> ImageSet:
    shards = list_raw_shards(root)

    def is_wanted(group: str) -> bool:
        return validation_fraction is None or split_of(group, validation_fraction) == "validation"

    def keys() -> Iterator[str]:
        for shard, rows in iterate_sample_rows(shards, ["key", "group"], with_overlap=with_overlap):
            for row in rows.to_pylist():
                if is_wanted(row["group"]):
                    yield f"{shard.name}/{row['key']}"

    chosen = None if limit is None else set(_chosen(keys(), limit))

    def images() -> Iterator[Entry]:
        if chosen is not None and all(shard.metadata for shard in shards):
            yield from _by_metadata(shards, chosen, with_overlap)
            return
        for shard in shards:
            for sample in read_raw_shard(shard, with_overlap=with_overlap):
                if isinstance(sample, RawSample) and is_wanted(sample.group):
                    key = f"{shard.name}/{sample.key}"
                    if chosen is None or key in chosen:
                        yield Entry(key, sample.caption, sample.image)

    def entries() -> Iterator[Entry]:
        found = images()
        if (first := next(found, None)) is None:
            raise DataError(f"{root}: its raw shards have no image (validation_fraction: {validation_fraction})")
        yield first
        yield from found

    contents = {shard.name: shard.checksum or _sha256_of_shard(shard) for shard in shards}
    choice = {"limit": limit, "validation_fraction": validation_fraction, **({"with_overlap": True} if with_overlap else {})}
    kept = entries if limit is None else KeptOnDisk(entries)
    return ImageSet(root, fingerprint({"shards": contents, **choice}), kept)


def _by_metadata(shards: list[RawShard], chosen: set[str], with_overlap: bool) -> Iterator[Entry]:
    """The chosen images in stored order, each by one ranged read of its tar: the place of an image is in the metadata."""
    by_name = {shard.name: shard for shard in shards}

    def read(name: str) -> list[Entry]:
        shard = by_name[name]
        rows = sample_rows(shard, ["key", "caption", "offset", "bytes", "crc32"], with_overlap=with_overlap)
        numbers = [i for i, key in enumerate(rows["key"].to_pylist()) if f"{name}/{key}" in chosen]
        return [
            Entry(f"{name}/{row['key']}", row["caption"], read_image(shard, row["offset"], row["bytes"], row["crc32"]))
            for row in rows.take(np.array(numbers, np.int64)).to_pylist()
        ]

    for entries in iterate_shards(list(by_name), read):
        yield from entries


class KeptOnDisk:
    """Reads images from raw shards once, and from a temporary file afterwards: a few images may lie in all of ten terabytes.

    30,000 images of 50 kB are 1.5 GB. If the temporary folder (TMPDIR) is full, the shards are read again each time.
    """

    def __init__(self, entries: Callable[[], Iterator[Entry]]) -> None:
        self._entries = entries
        self._file: IO[bytes] | None = None

    def __call__(self) -> Iterator[Entry]:
        """Yields the images."""
        if self._file is None:
            yield from self._first_time()
            return
        place = 0
        while True:
            self._file.seek(place)
            try:
                entry = pickle.load(self._file)  # of this process
            except EOFError:
                return
            place = self._file.tell()
            yield entry

    def _first_time(self) -> Iterator[Entry]:
        file: IO[bytes] | None = tempfile.TemporaryFile()  # noqa: SIM115 - later iterations read it
        for entry in self._entries():
            file = file and _appended(entry, file)
            yield entry
        self._file = file


def _appended(entry: Entry, file: IO[bytes]) -> IO[bytes] | None:
    """Append an image to a file. Returns the file, or None if the disk is full; the file is then closed."""
    try:
        pickle.dump(entry, file)
        file.flush()
    except OSError as error:
        log.warning("%s is full (%s): the raw shards are read again each time", tempfile.gettempdir(), error)
        with suppress(OSError):  # it tries again to write what is left
            file.close()
        return None
    return file


def _chosen(keys: Iterator[str] | dict[str, object], limit: int) -> list[str]:
    return sorted(heapq.nsmallest(limit, keys, key=lambda key: hashlib.sha256(key.encode()).digest()))


def _caption_beside(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    return decode_text(read_bounded(text, MAX_TEXT_BYTES)).strip() if text.is_file() else None


def _sha256_of_shard(shard: RawShard) -> str:
    with objects.local_copy(shard.url) as file:
        return sha256_of_file(file)
