"""Samples of a WebDataset tar: members are grouped by key within a window; every member is a sample or a reason."""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Final

from dalle_ds.data.images import extension_of
from dalle_ds.data.raw.captions import CAPTION_EXTENSIONS, CaptionProblem, caption_beside
from dalle_ds.data.raw.compressed import unpacked
from dalle_ds.data.raw.sample import (
    IMAGE_EXTENSIONS,
    MAX_KEY_CHARACTERS,
    MAX_MEMBER_BYTES,
    MAX_TEXT_BYTES,
    OTHER_IMAGE_EXTENSIONS,
    Dropped,
    RawSample,
    is_safe_key,
    short_key,
)

# Keys of a tar in the order of its members. Members of one key need not be neighbours: a tar in the order *.jpg, *.txt has
# half of its members between them. At most this many keys wait for further members; offsets wait, not bytes.
WINDOW: Final = 2**15
_NO_KEY_CHARACTERS: Final = re.compile(r"[^\w-]+")
_NO_UTF8: Final = re.compile(r"[\udc80-\udcff]")  # tarfile decodes a byte that is no UTF-8 to one of these

Source = tuple[int, int]  # offset and length of a member's data in the file


@dataclass
class _Group:
    """Members with the same key that are not read yet, or the reason to drop them."""

    members: dict[tuple[str, str], Source | str] = field(
        default_factory=dict
    )  # (middle of the name, extension) -> data, or reason
    reason: str = ""


def read_tar(file: Path, shard_name: str) -> Iterator[RawSample | Dropped]:
    """The samples of a tar, compressed or not, in the order in which their keys first appear.

    Archives joined by `cat` are read one after the other. A key that an earlier archive had gets the archive's number.
    """
    with unpacked(file) as plain, plain.file.open("rb") as opened:
        grouping = _Grouping(lambda source: _read(opened, source))
        try:
            for member, n_archive in _members(opened):
                yield from grouping.add(member, n_archive)
            yield from grouping.flush()
            if plain.is_cut:
                raise tarfile.ReadError("the rest could not be unpacked")
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            # Samples behind a broken header cannot be located. Count the one sample that is known to be lost.
            cut = grouping.take_current() if isinstance(error, _CutMember) else ""
            yield from grouping.flush()
            yield Dropped(cut or shard_name, "damaged shard")


class _CutMember(tarfile.ReadError):
    """The file ends within the data of its last member."""


class _Grouping:
    """Collects members by key. A group leaves the window at its end, at the end of an archive, or when the window is full."""

    def __init__(self, read: Callable[[Source], bytes]) -> None:
        self._read = read
        self._groups: dict[str, _Group] = {}  # in order of their first member
        self._seen: set[str] = set()  # keys of this archive
        self._seen_before: set[str] = set()  # keys of earlier archives
        self._links: dict[str, Source] = {}  # name -> data, for later links to it
        self._n_archive = 1
        self._key, self._is_repeated = "", False  # of the last member

    def add(self, member: tarfile.TarInfo, n_archive: int) -> Iterator[RawSample | Dropped]:
        if n_archive != self._n_archive:
            yield from self.flush()
            self._seen_before |= self._seen
            self._seen, self._n_archive, self._key = set(), n_archive, ""
        # Hidden files (such as ._NAME.jpg, which some systems add) and folders are not samples.
        if member.isdir() or PurePosixPath(member.name).name.startswith("."):
            self._key = ""
            return
        key, middle, extension = _split_name(member.name)
        if key in self._seen_before:
            key = short_key(f"{key}-{n_archive}")  # joined archives may each count from zero
        if key != self._key:
            self._key = key
            group = self._groups.get(key)
            self._is_repeated = key in self._seen if group is None else (middle, extension) in group.members
            if self._is_repeated:
                # With another image, or after its group left the window: a second, incomplete sample of the same key.
                yield Dropped(key if is_safe_key(key) else _printable(key), "duplicate key")
            elif group is None:
                if len(self._groups) == WINDOW:
                    yield from self._emit(next(iter(self._groups)))
                self._groups[key] = _Group()
                self._seen.add(key)
        if self._is_repeated:
            return
        group = self._groups[key]
        if not is_safe_key(key):
            group.reason = group.reason or "unsafe name"
        elif (middle, extension) in group.members:
            group.reason = group.reason or "duplicate key"
        else:
            group.members[middle, extension] = self._source_of(member, extension)

    def flush(self) -> Iterator[RawSample | Dropped]:
        for key in list(self._groups):
            yield from self._emit(key)

    def take_current(self) -> str:
        """Remove the group of the last member, which is incomplete, and return its key. Empty if there is none."""
        if not self._is_repeated:
            self._groups.pop(self._key, None)
        return self._key if is_safe_key(self._key) else _printable(self._key)

    def _source_of(self, member: tarfile.TarInfo, extension: str) -> Source | str:
        if member.islnk() or member.issym():
            # A link is followed to an earlier member of this tar, never to a file on a disk.
            folder = PurePosixPath(member.name).parent if member.issym() else PurePosixPath()
            return self._links.get(_normal(str(folder / member.linkname)), "broken link")
        if not member.isfile() or member.issparse():
            return "not a regular file"
        if member.size > (MAX_MEMBER_BYTES if extension in (*IMAGE_EXTENSIONS, *OTHER_IMAGE_EXTENSIONS) else MAX_TEXT_BYTES):
            return "too large"
        source = member.offset_data, member.size
        if len(self._links) == WINDOW:
            del self._links[next(iter(self._links))]
        self._links[_normal(member.name)] = source
        return source

    def _emit(self, key: str) -> Iterator[RawSample | Dropped]:
        group = self._groups.pop(key)
        yield from _samples_of(key, group, self._read)


