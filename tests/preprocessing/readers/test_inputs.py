"""Inputs of ingest other than image folders: tars, img2dataset's output, parquet files; on disk and on S3."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dalle_ds.data.manifest import RawShardManifest, load_shard_manifests
from dalle_ds.data.raw import RawSample, list_raw_shards, read_raw_shard
from dalle_ds.errors import DataError, FingerprintMismatch
from dalle_ds.recipes import load_recipe
from dalle_ds.storage import objects
from preprocessing.configs import ColumnsConfig, IngestConfig, VerifyConfig
from preprocessing.demo.drawn import draw
from preprocessing.stages import ingest, verify
from tests.data.test_raw import write_tar
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
    ],
)
def test_spellings_of_a_image_column(tmp_path: Path, name: str, column: pa.Array) -> None:
    file = tmp_path / f"{name}.parquet"
    pq.write_table(pa.table({"pixels": column, "title": pa.array(["first one", "second one", "third one"])}), file)
    with pytest.raises(DataError, match=r"the columns are \['pixels', 'title'\]; expected one of \['image', "):
        list(ingest.list_parts(str(file), ColumnsConfig())[0].samples())
    columns = {"image": ["pixels"], "caption": ["title"]}
    run(file, tmp_path / "out", columns=columns)
    assert {key: s.image for key, s in samples(str(tmp_path / "out")).items()} == {
        f"{name}/{i:08d}": image(i) for i in range(3)
    }
    with pytest.raises(DataError, match="column 'n' has the type int64; expected bytes or text"):
        pq.write_table(pa.table({"n": [1], "caption": ["x"]}), tmp_path / "n.parquet")
        list(ingest.list_parts(str(tmp_path / "n.parquet"), ColumnsConfig(image=("n",)))[0].samples())


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


@pytest.mark.parametrize("name", ["12b", "tiny"])
def test_recipes_fit(name: str) -> None:
    filters = load_recipe(IngestConfig, Path(__file__).parents[3] / "launchers" / "recipes" / f"{name}.yaml").filters
    assert (filters.min_aspect, filters.max_aspect, filters.language) == (0.5, 2, "en")  # as in the paper


def test_tars_and_loose_images_together_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.png", image(0)), ("0.txt", b"an image")])
    (tmp_path / "b.png").write_bytes(image(1))
    with pytest.raises(DataError, match="contains both tars and loose images"):
        run(tmp_path, tmp_path / "out")
