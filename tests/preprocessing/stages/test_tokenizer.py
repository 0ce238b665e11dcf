"""Tokenizer stage: trained only on the training split, and only once."""

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
    assert tokenizer.run(more).summary["trained_now"]
    shards = list_raw_shards(world.raw)
    of_shard = [set(rows["caption"].to_pylist()) for _, rows in iterate_sample_rows(shards, ["caption"])]
    assert all(len(captions & set(taught)) in (1, 2, 3) for captions in of_shard), "a sample is spread evenly over the shards"


def test_a_second_run_does_nothing(world: World, tmp_path: Path) -> None:
    out = tmp_path / "t.model"
    assert tokenizer.run(config(world, out)).summary["trained_now"]
    before = out.stat().st_mtime_ns
    assert not tokenizer.run(config(world, out)).summary["trained_now"]
    assert out.stat().st_mtime_ns == before


def test_other_settings_or_damage_train_again(world: World, tmp_path: Path) -> None:
    out = tmp_path / "t.model"
    first = tokenizer.run(config(world, out)).summary["fingerprint"]
    second = tokenizer.run(config(world, out, vocab_size=390)).summary
    assert second["trained_now"]
    assert second["fingerprint"] != first
    without_spaces = tokenizer.run(config(world, out, spaces=False)).summary
    assert without_spaces["trained_now"] and not tokenizer.run(config(world, out, spaces=False)).summary["trained_now"]
    assert CaptionTokenizer(out).encode("a a") == [*CaptionTokenizer(out).encode("a")] * 2
    out.write_bytes(b"half a mod")
    assert tokenizer.run(config(world, out)).summary["fingerprint"] == first
    assert CaptionTokenizer(out).fingerprint == first


def test_bad_input_is_told(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no raw shards"):
        tokenizer.run(config(world, tmp_path / "t.model", raw=str(tmp_path)))
    with pytest.raises(ConfigError, match="vocab_size is 20"):
        tokenizer.run(config(world, tmp_path / "t.model", vocab_size=20))
    assert not (tmp_path / "t.model").exists()
