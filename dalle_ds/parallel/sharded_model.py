"""The prior with its first weights, sharded as ZeRO-3 wants it: no rank ever holds the whole model."""

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules

from dalle_ds.console import progress
from dalle_ds.models.prior import Layer, Prior, PriorConfig, initialise
from dalle_ds.parallel.engine_config import EngineConfig
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.parallel.replicas.groups import Replicas

SHOWN_FROM = 1 << 30
"""Parameters from which making the first weights has a progress bar: one core draws so many in about ten seconds."""


def build_model(config: PriorConfig, engine_config: EngineConfig, seed: int, ranks: Ranks, replicas: Replicas | None) -> Prior:
    """The same seed gives the same weights at any world size, at any ZeRO stage and in all replicas."""
    generator = torch.Generator().manual_seed(seed)
    if engine_config.zero_stage != 3:
        model = Prior(config)
        initialise(model, generator)
        return model
    # Each layer is sharded as soon as it is made: no rank ever holds the whole model.
    shard_group = replicas.shard_group if replicas else None
    with deepspeed.zero.Init(config_dict_or_path=engine_config.json, data_parallel_group=shard_group, mpu=replicas):
        model = Prior(config)
    n_parameters = sum(p.ds_numel for p in model.parameters())
    bar = progress(
        total=n_parameters, what="first weights", unit="", unit_scale=True, enabled=ranks.is_main and n_parameters >= SHOWN_FROM
    )

    @contextmanager
    def gathered(parameter: torch.nn.Parameter) -> Iterator[None]:
        # what the first rank of the shard group leaves in it is everybody's; the same seed makes replicas equal
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield
        bar.update(parameter.ds_numel)

    with bar:
        initialise(model, generator, gathered, is_writer=(replicas.shard_rank if replicas else ranks.rank) == 0)
    # gathered, freed and reduced as a whole: hooks of its dozen modules would take the host longer than the layer itself
    set_z3_leaf_modules(model, [Layer])
    return model
