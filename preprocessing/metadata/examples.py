"""Examples of duplicates: a picture of kept images beside dropped ones, which shows whether a distance is too large."""

import io
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from dalle_ds.data.images import decode_image
from dalle_ds.data.raw.metadata import read_image, sample_rows
from dalle_ds.data.raw.shards import RawShard
from dalle_ds.storage import objects
from preprocessing.metadata.compare_hashes import Duplicate

TILE: Final = 128  # pixels
N_COLUMNS: Final = 4


def draw_examples(url: str, examples: list[Duplicate], shards: list[RawShard], starts: list[int]) -> None:
    """Write a PNG of pairs: the kept image left, the dropped image right.

    Args:
        starts: number of each shard's first image.
    """
    sheet = Image.new("RGB", (N_COLUMNS * (2 * TILE + 16), max(1, -(-len(examples) // N_COLUMNS)) * (TILE + 20)), "white")
    for place, example in enumerate(examples):
        left, top = place % N_COLUMNS * (2 * TILE + 16), place // N_COLUMNS * (TILE + 20)
        for offset, member in ((0, example.kept), (TILE, example.image)):
            number = int(np.searchsorted(starts, member, side="right")) - 1
            thumbnail = _image(shards[number], member - starts[number])
            thumbnail.thumbnail((TILE - 4, TILE - 4))
            sheet.paste(thumbnail, (left + offset, top))
        ImageDraw.Draw(sheet).text((left, top + TILE), f"{example.distance} bits", fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    objects.write_bytes(url, buffer.getvalue())


def _image(shard: RawShard, row: int) -> Image.Image:
    (place,) = sample_rows(shard, ["offset", "bytes", "crc32"]).slice(row, 1).to_pylist()
    return decode_image(read_image(shard, place["offset"], place["bytes"], place["crc32"]))
