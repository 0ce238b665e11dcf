"""Sets of images: content, fingerprints, preparation of images; files of statistics."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from dalle_ds.data.raw.shards import split_of
from dalle_ds.errors import DataError
from dalle_ds.evaluation.fid import moments
from dalle_ds.evaluation.image_sets import Entry, open_images, prepare
from dalle_ds.evaluation.statistics import Measure, Statistics, cache_path, require_comparable
from tests.support.images import draw_folder, encoded


def write_shard(path, n, first=0):
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + n):
            image = encoded(Image.new("RGB", (40, 32), (i, 0, 0)))
            for name, data in ((f"k{i:03d}.png", image), (f"k{i:03d}.txt", f"caption {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_a_folder_a_record_and_shards(tmp_path):
    folder = draw_folder(tmp_path / "folder", 5)
    (folder / "p0001.txt").write_text("a caption beside\n")
    plain = list(open_images(folder))
    assert [entry.key for entry in plain] == [f"p000{i}.png" for i in range(5)]
    assert [entry.caption for entry in plain] == [None, "a caption beside", None, None, None]
    assert plain[3].data == (folder / "p0003.png").read_bytes()

    record = {"images": [{"file": f"p000{i}.png", "caption": f"c{i}"} for i in (3, 1)]}  # not all of the folder
    (folder / "samples.json").write_text(json.dumps(record))
    for source in (folder, folder / "samples.json"):
        assert [(entry.key, entry.caption) for entry in open_images(source)] == [("p0003.png", "c3"), ("p0001.png", "c1")]

    shards = tmp_path / "raw"
    shards.mkdir()
    write_shard(shards / "0.tar", 20)
    write_shard(shards / "1.tar", 20, first=20)
    assert [entry.caption for entry in open_images(shards)] == [f"caption {i}" for i in range(40)]
    validation = [entry.key for entry in open_images(shards, validation_fraction=0.3)]
    assert 0 < len(validation) < 40
    assert validation == [f"{i // 20}/k{i:03d}" for i in range(40) if split_of(f"k{i:03d}", 0.3) == "validation"]


def test_a_record_names_files_of_its_own_folder_only(tmp_path):
    folder = draw_folder(tmp_path / "folder", 2)
    (tmp_path / "private.png").write_bytes((folder / "p0000.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    for name in ("../private.png", str(tmp_path / "private.png"), "sub/../p0000.png", "..", ".", "", "a\\b.png", "nul\0.png"):
        (folder / "samples.json").write_text(json.dumps({"images": [{"file": name, "caption": "c"}]}))
        with pytest.raises(DataError, match="expected the name of a file beside the record, not a path"):
            open_images(folder)
    for name, said in (("link.png", "1 are links: link.png"), ("none.png", "1 are missing: none.png")):
        (folder / "samples.json").write_text(json.dumps({"images": [{"file": name, "caption": "c"}]}))
        with pytest.raises(DataError, match=said):
            open_images(folder)


def test_every_image_of_a_folder_is_read_or_has_a_problem(tmp_path):
    folder, elsewhere = draw_folder(tmp_path / "folder", 2), draw_folder(tmp_path / "elsewhere", 1)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "circle").symlink_to(folder)
    (folder / "new.heic").write_bytes(b"of a phone")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    os.mkfifo(folder / "pipe.png")
    (folder / "p0001.txt").write_bytes(b"x" * (5 << 20))
    found = {entry.key: entry.problem for entry in open_images(folder)}
    assert found == {
        "huge.png": "too large",
        "linked/p0000.png": None,
        "new.heic": "of a format that is not read",
        "p0000.png": None,
        "p0001.png": "with a caption that cannot be read (has more than 4194304 bytes)",
        "pipe.png": "not a file",
    }


def test_links_out_of_a_folder_are_followed_only_where_nobody_else_sees_the_images(tmp_path):
    folder, private = draw_folder(tmp_path / "folder", 2), draw_folder(tmp_path / "private", 1)
    (private / "p0000.txt").write_text("secret")
    (folder / "link.png").symlink_to(private / "p0000.png")
    (folder / "linked").symlink_to(private)
    (folder / "p0000.txt").symlink_to(private / "p0000.txt")
    (folder / "same.png").symlink_to(folder / "p0001.png")
    followed = {entry.key: entry.caption for entry in open_images(folder)}
    assert followed["linked/p0000.png"] == followed["p0000.png"] == "secret" and len(followed) == 5
    left = {entry.key: entry.problem for entry in open_images(folder, follow_links=False)}
    out = "a link out of the folder, or its caption is"
    assert left == {"link.png": out, "linked": out, "p0000.png": out, "p0001.png": None, "same.png": None}


def test_a_limit_takes_the_same_images_from_all_over(tmp_path):
    write_shard(tmp_path / "0.tar", 40)
    chosen = [entry.key for entry in open_images(tmp_path, limit=12)]
    assert len(chosen) == 12 and chosen == [entry.key for entry in open_images(tmp_path, limit=12)]
    assert chosen[-1] > "0/k024"
    folder = draw_folder(tmp_path / "folder", 9)
    assert len(list(open_images(folder, limit=4))) == 4 and len(list(open_images(folder, limit=40))) == 9


def test_fingerprints_follow_names_contents_and_choice(tmp_path):
    folder = draw_folder(tmp_path / "folder", 4)
    write_shard(tmp_path / "0.tar", 4)
    marks = [
        open_images(folder).fingerprint,
        open_images(folder, limit=3).fingerprint,
        open_images(tmp_path).fingerprint,
        open_images(tmp_path, limit=3).fingerprint,
        open_images(tmp_path, validation_fraction=0.9).fingerprint,
    ]
    assert open_images(folder).fingerprint == marks[0] and open_images(tmp_path).fingerprint == marks[2]
    (folder / "p0000.png").write_bytes((folder / "p0001.png").read_bytes())
    write_shard(tmp_path / "0.tar", 4, first=1)
    marks += [open_images(folder).fingerprint, open_images(tmp_path).fingerprint]
    assert len(set(marks)) == 7


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        open_images(tmp_path / "empty")
    with pytest.raises(DataError, match="expected a folder or samples.json"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no raw shards"):
        open_images(draw_folder(tmp_path / "folder", 2), validation_fraction=0.5)
    (tmp_path / "samples.json").write_text('{"images": [{"file": "gone.png", "caption": "c"}]}')
    with pytest.raises(DataError, match="of which 1 are missing: gone.png"):
        open_images(tmp_path / "samples.json")
    (tmp_path / "samples.json").write_text("{}")
    with pytest.raises(DataError, match="not a record of samples"):
        open_images(tmp_path)


def test_images_are_cut_and_blurred():
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    pixels[28:36, 44:52] = 255
    entry = Entry("k", None, encoded(Image.fromarray(pixels)))
    sharp = prepare(entry, 64, 0)
    assert (sharp == pixels[:, 16:80]).all()
    assert prepare(entry, 32, 0).shape == (32, 32, 3)
    with pytest.raises(DataError, match="image k is too small; expected a short side of 65"):
        prepare(entry, 65, 0)
    with pytest.raises(DataError, match="image x is unreadable"):
        prepare(Entry("x", None, b"no image"), 8, 0)


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_blur_is_a_gaussian_of_this_standard_deviation(radius):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    pixels[20:40, 20:40] = 255
    distance = np.arange(-64, 65)
    weights = np.exp(-(distance**2) / (2 * radius**2))
    matrix = np.zeros((64, 64))  # of the filter along one side; pixels beyond the edges are those at the edges
    for row in range(64):
        np.add.at(matrix[row], np.clip(row + distance, 0, 63), weights / weights.sum())
    expected = np.einsum("ij,kl,jlc->ikc", matrix, matrix, pixels.astype(float))
    blurred = prepare(Entry("k", None, encoded(Image.fromarray(pixels))), 64, radius)
    assert blurred.dtype == np.uint8
    assert np.abs(blurred - expected).max() < 0.55, "only rounding to integers, and weights beyond four standard deviations"


MEASURE = Measure("inception", "abc", 256, 1.0)


def test_statistics_come_back_from_a_file(tmp_path):
    found = moments(np.random.default_rng(0).normal(size=(30, 5)))
    made = Statistics(MEASURE, "coco", "123", found)
    path = cache_path(tmp_path / "cache", MEASURE, "123")
    made.save(path)
    loaded = Statistics.load(path)
    assert (loaded.measure, loaded.source, loaded.images, loaded.moments.n) == (MEASURE, "coco", "123", 30)
    assert (loaded.moments.mean_D == found.mean_D).all() and (loaded.moments.factor_RD == found.factor_RD).all()
    path.write_bytes(path.read_bytes()[:-40])
    for damaged in (path, tmp_path / "gone.npz"):
        with pytest.raises(DataError, match="no statistics of images"):
            Statistics.load(damaged)


@pytest.mark.parametrize(
    "change", [{"extractor": "clip"}, {"extractor_fingerprint": "xyz"}, {"size": 64}, {"blur": 2.0}, {"preparation": "other"}]
)
def test_unlike_measures_are_not_compared_and_both_are_named(tmp_path, change):
    other = Measure(**{**MEASURE.__dict__, **change})
    require_comparable(MEASURE, Measure(**MEASURE.__dict__), "same")
    with pytest.raises(DataError) as error:
        require_comparable(MEASURE, other, "reference.npz")
    assert str(MEASURE) in str(error.value) and str(other) in str(error.value) and "reference.npz" in str(error.value)
    assert cache_path(tmp_path, MEASURE, "p") != cache_path(tmp_path, other, "p")


def test_statistics_of_pytorch_fid_are_named_as_such(tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(DataError, match="mu and sigma are of pytorch-fid, whose network gives other features"):
        Statistics.load(tmp_path / "theirs.npz")
