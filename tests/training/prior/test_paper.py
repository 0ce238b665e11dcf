"""The recipes of the paper's models run the paper's optimiser, and a run's page says what differs from the paper."""

from typing import Any

import pytest
import yaml

from dalle_ds.models.presets import PRESETS
from dalle_ds.parallel.engine_config import EngineConfig, load_engine_config
from dalle_ds.planning.memory import power_sgd_factors
from dalle_ds.precision.resblock_scaling import ResblockScalingConfig
from dalle_ds.recipes import VALIDATION_FRACTION, load_recipe
from dalle_ds.training.dvae.config import DVAERunConfig
from dalle_ds.training.prior.config import PriorRunConfig
from dalle_ds.training.prior.metrics import describe
from dalle_ds.training.prior.paper import differences
from preprocessing.configs import EncodeConfig, TokenizerConfig
from tests.support.launching import ROOT

RECIPES = ROOT / "launchers" / "recipes"
GPUS = {"12b": 256, "5.6b": 128, "2.8b": 64}


def different(
    name: str, *overrides: str, gpus: int | None = None, rank: Any = "recipe", fraction: float = 0.002424, **how: Any
) -> dict[str, Any]:
    run = load_recipe(PriorRunConfig, RECIPES / f"{name}.yaml", overrides)
    engine = how.get("engine") or load_engine_config(ROOT / run.deepspeed_config, micro_batch=1, accumulation=1, clip=4.0)
    rank = run.replicas.rank if rank == "recipe" else rank
    found = differences(run, run.model.on_paper(), engine, gpus or GPUS[name], [fraction], rank)
    return {one.key: (one.here, one.paper) for one in found}


@pytest.mark.parametrize("name", GPUS)
def test_recipes_of_the_papers_models_differ_from_it_in_one_setting(name: str) -> None:
    assert different(name) == {"optimizer.master": ("fp32", "none")}
    assert different(name, "optimizer.master=none") == {}


@pytest.mark.parametrize(("name", "rate"), [("12b", 0.141), ("5.6b", 0.149), ("2.8b", 0.167)])
def test_they_send_what_the_paper_sends(name: str, rate: float) -> None:
    run = load_recipe(PriorRunConfig, RECIPES / f"{name}.yaml")
    shards = GPUS[name] // run.replicas.count
    factors = power_sgd_factors(PRESETS[name], shards, run.replicas.rank)
    assert shards == 8 and factors.sent / factors.errors == pytest.approx(rate, abs=5e-4)


def test_all_stages_hold_out_606000_of_250_million_pairs_by_one_setting() -> None:
    text = (RECIPES / "12b.yaml").read_text()
    assert text.count("validation_fraction:") == 1
    recipe = yaml.safe_load(text)
    assert recipe["validation_fraction"] * 250e6 == pytest.approx(606_000)
    stages = [load_recipe(config, RECIPES / "12b.yaml") for config in (TokenizerConfig, EncodeConfig)]
    found = [stage.validation_fraction for stage in stages]
    found.append(load_recipe(DVAERunConfig, RECIPES / "12b.yaml").data.validation_fraction)
    assert set(found) == {recipe["validation_fraction"], VALIDATION_FRACTION}, "also the default of each stage"


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        ("optimizer.moments=fp32", "optimizer.moments", ("fp32", "low_bit")),
        ("optimizer.variance_clip=7", "optimizer.variance_clip", (7.0, 5.0)),
        ("learning_rate.plateau=null", "learning_rate", ("no halvings", "5 halvings when the loss flattens")),
        ("ema.decay=0.999", "ema.decay", (0.999, 0.99)),
        ("data.caption_dropout=0.1", "data.caption_dropout", (0.1, 0.0)),
        ("model.text_len=128", "model.text_len", (128, 256)),
    ],
)
def test_each_setting_that_differs_is_told(override: str, key: str, values: tuple[Any, Any]) -> None:
    assert different("12b", override) == {"optimizer.master": ("fp32", "none"), key: values}


def test_halvings_by_hand_are_the_papers_too() -> None:
    by_hand = "learning_rate.halve_at=[1,2,3,4,5]"
    assert "learning_rate" not in different("12b", "learning_rate.plateau=null", by_hand)


def test_differences_that_no_recipe_shows() -> None:
    """The rank for other shards, the split of the tokens, number formats of the DeepSpeed JSON."""
    assert different("12b", rank=82)["replicas.rank"] == ("82 on 8", "112 on 8")
    assert "replicas.rank" not in different("12b", gpus=512, rank=56)
    assert different("12b", fraction=0.05)["validation_fraction"] == (0.05, 0.002424)
    assert "validation_fraction" not in different("12b", fraction=0.0024)
    formats = "fp16 with a gradient scale for each residual block"
    for json, here in (({"bf16": {"enabled": True}}, "bf16"), ({}, "fp32")):
        assert different("12b", engine=EngineConfig(json, None))["deepspeed_config"] == (here, formats)
    one_scale = EngineConfig({"fp16": {"enabled": True}}, None)
    assert different("12b", engine=one_scale)["deepspeed_config"][0] == "fp16 with one loss scale"
    faster = EngineConfig({}, ResblockScalingConfig(growth_interval=10))
    assert different("12b", engine=faster)["fp16.growth_interval"] == (10, 1000)


def test_the_page_of_a_run_lists_them_all() -> None:
    run = load_recipe(PriorRunConfig, RECIPES / "12b.yaml", ["optimizer.moments=fp32"])
    engine = load_engine_config(ROOT / run.deepspeed_config, micro_batch=1, accumulation=1, clip=4.0)
    found = differences(run, run.model.on_paper(), engine, 256, [0.002424], 112)
    text = describe(run, 1, 256, found)
    assert "(its value in brackets): `optimizer.moments` fp32 (low_bit), `optimizer.master` fp32 (none)." in text
    assert "No setting differs from the paper's recipe." in describe(run, 1, 256, [])
