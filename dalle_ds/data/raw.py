"""Raw shards: WebDataset tars of images with captions, read sample by sample; every damaged sample is counted."""

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from dalle_ds.data.manifest import RawShardManifest, Record, load_shard_manifests, parse
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.hashing import hash_to_integer, sha256_of_file
from dalle_ds.storage.names import DATASET_FILE
from dalle_ds.storage.text import decode_text, lines_of

IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
MAX_MEMBER_BYTES: Final = 256 * 2**20
MAX_TEXT_BYTES: Final = 4 * 2**20  # maximum size of a .txt or .json member
DROP_LISTS: Final = "duplicates.json"
LISTED_REASONS: Final = ("near duplicate", "in evaluation set")  # reasons in drop lists; these samples are not failures
MAX_KEY_CHARACTERS: Final = 200
MAX_LIST_BYTES: Final = 8 * 2**30


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


@dataclass(frozen=True)
class RawShard:
    """One tar to read. `checksum` and `n_samples` are None if there is no manifest.

    The checksum is the tar's SHA-256. If the shard has a drop list, "+" and the list's hash follow, so that a changed list
    changes the input's identity.
    """

    name: str
    url: str
    bytes: int
    checksum: str | None = None
    n_samples: int | None = None
    drop_list: str | None = None  # URL of JSON lines {"key", "reason"}: samples to skip


class DropLists(Record):
    """duplicates.json under a root of raw shards: the drop lists written by `dalle-ds data dedup`."""

    max_distance: int
    lists: dict[str, str]  # shard -> path below the root; the file name contains a hash of the list


def split_of(group: str, validation_fraction: float) -> str:
    """ "train" or "validation", by hash of the group. The split does not depend on the other samples of the data set."""
    draw = hash_to_integer(f"split:{group}") / 2**64
    return "validation" if draw < validation_fraction else "train"


def list_raw_shards(root_url: str | Path) -> list[RawShard]:
    """The shards under a root, sorted by name: all shards with a manifest. If there are no manifests, every *.tar.

    Raises:
        DataError: there are neither manifests nor tars, or the root is that of a token data set.
    """
    if objects.exists(objects.join(root_url, DATASET_FILE)):
        raise DataError(f"{root_url} is a token data set: it has {DATASET_FILE}. Expected raw shards of `dalle-ds data ingest`")
    manifests = load_shard_manifests(root_url, RawShardManifest)
    if manifests:
        shards = [RawShard(m.shard, objects.join(root_url, m.path), m.bytes, m.checksum, m.n_samples) for m in manifests]
        return _with_drop_lists(root_url, shards)
    tars = objects.list_sizes(root_url, ".tar")
    if not tars:
        raise DataError(
            f"{root_url}: no raw shards: neither manifests/*.json nor *.tar files. "
            "`dalle-ds data ingest` creates them from a folder of images with captions"
        )
    names = distinct_names(root_url, {url: _shard_name(root_url, url) for url in tars})
    return sorted((RawShard(names[url], url, size) for url, size in tars.items()), key=lambda shard: shard.name)


def distinct_names(root_url: str | Path, names: Mapping[str, str]) -> dict[str, str]:
    """Make names of shards, by url, distinct. Equal names, with "/" equal to "_", get a hash of the path below `root_url`.

    Without it, a/0.tar and a_0.tar would both be the shard a_0, and one of them would count as done.
    """
    counts = Counter(name.replace("/", "_") for name in names.values())
    start = len(str(root_url))
    return {
        url: f"{name}-{hashlib.sha256(url[start:].encode()).hexdigest()[:8]}" if counts[name.replace("/", "_")] > 1 else name
        for url, name in names.items()
    }


def read_raw_shard(shard: RawShard) -> Iterator[RawSample | Dropped]:
    """The samples of a shard in stored order. An unusable sample is a Dropped with its reason.

    Raises:
        DataError: the shard is missing, or does not match its manifest (size, checksum).
    """
    try:
        with objects.local_copy(shard.url) as file:
            _check_identity(shard, file)
            dropped = _read_drop_list(shard.drop_list) if shard.drop_list else {}
            for sample in _read_tar(file, shard.name):
                reason = dropped.get(sample.key)
                yield Dropped(sample.key, reason) if reason else sample
    except FileNotFoundError:
        raise DataError(f"{shard.url}: the shard does not exist") from None


