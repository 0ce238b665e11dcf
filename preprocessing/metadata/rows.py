"""Rows of a raw shard's metadata, collected while a tar is packed or read."""

import tarfile
import zlib
from collections import Counter

from PIL import Image

from dalle_ds.data.raw.metadata import SCHEMA
from dalle_ds.data.raw.shards import RawSample
from preprocessing.filters.perceptual_hash import perceptual_hash

Language = tuple[str, float] | None


class Rows:
    """Columns of `data.raw.metadata.SCHEMA`, row by row."""

    def __init__(self) -> None:
        self.columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
        self.n_samples = 0
        self.dropped: Counter[str] = Counter()

    def keep(self, sample: RawSample, image: Image.Image, language: Language, offset: int) -> None:
        """Add a sample. `image` is its decoded image, `offset` the place of its encoded image in the tar."""
        self.n_samples += 1
        name, score = language or (None, None)
        self._add(
            key=sample.key,
            caption=sample.caption,
            group=sample.group,
            width=image.width,
            height=image.height,
            language=name,
            language_score=score,
            phash=perceptual_hash(image),
            offset=offset,
            bytes=len(sample.image),
            crc32=zlib.crc32(sample.image),
        )

    def drop(self, key: str, reason: str) -> None:
        """Add an input that was dropped. A key from a file name that is no UTF-8 is stored escaped."""
        self.dropped[reason] += 1
        self._add(key=key.encode(errors="backslashreplace").decode(), reason=reason)

    def _add(self, **values: object) -> None:
        for name, column in self.columns.items():
            column.append(values.get(name))


def data_offset(end: int, n_bytes: int) -> int:
    """The place of a tar member's data, from the place where the member ends: its data are padded to whole blocks."""
    return end - -(-n_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
