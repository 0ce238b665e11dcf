"""DeepSpeed's JSON: every key belongs either to the JSON or to the recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from dalle_ds.errors import ConfigError
from dalle_ds.parallel.engine_config import EngineConfig, load_engine_config

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
ZERO3 = {"zero_optimization": {"stage": 3}}


def load(tmp_path: Path, tree: dict[str, Any]) -> EngineConfig:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree))
    return load_engine_config(path, micro_batch=4, accumulation=2, clip=4.0)


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda p: p.name)
def test_shipped_configurations_are_accepted(path: Path) -> None:
    config = load_engine_config(path, micro_batch=4, accumulation=2, clip=4.0)
    assert config.json["gradient_accumulation_steps"] == 2
    assert (config.block_scaling is not None) == ("per_resblock" in path.read_text())


@pytest.mark.parametrize(
    ("key", "value", "recipe_key"),
    [
        ("train_batch_size", 64, "global_batch"),
        ("gradient_clipping", 1.0, "optimizer.clip"),
        ("optimizer", {"type": "Adam"}, "optimizer"),
    ],
)
def test_what_the_recipe_owns_is_refused(tmp_path: Path, key: str, value: Any, recipe_key: str) -> None:
    with pytest.raises(ConfigError, match=f"sets {key} = .*{recipe_key}"):
        load(tmp_path, {**ZERO3, key: value})


def test_per_resblock_section_becomes_ours(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        {**ZERO3, "fp16": {"enabled": True, "loss_scale": "per_resblock", "initial_scale_power": 10, "growth_interval": 500}},
    )
    assert config.block_scaling.initial_scale_power == 10
    assert config.block_scaling.growth_interval == 500
    assert config.json["fp16"] == {"enabled": False}


@pytest.mark.parametrize(
    "section", [{"enabled": True, "loss_scale": 0, "initial_scale_power": 16}, {"enabled": False, "loss_scale": "per_resblock"}]
)
def test_other_fp16_sections_are_deepspeeds(tmp_path: Path, section: dict[str, Any]) -> None:
    config = load(tmp_path, {**ZERO3, "fp16": section})
    assert config.block_scaling is None
    assert config.json["fp16"] == section


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"fp16": {"enabled": True, "loss_scale": "per_resblock"}}, "needs zero_optimization.stage 3, found 0"),
        (
            {**ZERO3, "fp16": {"enabled": True, "loss_scale": "per_resblock", "hysteresis": 2}},
            "unknown keys in the fp16 section .*: hysteresis;",
        ),
        ({**ZERO3, "fp16": {"enabled": True, "loss_scale": "per_resblock", "skip": "half"}}, "skip.*'update' or 'block'"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "bf16 needs .*stage 1, 2 or 3, found 0"),
        ({"fp16": {"enabled": True}}, "fp16 needs .*stage 1, 2 or 3, found 0"),
        ({**ZERO3, "fp16": {"enabled": True, "loss_scale": "per_resblock", "min_scale_power": 20}}, "min <= initial <= max"),
    ],
)
def test_wrong_sections_say_what_is_wrong(tmp_path: Path, tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, tree)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_engine_config(tmp_path / "none.json", micro_batch=1, accumulation=1, clip=1.0)
    for content in (b"{", b"", b"[" * 100_000, b'{"a": "caf\xe9"}', b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ConfigError, match="not valid JSON"):
            load_engine_config(tmp_path / "bad.json", micro_batch=1, accumulation=1, clip=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"is \[\], expected an object"),
        ('{"fp16": true}', "sets fp16 = true, expected an object"),
        ('{"zero_optimization": 3}', "sets zero_optimization = 3, expected an object"),
        ('{"scheduler": {}}', r"comes from the recipe \(learning_rate\)"),
    ],
)
def test_json_of_another_shape(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_engine_config(tmp_path / "odd.json", micro_batch=1, accumulation=1, clip=1.0)


def test_replicas_skip_whole_updates(tmp_path: Path) -> None:
    section = {"enabled": True, "loss_scale": "per_resblock", "skip": "block"}
    with pytest.raises(ConfigError, match='"skip": "update"'):
        load(tmp_path, {**ZERO3, "fp16": section}).require_replicable()
    load(tmp_path, {**ZERO3, "fp16": {**section, "skip": "update"}}).require_replicable()


PER_RESBLOCK = {**ZERO3, "fp16": {"enabled": True, "loss_scale": "per_resblock"}}


@pytest.mark.parametrize(
    ("tree", "moments", "number_format", "message"),
    [
        ({**ZERO3, "bf16": {"enabled": True}}, "low_bit", "1-6-9", "per_resblock"),
        (
            {**PER_RESBLOCK, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            "low_bit",
            "1-6-9",
            "has offload_optimizer",
        ),
        (PER_RESBLOCK, "fp32", "1-6-9", "needs optimizer.moments low_bit, but the recipe has fp32"),
        (PER_RESBLOCK, "low_bit", "fp32", "needs replicas.number_format 1-6-9, but the recipe has fp32"),
    ],
)
def test_where_matrices_cannot_be_without_masters(
    tmp_path: Path, tree: dict[str, Any], moments: str, number_format: str, message: str
) -> None:
    load(tmp_path, PER_RESBLOCK).require_masterless("low_bit", "1-6-9")
    with pytest.raises(ConfigError, match=f"optimizer.master none .*{message}"):
        load(tmp_path, tree).require_masterless(moments, number_format)
