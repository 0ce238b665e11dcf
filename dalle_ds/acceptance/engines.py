"""Engines for the steps, built in the same way as from a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.acceptance.place import Place
from dalle_ds.models.prior import PriorConfig
from dalle_ds.parallel.engine import PriorEngine
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.training.prior.build import build_engine, read_engine_config
from dalle_ds.training.prior.config import PriorRunConfig

LEARNING_RATE = 1e-4


def make_engine(
    place: Place,
    ranks: Ranks,
    config: PriorConfig,
    *,
    micro_batch: int,
    accumulation: int = 1,
    activation_checkpointing: bool = True,
    moments: str = "fp32",
    master: str = "fp32",
) -> PriorEngine:
    """Returns an engine with the default DeepSpeed config: ZeRO-3, fp16 branches, one gradient scale per residual block."""
    recipe = PriorRunConfig.model_validate(
        {
            "folder": "none",
            "data": {"dataset": "none"},
            "optimizer": {"moments": moments, "master": master},
            "deepspeed_config": place.pick("ds_configs/zero3_fp16.json", "ds_configs/zero3_fp16_cpu.json"),
            "global_batch": micro_batch * accumulation * ranks.world_size,
            "micro_batch": micro_batch,
            "activation_checkpointing": activation_checkpointing,
        }
    )
    return build_engine(recipe, config, read_engine_config(recipe, ranks), ranks)


class _Inf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.full_like(grad, float("inf"))


@contextmanager
def overflowing(module: nn.Module) -> Iterator[None]:
    """In this context, the gradients in `module`'s backward pass are Inf, as after an fp16 overflow."""
    whole = module.forward
    module.forward = lambda *args: _Inf.apply(whole(*args))
    try:
        yield
    finally:
        module.forward = whole
