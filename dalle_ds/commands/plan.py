"""`dalle-ds plan`: of a preset, or of a recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle_ds.errors import ConfigError
from dalle_ds.models.presets import PRESETS
from dalle_ds.planning.settings import PlanSettings
from dalle_ds.recipes import from_options, load_recipe
from dalle_ds.training.prior.config import PriorRun
from dalle_ds.training.prior.cost import plan, settings_of


def run(preset: str | None, recipe: Path | None, overrides: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's summary. `given` are fields of `PlanSettings`, which go before what the recipe says.

    Raises:
        ConfigError: no such preset or machine, a recipe that can't be read, overrides without a recipe, wrong values.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    if recipe is None and overrides:
        raise ConfigError(f"--set {overrides[0]}: it changes a recipe, and --recipe names none")
    if recipe is None:
        preset = preset or "12b"
        return {"preset": preset, **plan(PRESETS[preset], from_options(PlanSettings, given))}
    job = load_recipe(PriorRun, recipe, overrides)
    of_recipe = settings_of(job, from_options(PlanSettings, given).gpus)
    config = PRESETS[preset] if preset else job.model.on_paper()
    return {"preset": preset or job.model.preset, **plan(config, from_options(PlanSettings, {**of_recipe, **given}))}
