"""Build and initialise the prior. Under ZeRO-3 it is sharded from the start, so no rank ever holds the whole model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dalle_ds.console import progress
from dalle_ds.models.prior import Layer, Prior, PriorConfig, initialise
from dalle_ds.parallel.deepspeed_api import deepspeed, set_z3_leaf_modules
from dalle_ds.parallel.engine_config import EngineConfig
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.parallel.replicas.groups import Replicas

SHOWN_FROM = 1 << 30
"""Number of parameters from which initialisation shows a progress bar. One core draws this many in about ten seconds."""


def build_model(
    config: PriorConfig, engine_config: EngineConfig, seed: int | None, ranks: Ranks, replicas: Replicas | None
) -> Prior:
    """Build, initialise and shard the prior.

    The same seed gives the same weights at any world size, at any ZeRO stage and in all replicas. Without a seed, no weights
    are drawn: drawing 12 billion takes a minute, and a checkpoint would replace them.
    """
    if engine_config.zero_stage != 3:
        model = Prior(config)
        if seed is not None:
            initialise(model, torch.Generator().manual_seed(seed))
        return model
    # each module is sharded as soon as it is constructed
    shard_group = replicas.shard_group if replicas else None
    with deepspeed.zero.Init(config_dict_or_path=engine_config.json, data_parallel_group=shard_group, mpu=replicas):
        model = Prior(config)
    if seed is not None:
        _initialise_sharded(model, seed, ranks, replicas)
    # A layer is gathered, freed and reduced as a whole: hooks on its dozen modules would cost more host time than the layer.
    set_z3_leaf_modules(model, [Layer])
    return model


def _initialise_sharded(model: Prior, seed: int, ranks: Ranks, replicas: Replicas | None) -> None:
    n_parameters = sum(p.ds_numel for p in model.parameters())
    bar = progress(
        total=n_parameters,
        what="initialising weights",
        unit="",
        unit_scale=True,
        enabled=ranks.is_main and n_parameters >= SHOWN_FROM,
    )

    @contextmanager
    def gathered(parameter: torch.nn.Parameter) -> Iterator[None]:
        # the first rank of a shard group broadcasts its values to the group; replicas are equal since they use the same seed
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield
        bar.update(parameter.ds_numel)

    generator = torch.Generator().manual_seed(seed)
    with bar:
        initialise(model, generator, gathered, is_writer=(replicas.shard_rank if replicas else ranks.rank) == 0)
