"""Tokenizer stage: trained only on the training split, and only once."""

from pathlib import Path

import pytest

from dalle_ds.data.raw import iterate_images
from dalle_ds.data.tokenizer import CaptionTokenizer, train_tokenizer
from dalle_ds.errors import ConfigError, DataError
from preprocessing.configs import TokenizerConfig
from preprocessing.stages import tokenizer
from tests.preprocessing.conftest import World


def config(world: World, out: Path, **more: object) -> TokenizerConfig:
    return TokenizerConfig(**{"raw": world.raw, "out": str(out), "vocab_size": 400, "validation_fraction": 0.2, **more})


def test_it_sees_the_train_split_only(world: World, tmp_path: Path) -> None:
    outcome = tokenizer.run(config(world, tmp_path / "t.model"))
    captions = [sample.caption for sample in iterate_images(world.raw, "train", 0.2)]
    assert 0 < outcome.summary["captions"] == len(captions) < 60
    assert outcome.summary["fingerprint"] == train_tokenizer(captions, 400, tmp_path / "twin.model").fingerprint


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
    out.write_bytes(b"half a mod")
    assert tokenizer.run(config(world, out)).summary["fingerprint"] == first
    assert CaptionTokenizer(out).fingerprint == first


def test_bad_input_is_told(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no raw shards"):
        tokenizer.run(config(world, tmp_path / "t.model", raw=str(tmp_path)))
    with pytest.raises(ConfigError, match="vocab_size is 20"):
        tokenizer.run(config(world, tmp_path / "t.model", vocab_size=20))
    assert not (tmp_path / "t.model").exists()
