"""Tars of others: any order, joined or compressed archives, dots in names, links; every member is a sample or a reason."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from dalle_ds.data.raw import compressed, tar_samples
from dalle_ds.data.raw.sample import Dropped, RawSample
from dalle_ds.data.raw.shards import list_raw_shards, read_raw_shard
from tests.data.raw.test_shards import IMAGE, read_one, record, write_tar

A, B = IMAGE + b"a", IMAGE + b"b"  # decoders ignore the last byte; it tells the images apart


def captions(found: list[RawSample | Dropped]) -> dict[str, str]:
    return {sample.key: sample.caption for sample in found if isinstance(sample, RawSample)}


def reasons(found: list[RawSample | Dropped]) -> list[tuple[str, str]]:
    return [(sample.key, sample.reason) for sample in found if isinstance(sample, Dropped)]


def pairs(*keys: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{kind}", data) for key in keys for kind, data in (("png", IMAGE), ("txt", f"image {key}".encode()))]


def arrow_compress(codec: str) -> Callable[[bytes], bytes]:
    """Compress as the tool of this name does, into one frame."""

    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return compress


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    keys = [str(i) for i in range(5)]
    members = sorted(pairs(*keys), key=lambda member: member[0].partition(".")[2])  # *.png, then *.txt
    found = read_one(write_tar(tmp_path / "0.tar", members))
    assert captions(found) == {key: f"image {key}" for key in keys}
    assert len(found) == 5


def test_the_window_is_bounded_and_what_lies_beyond_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_samples, "WINDOW", 3)
    members = pairs("a", "b", "c", "d", "e")
    found = read_one(write_tar(tmp_path / "0.tar", members[::2] + members[1::2]))
    assert captions(found) == {key: f"image {key}" for key in "cde"}
    assert sorted(reasons(found)) == [("a", "duplicate key"), ("a", "no caption"), ("b", "duplicate key"), ("b", "no caption")]


def test_a_sample_that_comes_again_is_counted_and_the_first_is_kept(tmp_path: Path) -> None:
    found = read_one(write_tar(tmp_path / "0.tar", [*pairs("a", "b"), ("a.png", B), ("a.txt", b"another")]))
    assert captions(found) == {"a": "image a", "b": "image b"}
    assert reasons(found) == [("a", "duplicate key")]


@pytest.mark.parametrize("padding", [0, 512, 10_240 * 7])
def test_joined_archives_are_read_to_the_end(tmp_path: Path, padding: int) -> None:
    parts = [write_tar(tmp_path / "parts" / f"{i}.tar", pairs(*keys)).read_bytes() for i, keys in enumerate(["ab", "bc", "d"])]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(bytes(padding).join(parts))
    found = read_one(tmp_path / "in" / "0.tar")
    # The second archive counts from its own start: its b is another image.
    assert captions(found) == {"a": "image a", "b": "image b", "b-2": "image b", "c": "image c", "d": "image d"}
    assert reasons(found) == []


def test_what_follows_the_end_and_is_no_archive_is_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", pairs("a"))
    path.write_bytes(path.read_bytes() + b"rubbish")
    found = read_one(path)
    assert captions(found) == {"a": "image a"}
    assert reasons(found) == [("0", "damaged shard")]


def test_dots_in_names(tmp_path: Path) -> None:
    members = [
        *pairs("img_1.0_a", "img_1.0_b", "img_2.5_a", "train.v1/0001"),
        ("s0.input.jpg", IMAGE),
        ("s0.outputs.txt", b"one sample"),
        ("s1.png", IMAGE),
        ("s1.json", record("the caption")),
        ("s1.tags.txt", b"not the caption"),
        ("s2.x.png", IMAGE),
        ("s2.x.txt", b"with an image"),
        ("s2.y.txt", b"without an image"),
    ]
    found = read_one(write_tar(tmp_path / "0.tar", members))
    assert captions(found) == {
        "img_1_0_a": "image img_1.0_a",
        "img_1_0_b": "image img_1.0_b",
        "img_2": "image img_2.5_a",
        "train.v1/0001": "image train.v1/0001",
        "s0": "one sample",
        "s1": "the caption",
        "s2_x": "with an image",
    }
    assert reasons(found) == [("s2_y", "no image")]


def test_links_are_followed_within_the_tar_only(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, target
            tar.addfile(member, io.BytesIO(data))

        add("blobs/x.png", A)
        add("blobs/x.txt", b"the first")
        add("./a/hard.png", kind=tarfile.LNKTYPE, target="blobs/x.png")
        add("a/hard.txt", b"a hard link")
        add("a/soft.png", kind=tarfile.SYMTYPE, target="../blobs/x.png")
        add("a/soft.txt", b"a symbolic link")
        add("out.png", kind=tarfile.SYMTYPE, target="/etc/passwd")
        add("out.txt", b"leads out")
        add("pipe.png", kind=tarfile.FIFOTYPE)
    found = read_one(path)
    assert captions(found) == {"blobs/x": "the first", "a/hard": "a hard link", "a/soft": "a symbolic link"}
    assert {sample.image for sample in found if isinstance(sample, RawSample)} == {A}
    assert reasons(found) == [("out", "broken link"), ("pipe", "not a regular file")]


def test_captions_of_every_form(tmp_path: Path) -> None:
    lines = ["a red bird on a branch", "a small bird", "this bird has a short beak"]
    members = [
        *((f"{i}.png", IMAGE) for i in range(8)),
        ("0.json", record("")),
        ("0.txt", b"a full text beside an empty record"),
        ("1.json", record(lines)),
        ("2.txt", "\r\n".join([*lines, ""]).encode()),
        ("3.json", b'{"TEXT": "as LAION names it"}'),
        ("4.txt", "\ufeffa cat".encode("utf-16-le")),
        ("5.caption", b"\xef\xbb\xbfkohya's ending"),
        ("6.json", b'[{"box": [0, 0, 9, 9]}]'),
        ("6.txt", b"a text beside annotations"),
        ("7.json", b"{"),
        ("7.txt", b"a text beside a damaged record"),
        ("h.heic", b"?"),
        ("h.txt", b"a format that is not read"),
        ("j.heic", IMAGE),
        ("j.txt", b"the content decides"),
    ]
    found = read_one(write_tar(tmp_path / "0.tar", members))
    told = captions(found)
    assert told["1"] in lines and told["2"] in lines
    assert {key: told[key] for key in "034567"} == {
        "0": "a full text beside an empty record",
        "3": "as LAION names it",
        "4": "a cat",
        "5": "kohya's ending",
        "6": "a text beside annotations",
        "7": "a text beside a damaged record",
    }
    assert reasons(found) == [("h", "unsupported image format")]
    assert (told["j"], found[-1].extension) == ("the content decides", "png")


def test_of_several_captions_the_key_draws_one(tmp_path: Path) -> None:
    lines = [f"caption {i}" for i in range(5)]
    members = [(f"{i}.{kind}", data) for i in range(200) for kind, data in (("png", IMAGE), ("txt", "\n".join(lines).encode()))]
    path = write_tar(tmp_path / "0.tar", members)
    drawn = captions(read_one(path))
    assert drawn == captions(read_one(path))
    counts = [list(drawn.values()).count(line) for line in lines]
    assert sum(counts) == 200 and min(counts) > 20


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("0.tar.gz", gzip.compress),
        ("0.TGZ", gzip.compress),
        ("0.tar", gzip.compress),
        ("0.tar.bz2", bz2.compress),
        ("0.tar.xz", lzma.compress),
        ("0.tar.zst", arrow_compress("zstd")),
        ("0.TZST", arrow_compress("zstd")),
        ("0.tar.lz4", arrow_compress("lz4")),
    ],
)
def test_compressed_tars(tmp_path: Path, name: str, compress: Callable[[bytes], bytes]) -> None:
    whole = write_tar(tmp_path / "plain", pairs(*"abcdef")).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(compress(whole))
    (shard,) = list_raw_shards(tmp_path / "in")
    assert shard.name == "0"
    assert captions(list(read_raw_shard(shard))) == {key: f"image {key}" for key in "abcdef"}
    (tmp_path / "in" / name).write_bytes(compress(whole)[: len(compress(whole)) // 2])
    (shard,) = list_raw_shards(tmp_path / "in")
    assert list(read_raw_shard(shard))[-1].reason == "damaged shard"
    (tmp_path / "in" / name).write_bytes(compress(whole) * 2)
    (shard,) = list_raw_shards(tmp_path / "in")
    assert len(captions(list(read_raw_shard(shard)))) == 12


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-2000],
        lambda data: data + b"what follows is no archive",
        lambda data: data[:-3000] + bytes(byte ^ 0x55 for byte in data[-3000:-2900]) + data[-2900:],
    ],
    ids=["cut", "joined with rubbish", "spoilt"],
)
@pytest.mark.parametrize(
    ("name", "compress"), [("0.tar.gz", gzip.compress), ("0.tar.xz", lzma.compress), ("0.tar.zst", arrow_compress("zstd"))]
)
def test_what_lies_before_the_damage_of_a_compressed_tar_is_read(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes], spoil: Callable[[bytes], bytes]
) -> None:
    noise = random.Random(0)
    members = [
        (f"{key}.{kind}", noise.randbytes(90_000) if kind == "png" else b"x") for key in "abcde" for kind in ("png", "txt")
    ]
    whole = write_tar(tmp_path / "plain", members).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(spoil(compress(whole)))
    found = read_one(tmp_path / "in" / name)
    assert set("abc") <= captions(found).keys() <= set("abcde")
    is_told = bool(reasons(found)) and reasons(found)[-1][1] == "damaged shard"
    assert is_told or (name == "0.tar.zst" and captions(found).keys() == set("abcde")), "these zstd streams have no checksum"


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_what_follows_a_compressed_tar_is_counted_and_padding_is_nothing(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    """bz2.open and lzma.open ignore it."""
    whole = compress(write_tar(tmp_path / "plain", pairs(*"abc")).read_bytes())
    for behind, expected in ((bytes(100_000), []), (bytes(100_000) + b"x" * 99, [("0", "damaged shard")])):
        (tmp_path / "0.tar.gz").write_bytes(whole + behind)
        found = read_one(tmp_path / "0.tar.gz")
        assert captions(found).keys() == set("abc") and reasons(found) == expected


def test_a_damaged_header_of_gzip_is_a_damaged_shard(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(write_tar(tmp_path / "plain", pairs("a")).read_bytes()))
    for at in range(2, 20):
        spoilt = data.copy()
        spoilt[at] ^= 0xFF
        (tmp_path / "0.tar.gz").write_bytes(spoilt)
        found = read_one(tmp_path / "0.tar.gz")
        assert captions(found) == {"a": "image a"} or reasons(found) == [("0", "damaged shard")]


def test_a_full_disk_is_no_damaged_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(write_tar(tmp_path / "plain", pairs(*"abc")).read_bytes()))

    @contextmanager
    def full() -> Iterator[Path]:
        (tmp_path / "unpacked.tar").symlink_to("/dev/full")
        yield tmp_path

    monkeypatch.setattr(compressed, "scratch_folder", full)
    with pytest.raises(OSError, match="No space left"):
        read_one(tmp_path / "0.tar.gz")


def test_names_that_are_no_utf8_are_kept_apart(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in pairs("caf\xe9", "caf\xe8"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert captions(read_one(tmp_path / "0.tar")) == {"caf%E9": "image caf\xe9", "caf%E8": "image caf\xe8"}


def test_a_tar_that_unpacks_to_far_more_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "FREE_BYTES", 1 << 20)
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress(write_tar(tmp_path / "plain", [*pairs("a"), ("b.png", bytes(64 << 20))]).read_bytes()))
    found = list(read_raw_shard(list_raw_shards(tmp_path)[0]))
    assert captions(found) == {"a": "image a"}
    assert reasons(found) == [("b", "damaged shard")]


def test_upper_case_endings_are_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "A.TAR", pairs("a"))
    assert [shard.name for shard in list_raw_shards(tmp_path)] == ["A"]
