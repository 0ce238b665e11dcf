"""Image folders: every caption format, and every input error."""

from pathlib import Path

import pytest
from PIL import Image

from dalle_ds.errors import DataError
from preprocessing.readers.folder import read_folder


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def pairs(folder: Path) -> dict[str, tuple[str, str]]:
    return {entry.key: (entry.caption, entry.group) for entry in read_folder(str(folder)) if not entry.reason}


def reasons(folder: Path) -> dict[str, str]:
    return {entry.key: entry.reason for entry in read_folder(str(folder)) if entry.reason}


def test_text_beside_the_image(tmp_path: Path) -> None:
    image(tmp_path / "sub" / "a.b.jpg")
    image(tmp_path / "lonely.jpg")
    (tmp_path / "sub" / "a.b.txt").write_text("\ufeff  a caption\n", encoding="utf-8")
    assert pairs(tmp_path) == {"sub_a_b": ("a caption", "sub_a_b")}  # keys have no dots: webdataset cuts a key at the first dot
    assert reasons(tmp_path) == {"lonely": "no caption"}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_jsonl(tmp_path: Path, bom: str) -> None:
    for name in ("a.png", "b.png", "c.png"):
        image(tmp_path / name)
    (tmp_path / "captions.jsonl").write_text(
        bom
        + "\n".join(
            [
                '{"file": "a.png", "caption": "one", "group": "g"}',
                '{"file_name": "./b.png", "text": "two\u2028lines\x85"}',
                "",
                "{broken",
                '"text"',
                '{"file": "a.png", "caption": "again"}',
                '{"file": "gone.png", "caption": "x"}',
                '{"file": "c.png", "caption": 5}',
                '{"file": "../../etc/passwd", "caption": "x"}',
            ]
        ),
        encoding="utf-8",
    )
    assert pairs(tmp_path) == {"a": ("one", "g"), "b": ("two\u2028lines", "b")}
    assert reasons(tmp_path) == {
        "captions.jsonl:4": "bad caption line",
        "captions.jsonl:5": "bad caption line",
        "captions.jsonl:6": "second caption",
        "captions.jsonl:7": "missing image",
        "captions.jsonl:8": "bad caption line",
        "captions.jsonl:9": "missing image",
        "c": "no caption",
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.tsv", 'file\tcaption\tgroup\na.png\ta "red" bear, big\tg\n'),
        ("captions.csv", 'file,caption,group\na.png,"a ""red"" bear, big",g\n'),
    ],
)
def test_tables(tmp_path: Path, name: str, text: str) -> None:
    image(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    assert pairs(tmp_path) == {"a": ('a "red" bear, big', "g")}


def test_bytes_that_are_no_utf8_are_kept_for_the_filter(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert pairs(tmp_path) == {"a": ("caf\ufffd", "a")}


def test_keys_are_unique(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a_b.png", "a/b.png", "a b.png"):
        image(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("caption")
    assert sorted(pairs(tmp_path)) == ["a", "a-2", "a_b", "a_b-2", "a_b-3"]


def test_nothing_usable_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder does not exist or is empty"):
        read_folder(str(tmp_path / "missing"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no images among its 1 files"):
        read_folder(str(tmp_path))
    image(tmp_path / "a.png")
    with pytest.raises(DataError, match="no captions: expected captions.jsonl"):
        read_folder(str(tmp_path))
    (tmp_path / "captions.csv").write_text("name,label\na.png,x\n")
    with pytest.raises(DataError, match="columns .*'label', 'name'.*; expected `file`, `caption`"):
        read_folder(str(tmp_path))
