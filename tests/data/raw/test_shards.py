"""Raw shards: samples are read back, damaged samples are counted, a group stays in one split."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dalle_ds.data.raw.shards import Dropped, RawSample, list_raw_shards, read_raw_shard, split_of
from dalle_ds.errors import DataError
from tests.support.images import encoded

IMAGE = encoded(Image.new("RGB", (8, 8), "red"))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def record(caption: object = "a caption", **more: object) -> bytes:
    return json.dumps({"caption": caption, **more}).encode()


def read_one(path: Path) -> list[RawSample | Dropped]:
    (shard,) = list_raw_shards(path.parent)
    return list(read_raw_shard(shard))


def test_samples_of_every_spelling(tmp_path: Path) -> None:
    found = read_one(
        write_tar(
            tmp_path / "0.tar",
            [
                ("a.png", IMAGE),
                ("a.json", record("first", group="g")),
                ("b.json", record("second")),
                ("b.PNG", IMAGE),
                ("dir/c.jpg", IMAGE),
                ("dir/c.txt", "\ufeffdritte \u00fc".encode()),
                ("dir/c.cls", b"ignored"),
            ],
        )
    )
    assert found == [
        RawSample("a", "g", "first", IMAGE, "png"),
        RawSample("b", "b", "second", IMAGE, "png"),
        RawSample("dir/c", "dir/c", "dritte \u00fc", IMAGE, "jpg"),
    ]


def test_what_cannot_be_a_sample_is_dropped_with_a_reason(tmp_path: Path) -> None:
    found = read_one(
        write_tar(
            tmp_path / "0.tar",
            [
                ("a.json", record()),
                ("b.png", IMAGE),
                ("c.png", IMAGE),
                ("c.json", b"{"),
                ("d.png", IMAGE),
                ("d.json", record(5)),
                ("e.png", IMAGE),
                ("e.txt", b"caf\xe9"),
                ("f.png", IMAGE),
                ("f.json", b"[]"),
                ("good.png", IMAGE),
                ("good.json", record()),
                ("a.png", IMAGE),
                ("h.png", IMAGE),
                ("h.png", IMAGE),
                ("h.json", record()),
                ("i.png", IMAGE),
                ("i.json", record(group=[7])),
            ],
        )
    )
    assert {d.key: d.reason for d in found if isinstance(d, Dropped)} == {
        "b": "no caption",
        "c": "unreadable caption",
        "d": "unreadable caption",
        "e": "unreadable caption",
        "f": "unreadable caption",
        "h": "duplicate key",
        "i": "unreadable caption",
    }
    assert [s.key for s in found if isinstance(s, RawSample)] == ["a", "good"]  # the members of a key need not be neighbours


def test_hostile_member_names_are_only_keys(tmp_path: Path) -> None:
    found = read_one(
        write_tar(
            tmp_path / "x" / "0.tar",
            [("../../evil.png", IMAGE), ("../../evil.json", record()), ("/abs.png", IMAGE), ("/abs.json", record())],
        )
    )
    assert len(found) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "x"]


@pytest.mark.parametrize("cut", [512 * 9 + 100, 512 * 9 + 300, 512 * 8 + 20])
def test_a_truncated_tar_gives_what_it_has_and_says_so(tmp_path: Path, cut: int) -> None:
    members = [(f"{i}.{kind}", data) for i in range(5) for kind, data in (("png", IMAGE), ("json", record()))]
    path = write_tar(tmp_path / "0.tar", members)
    path.write_bytes(path.read_bytes()[:cut])
    found = read_one(path)
    assert isinstance(found[-1], Dropped)
    assert found[-1].reason == "damaged shard"
    assert found[:-1] == [RawSample(str(i), str(i), "a caption", IMAGE, "png") for i in range(len(found) - 1)]
    assert len(found) == 3


def test_rubbish_instead_of_a_tar(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"x" * 5000)
    assert read_one(tmp_path / "0.tar") == [Dropped("0", "damaged shard")]


def test_no_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no raw shards"):
        list_raw_shards(tmp_path)


def test_a_shard_that_changed_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.png", IMAGE), ("a.json", record())])
    (shard,) = list_raw_shards(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    with pytest.raises(DataError, match="the shard has changed or is truncated"):
        list(read_raw_shard(shard))
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        list(read_raw_shard(shard))


def test_sub_folders_are_part_of_the_name(tmp_path: Path) -> None:
    for name in ("b/0.tar", "a/0.tar"):
        write_tar(tmp_path / name, [("k.png", IMAGE)])
    assert [shard.name for shard in list_raw_shards(tmp_path)] == ["a_0", "b_0"]
    write_tar(tmp_path / "a_0.tar", [("k.png", IMAGE)])
    names = [shard.name for shard in list_raw_shards(tmp_path)]
    assert len(set(names)) == 3 and [name[:4] for name in names] == ["a_0-", "a_0-", "b_0"]


def test_the_split_follows_the_group() -> None:
    drawn = [split_of(f"group {i}", 0.1) for i in range(5000)]
    assert 0.08 < drawn.count("validation") / len(drawn) < 0.12
    assert drawn == [split_of(f"group {i}", 0.1) for i in range(5000)]
    assert {split_of(f"g{i}", 0.0) for i in range(100)} == {"train"}
    # A larger fraction only adds samples: validation samples stay in the validation split.
    assert all(split_of(f"group {i}", 0.2) == "validation" for i, split in enumerate(drawn) if split == "validation")
