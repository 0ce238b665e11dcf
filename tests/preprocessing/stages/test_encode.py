"""Encode: tokens equal those of a plain reference, shards are committed once, other settings and bad shards are refused."""

import dataclasses
import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dalle_ds.data.commit import commit_shard
from dalle_ds.data.images import decode_image, prior_crop, seed_of
from dalle_ds.data.manifest import (
    SPLITS,
    RawShardManifest,
    ShardManifest,
    StoredFile,
    done_shards,
    load_dataset_info,
    load_shard_manifests,
)
from dalle_ds.data.raw.metadata import sample_rows
from dalle_ds.data.raw.shards import DROP_LISTS, DropLists, list_raw_shards, split_of, without_drop_list
from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.data.tokens.dataset_files import load_index, load_manifest, merge_stored
from dalle_ds.data.tokens.shards import read_block
from dalle_ds.errors import DataError, FingerprintMismatch
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.storage import objects
from dalle_ds.storage.weights import read_weights, write_weights
from preprocessing.configs import DataPlanConfig, DuplicatesConfig, IngestConfig, StatsConfig, TokenizerConfig, VerifyConfig
from preprocessing.encoding import encode_shard, publication, reconstruct
from preprocessing.encoding.encode_shard import EncodeJob
from preprocessing.executors import local
from preprocessing.stages import duplicates, encode, ingest, plan, stats, tokenizer, verify
from tests.preprocessing.conftest import N_IMAGES, N_SHARDS, World, part_checksums, write_dvae
from tests.support.images import draw_folder, encoded
from tests.support.sealed import edit_json


def read_all(root: str) -> dict[str, dict[str, tuple[np.ndarray, str]]]:
    index = load_index(root)[1]
    found: dict[str, dict[str, tuple[np.ndarray, str]]] = {"train": {}, "validation": {}}
    for split, samples in found.items():
        for part in index.parts(split):
            for block in part.blocks:
                for tokens_N, key, caption in zip(*read_block(root, part, block), strict=True):
                    samples[key] = (tokens_N, caption)
    return found


def files_and_times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_tokens_equal_a_plain_twin(world: World, tmp_path: Path) -> None:
    out = str(tmp_path / "tokens")
    outcome = encode.run(world.config(out))
    assert outcome.is_complete
    weights = read_weights(world.dvae, "dvae")
    dvae = DVAE(DVAEConfig(**weights.config))
    dvae.load_state_dict(weights.state)
    captions = [json.loads(line) for line in (world.images / "captions.jsonl").read_text().splitlines()]
    found = read_all(out)
    assert sum(map(len, found.values())) == len(captions) == N_IMAGES
    histogram = np.zeros(32, dtype=np.int64)
    for record in captions:
        key = record["file"][:-4]
        crop = prior_crop(decode_image((world.images / record["file"]).read_bytes()), 32, seed_of(key))
        codes = dvae.tokens(torch.from_numpy(crop).permute(2, 0, 1)[None])[0].numpy()
        split = split_of(record["group"], 0.2)
        tokens_N, caption = found[split][key]
        assert np.array_equal(tokens_N, codes)
        assert caption == record["caption"]
        if split == "train":
            histogram += np.bincount(codes, minlength=32)
    manifest = load_manifest(out)
    assert manifest.complete
    assert manifest.code_histogram == histogram.tolist()
    assert sum(manifest.caption_lengths.values()) == manifest.n_samples["train"] == len(found["train"])
    assert len(found["validation"]) > 0
    assert outcome.summary["codes_used"] > 1
    assert verify.run(VerifyConfig(root=out, workers=1)).is_complete


