"""Tokenizer stage: trained only on the training split, and only once."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from dalle_ds.data.raw.metadata import iterate_sample_rows
from dalle_ds.data.raw.shards import RawSample, list_raw_shards, read_raw_shard, split_of
from dalle_ds.data.tokenizer import CaptionTokenizer, train_tokenizer
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.storage import objects
from preprocessing.configs import TokenizerConfig
from preprocessing.stages import tokenizer
from tests.preprocessing.conftest import World


def config(world: World, out: Path, **more: object) -> TokenizerConfig:
    return TokenizerConfig(**{"raw": world.raw, "out": str(out), "vocab_size": 400, "validation_fraction": 0.2, **more})


def test_it_sees_the_train_split_only(world: World, tmp_path: Path) -> None:
    outcome = tokenizer.run(config(world, tmp_path / "t.model"))
    found = [sample for shard in list_raw_shards(world.raw) for sample in read_raw_shard(shard)]
    samples = [sample for sample in found if isinstance(sample, RawSample)]
    captions = [sample.caption for sample in samples if split_of(sample.group, 0.2) == "train"]
    assert 0 < outcome.summary["captions"] == len(captions) < 60
    assert outcome.summary["fingerprint"] == train_tokenizer(captions, 400, tmp_path / "twin.model").fingerprint


def test_it_reads_a_sample_of_captions_and_no_tar(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "local_copy", None)  # every reader of tars calls it
    taught: list[str] = []

    def teach(captions: Iterable[str], vocab_size: int, out: str, *, spaces: bool) -> CaptionTokenizer:
        taught[:] = captions
        return train_tokenizer(taught, vocab_size, out, spaces=spaces)

    monkeypatch.setattr(tokenizer, "train_tokenizer", teach)
    every = tokenizer.run(config(world, tmp_path / "all.model", max_captions=60)).summary
    all_captions = set(taught)
    some = tokenizer.run(config(world, tmp_path / "some.model", max_captions=30, validation_fraction=0.0)).summary
    assert some["captions"] == len(taught) == 30 < every["captions"] < 60, "60 samples in 15 shards"
    assert set(taught) != all_captions
    assert not tokenizer.run(config(world, tmp_path / "all.model", max_captions=61)).summary["trained_now"]
    more = config(world, tmp_path / "some.model", max_captions=31, validation_fraction=0.0)
    with pytest.raises(DataError, match="some.model: exists, but was not trained on these captions with these settings"):
        tokenizer.run(more)
    shards = list_raw_shards(world.raw)
    of_shard = [set(rows["caption"].to_pylist()) for _, rows in iterate_sample_rows(shards, ["caption"])]
    assert all(len(captions & set(taught)) in (1, 2, 3) for captions in of_shard), "a sample is spread evenly over the shards"


def test_a_second_run_does_nothing(world: World, tmp_path: Path) -> None:
    out = tmp_path / "t.model"
    assert tokenizer.run(config(world, out)).summary["trained_now"]
    before = out.stat().st_mtime_ns
    assert not tokenizer.run(config(world, out)).summary["trained_now"]
    assert out.stat().st_mtime_ns == before


def test_another_tokenizer_is_not_replaced(world: World, tmp_path: Path) -> None:
    out, other, plain = (tmp_path / name for name in ("t.model", "other.model", "plain.model"))
    first = tokenizer.run(config(world, out)).summary["fingerprint"]
    assert tokenizer.run(config(world, other, vocab_size=390)).summary["fingerprint"] != first
    without_spaces = config(world, plain, spaces=False)
    assert tokenizer.run(without_spaces).summary["trained_now"] and not tokenizer.run(without_spaces).summary["trained_now"]
    assert CaptionTokenizer(plain).encode("a a") == [*CaptionTokenizer(plain).encode("a")] * 2
    refused = "exists, but was not trained on these captions with these settings; choose another `tokenizer.out`, or remove"
    with pytest.raises(DataError, match=f"t.model: {refused}"):
        tokenizer.run(config(world, out, vocab_size=390))
    assert CaptionTokenizer(out).fingerprint == first
    shutil.copy(other, out)  # under the record of another
    shutil.copy(other, tmp_path / "alone.model")  # without a record
    (tmp_path / "notes.txt").write_text("no model at all")
    for file in (out, tmp_path / "alone.model", tmp_path / "notes.txt"):
        before = file.read_bytes()
        with pytest.raises(DataError, match=f"{file.name}: {refused}"):
            tokenizer.run(config(world, file))
        assert file.read_bytes() == before


def test_a_damaged_model_is_trained_again(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "t.model"
    first = tokenizer.run(config(world, out)).summary["fingerprint"]
    out.write_bytes(b"half a mod")
    assert tokenizer.run(config(world, out)).summary["fingerprint"] == first
    assert CaptionTokenizer(out).fingerprint == first and "it is trained again" in caplog.text


@pytest.mark.parametrize("written", [1, 2])
def test_a_killed_training_is_repeated(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """The same command continues whether the kill came before or after the model was written."""
    out, n_written = tmp_path / "t.model", 0

    def write(url: str | Path, data: bytes) -> None:
        nonlocal n_written
        if n_written == written:
            raise KeyboardInterrupt
        n_written += 1
        write_bytes(url, data)

    write_bytes = objects.write_bytes
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(objects, "write_bytes", write)
        killed.setattr("dalle_ds.data.tokenizer.write_bytes", write)
        tokenizer.run(config(world, out))
    assert out.exists() == (written == 2)
    again = tokenizer.run(config(world, out)).summary
    assert again["trained_now"] and again["fingerprint"] == CaptionTokenizer(out).fingerprint
    assert not tokenizer.run(config(world, out)).summary["trained_now"]


def test_bad_input_is_told(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no raw shards"):
        tokenizer.run(config(world, tmp_path / "t.model", raw=str(tmp_path)))
    with pytest.raises(ConfigError, match="vocab_size is 20"):
        tokenizer.run(config(world, tmp_path / "t.model", vocab_size=20))
    assert not (tmp_path / "t.model").exists()
