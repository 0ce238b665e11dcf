"""Compressed tars: recognised by their first bytes, and unpacked to a temporary file with a limit."""

import bz2
import gzip
import logging
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from dalle_ds.storage.scratch import scratch_folder

log = logging.getLogger(__name__)

TAR_ENDINGS: Final = (*(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"), *(".tar.zst", ".tzst", ".tar.lz4"))
MAX_EXPANSION: Final = 50  # a tar of encoded images hardly shrinks; a bomb shrinks a thousandfold
CHUNK_BYTES: Final = 1 << 16  # of zstd and lz4, up to this much before the damage is lost
FREE_BYTES: Final = 2**30  # a small tar may unpack to this size with any ratio


def tar_stem(name: str) -> str | None:
    """The name without the ending of a tar, in upper or lower case. None if it is no tar's name."""
    ending = next((ending for ending in TAR_ENDINGS if name.lower().endswith(ending)), None)
    return name[: -len(ending)] if ending else None


class Unpacked(NamedTuple):
    """A file with the content of another. `is_cut`: not all of the content is in it."""

    file: Path
    is_cut: bool = False


@contextmanager
def unpacked(file: Path) -> Iterator[Unpacked]:
    """Yields the file itself, or a temporary file with the content of a gzip, bzip2, xz, zstd or lz4 file.

    Damaged content is cut where it is damaged, as by bytes of another kind behind its end, and content beyond the limit there.

    Raises:
        OSError: the temporary file cannot be written, as on a full disk.
    """
    with file.open("rb") as opened:
        start = opened.read(6)
    content = next((content for magic, content in _FORMATS.items() if start.startswith(magic)), None)
    if content is None:
        yield Unpacked(file)
        return
    limit = max(FREE_BYTES, MAX_EXPANSION * file.stat().st_size)
    with scratch_folder() as folder:
        target, is_cut = folder / "unpacked.tar", False
        with target.open("wb") as sink, closing(content(file)) as chunks:
            while not is_cut:
                try:  # only around reading: a disk that is full must not pass for a damaged file
                    chunk = next(chunks, None)
                except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                    log.warning("%s: damaged (%s); the rest is not read", file, error)
                    is_cut = True
                    break
                if chunk is None:
                    break
                is_cut = sink.tell() + len(chunk) > limit
                if is_cut:
                    log.warning("%s: unpacks to more than %d bytes; the rest is not read", file, limit)
                else:
                    sink.write(chunk)
        yield Unpacked(target, is_cut)


def _read_by(opener: Callable[[Path], Any]) -> Callable[[Path], Generator[bytes, None, None]]:
    def chunks(file: Path) -> Generator[bytes, None, None]:
        with opener(file) as source:
            # read1 returns what it has before damage; read would lose it.
            while chunk := source.read1(CHUNK_BYTES):
                yield chunk

    return chunks


def _streams_by(make: Callable[[], Any]) -> Callable[[Path], Generator[bytes, None, None]]:
    """Joined streams, as bz2.open and lzma.open read them. Those take no notice of what lies behind the last stream."""

    def chunks(file: Path) -> Generator[bytes, None, None]:
        with file.open("rb") as raw:
            stream, data = make(), raw.read(CHUNK_BYTES)
            while data or not (stream.eof or stream.needs_input):
                yield stream.decompress(data, CHUNK_BYTES)
                data = b""
                if stream.eof:
                    data = stream.unused_data.lstrip(b"\0")  # xz pads its streams with zeros
                    while not data and (more := raw.read(CHUNK_BYTES)):
                        data = more.lstrip(b"\0")
                    stream = make() if data else stream
                elif stream.needs_input and not (data := raw.read(CHUNK_BYTES)):
                    raise EOFError("it ends within a stream")

    return chunks


def _open_arrow(codec: str) -> Callable[[Path], Any]:
    def opened(file: Path) -> Any:
        import pyarrow as pa  # takes a third of a second, and most tars are not compressed

        return pa.CompressedInputStream(pa.OSFile(str(file)), codec)

    return opened


_FORMATS: Final[dict[bytes, Callable[[Path], Generator[bytes, None, None]]]] = {
    b"\x1f\x8b": _read_by(gzip.open),
    b"BZh": _streams_by(bz2.BZ2Decompressor),
    b"\xfd7zXZ\0": _streams_by(lzma.LZMADecompressor),
    b"\x28\xb5\x2f\xfd": _read_by(_open_arrow("zstd")),
    b"\x04\x22\x4d\x18": _read_by(_open_arrow("lz4")),
}