def iterate_images(root_url: str | Path, split: str, validation_fraction: float) -> Iterator[RawSample]:
    """All samples of a split, shard by shard. Dropped samples are skipped.

    Raises:
        ValueError: `split` is neither "train" nor "validation".
        DataError: no shards, or a damaged shard.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split {split!r}: expected 'train' or 'validation'")
    for shard in list_raw_shards(root_url):
        for sample in read_raw_shard(shard):
            if isinstance(sample, RawSample) and split_of(sample.group, validation_fraction) == split:
                yield sample


def load_images(root_url: str | Path, split: str, validation_fraction: float) -> list[RawSample]:
    """All samples of a split in memory, for small data sets. `iterate_images` streams larger data sets.

    Raises:
        DataError: the shards are larger than 8 GiB, or the split has no sample.
    """
    total = sum(shard.bytes for shard in list_raw_shards(root_url))
    if total > MAX_LIST_BYTES:
        raise DataError(
            f"{root_url}: {total / 2**30:.1f} GiB of raw shards, expected at most {MAX_LIST_BYTES / 2**30:.0f} GiB "
            "to load into memory"
        )
    samples = list(iterate_images(root_url, split, validation_fraction))
    if not samples:
        raise DataError(f"{root_url}: no sample in the {split} split at validation_fraction {validation_fraction}")
    return samples


def without_drop_list(shard: RawShard) -> RawShard:
    """The same shard without its drop list, so that readers yield all its samples."""
    return replace(shard, drop_list=None, checksum=shard.checksum.partition("+")[0] if shard.checksum else None)


def _with_drop_lists(root_url: str | Path, shards: list[RawShard]) -> list[RawShard]:
    url = objects.join(root_url, DROP_LISTS)
    try:
        lists = parse(DropLists, objects.read_bytes(url), url).lists
    except FileNotFoundError:
        return shards
    return [
        replace(
            shard,
            drop_list=objects.join(root_url, lists[shard.name]),
            checksum=f"{shard.checksum}+{lists[shard.name].rpartition('-')[2].removesuffix('.jsonl')}",
        )
        if shard.name in lists
        else shard
        for shard in shards
    ]


def _read_drop_list(url: str) -> dict[str, str]:
    try:
        records = [json.loads(line) for line in lines_of(objects.read_bytes(url).decode())]
        return {record["key"]: record["reason"] for record in records}
    except FileNotFoundError:
        raise DataError(f"{url}: the drop list is missing; run `dalle-ds data dedup` again") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{url}: the drop list is damaged; run `dalle-ds data dedup` again") from None


def _shard_name(root_url: str | Path, url: str) -> str:
    # The name includes sub-folders, so that a/0.tar and b/0.tar are two shards.
    return url.removeprefix(str(root_url)).strip("/").removesuffix(".tar").replace("/", "_")


def _check_identity(shard: RawShard, file: Path) -> None:
    found = file.stat().st_size
    if found != shard.bytes:
        raise DataError(f"{shard.url}: {found} bytes, expected {shard.bytes}; the shard has changed or is truncated")
    if shard.checksum is not None:
        digest = sha256_of_file(file)
        expected = shard.checksum.partition("+")[0]
        if digest != expected:
            raise DataError(f"{shard.url}: SHA-256 {digest}, expected {expected} as in its manifest; the shard is damaged")


def _read_tar(file: Path, shard_name: str) -> Iterator[RawSample | Dropped]:
    key, parts, dropped = "", {}, ""
    seen: set[str] = set()
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                # Hidden files (such as ._NAME.jpg, which some systems add), links and folders are not samples.
                if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                    continue
                member_key, extension = _split_name(member.name)
                if member_key != key:
                    if key:
                        yield _assemble(key, parts, dropped)
                    # A repeated key would silently become a second, incomplete sample.
                    key, parts, dropped = member_key, {}, "duplicate key" if member_key in seen else ""
                    seen.add(key)
                if not _is_safe(key):
                    dropped = dropped or "unsafe name"
                elif member.size > (MAX_MEMBER_BYTES if extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES):
                    dropped = dropped or "too large"
                elif extension in parts:
                    dropped = dropped or "duplicate key"
                elif extension in IMAGE_EXTENSIONS or extension in ("json", "txt"):
                    opened = tar.extractfile(member)
                    parts[extension] = opened.read() if opened else b""
                    if len(parts[extension]) != member.size:
                        raise tarfile.ReadError("unexpected end of data")
        if key:
            yield _assemble(key, parts, dropped)
        key = ""
        if not _ends_properly(file, tar.offset):
            raise tarfile.ReadError("no end-of-archive block")
    except (tarfile.TarError, OSError, ValueError, EOFError):
        # Samples behind a broken header cannot be located. Count the one sample that is known to be lost.
        yield Dropped(key or shard_name, "damaged shard")


def _ends_properly(file: Path, offset: int) -> bool:
    # tarfile treats a truncated or broken header as the end of the file, but a complete tar ends with a block of zeros.
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _split_name(name: str) -> tuple[str, str]:
    # WebDataset's rule: the key ends at the first dot of the file name.
    path = PurePosixPath(name)
    base, _, extension = path.name.partition(".")
    return (path.parent / base).as_posix().lstrip("/"), extension.lower()


def _is_safe(key: str) -> bool:
    # Unpacking a shard made from this one must not write outside the target folder, or use a name that a disk refuses.
    return key.isprintable() and len(key) <= MAX_KEY_CHARACTERS and "\\" not in key and ".." not in key.split("/")


def _assemble(key: str, parts: dict[str, bytes], dropped: str) -> RawSample | Dropped:
    if dropped:
        return Dropped(ascii(key[:MAX_KEY_CHARACTERS])[1:-1] if dropped == "unsafe name" else key, dropped)
    images = [extension for extension in parts if extension in IMAGE_EXTENSIONS]
    if not images:
        return Dropped(key, "no image")
    try:
        record = json.loads(parts["json"]) if "json" in parts else {}
        caption, group = record.get("caption"), record.get("group", key)
        if caption is None:  # img2dataset's json may lack the caption, which is then in the txt
            caption = decode_text(parts["txt"])
        f"{caption}{group}".encode()  # raises on an unpaired surrogate: JSON can express it, UTF-8 cannot
    except KeyError:
        return Dropped(key, "no caption")
    except (ValueError, AttributeError, TypeError, RecursionError):
        return Dropped(key, "unreadable caption")
    if not isinstance(caption, str) or not isinstance(group, str):
        return Dropped(key, "unreadable caption")
    return RawSample(key, group, caption, parts[images[0]], images[0])
