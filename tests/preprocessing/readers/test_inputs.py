"""Inputs of ingest other than image folders: tars, img2dataset's output, parquet files; on disk and on S3."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dalle_ds.data.manifest import RawShardManifest, load_shard_manifests
from dalle_ds.data.raw.shards import RawSample, list_raw_shards, read_raw_shard
from dalle_ds.errors import DataError, FingerprintMismatch
from dalle_ds.recipes import load_recipe
from dalle_ds.storage import objects
from preprocessing.configs import ColumnsConfig, IngestConfig, VerifyConfig
from preprocessing.demo.drawn import draw
from preprocessing.readers import parquet
from preprocessing.readers.listing import list_input
from preprocessing.stages import ingest, verify
from tests.data.raw.test_shards import write_tar
from tests.support.images import encoded


def image(number: int, kind: str = "PNG") -> bytes:
    return encoded(draw(number, 48).image, kind)


def samples(root: str) -> dict[str, RawSample]:
    found = [sample for shard in list_raw_shards(root) for sample in read_raw_shard(shard)]
    assert all(isinstance(sample, RawSample) for sample in found)
    assert verify.run(VerifyConfig(root=root, workers=1)).is_complete
    return {sample.key: sample for sample in found}


def run(images: object, out: object, **more: object) -> dict[str, object]:
    outcome = ingest.run(IngestConfig(images=str(images), out=str(out), workers=1, **more))
    assert outcome.is_complete
    assert outcome.summary["inputs"] == outcome.summary["samples"] + sum(outcome.summary["dropped"].values())
    return outcome.summary


def upload(folder: Path, url: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            objects.put_file(file, objects.join(url, file.relative_to(folder).as_posix()))


def img2dataset_output(folder: Path) -> Path:
    """Two tars with logs, as img2dataset writes them. The second tar continues the keys; the third sample has no caption."""
    folder.mkdir()
    for shard in range(2):
        members = []
        for i in range(3):
            key = f"{shard:05d}{i:04d}"
            # The json may lack the caption, which is then only in the txt.
            caption = f"bear number {key}"
            record = {
                "key": key,
                "status": "success",
                "width": 48,
                "height": 48,
                "url": f"https://example.org/{key}",
                "error_message": None,
                "caption": caption if shard == 0 and i < 2 else None,
            }
            members += [
                (f"{key}.jpg", image(10 * shard + i, "JPEG")),
                (f"{key}.json", json.dumps(record).encode()),
                (f"{key}.txt", b"" if (shard, i) == (0, 2) else caption.encode()),
            ]
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 3, "successes": 3}')
        pq.write_table(
            pa.table({"url": ["https://example.org"], "caption": ["x"], "status": ["failed_to_download"]}),
            folder / f"{shard:05d}.parquet",
        )
    return folder


def test_img2dataset_output(any_root: str, tmp_path: Path) -> None:
    upload(img2dataset_output(tmp_path / "in"), f"{any_root}/in")
    summary = run(f"{any_root}/in", f"{any_root}/out")
    assert (summary["shards"], summary["inputs"], summary["dropped"]) == (2, 6, {"empty caption": 1})
    found = samples(f"{any_root}/out")
    assert {key: sample.caption for key, sample in found.items()} == {
        f"0000{shard}/0000{shard}000{i}": f"bear number 0000{shard}000{i}"
        for shard in range(2)
        for i in range(3)
        if (shard, i) != (0, 2)
    }
    assert found["00001/000010002"].image == image(12, "JPEG")
    assert run(f"{any_root}/in", f"{any_root}/out")["shards_made_now"] == 0


def test_img2datasets_folders_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "00000"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"00000000{i}.jpg").write_bytes(image(i, "JPEG"))
        (folder / f"00000000{i}.txt").write_text(f"image number {i}")
        (folder / f"00000000{i}.json").write_text('{"status": "success"}')
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    pq.write_table(pa.table({"url": ["u"]}), tmp_path / "in" / "00000.parquet")
    assert run(tmp_path / "in", tmp_path / "out")["samples"] == 3


def test_tars_that_all_count_from_zero_keep_their_keys_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(
            tmp_path / "in" / f"{name}.tar",
            [
                ("0.png", image(ord(name))),
                ("0.txt", b"an image"),
                ("1.png", image(1)),
                ("1.json", b'{"caption": "an image", "group": "g"}'),
            ],
        )
    run(tmp_path / "in", tmp_path / "out")
    assert {key: sample.group for key, sample in samples(str(tmp_path / "out")).items()} == {
        "a/0": "a/0",
        "a/1": "g",
        "b/0": "b/0",
        "b/1": "g",
    }
    write_tar(tmp_path / "in" / "c.tar", [("0.png", image(5)), ("0.txt", b"an image")])
    with pytest.raises(FingerprintMismatch):
        run(tmp_path / "in", tmp_path / "out")


def test_tars_whose_names_become_equal_stay_apart(tmp_path: Path) -> None:
    names = ("a/0.tar", "a_0.tar", "set.1.tar", "set_1.tar")
    for i, name in enumerate(names):
        write_tar(tmp_path / "in" / name, [("0.png", image(i)), ("0.txt", f"image number {i}".encode())])
    run(tmp_path / "in", tmp_path / "out")
    found = samples(str(tmp_path / "out"))
    assert sorted(sample.caption for sample in found.values()) == [f"image number {i}" for i in range(4)]
    assert len({key.replace("/", "_") for key in found}) == 4


def write_parquet(file: Path, rows: int, **columns: pa.Array) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "image": pa.array([image(i, "JPEG" if i % 2 else "WEBP") for i in range(rows)], pa.binary()),
        "caption": pa.array([f"image number {i}" for i in range(rows)]),
    } | columns
    pq.write_table(pa.table(table), file, row_group_size=4)
    return file


def test_parquet_of_bytes(any_root: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a" / "part.0.parquet", 10)
    write_parquet(tmp_path / "in" / "b.parquet", 3)
    upload(tmp_path / "in", f"{any_root}/in")
    summary = run(f"{any_root}/in", f"{any_root}/out")
    assert (summary["shards"], summary["samples"], summary["dropped"]) == (2, 13, {})
    found = samples(f"{any_root}/out")
    assert found["a/part_0/00000006"] == RawSample(
        "a/part_0/00000006", "a/part_0/00000006", "image number 6", image(6, "WEBP"), "webp"
    )
    assert found["b/00000001"].extension == "jpg"


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("struct", pa.array([{"bytes": image(i), "path": None} for i in range(3)])),
        ("large", pa.array([image(i) for i in range(3)], pa.large_binary())),
        ("dictionary", pa.array([image(i) for i in range(3)], pa.binary()).dictionary_encode()),
        ("view", pa.array([image(i) for i in range(3)], pa.binary_view())),
        ("list", pa.array([[image(i)] for i in range(3)], pa.list_(pa.binary()))),
        ("structs", pa.array([[{"bytes": image(i), "path": "x"}] for i in range(3)])),
    ],
)
def test_spellings_of_a_image_column(tmp_path: Path, name: str, column: pa.Array) -> None:
    file = tmp_path / f"{name}.parquet"
    pq.write_table(pa.table({"pixels": column, "title": pa.array(["first one", "second one", "third one"])}), file)
    with pytest.raises(DataError, match=r"the columns are \['pixels', 'title'\]; expected one of \['image', "):
        list(ingest.list_parts(list_input(str(file)), ColumnsConfig())[0].samples())
    columns = {"image": "pixels", "caption": ["title"]}
    run(file, tmp_path / "out", columns=columns)
    assert {key: s.image for key, s in samples(str(tmp_path / "out")).items()} == {
        f"{name}/{i:08d}": image(i) for i in range(3)
    }
    with pytest.raises(DataError, match="column 'n' has the type int64; expected bytes or text"):
        pq.write_table(pa.table({"n": [1], "caption": ["x"]}), tmp_path / "n.parquet")
        list(ingest.list_parts(list_input(str(tmp_path / "n.parquet")), ColumnsConfig(image=("n",)))[0].samples())


def test_a_column_that_stands_twice_is_named(tmp_path: Path) -> None:
    columns = [pa.array([image(0)]), pa.array(["first"]), pa.array(["second"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["image", "caption", "caption"]), tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="twice.parquet: column 'caption' stands 2 times; expected it once"):
        list(ingest.list_parts(list_input(str(tmp_path / "twice.parquet")), ColumnsConfig())[0].samples())


def test_rows_of_a_parquet_file_that_cannot_be_samples(tmp_path: Path) -> None:
    captions = pa.array([b"good one", b"caf\xe9 noir", None, b"", b"good too"], pa.binary())
    captions = pa.Array.from_buffers(pa.string(), 5, captions.buffers())  # invalid UTF-8, which Arrow does not check
    images = pa.array([image(0), image(1), image(2), image(3), None], pa.binary())
    write_parquet(tmp_path / "a.parquet", 5, caption=captions, image=images)
    assert run(tmp_path / "a.parquet", tmp_path / "out")["dropped"] == {
        "unreadable caption": 1,
        "no caption": 1,
        "empty caption": 1,
        "no image": 1,
    }


def test_damaged_parquet_files(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "in" / "broken.parquet", 12).read_bytes()
    column = pq.ParquetFile(tmp_path / "in" / "broken.parquet").metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    broken = bytearray(whole)
    broken[start : start + 64] = b"\xff" * 64  # the header of the first page of the second row group
    (tmp_path / "in" / "broken.parquet").write_bytes(broken)
    (tmp_path / "in" / "cut.parquet").write_bytes(whole[:-100])
    (tmp_path / "in" / "rubbish.parquet").write_bytes(os.urandom(3000))
    (tmp_path / "in" / "zero.parquet").write_bytes(b"")
    summary = run(tmp_path / "in", tmp_path / "out")
    assert summary["samples"] == 8  # those of the first and third row groups
    assert summary["dropped"] == {"damaged shard": 4 + 3}
    shards = {manifest.shard: manifest.n_input for manifest in load_shard_manifests(tmp_path / "out", RawShardManifest)}
    assert shards == {"00000": 12, "00001": 1, "00002": 1, "00003": 1}


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.dictionary(pa.int8(), pa.string()))]
)
def test_a_list_of_captions_is_drawn_from(tmp_path: Path, kind: pa.DataType) -> None:
    captions = [["first one", "first again", "first once more"], ["second"], [], None, [None], ["", "third one"]]
    column = pa.array(captions, pa.list_(pa.string())).cast(kind)
    write_parquet(tmp_path / "a.PARQUET", 6, caption=pa.nulls(6)).unlink()
    pq.write_table(pa.table({"jpg": [image(i) for i in range(6)], "TEXT": column}), tmp_path / "a.PARQUET")
    assert run(tmp_path, tmp_path / "out")["dropped"] == {"no caption": 3}
    found = samples(str(tmp_path / "out"))
    assert found["a/00000000"].caption in captions[0]
    assert [found[f"a/0000000{row}"].caption for row in (1, 5)] == ["second", "third one"]


def test_views_of_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", 3, caption=pa.array([f"view number {i}" for i in range(3)], pa.string_view()))
    run(tmp_path, tmp_path / "out")
    assert sorted(sample.caption for sample in samples(str(tmp_path / "out")).values()) == [
        f"view number {i}" for i in range(3)
    ]


def test_a_column_that_unpacks_to_far_more_is_counted_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [image(0, "JPEG"), bytes(64 << 20), image(2, "JPEG")]
    table = pa.table({"image": pa.array(rows, pa.binary()), "caption": ["the first", "a bomb", "the third"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1, compression="zstd")
    monkeypatch.setattr(parquet, "FREE_BYTES", 1 << 20)
    assert run(tmp_path / "a.parquet", tmp_path / "out")["dropped"] == {"too large": 1}
    assert sorted(samples(str(tmp_path / "out"))) == ["a/00000000", "a/00000002"]


def test_large_images_are_read_few_at_a_time() -> None:
    class Chunk:
        path_in_schema, has_dictionary_page = "image.bytes", False
        total_uncompressed_size = total_compressed_size = 1000 * 16 * 2**20

    class Group:
        num_rows, num_columns = 1000, 1

        def column(self, number: int) -> type[Chunk]:
            return Chunk

    assert parquet._batch_rows(Group(), {"image"}) == ("", 4)


def test_tars_and_parquet_files_in_one_folder_are_both_read(tmp_path: Path) -> None:
    folder = img2dataset_output(tmp_path / "in")  # its logs have columns without images
    (folder / "00001_stats.json").unlink()
    write_parquet(folder / "more.parquet", 2)
    write_parquet(folder / "00000" / "0.parquet", 1)
    (folder / "gone.tar").symlink_to("nothing.tar")
    os.mkfifo(folder / "pipe.tar")
    (folder / "more.tar.br").write_bytes(b"?")
    summary = run(folder, tmp_path / "out")
    assert (summary["inputs"], summary["dropped"]) == (
        6 + 2 + 1 + 3,
        {"empty caption": 1, "broken link": 1, "not a regular file": 1, "unsupported archive": 1},
    )
    assert {key.rpartition("/")[0] for key in samples(str(tmp_path / "out"))} == {"00000", "00001", "more", "00000/0"}


def test_endings_in_any_case_and_compressed_tars(tmp_path: Path) -> None:
    members = [("0.png", image(0)), ("0.txt", b"an image")]
    whole = write_tar(tmp_path / "in" / "A.TAR", members).read_bytes()
    (tmp_path / "in" / "b.tar.gz").write_bytes(gzip.compress(whole))
    (tmp_path / "in" / "b.parquet").write_bytes(b"rubbish")
    assert run(tmp_path / "in", tmp_path / "out")["dropped"] == {"damaged shard": 1}
    found = samples(str(tmp_path / "out"))
    assert len(found) == 2 and "A/0" in found  # b.tar.gz and b.parquet get distinct names
    assert run(tmp_path / "in" / "b.tar.gz", tmp_path / "one")["samples"] == 1


def test_keys_that_grow_too_long_are_cut_and_stay_distinct(tmp_path: Path) -> None:
    members = [(f"{'k' * 195}{i}.{kind}", data) for i in range(3) for kind, data in (("png", image(i)), ("txt", b"an image"))]
    write_tar(tmp_path / "in" / "shard-000000.tar", members)
    write_parquet(tmp_path / "in" / ("p" * 220 + ".parquet"), 2)
    assert run(tmp_path / "in", tmp_path / "out")["dropped"] == {}
    found = samples(str(tmp_path / "out"))
    assert len(found) == 5 and all(len(key) <= 200 for key in found)
    assert all(sample.group == key for key, sample in found.items())


def test_what_is_no_input_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"no images among its 1 files \(1 .zip\); expected"):
        run(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"is one file; expected a folder, or a file ending in .tar, .tar.gz, "):
        run(tmp_path / "images.zip", tmp_path / "out")
    write_parquet(tmp_path / "a.parquet", 1)
    (tmp_path / "b.png").write_bytes(image(1))
    with pytest.raises(DataError, match="contains both parquet files and loose images"):
        run(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["12b", "emoji"])
def test_recipes_fit(name: str) -> None:
    filters = load_recipe(IngestConfig, Path(__file__).parents[3] / "launchers" / "recipes" / f"{name}.yaml").filters
    assert (filters.min_aspect, filters.max_aspect, filters.language) == (0.5, 2, "en")  # as in the paper


def test_tars_and_loose_images_together_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.png", image(0)), ("0.txt", b"an image")])
    (tmp_path / "b.png").write_bytes(image(1))
    with pytest.raises(DataError, match="contains both tars and loose images"):
        run(tmp_path, tmp_path / "out")
