"""`dalle-ds diagnose`: the update of a diagnosis once more, on any number of ranks."""

from pathlib import Path
from typing import Any

from dalle_ds.commands.settings import DiagnoseConfig
from dalle_ds.errors import ConfigError
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.recipes import load_recipe
from dalle_ds.training.prior.config import PriorRun
from dalle_ds.training.prior.diagnosis import DEEPSPEED_FILE, RECIPE_FILE, replay


def run(config: DiagnoseConfig, ranks: Ranks) -> dict[str, Any]:
    """By the recipe that lies with the diagnosis, where none is named. Raises ConfigError where that is on s3://."""
    recipe, overrides = config.recipe, list(config.recipe_overrides)
    if recipe is None:
        if "://" in config.diagnosis:
            raise ConfigError(f"{config.diagnosis}: name the recipe as well, such as recipe.yaml in the run's folder")
        recipe = Path(config.diagnosis, RECIPE_FILE)
        overrides.insert(0, f"deepspeed_config={Path(config.diagnosis, DEEPSPEED_FILE)}")
    return replay(load_recipe(PriorRun, recipe, overrides), config.diagnosis, ranks)
