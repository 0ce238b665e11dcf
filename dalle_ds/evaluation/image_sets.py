"""Sets of images to score: a folder, a samples.json, or raw shards. Images are streamed and prepared in the same way."""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from dalle_ds.data.images import ImageProblem, center_crop, decode_image
from dalle_ds.data.raw import IMAGE_EXTENSIONS, RawSample, RawShard, list_raw_shards, read_raw_shard, split_of
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint
from dalle_ds.storage.hashing import sha256_of_file
from dalle_ds.storage.names import SAMPLES_FILE
from dalle_ds.storage.text import decode_text

PREPARATION = "centre crop by Lanczos, then Pillow's GaussianBlur/v1"  # increase the version when `prepare` changes


class Entry(NamedTuple):
    """An encoded image. The caption is None if there is none."""

    key: str
    caption: str | None
    data: bytes


@dataclass(frozen=True)
class ImageSet:
    """Images from one source. `fingerprint` covers their names and bytes. Each iteration reads the images again."""

    source: str
    fingerprint: str
    entries: Callable[[], Iterator[Entry]]

    def __iter__(self) -> Iterator[Entry]:
        return self.entries()


def open_images(source: str | Path, *, limit: int | None = None, validation_fraction: float | None = None) -> ImageSet:
    """Open a set of images.

    Args:
        source: a samples.json or its folder; the root of raw shards (path or s3:// url); or a folder of images, where the
            caption of an image is in a .txt file with the same name, if there is one.
        limit: maximum number of images. They are chosen by a hash of their names, so the choice is the same each time and does
            not depend on the order of the source.
        validation_fraction: if the source is raw shards, use only their validation split at this fraction.

    Raises:
        DataError: `source` does not exist, has no images, or is a samples.json that names missing files; or
            `validation_fraction` is given and the source is not raw shards.
    """
    local = objects.local_path(source)
    if local is not None and (local.name == SAMPLES_FILE or (local / SAMPLES_FILE).is_file()):
        files = _of_record(local if local.name == SAMPLES_FILE else local / SAMPLES_FILE)
    elif local is None or any(local.glob("*.tar")) or (local / "manifests").is_dir():
        return _of_shards(str(source), limit, validation_fraction)
    elif local.is_dir():
        found = sorted(path for path in local.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
        files = {str(path.relative_to(local)): (path, _caption_beside(path)) for path in found}
    else:
        raise DataError(f"{source}: expected a folder or {SAMPLES_FILE}, found neither")
    if validation_fraction is not None:
        raise DataError(f"{source} has no raw shards: only raw shards have a validation split")
    if limit is not None:
        files = {key: files[key] for key in _chosen(files, limit)}
    if not files:
        raise DataError(f"{source}: no images; expected files ending in {', '.join(IMAGE_EXTENSIONS)}, or raw shards")
    digests = {key: sha256_of_file(path) for key, (path, _) in files.items()}
    return ImageSet(
        str(source),
        fingerprint({"images": digests}),
        lambda: (Entry(key, caption, path.read_bytes()) for key, (path, caption) in files.items()),
    )


def decode(entry: Entry) -> Image.Image:
    """Decode an image to RGB. Raises DataError, which names the key, if the image cannot be read."""
    try:
        return decode_image(entry.data)
    except ImageProblem as problem:
        raise DataError(f"image {entry.key} is {problem.reason}") from None


def prepare(entry: Entry, size: int, blur: float) -> np.ndarray:
    """Decode, crop to a square of `size` pixels per side, and blur. Returns uint8 (size, size, 3).

    `blur` is the radius of Pillow's GaussianBlur: the standard deviation in pixels of the cropped image. 0 does not blur. The
    paper (section 3.1, figure 9) blurs real images and samples, to ignore the high frequencies that a dVAE loses.

    Raises:
        DataError: the image cannot be read, or its short side is less than `size`.
    """
    try:
        pixels_HWC = center_crop(decode(entry), size)
    except ImageProblem as problem:
        raise DataError(f"image {entry.key} is {problem.reason}; expected a short side of {size} pixels or more") from None
    return np.asarray(Image.fromarray(pixels_HWC).filter(ImageFilter.GaussianBlur(blur))) if blur else pixels_HWC


def _of_record(file: Path) -> dict[str, tuple[Path, str | None]]:
    try:
        images = json.loads(file.read_text(encoding="utf-8"))["images"]
        files = {str(image["file"]): (file.parent / image["file"], str(image["caption"])) for image in images}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a record of samples ({error}); `dalle-ds sample` writes one") from None
    missing = [key for key, (path, _) in files.items() if not path.is_file()]
    if missing:
        raise DataError(f"{file} names {len(files)} images, of which {len(missing)} are missing: {', '.join(missing[:3])}")
    return files


def _of_shards(root: str, limit: int | None, validation_fraction: float | None) -> ImageSet:
    shards = list_raw_shards(root)

    def samples() -> Iterator[tuple[str, RawSample]]:
        for shard in shards:
            for sample in read_raw_shard(shard):
                if isinstance(sample, RawSample) and (
                    validation_fraction is None or split_of(sample.group, validation_fraction) == "validation"
                ):
                    yield f"{shard.name}/{sample.key}", sample

    chosen = None if limit is None else set(_chosen((key for key, _ in samples()), limit))

    def entries() -> Iterator[Entry]:
        images = (Entry(key, sample.caption, sample.image) for key, sample in samples() if chosen is None or key in chosen)
        if (first := next(images, None)) is None:
            raise DataError(f"{root}: its raw shards have no image (validation_fraction: {validation_fraction})")
        yield first
        yield from images

    contents = {shard.name: shard.checksum or _sha256_of_shard(shard) for shard in shards}
    return ImageSet(
        root, fingerprint({"shards": contents, "limit": limit, "validation_fraction": validation_fraction}), entries
    )


def _chosen(keys: Iterator[str] | dict[str, object], limit: int) -> list[str]:
    return sorted(heapq.nsmallest(limit, keys, key=lambda key: hashlib.sha256(key.encode()).digest()))


def _caption_beside(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    return decode_text(text.read_bytes()).strip() if text.is_file() else None


def _sha256_of_shard(shard: RawShard) -> str:
    with objects.local_copy(shard.url) as file:
        return sha256_of_file(file)
