"""The settings of a run that a restart may change, although they change the numbers: a checkpoint keeps them for comparison."""

from typing import Any

from dalle_ds.parallel.engine_config import RECIPE_OWNS, EngineConfig
from dalle_ds.recipes import flatten
from dalle_ds.training.prior.config import PriorRunConfig

# Recipe keys that are part of the run's identity, or that change where and how fast it computes, but no numbers.
_LEFT_OUT = {
    **dict.fromkeys(("folder", "tracking", "checkpoint", "validation", "failure", "sampling"), True),
    **dict.fromkeys(("global_batch", "seed", "model"), True),  # identity
    **dict.fromkeys(("micro_batch", "activation_checkpointing"), True),
    "deepspeed_config": True,  # its content is compared
    "data": {"dataset", "mix", "dvae", "tokenizer", "prefetch", "cache"},
}
_OF_THE_RECIPE = {*RECIPE_OWNS, "steps_per_print", "timers"}
"""Keys of the engine's JSON that come from the recipe, or that only print."""


def settings_of(recipe: PriorRunConfig, engine: EngineConfig) -> dict[str, Any]:
    """The settings by their recipe key; those of the DeepSpeed JSON begin with "deepspeed."."""
    tree = recipe.model_dump(mode="json", exclude=_LEFT_OUT)
    if recipe.learning_rate.shape == "constant" and recipe.learning_rate.plateau is None:
        del tree["updates"]  # then a longer run only goes on
    json = {key: value for key, value in engine.json.items() if key not in _OF_THE_RECIPE}
    if engine.block_scaling is not None:
        json["fp16"] = {"loss_scale": "per_resblock", **engine.block_scaling.model_dump(mode="json")}
    number_format = str(engine.branch_dtype).removeprefix("torch.")
    return {"number_format": number_format, **flatten(tree), **flatten(json, "deepspeed.")}
