"""Encode: tokens equal those of a plain reference, shards are committed once, other settings and bad shards are refused."""

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_ds.data.commit import commit_shard
from dalle_ds.data.images import decode_image, prior_crop, seed_of
from dalle_ds.data.manifest import load_dataset_info, load_manifest
from dalle_ds.data.raw import list_raw_shards, split_of
from dalle_ds.data.shards import read_block
from dalle_ds.errors import DataError, FingerprintMismatch
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.storage import objects
from dalle_ds.storage.weights import read_weights, write_weights
from preprocessing.configs import IngestConfig, StatsConfig, TokenizerConfig, VerifyConfig
from preprocessing.encoding import encode_shard, reconstruct
from preprocessing.encoding.encode_shard import EncodeJob
from preprocessing.executors import local
from preprocessing.stages import encode, ingest, stats, tokenizer, verify
from tests.preprocessing.conftest import N_IMAGES, N_SHARDS, World, part_checksums, write_dvae
from tests.support.images import draw_folder, encoded


def read_all(root: str) -> dict[str, dict[str, tuple[np.ndarray, str]]]:
    manifest = load_manifest(root)
    found: dict[str, dict[str, tuple[np.ndarray, str]]] = {"train": {}, "validation": {}}
    for split, samples in found.items():
        for part in manifest.parts(split):
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
    assert [path.stem for path in made] == [f"{i % N_SHARDS:05}" for i in range(5, 5 + N_SHARDS)]
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
    assert "the tar is damaged after" in outcome.summary["failed_shards"]["broken"]
    assert outcome.summary["samples"] == {"train": 30, "validation": 0}
    assert outcome.summary["dropped"] == {"unreadable": 1}
    assert not objects.exists(objects.join(out, "manifest.json"))
    assert "dropped" not in {path.name for path in Path(out).iterdir()}

    accepted = encode.run(config.model_copy(update={"max_failure_rate": 1.0}))
    assert accepted.is_complete
    assert accepted.summary["shards_made_now"] == 2
    assert accepted.summary["dropped"] == {"damaged shard": 1, "empty caption": 1, "too small": 1, "unreadable": 2}
    assert verify.run(VerifyConfig(root=out, workers=1)).is_complete


def test_a_missing_shard_is_named_and_the_rest_done(world: World, tmp_path: Path) -> None:
    ingest.run(IngestConfig(images=str(world.images), out=str(tmp_path / "raw"), samples_per_shard=20, workers=1))
    Path(list_raw_shards(tmp_path / "raw")[1].url).unlink()
    outcome = encode.run(world.config(tmp_path / "tokens", raw=str(tmp_path / "raw")))
    assert outcome.summary["failed_shards"].keys() == {"00001"}
    assert "does not exist" in outcome.summary["failed_shards"]["00001"]
    assert outcome.summary["shards"] == 2


def test_the_loser_of_a_race_takes_its_data_away(world: World, tmp_path: Path) -> None:
    out = str(tmp_path / "tokens")
    encode.run(world.config(out))
    manifest = load_manifest(out).shards[0]
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
        ({"dvae": str(tmp_path / "strange")}, "does not match DVAEConfig"),
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
        tokenizer.run(TokenizerConfig(raw=world.raw, out=str(out / "tokenizer.model"), vocab_size=390))

    def lose_manifest(out: Path) -> None:
        first(out, "manifests").unlink()

    def edit_histogram(out: Path) -> None:
        manifest = json.loads(first(out, "manifests").read_text())
        manifest["code_histogram"][0] += 1
        first(out, "manifests").write_text(json.dumps(manifest))

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


def test_stats_come_from_the_manifests(world: World, tmp_path: Path) -> None:
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
    assert (raw["kind"], raw["samples"]) == ("raw", N_IMAGES)
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
