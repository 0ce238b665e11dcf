"""PNG files of flat images, without Pillow's search for a filter: a quarter of its time, and smaller files, for scenes."""

import struct
import zlib

import numpy as np


def png_of(pixels_HWC: np.ndarray) -> bytes:
    """A PNG file of uint8 RGB pixels (H, W, 3)."""
    height, width, _ = pixels_HWC.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter: 0, none
    lines[:, 1:] = pixels_HWC.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of RGB, not interlaced
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(lines.tobytes(), 1)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