def _samples_of(key: str, group: _Group, read: Callable[[Source], bytes]) -> Iterator[RawSample | Dropped]:
    if group.reason:
        yield Dropped(_printable(key) if group.reason == "unsafe name" else key, group.reason)
        return
    kinds = dict(group.members)
    images = dict.fromkeys(middle for middle, extension in kinds if extension in IMAGE_EXTENSIONS)
    texts = dict.fromkeys(middle for middle, extension in kinds if extension in ("json", *CAPTION_EXTENSIONS))
    others = dict.fromkeys(middle for middle, extension in kinds if extension in OTHER_IMAGE_EXTENSIONS)
    middle = next(iter(images | others), "")
    has_strangers = len(texts) > 1 and (middle in texts if middle else not images | others)
    if len(images | others) <= 1 and not has_strangers:
        # One sample, also if its members have further dots in their names: s0.input.jpg, s0.outputs.txt.
        yield _assemble(key, middle, {middle} if middle in texts else set(texts), kinds, read)
        return
    # WebDataset ends the key at the first dot. Names as img_1.0_a.jpg, img_1.0_b.jpg then share a key, but not their middle.
    for middle in images | others | texts:
        own = short_key(f"{key}_{_NO_KEY_CHARACTERS.sub('_', middle)}") if middle else key
        yield _assemble(own, middle, {middle}, kinds, read)


def _assemble(
    key: str, middle: str, text_middles: set[str], kinds: dict[tuple[str, str], Source | str], read: Callable[[Source], bytes]
) -> RawSample | Dropped:
    texts = [
        (extension, source)
        for extension in ("json", *CAPTION_EXTENSIONS)
        for (found, kind), source in kinds.items()
        if kind == extension and found in text_middles
    ]
    images = [
        (extension, source)
        for extensions in (IMAGE_EXTENSIONS, OTHER_IMAGE_EXTENSIONS)
        for (found, extension), source in kinds.items()
        if found == middle and extension in extensions
    ]
    reason = next((source for _, source in [*images[:1], *texts] if isinstance(source, str)), None)
    if reason:
        return Dropped(key, reason)
    if not images:
        return Dropped(key, "no image")
    records = [read(source) for extension, source in texts if extension == "json"]
    try:
        captions = [read(source) for extension, source in texts if extension != "json"]
        caption, group = caption_beside(key, records[0] if records else None, captions)
    except CaptionProblem as problem:
        return Dropped(key, problem.reason)
    image, extension = read(images[0][1]), images[0][0]
    if extension not in IMAGE_EXTENSIONS:  # the content decides: image.heic may be a JPEG
        extension = extension_of(image) or ""
    return RawSample(key, group, caption, image, extension) if extension else Dropped(key, "unsupported image format")


def _members(opened: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, int]]:
    # Yields each member with the number of its archive. Raises tarfile.ReadError where the bytes are no tar any more.
    size = opened.seek(0, 2)
    start: int | None = 0
    n_archive = 0
    while start is not None:
        n_archive += 1
        opened.seek(start)
        tar = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115 (it owns nothing: the file belongs to the caller)
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep every member in memory
            yield member, n_archive
            if member.isreg() and not member.issparse() and _end_of(member) > size:
                raise _CutMember("unexpected end of data")
        # tarfile treats a truncated or broken header as the end, but a complete tar ends with a block of zeros.
        opened.seek(tar.offset)
        if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end-of-archive block")
        start = _next_block(opened)


def _end_of(member: tarfile.TarInfo) -> int:
    # Members are padded to whole blocks.
    return member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _next_block(opened: IO[bytes]) -> int | None:
    # The offset of the next block that has a byte other than zero: the start of a further archive. None at the end of the file.
    while chunk := opened.read(1 << 20):
        if rest := chunk.lstrip(b"\0"):
            at = opened.tell() - len(rest)
            return at - at % tarfile.BLOCKSIZE
    return None


def _read(opened: IO[bytes], source: Source) -> bytes:
    opened.seek(source[0])
    return opened.read(source[1])


def _split_name(name: str) -> tuple[str, str, str]:
    # WebDataset's rule: the key ends at the first dot of the file name. The extension starts at the last. Names of old systems
    # in latin-1 or Shift JIS keep their bytes as %E9, as in urls.
    path = PurePosixPath(_NO_UTF8.sub(lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", name))
    base, _, rest = path.name.partition(".")
    middle, _, extension = rest.rpartition(".")
    return short_key((path.parent / base).as_posix().lstrip("/")), middle, extension.lower()


def _normal(name: str) -> str:
    parts: list[str] = []
    for part in PurePosixPath(name).parts:
        if part == ".." and parts:
            parts.pop()
        elif part != "/":
            parts.append(part)
    return "/".join(parts)


def _printable(key: str) -> str:
    return ascii(key[:MAX_KEY_CHARACTERS])[1:-1]
