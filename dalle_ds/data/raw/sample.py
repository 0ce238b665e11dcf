"""One sample of a raw shard: its image, caption and key, the limits of each, and what is said of one that cannot be used."""

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Final

SAME_FORMAT: Final = {"jfif": "jpg", "jpe": "jpg", "pjpeg": "jpg", "pjp": "jpg", "apng": "png", "dib": "bmp"}
IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", *SAME_FORMAT)
OTHER_IMAGE_EXTENSIONS: Final = (
    *("heic", "heif", "jxl", "jp2", "j2k", "jpx", "svg", "ico", "psd", "tga", "ppm", "pgm", "pbm", "pnm"),
    *("exr", "hdr", "dds", "eps", "raw", "dng"),
)
"""Images that are not read: their decoders are missing or unsafe. Samples with them are counted, not ignored."""

MAX_MEMBER_BYTES: Final = 256 * 2**20
MAX_TEXT_BYTES: Final = 4 * 2**20  # maximum size of a .txt or .json
MAX_KEY_CHARACTERS: Final = 200


class SampleProblem(Exception):
    """A sample cannot be used. `reason` is the reason under which it is counted. A run must not stop because of it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class RawSample:
    """An image, still encoded, with its caption. Samples that share a `group` (skin tones of one emoji) share a split."""

    key: str
    group: str
    caption: str
    image: bytes
    extension: str


@dataclass(frozen=True)
class Dropped:
    """A sample that was dropped, and the reason under which it is counted."""

    key: str
    reason: str


def is_safe_key(key: str) -> bool:
    """Whether unpacking a shard with this key writes inside the target folder, under a name that disks accept."""
    return key.isprintable() and len(key) <= MAX_KEY_CHARACTERS and "\\" not in key and ".." not in key.split("/")


def short_key(key: str) -> str:
    """The key, cut to MAX_KEY_CHARACTERS. The end of a cut key is a hash of the whole key, so cut keys stay distinct."""
    if len(key) <= MAX_KEY_CHARACTERS:
        return key
    digest = sha256(key.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{key[: MAX_KEY_CHARACTERS - 1 - len(digest)]}-{digest}"


def with_prefix(sample: RawSample | Dropped, prefix: str) -> RawSample | Dropped:
    """The sample with a longer key, as it can be stored. A group that equals the key follows it."""
    key = f"{prefix}/{sample.key}"
    if isinstance(sample, Dropped):
        return replace(sample, key=key)
    key = short_key(key)
    return replace(sample, key=key, group=key if sample.group == sample.key else sample.group)