def test_several_crops_of_each_training_image(world: World, tmp_path: Path) -> None:
    out, one = str(tmp_path / "tokens"), str(tmp_path / "one")
    outcome = encode.run(world.config(out, crops=3))
    encode.run(world.config(one))
    dvae = encode_shard.load_dvae(world.dvae)[0]
    manifest, manifest_of_one = load_manifest(out), load_manifest(one)
    histogram = np.zeros(32, dtype=np.int64)
    crops = []
    for crop in range(3):
        keys = []
        for part in load_index(out)[1].parts("train", crop):
            for block in part.blocks:
                for tokens_N, key, _ in zip(*read_block(out, part, block), strict=True):
                    image = decode_image((world.images / f"{key}.png").read_bytes())
                    pixels = prior_crop(image, 32, seed_of(key, crop))
                    codes = dvae.tokens(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].numpy()
                    assert np.array_equal(tokens_N, codes), (key, crop)
                    histogram += np.bincount(codes, minlength=32)
                    keys.append(key)
                    crops.append((key, pixels.tobytes()))
        assert keys == list(read_all(out)["train"])
    assert len(set(crops)) > 0.9 * len(crops), "crops of an image differ"
    assert manifest.code_histogram == histogram.tolist()
    assert manifest.caption_lengths == manifest_of_one.caption_lengths
    for split in ("train", "validation"):
        checksums = [[part.checksum for part in load_index(root)[1].parts(split)] for root in (out, one)]
        assert checksums[0] == checksums[1], "the first crop is that of a data set with one crop"
    verified = verify.run(VerifyConfig(root=out, workers=1))
    assert verified.is_complete and verified.summary["samples"] == N_IMAGES and verified.summary["orphans"] == 0
    assert verified.summary["images_compared"] > verify.run(VerifyConfig(root=one, workers=1)).summary["images_compared"]
    planned, planned_more = (plan.run(DataPlanConfig(measured=out, crops=crops)).summary for crops in (None, 6))
    assert planned["crops"] == outcome.summary["crops"] == 3
    assert planned["bytes_per_sample"] == pytest.approx(outcome.summary["bytes_per_sample"])
    for name in ("bytes_per_sample", "worker_hours"):
        assert planned_more[name] == pytest.approx(2 * planned[name]), name
    with pytest.raises(FingerprintMismatch, match="crops was 3, is now None"):
        encode.run(world.config(out))


