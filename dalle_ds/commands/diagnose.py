"""`dalle-ds diagnose`: repeat the update at which a run of the prior diverged, on any number of ranks."""

from typing import Any

from dalle_ds.commands.settings import DiagnoseConfig
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.training.prior.diagnosis import replay


def run(config: DiagnoseConfig, ranks: Ranks) -> dict[str, Any]:
    return replay(config.recipe_of_run(), config.diagnosis, ranks)
