"""Build the model of a weights file, whose config may be of another version, or made up."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.recipes import from_values
from dalle_ds.storage.weights import Weights


def dvae_config_of(weights: Weights, url: str | Path) -> DVAEConfig:
    """The config of a dVAE's weights; `url` is for messages. Raises DataError if it is none of this version."""
    try:
        return from_values(DVAEConfig, weights.config, f"config of dVAE {url}")
    except ConfigError as error:
        raise DataError(str(error)) from None


def build_dvae(weights: Weights, url: str | Path) -> DVAE:
    """The dVAE of its weights, which it uses without a copy; `url` is for messages.

    Raises:
        DataError: as `dvae_config_of`, or the weights do not fit the config.
    """
    with torch.device("meta"):  # skips initialization
        dvae = DVAE(dvae_config_of(weights, url))
    fill(dvae, weights.state, str(url))
    return dvae


def fill(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Put weights into a model on the meta device, without a copy. Raises DataError, which names `what`, if they do not fit."""
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        said = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise DataError(f"{what}: the weights do not fit the config beside them: {said[:300]}") from None
