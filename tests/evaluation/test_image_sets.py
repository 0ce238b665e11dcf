"""Sets of images: content, fingerprints, preparation of images; files of statistics."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from dalle_ds.data.raw import split_of
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
    blurred = prepare(entry, 64, 2.0)
    # the radius is the standard deviation in pixels; Pillow approximates the Gaussian by a few box filters
    expected = gaussian_filter(sharp.astype(float), (2.0, 2.0, 0))
    assert np.abs(blurred - expected).max() < 6 and blurred.max() < 240
    assert np.abs(prepare(entry, 64, 1.0) - expected).max() > 30
    assert prepare(entry, 32, 0).shape == (32, 32, 3)
    with pytest.raises(DataError, match="image k is too small; expected a short side of 65"):
        prepare(entry, 65, 0)
    with pytest.raises(DataError, match="image x is unreadable"):
        prepare(Entry("x", None, b"no image"), 8, 0)


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
