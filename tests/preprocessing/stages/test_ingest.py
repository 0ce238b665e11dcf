"""Ingest: every sample is accounted for, a restart makes the same shards, damaged input is never fatal."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from dalle_ds.data.manifest import RawShardManifest, load_shard_manifests
from dalle_ds.data.raw.metadata import read_metadata
from dalle_ds.data.raw.shards import RawSample, list_raw_shards, read_raw_shard, shard_of
from dalle_ds.errors import DataError, FingerprintMismatch
from dalle_ds.storage import objects
from preprocessing.configs import FilterConfig, IngestConfig, VerifyConfig
from preprocessing.readers import inputs
from preprocessing.stages import ingest, verify
from tests.data.raw.test_shards import write_tar
from tests.support.images import draw_folder, encoded
from tests.support.sealed import edit_json


def config(images: Path, out: str, **more: object) -> IngestConfig:
    return IngestConfig(images=str(images), out=out, **{"samples_per_shard": 8, "workers": 1, **more})


def checksums(root: str) -> dict[str, str]:
    return {manifest.shard: manifest.checksum for manifest in load_shard_manifests(root, RawShardManifest)}


def test_all_samples_arrive(any_root: str, tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", 20)
    outcome = ingest.run(config(images, any_root))
    assert outcome.is_complete
    assert (outcome.summary["shards"], outcome.summary["samples"], outcome.summary["dropped"]) == (3, 20, {})
    samples = [sample for shard in list_raw_shards(any_root) for sample in read_raw_shard(shard)]
    assert all(isinstance(sample, RawSample) for sample in samples)
    captions = [json.loads(line) for line in (images / "captions.jsonl").read_text().splitlines()]
    assert [(s.key, s.caption, s.group, s.image) for s in samples] == [
        (c["file"][:-4], c["caption"], c["group"], (images / c["file"]).read_bytes()) for c in captions
    ]
    assert verify.run(VerifyConfig(root=any_root, workers=1)).is_complete


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    ingest.run(config(draw_folder(tmp_path / "images", 10), str(tmp_path / "raw")))
    tars = [shard.url for shard in list_raw_shards(tmp_path / "raw")]
    found = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert len(found) == 10
    assert found[3]["json"]["caption"].endswith("number 3")
    assert found[3]["json"]["language"] == "en" and 0.1 < found[3]["json"]["language_score"] <= 1
    assert found[3]["png"].size == (48, 48)


def hostile_folder(folder: Path) -> Path:
    draw_folder(folder, 6)
    good = (folder / "p0000.png").read_bytes()
    lines = (folder / "captions.jsonl").read_text().splitlines()

    def add(name: str, data: bytes | None, caption: str) -> None:
        if data is not None:
            (folder / name).write_bytes(data)
        lines.append(json.dumps({"file": name, "caption": caption}))

    add("cut.png", good[:60], "a cut image")
    add("text.jpg", b"<html>", "not an image")
    add("empty.png", b"", "an empty file")
    add("wide.png", encoded(Image.new("RGB", (200, 40))), "a wide image")
    add("tiny.png", encoded(Image.new("RGB", (5, 5))), "a tiny image")
    add("huge.png", encoded(Image.new("1", (12_000, 12_000))), "a decompression bomb")
    add("nocaption.png", encoded(Image.new("RGB", (40, 40), "red")), "  ")
    add("date.png", encoded(Image.new("RGB", (40, 41), "red")), "photographed on 3 May 2004")
    add("twin-a.png", encoded(Image.new("RGB", (40, 42), "blue")), "")  # has no caption, so twin-b is kept
    add("twin-b.png", encoded(Image.new("RGB", (40, 42), "blue")), "the kept twin")
    add("twin-c.png", encoded(Image.new("RGB", (40, 42), "blue")), "the third twin")
    add("gone.png", None, "an image that is missing")
    lines.append("{broken")
    (folder / "stray.png").write_bytes(encoded(Image.new("RGB", (40, 43))))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_hostile_input_is_counted_and_never_fatal(tmp_path: Path) -> None:
    root = str(tmp_path / "raw")
    outcome = ingest.run(config(hostile_folder(tmp_path / "images"), root))
    assert outcome.is_complete
    assert outcome.summary["dropped"] == {
        "unreadable": 2,
        "truncated": 1,
        "aspect ratio": 1,
        "too small": 1,
        "too large": 1,
        "empty caption": 2,
        "boilerplate": 1,
        "duplicate image": 1,
        "missing image": 1,
        "bad caption line": 1,
        "no caption": 1,
    }
    assert outcome.summary["samples"] == 7
    assert outcome.summary["inputs"] == 7 + sum(outcome.summary["dropped"].values())
    keys = {sample.key for shard in list_raw_shards(root) for sample in read_raw_shard(shard)}
    assert "twin-b" in keys
    listed = {}
    for manifest in load_shard_manifests(root, RawShardManifest):
        rows = read_metadata(shard_of(root, manifest), ("key", "reason")).to_pylist()
        listed |= {row["key"]: row["reason"] for row in rows if row["reason"]}
    assert listed["twin-c"] == "duplicate image"
    assert listed["huge"] == "too large"
    assert len(listed) == sum(outcome.summary["dropped"].values())
    assert verify.run(VerifyConfig(root=root, workers=1)).is_complete


def test_each_image_of_a_folder_is_read_once_and_by_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):  # 0, 2 and 4 are one image, all have the same size
        colour = ("red", "blue", "red", "lime", "red", "navy")[number]
        pixels = Image.new("RGB", (40, 40), colour)
        pixels.save(images / f"{number}.bmp")
        (images / f"{number}.txt").write_text(f"a square of number {number}")
    assert len({image.stat().st_size for image in images.glob("*.bmp")}) == 1
    read: list[str] = []
    read_entry = inputs.read_entry
    monkeypatch.setattr(inputs, "read_entry", lambda entry: (read.append(entry.key), read_entry(entry))[1])
    settings = config(images, str(tmp_path / "raw"), samples_per_shard=3)
    plans, *_ = ingest._plan(settings)
    assert len(plans) == 2 and not read
    outcome = ingest.run(settings)
    assert sorted(read) == [str(number) for number in range(6)]
    assert outcome.summary["dropped"] == {"duplicate image": 1}, "4 is in another shard than 0: dedup finds it"
    assert outcome.summary["samples"] == 5


def test_names_that_are_no_utf8_are_kept_or_listed(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", 2)
    (images / "captions.jsonl").unlink()
    for name, content in {
        b"caf\xe9.png": (images / "p0000.png").read_bytes(),
        b"caf\xe9.txt": b"a picture of a house",
        b"lone\xe9.txt": b"without an image",
        b"film\xe9.mp4": b"?",
    }.items():
        Path(os.fsdecode(bytes(images) + b"/" + name)).write_bytes(content)
    outcome = ingest.run(config(images, str(tmp_path / "raw")))
    assert outcome.is_complete
    assert outcome.summary["dropped"] == {"missing image": 1, "no caption": 2, "unknown file type": 1}
    (shard,) = list_raw_shards(tmp_path / "raw")
    assert "lone\\udce9.txt" in read_metadata(shard, ["key"])["key"].to_pylist()
    for i in range(2):
        (images / f"p000{i}.png").unlink()
    write_tar(
        Path(os.fsdecode(bytes(tmp_path) + b"/tars/t\xe9.tar")),
        [("0.png", encoded(Image.new("RGB", (40, 40)))), ("0.txt", b"a red house")],
    )
    Path(os.fsdecode(bytes(tmp_path) + b"/tars/gone\xe9.tar")).symlink_to("nothing")
    outcome = ingest.run(config(tmp_path / "tars", str(tmp_path / "raw2")))
    assert (outcome.is_complete, outcome.summary["samples"], outcome.summary["dropped"]) == (True, 1, {"broken link": 1})


def test_a_second_run_does_nothing_and_a_restart_makes_what_is_missing(tmp_path: Path) -> None:
    images, root = draw_folder(tmp_path / "images", 20), str(tmp_path / "raw")
    ingest.run(config(images, root))
    before = {path: path.stat().st_mtime_ns for path in Path(root).rglob("*") if path.is_file()}
    assert ingest.run(config(images, root)).summary["shards_made_now"] == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path(root).rglob("*") if path.is_file()}
    sums = checksums(root)
    (tmp_path / "raw" / "manifests" / "00001.json").unlink()  # as after a kill before the commit: data without a manifest
    assert ingest.run(config(images, root)).summary["shards_made_now"] == 1
    assert checksums(root) == sums
    (tmp_path / "raw" / "data" / ".00001.tar.0123456789ab.part").write_bytes(b"cut")  # as after a kill during a write
    report = verify.run(VerifyConfig(root=root, workers=1))
    assert report.is_complete
    assert report.summary["orphans"] == 3
    verify.run(VerifyConfig(root=root, workers=1, delete_orphans=True))
    report = verify.run(VerifyConfig(root=root, workers=1))
    assert report.is_complete
    assert report.summary["orphans"] == 0


def test_worker_processes_make_the_same_bytes(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", 20)
    ingest.run(config(images, str(tmp_path / "one")))
    ingest.run(config(images, str(tmp_path / "two"), workers=2))
    assert checksums(str(tmp_path / "one")) == checksums(str(tmp_path / "two"))


def test_other_inputs_or_filters_into_the_same_output_are_refused(tmp_path: Path) -> None:
    images, root = draw_folder(tmp_path / "images", 10), str(tmp_path / "raw")
    mark = ingest.run(config(images, root)).summary["fingerprint"]
    for other in (config(images, root, filters=FilterConfig(min_letters=9)), config(images, root, samples_per_shard=5)):
        with pytest.raises(FingerprintMismatch, match=f"expected fingerprint {mark}, found"):
            ingest.run(other)
    (images / "captions.jsonl").write_text((images / "captions.jsonl").read_text().replace("number 3", "number three"))
    with pytest.raises(FingerprintMismatch, match="; images or captions have changed since"):
        ingest.run(config(images, root))


def test_settings_that_changed_are_named_with_both_values(tmp_path: Path) -> None:
    images, root = draw_folder(tmp_path / "images", 10), str(tmp_path / "raw")

    def refused(**settings: Any) -> str:
        with pytest.raises(FingerprintMismatch) as caught:
            ingest.run(config(images, root, **settings))
        return str(caught.value)

    ingest.run(config(images, root, samples_per_shard=11, filters=FilterConfig(language=None)))
    same = FilterConfig(language=None)
    told = refused(samples_per_shard=9, filters=same)
    assert "; ingest.samples_per_shard was 11, is now 9. Choose" in told
    told = refused(samples_per_shard=11, filters=FilterConfig(min_side=20))
    assert '; ingest.filters.language was null, is now "en"; ingest.filters.min_side was 32, is now 20. Choose' in told
    (images / "p0000.png").unlink()
    told = refused(samples_per_shard=9, filters=same)
    assert "ingest.samples_per_shard was 11, is now 9; images or captions have changed since" in told
    edit_json(Path(root) / "raw.json", lambda record: record.pop("filters"))  # as earlier versions wrote it
    assert "images, filters or captions have changed since" in refused(samples_per_shard=11, filters=same)


def test_no_room_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "free_bytes", lambda url: 1000)
    with pytest.raises(DataError, match="needed for the raw shards"):
        ingest.run(config(draw_folder(tmp_path / "images", 3), str(tmp_path / "raw")))


def test_damage_is_found_by_verify(tmp_path: Path) -> None:
    root = str(tmp_path / "raw")
    ingest.run(config(draw_folder(tmp_path / "images", 10), root))
    shard = list_raw_shards(root)[0]
    data = bytearray(Path(shard.url).read_bytes())
    data[600] ^= 1
    Path(shard.url).write_bytes(data)
    outcome = verify.run(VerifyConfig(root=root, workers=1))
    assert not outcome.is_complete
    assert "SHA-256" in outcome.problems[0]
