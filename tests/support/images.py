"""Small drawn test images with captions: folders as input for `preprocessing ingest`, and encoded bytes in any format."""

import io
import json
from pathlib import Path

from PIL import Image

from preprocessing.demo.drawn import draw


def draw_folder(folder: Path, n_images: int, size: int = 48) -> Path:
    """Write `n_images` PNG files and captions.jsonl to `folder`. Every fourth image shares its group with the previous one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "captions.jsonl").open("w") as captions:
        for i in range(n_images):
            drawing = draw(i, size)
            drawing.image.save(folder / f"p{i:04d}.png")
            group = f"g{i - 1 if i % 4 == 3 else i:04d}"
            record = {"file": f"p{i:04d}.png", "caption": f"{drawing.caption}, number {i}", "group": group}
            captions.write(json.dumps(record) + "\n")
    return folder


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Returns the image as the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