def test_crops_that_changed_places_are_found(world: World, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    encode.run(world.config(out, crops=3))
    for file in (out / "manifests").glob("*.json"):
        edit_json(file, lambda record: record["more_crops"].reverse())
    problems = verify.run(VerifyConfig(root=str(out), workers=1, images_per_shard=4)).problems
    assert sum("of its tokens equal those of its source image" in problem for problem in problems) > 3


def test_a_second_run_does_nothing(world: World, tmp_path: Path) -> None:
    encode.run(world.config(tmp_path / "tokens"))
    before = files_and_times(tmp_path / "tokens")
    assert encode.run(world.config(tmp_path / "tokens")).summary["shards_made_now"] == 0
    assert files_and_times(tmp_path / "tokens") == before


def test_a_restart_makes_only_what_is_missing(world: World, tmp_path: Path, is_undisturbed: Callable[[str], bool]) -> None:
    out = tmp_path / "tokens"
    encode.run(world.config(out))
    for name in ("00003", "00007"):
        (out / "manifests" / f"{name}.json").unlink()
    (out / "manifest.json").unlink()
    assert not load_manifest(str(out)).complete
    assert encode.run(world.config(out)).summary["shards_made_now"] == 2
    assert is_undisturbed(str(out))
    assert verify.run(VerifyConfig(root=str(out), workers=1)).summary["n_problems"] == 0


def test_worker_processes_write_the_same_bytes(world: World, tmp_path: Path, is_undisturbed: Callable[[str], bool]) -> None:
    outcome = encode.run(world.config(tmp_path / "tokens", workers=2))
    assert outcome.is_complete
    assert outcome.summary["shards_made_now"] == N_SHARDS
    assert is_undisturbed(str(tmp_path / "tokens"))


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_any_number_of_decoding_threads_writes_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(encode_shard, "CHUNK_SAMPLES", 3)
    monkeypatch.setattr(encode_shard, "CHUNK_BYTES", chunk_bytes)
    raw = str(tmp_path / "raw")
    ingest.run(IngestConfig(images=str(world.images), out=raw, samples_per_shard=N_IMAGES, workers=1))
    (shard,) = list_raw_shards(raw)
    found = []
    for n_threads in (1, 2, 5):
        monkeypatch.setattr(local, "n_cores", lambda n_threads=n_threads: n_threads)
        assert encode.run(world.config(tmp_path / str(n_threads), raw=raw)).is_complete
        found.append(part_checksums(str(tmp_path / str(n_threads))))
    torch.set_num_threads(1)
    assert list(found[0]) == [shard.name]
    assert found[0] == found[1] == found[2]


def test_several_machines_begin_apart_and_leave_out_what_stands(
    world: World, tmp_path: Path, is_undisturbed: Callable[[str], bool]
) -> None:
    out = tmp_path / "tokens"
    outcome = encode.run(world.config(out, machine=1, machines=3))
    made = sorted((out / "manifests").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    names, own = [path.stem for path in made], [f"{i:05}" for i in range(5, 5 + N_SHARDS // 3)]
    assert sorted(names[: len(own)]) == own, "its own part first"
    assert sorted(names) == [f"{i:05}" for i in range(N_SHARDS)]
    assert outcome.is_complete and is_undisturbed(str(out))
    gone = dataclasses.replace(list_raw_shards(world.raw)[0], url=str(tmp_path / "gone.tar"))
    work = EncodeJob(str(out), load_dataset_info(str(out)), 4, 3, 0.1, "cpu").start(1)
    assert work(gone) is None, "another machine committed it meanwhile"
    last = encode.run(world.config(out, machine=3, machines=3))
    assert last.is_complete and last.summary["shards_made_now"] == 0


def test_another_making_into_the_same_output_is_refused(world: World, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    encode.run(world.config(out))
    info = load_dataset_info(str(out))
    before = files_and_times(out)
    other_dvae = write_dvae(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(FingerprintMismatch, match=f"dvae of data set .*expected fingerprint {info.dvae}, found {other_dvae}"):
        encode.run(world.config(out, dvae=str(tmp_path / "other.safetensors")))
    other = tokenizer.run(TokenizerConfig(raw=world.raw, out=str(tmp_path / "t.model"), vocab_size=390)).summary["fingerprint"]
    with pytest.raises(FingerprintMismatch, match=f"tokenizer of data set .*fingerprint {info.tokenizer}, found {other}"):
        encode.run(world.config(out, tokenizer=str(tmp_path / "t.model")))
    with pytest.raises(FingerprintMismatch, match="validation_fraction was 0.2, is now 0.3"):
        encode.run(world.config(out, validation_fraction=0.3))
    assert files_and_times(out) == before


def test_another_crop_rule_is_refused(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode.run(world.config(tmp_path / "tokens"))
    monkeypatch.setattr(encode, "CROP_RULE", "another rule")
    with pytest.raises(FingerprintMismatch, match="crop was .* is now 'another rule'"):
        encode.run(world.config(tmp_path / "tokens"))


def test_another_raw_set_with_the_same_names_does_not_pass_for_done(world: World, tmp_path: Path) -> None:
    encode.run(world.config(tmp_path / "tokens"))
    images = draw_folder(tmp_path / "images", 20, size=64)
    ingest.run(IngestConfig(images=str(images), out=str(tmp_path / "raw"), samples_per_shard=4, workers=1))
    with pytest.raises(DataError, match="shard 00000 was made from .*for another raw set"):
        encode.run(world.config(tmp_path / "tokens", raw=str(tmp_path / "raw")))


def write_tar(path: Path, samples: list[tuple[str, bytes, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, image, caption in samples:
            for name, data in ((f"{key}.png", image), (f"{key}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def good_sample(i: int) -> tuple[str, bytes, str]:
    return f"k{i:03d}", encoded(Image.effect_noise((40, 40), 30 + i)), f"noise number {i}"


def test_plain_tars_and_bad_shards(world: World, tmp_path: Path) -> None:
    """Tars without manifests: bad samples are counted, bad shards stay open and are named, the others are encoded."""
    raw, out = tmp_path / "raw", str(tmp_path / "tokens")
    write_tar(raw / "good.tar", [good_sample(i) for i in range(10)])
    few_bad = [good_sample(i) for i in range(20, 40)] + [("bad", b"not an image", "x")]
    write_tar(raw / "few.tar", few_bad)
    write_tar(
        raw / "many.tar",
        [
            *[good_sample(i) for i in range(40, 44)],
            ("tiny", encoded(Image.new("L", (9, 9))), "x"),
            ("blank", good_sample(0)[1], " "),
            ("cut", good_sample(1)[1][:100], "x"),
        ],
    )
    write_tar(raw / "broken.tar", [good_sample(i) for i in range(50, 70)])
    data = (raw / "broken.tar").read_bytes()
    (raw / "broken.tar").write_bytes(data[: len(data) // 2])
    config = world.config(out, raw=str(raw), validation_fraction=0.0)
    outcome = encode.run(config)
    assert not outcome.is_complete
    assert outcome.summary["failed_shards"].keys() == {"many", "broken"}
    assert "3 of 7 samples failed (" in outcome.summary["failed_shards"]["many"]
    assert "1 too small" in outcome.summary["failed_shards"]["many"]
    assert (
        "needs 32 pixels on the shorter side: ingest with `ingest.filters.min_side` 32"
        in outcome.summary["failed_shards"]["many"]
    )
    assert "the tar is damaged after" in outcome.summary["failed_shards"]["broken"]
    assert outcome.summary["samples"] == {"train": 30, "validation": 0}
    assert outcome.summary["dropped"] == {"unreadable": 1}
    published = load_manifest(out)
    assert not published.complete and published.missing == ["broken", "many"] and published.n_samples["train"] == 30
    assert TokenDataset(out).n_samples == 30, "training reads the shards that are done"
    assert "dropped" not in {path.name for path in Path(out).iterdir()}

    accepted = encode.run(config.model_copy(update={"max_failure_rate": 1.0}))
    assert accepted.is_complete
    assert accepted.summary["shards_made_now"] == 2
    reasons = ("damaged shard", "empty caption", "too small", "truncated", "unreadable")
    assert accepted.summary["dropped"] == dict.fromkeys(reasons, 1)
    assert verify.run(VerifyConfig(root=out, workers=1)).is_complete


def test_shards_without_samples_are_finished_shards(world: World, tmp_path: Path) -> None:
    """Every stage takes what the stage before it finished: shards whose samples were all dropped, empty tars and tables."""
    images = draw_folder(tmp_path / "images", 4)
    lines = [json.dumps({"file": f"gone{i}.png", "caption": "an image that is missing"}) for i in range(48)]
    captions = images / "captions.jsonl"
    captions.write_text("\n".join([*lines, captions.read_text()]))
    raw, out = str(tmp_path / "raw"), str(tmp_path / "tokens")
    ingest.run(IngestConfig(images=str(images), out=raw, samples_per_shard=4, workers=1))
    assert [manifest.n_samples for manifest in load_shard_manifests(raw, RawShardManifest)] == [0] * 12 + [4]
    duplicates.run(DuplicatesConfig(raw=raw, workers=1))
    outcome = encode.run(world.config(out, raw=raw))
    assert outcome.is_complete
    assert (outcome.summary["shards"], sum(outcome.summary["samples"].values())) == (13, 4)
    assert load_manifest(out).complete
    for root in (raw, out):
        assert verify.run(VerifyConfig(root=root, workers=1)).is_complete
        assert stats.run(StatsConfig(root=root)).is_complete
    assert plan.run(DataPlanConfig(measured=out)).is_complete
    assert encode.run(world.config(out, raw=raw)).summary["shards_made_now"] == 0


def test_a_data_set_without_any_sample_is_complete(world: World, tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "0.tar", [])
    (tmp_path / "tables").mkdir()
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), tmp_path / "tables" / "0.parquet"
    )
    for kind in ("tars", "tables"):
        raw, out = str(tmp_path / f"raw_{kind}"), str(tmp_path / f"tokens_{kind}")
        assert ingest.run(IngestConfig(images=str(tmp_path / kind), out=raw, workers=1)).summary["inputs"] == 0
        duplicates.run(DuplicatesConfig(raw=raw, workers=1))
        assert encode.run(world.config(out, raw=raw)).is_complete
        for root in (raw, out):
            assert verify.run(VerifyConfig(root=root, workers=1)).is_complete
            assert stats.run(StatsConfig(root=root)).is_complete
        with pytest.raises(DataError, match=": 0 samples in"):
            plan.run(DataPlanConfig(measured=out))
    assert encode.run(world.config(tmp_path / "tokens", raw=str(tmp_path / "tars"))).is_complete  # a tar without a manifest


def test_a_missing_shard_is_named_and_the_rest_done(world: World, tmp_path: Path) -> None:
    ingest.run(IngestConfig(images=str(world.images), out=str(tmp_path / "raw"), samples_per_shard=20, workers=1))
    Path(list_raw_shards(tmp_path / "raw")[1].url).unlink()
    outcome = encode.run(world.config(tmp_path / "tokens", raw=str(tmp_path / "raw")))
    assert outcome.summary["failed_shards"].keys() == {"00001"}
    assert "does not exist" in outcome.summary["failed_shards"]["00001"]
    assert outcome.summary["shards"] == 2


@pytest.mark.parametrize("repair", ["tar", "other folder", "max_failure_rate"])
def test_any_machine_tries_a_repaired_shard_again(world: World, tmp_path: Path, repair: str) -> None:
    raw, out = tmp_path / "raw", str(tmp_path / "tokens")
    for i in range(4):
        write_tar(raw / f"{i}.tar", [good_sample(10 * i + k) for k in range(4)])
    shutil.copytree(raw, tmp_path / "sound")
    sound = (raw / "3.tar").read_bytes()
    cut = sound[: len(sound) // 2].ljust(len(sound), b"?")
    (raw / "3.tar").write_bytes(cut)
    configs = [world.config(out, raw=str(raw), machine=machine, machines=5) for machine in range(5)]
    assert [encode.run(configs[machine]).is_complete for machine in (0, 1)] == [False, False]
    failed = encode.run(configs[4]).summary["failed_shards"]
    assert "failed on 2 other machines" in failed["3"]
    again = configs[4]
    if repair == "tar":
        (raw / "3.tar").write_bytes(sound)
    elif repair == "other folder":
        again = again.model_copy(update={"raw": str(tmp_path / "sound")})
    else:
        again = again.model_copy(update={"max_failure_rate": 1.0})
    outcome = encode.run(again)
    assert outcome.is_complete and outcome.summary["shards_made_now"] == 1
    assert objects.list_files(f"{out}/claims") == []


def test_the_loser_of_a_race_takes_its_data_away(world: World, tmp_path: Path) -> None:
    out = str(tmp_path / "tokens")
    encode.run(world.config(out))
    manifest = load_shard_manifests(out, ShardManifest)[0]
    ours = tmp_path / "ours.tar"
    ours.write_bytes(b"x")
    late = manifest.model_copy(update={"attempt": "late"})
    assert not commit_shard(out, manifest.shard, {"data/late.tar": ours}, late)
    assert not (tmp_path / "tokens" / "data" / "late.tar").exists()
    assert verify.run(VerifyConfig(root=out, workers=1)).summary["orphans"] == 0


def test_bad_input_is_told_at_the_start(world: World, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("this is no dVAE")
    write_weights(tmp_path / "strange", kind="dvae", config={"widgets": 3}, state={"a": torch.ones(1)})
    for wrong, message in [
        ({"raw": str(tmp_path / "empty")}, "no raw shards"),
        ({"raw": str(tmp_path / "missing")}, "no raw shards"),
        ({"dvae": str(tmp_path / "missing")}, "no such dvae weights file"),
        ({"dvae": str(tmp_path / "text")}, "not a safetensors"),
        ({"dvae": world.tokenizer}, "not a safetensors"),
        ({"dvae": str(tmp_path / "strange")}, "config of dVAE .*strange: "),
        ({"tokenizer": str(tmp_path / "missing")}, "no such file"),
        ({"tokenizer": world.dvae}, "sentencepiece"),
    ]:
        with pytest.raises(DataError, match=message):
            encode.run(world.config(out, **wrong))
    assert not out.exists()


@pytest.mark.parametrize(("used", "floor", "is_refused"), [(7, 0.25, True), (8, 0.25, False), (7, 0.2, False)])
def test_a_collapsed_codebook_is_refused(world: World, tmp_path: Path, used: int, floor: float, is_refused: bool) -> None:
    url = str(tmp_path / "dvae.safetensors")
    write_dvae(tmp_path / "dvae.safetensors", extra={"validation": json.dumps({"codes_used": used, "n_codes": 32})})
    config = world.config(tmp_path / "out", dvae=url, min_codes_used=floor)
    if is_refused:
        with pytest.raises(DataError, match="used 7 of its 32 codes on validation images, expected at least 25%"):
            encode.run(config)
        assert not (tmp_path / "out").exists()
    else:
        assert encode.run(config).is_complete


@pytest.mark.parametrize(
    "extra",
    [
        {"validation": "[]"},
        {"validation": "{"},
        {"validation": '{"codes_used": "many", "n_codes": 32}'},
        {"validation": "[" * 100_000},
        {"validation_fraction": "half"},
        {"validation_fraction": "nan"},
    ],
)
def test_metadata_of_a_strange_dvae_is_named(world: World, tmp_path: Path, extra: dict[str, str]) -> None:
    """Nothing verifies these entries: the fingerprint is that of the weights."""
    write_dvae(tmp_path / "dvae.safetensors", extra=extra)
    with pytest.raises(
        DataError, match=r"dvae\.safetensors.*(validation_fraction in its metadata is|not a valid CodebookUsage)"
    ):
        encode.run(world.config(tmp_path / "out", dvae=str(tmp_path / "dvae.safetensors")))


def test_no_room_is_told_before_any_work(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "free_bytes", lambda url: 1000)
    with pytest.raises(DataError, match="needed for the token shards"):
        encode.run(world.config(tmp_path / "tokens"))


def test_verify_finds_every_kind_of_damage(world: World, tmp_path: Path) -> None:
    def problems_after(damage: Callable[[Path], None]) -> list[str]:
        out = tmp_path / damage.__name__
        encode.run(world.config(out))
        damage(out)
        return verify.run(VerifyConfig(root=str(out), workers=1)).problems

    def first(out: Path, folder: str) -> Path:
        return sorted((out / folder).iterdir())[0]

    def flip(out: Path) -> None:
        file = first(out, "data")
        data = bytearray(file.read_bytes())
        data[700] ^= 1
        file.write_bytes(data)

    def cut(out: Path) -> None:
        file = first(out, "data")
        file.write_bytes(file.read_bytes()[:-512])

    def remove(out: Path) -> None:
        first(out, "data").unlink()

    def other_tokenizer(out: Path) -> None:
        (out / "tokenizer.model").unlink()
        tokenizer.run(TokenizerConfig(raw=world.raw, out=str(out / "tokenizer.model"), vocab_size=390))

    def lose_manifest(out: Path) -> None:
        first(out, "manifests").unlink()

    def edit_histogram(out: Path) -> None:
        def point_to_other(manifest: dict[str, Any]) -> None:
            details = json.loads(gzip.decompress(file.read_bytes()))
            details["code_histogram"][0] += 1
            file.write_bytes(gzip.compress(json.dumps(details).encode()))
            manifest["details"] = StoredFile.of(manifest["details"]["path"], file.read_bytes()).model_dump()

        file = first(out, "details")
        edit_json(first(out, "manifests"), point_to_other)

    for damage, message in [
        (flip, "SHA-256"),
        (cut, "as in its manifest"),
        (remove, "it does not exist"),
        (other_tokenizer, "tokenizer.model: fingerprint"),
        (lose_manifest, "does not match the merged"),
        (edit_histogram, "code histogram"),
    ]:
        found = problems_after(damage)
        assert any(message in problem for problem in found), (damage.__name__, found)


def test_stats_come_from_the_manifests(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = str(tmp_path / "tokens")
    encode.run(world.config(out))
    found = stats.run(StatsConfig(root=out)).summary
    assert found["inputs"] == N_IMAGES == sum(found["samples"].values())
    n_bytes = sum(path.stat().st_size for path in (tmp_path / "tokens" / "data").iterdir())
    assert found["bytes"] == n_bytes
    assert found["projected_gigabytes"] == pytest.approx(n_bytes / N_IMAGES * 0.25)
    assert 1 <= found["perplexity"] <= found["codes_used"] <= 32
    assert found["caption_tokens"]["median"] <= found["caption_tokens"]["max"]
    raw = stats.run(StatsConfig(root=world.raw)).summary
    assert "no images" not in caplog.text
    assert (raw["kind"], raw["samples"]) == ("raw", N_IMAGES)
    shutil.rmtree(tmp_path / "tokens" / "data")
    shutil.copytree(world.raw, tmp_path / "raw", ignore=shutil.ignore_patterns("*.tar"))
    for root, expected in ((out, found), (str(tmp_path / "raw"), {**raw, "root": str(tmp_path / "raw")})):
        caplog.clear()
        summary = stats.run(StatsConfig(root=root)).summary
        varying = {"page": None, "seconds": None}
        assert {**summary, **varying} == {**expected, **varying}
        assert "no images on the page" in caplog.text and "does not exist" in caplog.text
    with pytest.raises(DataError, match="neither a token data set nor"):
        stats.run(StatsConfig(root=str(tmp_path / "missing")))
    assert part_checksums(out)


def test_a_precision_is_measured_against_fp32_and_belongs_to_the_data_set(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path / "bf16", precision="bf16", min_agreement=0.9)
    summary = encode.run(config).summary
    info = load_dataset_info(config.out)
    assert summary["agreement"] == info.agreement and 0.9 <= info.agreement <= 1
    assert encode.run(config).summary["shards_made_now"] == 0
    with pytest.raises(FingerprintMismatch, match="precision was 'bf16', is now None"):
        encode.run(world.config(config.out))


def test_tf32_is_for_cuda_and_belongs_to_the_data_set(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="encode.tf32 is true on cpu"):
        encode.run(world.config(out, tf32=True))
    assert not out.exists()
    encode.run(world.config(out))
    file = out / "dataset.json"
    assert "tf32" not in json.loads(file.read_text())
    file.write_bytes(load_dataset_info(str(out)).model_copy(update={"tf32": True}).sealed().to_json())  # as on a GPU
    with pytest.raises(FingerprintMismatch, match="tf32 was True, is now None"):
        encode.run(world.config(out))


def test_a_precision_below_the_agreed_share_is_refused(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "agreement", lambda *_: 0.9949)
    with pytest.raises(DataError, match=r"99\.49%.*expects 99\.50%; use fp32"):
        encode.run(world.config(tmp_path / "out", precision="bf16"))
    with pytest.raises(DataError, match="fp16 on cpu"):
        encode.run(world.config(tmp_path / "out", precision="fp16"))
    assert not (tmp_path / "out").exists()


def test_verify_holds_decoded_tokens_against_their_source(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    encode.run(world.config(out))
    config = VerifyConfig(root=out, workers=1, images_per_shard=2)
    outcome = verify.run(config)
    assert outcome.is_complete, outcome.problems
    assert N_SHARDS < outcome.summary["images_compared"] <= 4 * N_SHARDS  # samples of both splits
    assert outcome.summary["psnr_min"] <= outcome.summary["psnr_mean"]
    assert decode_image(objects.read_bytes(outcome.summary["image"])).width == 8 * 32
    taken = reconstruct.crop_of
    monkeypatch.setattr(reconstruct, "crop_of", lambda *arguments: 255 - taken(*arguments))  # sources of other samples
    assert "of its tokens equal those of its source image" in verify.run(config).problems[0]
    monkeypatch.setattr(reconstruct, "read_raw_shard", lambda _: iter(()))
    assert "does not contain it" in verify.run(config).problems[0]
    (Path(world.raw) / "data").rename(tmp_path / "moved")  # raw shards may be removed after an encode
    try:
        gone = verify.run(config)
    finally:
        (tmp_path / "moved").rename(Path(world.raw) / "data")
    assert gone.is_complete and gone.summary["images_compared"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_less_than_fp32_on_a_gpu_agrees_with_fp32(world: World, tmp_path: Path, precision: str, tf32: bool) -> None:
    config = world.config(tmp_path / "out", precision=precision, tf32=tf32, device="cuda", min_agreement=0.9)
    summary = encode.run(config).summary
    assert summary["agreement"] is None if (precision, tf32) == ("fp32", False) else summary["agreement"] >= 0.9
    assert load_dataset_info(config.out).tf32 == (tf32 or None)
    assert verify.run(VerifyConfig(root=str(tmp_path / "out"), workers=1)).is_complete


@pytest.mark.parametrize("publisher_died", [False, True])
def test_one_machine_publishes_for_all(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publisher_died: bool
) -> None:
    """All machines are through at the same time. At full size each of them would read 50,000 objects to publish them."""
    out = str(tmp_path / "tokens")
    encode.run(world.config(out))
    for url in (f"{out}/manifest.json", *objects.list_files(f"{out}/index")):
        objects.delete(url)
    monkeypatch.setattr(publication, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(publication, "MAX_WAIT_SECONDS", 0.5 if publisher_died else 600.0)
    n_merges = 0

    def counted(*args: Any) -> Any:
        nonlocal n_merges
        n_merges += 1
        return merge_stored(*args)

    monkeypatch.setattr(publication, "merge_stored", counted)
    configs = [world.config(out, machines=4, machine=machine) for machine in range(4)]
    if publisher_died:
        killed = publication._claimed(out, done_shards(out), 3, 4)
        killed_before = publication._claimed(out, done_shards(out) - {"00001"}, 2, 4)
        assert killed.__enter__() and killed_before.__enter__()
        configs = configs[:1]
        assert verify.run(VerifyConfig(root=out, workers=1)).summary["orphans"] == 2
    with ThreadPoolExecutor(len(configs)) as pool:
        summaries = [outcome.summary for outcome in pool.map(encode.run, configs)]
    assert n_merges == 1
    assert all(summary["shards"] == N_SHARDS and summary["shards_made_now"] == 0 for summary in summaries)
    assert load_manifest(out).complete and load_index(out)[1].names == sorted(done_shards(out))
    assert objects.list_files(f"{out}/status/publishing") == [], "claims are of no use any more"
    killed_after = publication._claimed(out, done_shards(out), 3, 4)
    assert killed_after.__enter__(), "this machine was killed when it had published"
    encode.run(configs[0])
    assert objects.list_files(f"{out}/status/publishing") == []
    assert n_merges == 1, "what is published is not merged again"
    (tmp_path / "tokens" / "manifests" / "00001.json").touch()
    encode.run(world.config(out))
    assert n_merges == 2, "a younger manifest may be of another attempt"


def write_drop_list(root: str, keys: list[str]) -> None:
    lists = {}
    for shard in list_raw_shards(root):
        own = [key for key in sample_rows(without_drop_list(shard), ["key"])["key"].to_pylist() if key in keys]
        if own:
            lists[shard.name] = f"duplicates/{shard.name}-{len(own)}.jsonl"
            lines = [json.dumps({"key": key, "reason": "near duplicate"}) for key in own]
            objects.write_bytes(objects.join(root, lists[shard.name]), "\n".join(lines).encode())
    objects.write_bytes(objects.join(root, DROP_LISTS), DropLists(max_distance=2, lists=lists).to_json())


def read_keys(out: str) -> set[str]:
    found: set[str] = set()
    for split in SPLITS:
        dataset = TokenDataset(out, split)
        found |= {key for block in dataset.blocks(range(dataset.n_blocks)).values() for key in block.keys}
    return found


def test_a_changed_drop_list_masks_encoded_shards(world: World, tmp_path: Path) -> None:
    raw, out = str(tmp_path / "raw"), str(tmp_path / "tokens")
    shutil.copytree(world.raw, raw)
    every = [key for shard in list_raw_shards(raw) for key in sample_rows(shard, ["key"])["key"].to_pylist()]
    first = every[:2]
    write_drop_list(raw, first)
    config = world.config(out, raw=raw)
    summary = encode.run(config).summary
    assert (summary["dropped"], summary["masked"], summary["no_longer_listed"]) == ({"near duplicate": 2}, 0, 0)
    sums = part_checksums(out)

    write_drop_list(raw, [every[1], *every[9:30:4]])
    summary = encode.run(config).summary
    assert (summary["shards_made_now"], summary["masked"], summary["no_longer_listed"]) == (0, 6, 1)
    assert part_checksums(out) == sums
    assert read_keys(out) == set(every) - {*first, *every[9:30:4]}
    verified = verify.run(VerifyConfig(root=out, workers=1, images_per_shard=0))
    assert verified.is_complete and verified.summary["orphans_by_kind"] == {"replaced index": 1}

    write_drop_list(raw, [])
    assert encode.run(config).summary["no_longer_listed"] == 2
    assert read_keys(out) == set(every) - set(first)
