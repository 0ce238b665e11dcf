"""Image folders: every caption format, and every input error."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dalle_ds.data.raw.sample import Dropped, RawSample, is_safe_key
from dalle_ds.errors import DataError
from preprocessing.configs import ColumnsConfig, IngestConfig
from preprocessing.readers import caption_files
from preprocessing.readers.folder import read_folder
from preprocessing.readers.inputs import FolderPart, list_parts
from preprocessing.readers.listing import list_input
from preprocessing.stages import ingest
from tests.support.memory import names_below, peak_of


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def pairs(folder: Path) -> dict[str, tuple[str, str]]:
    return {entry.key: (entry.caption, entry.group) for entry in read_folder(list_input(str(folder))) if not entry.reason}


def reasons(folder: Path) -> dict[str, str]:
    return {entry.key: entry.reason for entry in read_folder(list_input(str(folder))) if entry.reason}


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
        ("captions.csv", 'file;caption;group\na.png;"a ""red"" bear, big";g\n'),
        ("captions.csv", 'caption\tfile\tgroup\n"a ""red"" bear, big"\ta.png\tg\n'),
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


def write_table(folder: Path, name: str, text: str, n_images: int = 6) -> Path:
    for i in range(n_images):
        image(folder / f"{i}.jpg")
    (folder / name).write_bytes(text.encode())
    return folder


def test_an_open_quote_costs_its_own_line(tmp_path: Path) -> None:
    rows = ["file,caption", "0.jpg,zero", '1.jpg,"open', "2.jpg,two", '3.jpg,"lines', 'of one"', '4.jpg,a "loud" 5']
    write_table(tmp_path, "captions.csv", "\r\n".join([*rows, '5.jpg,"a "red" car"']))
    assert pairs(tmp_path) == {"0": ("zero", "0"), "2": ("two", "2"), "3": ("lines\r\nof one", "3"), "4": ('a "loud" 5', "4")}
    assert reasons(tmp_path) == {
        "captions.csv:3": "bad caption line",
        "captions.csv:8": "bad caption line",
        "1": "no caption",
        "5": "no caption",
    }


def test_open_quotes_in_a_large_table_cost_their_own_lines(tmp_path: Path) -> None:
    lines = [f"{i}.jpg,{chr(34) * (i % 3 == 0)}caption {i} {'x' * 200}" for i in range(3000)]  # longer than csv's own limit
    write_table(tmp_path, "captions.csv", "file,caption\n" + "\n".join(lines), n_images=3)
    found = reasons(tmp_path)
    # Only the images tell that the lines behind an open quote are lines of their own.
    assert found["captions.csv:2"] == "bad caption line"
    assert sorted(pairs(tmp_path)) == ["1", "2"]
    assert len([source for source in found if source.startswith("captions.csv")]) + 2 == 3000


@pytest.mark.parametrize(("name", "separator"), [("captions.csv", ","), ("captions.tsv", "\t")])
def test_surplus_fields_would_cut_a_caption(tmp_path: Path, name: str, separator: str) -> None:
    rows = ["file caption", "0.jpg whole", "1.jpg cut rest", "2.jpg whole  ", "3.jpg", "4.jpg " + "a" * 200_000]
    write_table(tmp_path, name, "\n".join(row.replace(" ", separator) for row in rows))
    assert pairs(tmp_path) == {"0": ("whole", "0"), "2": ("whole", "2"), "4": ("a" * 200_000, "4")}
    assert {source: why for source, why in reasons(tmp_path).items() if "captions" in source} == {
        f"{name}:3": "bad caption line",
        f"{name}:5": "bad caption line",
    }


def test_a_line_longer_than_any_caption_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_files, "MAX_TEXT_BYTES", 1000)
    rows = [f'{{"file": "{i}.jpg", "caption": "{"x" * length}"}}' for i, length in enumerate([10, 5000, 20])]
    write_table(tmp_path, "captions.jsonl", "\n".join(rows), n_images=3)
    assert sorted(pairs(tmp_path)) == ["0", "2"]
    assert reasons(tmp_path) == {"captions.jsonl:2": "bad caption line", "1": "no caption"}


def test_captions_files_of_subfolders_and_of_imagefolder(tmp_path: Path) -> None:
    for path in ("train/0.jpg", "train/1.jpg", "val/0.jpg", "2.jpg", "val/deep/3.jpg"):
        image(tmp_path / path)
    (tmp_path / "train" / "metadata.jsonl").write_text(
        '{"file_name": "0.jpg", "text": "a"}\n{"file_name": "1.jpg", "text": "b"}'
    )
    (tmp_path / "val" / "CAPTIONS.CSV").write_text("File,TEXT\n0.jpg,c\ndeep/3.jpg,d\n../2.jpg,e\n../../2.jpg,out\n")
    assert {key: caption for key, (caption, _) in pairs(tmp_path).items()} == {
        "train_0": "a",
        "train_1": "b",
        "val_0": "c",
        "val_deep_3": "d",
        "2": "e",
    }
    assert reasons(tmp_path) == {"val/CAPTIONS.CSV:5": "missing image"}


@pytest.mark.parametrize(
    "captions",
    [
        pa.array(["a", "b", None, "gone"]),
        pa.array(["a", "b", None, "gone"]).dictionary_encode(),
        pa.array([["a"], ["b"], [], ["gone"]]),
    ],
)
def test_imagefolder_with_parquet(tmp_path: Path, captions: pa.Array) -> None:
    for i in range(3):
        image(tmp_path / "train" / f"{i}.jpg")
    names = [f"{i}.jpg" for i in range(4)]
    pq.write_table(pa.table({"image": names, "text": captions, "group": [7, 7, 8, 8]}), tmp_path / "train" / "metadata.parquet")
    listing = list_input(str(tmp_path))
    assert list_parts(listing, ColumnsConfig()) == []  # no data set of encoded images, though a column is called so
    assert pairs(tmp_path) == {"train_0": ("a", "7"), "train_1": ("b", "7")} | (
        {"train_2": ("", "8")} if pa.types.is_list(captions.type) else {}
    )
    assert reasons(tmp_path)["train/metadata.parquet:4"] == "missing image"


def test_rows_of_a_damaged_caption_table_are_counted(tmp_path: Path) -> None:
    for i in range(4):
        image(tmp_path / f"{i}.jpg")
    texts = pa.array([b"zero", b"caf\xe9", b"two" * 50, b"three" * 50]).view(pa.string())
    file = tmp_path / "metadata.parquet"
    pq.write_table(pa.table({"file_name": [f"{i}.jpg" for i in range(4)], "text": texts}), file, row_group_size=2)
    data = bytearray(file.read_bytes())
    at = pq.read_metadata(file).row_group(1).column(1).dictionary_page_offset
    data[at : at + 40] = bytes(40)
    file.write_bytes(data)
    assert pairs(tmp_path) == {"0": ("zero", "0"), "1": ("caf\ufffd", "1")}
    assert reasons(tmp_path) == {
        "metadata.parquet:3": "bad caption line",
        "metadata.parquet:4": "bad caption line",
        "2": "no caption",
        "3": "no caption",
    }
    file.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="damaged parquet file"):
        pairs(tmp_path)


def test_groups_may_be_numbers(tmp_path: Path) -> None:
    for name in "ab":
        image(tmp_path / f"{name}.png")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": "one", "group": 0}')
    (tmp_path / "b.json").write_text('{"caption": "two", "group": 0}')
    assert pairs(tmp_path) == {"a": ("one", "0"), "b": ("two", "0")}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("captions.jsonl", '[{"file": "a.png", "caption": "x"}]', r"the first is '\[\{\"file\".*expected \{\"file\": "),
        ("captions.jsonl", '{\n "file": "a.png",\n "caption": "x"\n}', r"the first is '\{'"),
        ("captions.jsonl", '{"file": 0, "caption": "x"}', 'the first is .*"file": 0'),
        ("captions.csv", "file,caption\na.png,red, round\n", r"no line has a value for each of the columns .* captions.csv:2$"),
        ("captions.csv", "file,caption,caption\na.png,red,blue\n", "'caption' stands twice"),
        ("captions.csv", "a.png,red\n", r"columns \['a.png', 'red'\], expected `file`"),
    ],
)
def test_a_caption_file_without_a_usable_line_is_shown(tmp_path: Path, name: str, text: str, expected: str) -> None:
    image(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=expected):
        read_folder(list_input(str(tmp_path)))


def test_names_that_disk_and_line_write_differently(tmp_path: Path) -> None:
    for name in ("cafe\u0301.jpg", "IMG_1.JPG", "sub/x.jpg", "a.jpg", "A.jpg"):
        image(tmp_path / name)
    (tmp_path / "captions.tsv").write_text(
        f"file\tcaption\ncaf\u00e9.jpg\t1\nimg_1.jpg\t2\nsub\\x.jpg\t3\n{tmp_path}/A.jpg\t4\na.JPG\tambiguous\n",
        encoding="utf-8",
    )
    assert {key: caption for key, (caption, _) in pairs(tmp_path).items()} == {
        "cafe_": "1",
        "IMG_1": "2",
        "sub_x": "3",
        "A": "4",
    }
    assert reasons(tmp_path) == {"captions.tsv:6": "missing image", "a": "no caption"}


def test_caption_files_of_every_spelling(tmp_path: Path) -> None:
    for name in ("A.jpg", "B.png", "C.jpg", "cafe\u0301.jpg", "D.jpg", "E.jpg", "e.jpg", "F.jpg"):
        image(tmp_path / name)
    for name, text in {
        "A.TXT": "one",
        "B.caption": "two",
        "C.jpg.txt": "three",
        "caf\u00e9.txt": "four",
        "D.txt": "red\n\ngreen\n",
        "E.txt": "upper",
        "e.txt": "lower",
        "F.json": '{"caption": "five"}',
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "G.jpg").write_bytes((tmp_path / "A.jpg").read_bytes())
    (tmp_path / "G.txt").write_bytes("\ufeffsix".encode("utf-16-le"))
    found = {key: caption for key, (caption, _) in pairs(tmp_path).items()}
    assert found.pop("D") in ("red", "green")
    assert found == {"A": "one", "B": "two", "C": "three", "cafe_": "four", "E": "upper", "e": "lower", "F": "five", "G": "six"}
    assert reasons(tmp_path) == {}


def test_every_file_is_a_sample_or_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image(tmp_path / "a.jpg")
    for name in ("a.txt", "orphan.txt", "photo.heic", "noname", "film.mp4", "gone.txt", "README.md", "a.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "gone.jpg").symlink_to("nothing.jpg")
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate(1 << 40)  # a sparse file: a terabyte that takes no room
    image(tmp_path / "big.jpg")
    with caplog.at_level("INFO"):
        assert sorted(pairs(tmp_path)) == ["a"]
        assert reasons(tmp_path) == {
            "orphan.txt": "missing image",
            "photo.heic": "unsupported image format",
            "noname": "unknown file type",
            "film.mp4": "unknown file type",
            "gone.jpg": "broken link",
            "big": "too large",
        }
    assert "1 files (1 .md" in caplog.text


def test_a_file_with_a_caption_is_judged_by_its_content(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    for name in ("jpeg.heic", "noname"):  # different bytes: they are not duplicates
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes() + name.encode())
    (tmp_path / "true.heic").write_bytes(b"?")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("a", "jpeg", "noname", "true", "huge"):
        (tmp_path / f"{name}.txt").write_text("a caption")
    found = {sample.key: sample for sample in FolderPart(tuple(read_folder(list_input(str(tmp_path))))).samples()}
    assert {key: sample.extension for key, sample in found.items() if isinstance(sample, RawSample)} == {
        "a": "png",
        "jpeg": "png",
        "noname": "png",
    }
    assert found["true"] == Dropped("true", "unsupported image format")
    assert found["huge"] == Dropped("huge", "too large")


def test_long_paths_become_keys_that_can_be_stored(tmp_path: Path) -> None:
    folder = "a" * 100 + "/" + "b" * 100
    for name in ("0.jpg", "1.jpg"):
        image(tmp_path / folder / name)
        (tmp_path / folder / name).with_suffix(".txt").write_text("caption")
    keys = list(pairs(tmp_path))
    assert len(set(keys)) == 2
    assert all(is_safe_key(key) and key.startswith("a" * 100 + "_b") for key in keys)


def test_keys_are_unique(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a_b.png", "a/b.png", "a b.png"):
        image(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("caption")
    assert sorted(pairs(tmp_path)) == ["a", "a-2", "a_b", "a_b-2", "a_b-3"]


def test_nothing_usable_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder does not exist or is empty"):
        read_folder(list_input(str(tmp_path / "missing")))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no images among its 1 files \(1 .txt\); expected jpg, "):
        read_folder(list_input(str(tmp_path)))
    image(tmp_path / "a.png")
    with pytest.raises(DataError, match="no captions: expected captions.jsonl"):
        read_folder(list_input(str(tmp_path)))
    (tmp_path / "captions.csv").write_text("name,label\na.png,x\n")
    with pytest.raises(DataError, match="columns .*'name', 'label'.*, expected `file`, `caption`"):
        read_folder(list_input(str(tmp_path)))


def test_a_folder_takes_little_memory_a_file(tmp_path: Path) -> None:
    """The plan of the largest folder, two million images with their texts, must fit into a small machine."""
    n = 1000
    for number in range(n):
        image = tmp_path / f"part-{number % 10}" / f"{number:08d}.jpg"
        image.parent.mkdir(exist_ok=True)
        image.touch()
        image.with_suffix(".txt").write_text(f"A caption of sixty characters for the picture with number {number}.")
    config = IngestConfig(images=str(tmp_path), out=str(tmp_path / "raw"))
    names = names_below(tmp_path)
    plans, n_input, _ = ingest._plan(config)  # imports what it needs
    assert (len(plans), n_input) == (4, n) and len(names) > 2 * n
    assert peak_of(lambda: ingest._plan(config)) / n < 2700, "bytes an image"
