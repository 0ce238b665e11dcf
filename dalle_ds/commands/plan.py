"""`dalle-ds plan`: estimate memory, time and cost of training a prior, given a preset or a recipe."""

from typing import Any

from dalle_ds.commands.settings import PlanConfig
from dalle_ds.errors import ConfigError
from dalle_ds.models.presets import PRESETS
from dalle_ds.planning.settings import PlanInputsConfig
from dalle_ds.recipes import from_options, load_recipe
from dalle_ds.training.prior.config import PriorRunConfig
from dalle_ds.training.prior.cost import plan, settings_of


def run(config: PlanConfig) -> dict[str, Any]:
    """Estimate memory, time and cost. Precedence: defaults < recipe < options.

    Raises:
        ConfigError: unknown preset or machine, unreadable recipe, or invalid values.
    """
    preset, given = config.preset, config.given()
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    if config.recipe is None:
        preset = preset or "12b"
        return {"preset": preset, **plan(PRESETS[preset], from_options(PlanInputsConfig, given))}
    job = load_recipe(PriorRunConfig, config.recipe, config.recipe_overrides)
    of_recipe = settings_of(job, from_options(PlanInputsConfig, given).gpus)
    model = PRESETS[preset] if preset else job.model.on_paper()
    return {"preset": preset or job.model.preset, **plan(model, from_options(PlanInputsConfig, {**of_recipe, **given}))}
