"""The host's work per layer: the engine under DeepSpeed against the plain model, in CPU time and in counts."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dalle_ds.bench.fake_world.counting import Sent, python_calls
from dalle_ds.bench.fake_world.one_rank import make_engine, miniature, random_batches
from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import Prior, PriorConfig, initialise
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.precision.resblock_scaling import ResblockGradScaler, ResblockScalingConfig

WARM_UP = 3


@dataclass(frozen=True)
class HostWork:
    """Work of the host: CPU seconds (the minimum over the rounds), function calls from Python, dispatched torch operators."""

    seconds: float
    calls: float
    dispatches: float

    def __sub__(self, other: "HostWork") -> "HostWork":
        return HostWork(self.seconds - other.seconds, self.calls - other.calls, self.dispatches - other.dispatches)

    def __truediv__(self, n: float) -> "HostWork":
        return HostWork(self.seconds / n, self.calls / n, self.dispatches / n)


def host_work(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, HostWork]:
    """Measure `works` in turns, after `WARM_UP` runs of each. ZeRO-3 knows the order of modules only in the third run, and its
    prefetching settles a little later. With 0 rounds, seconds are NaN."""
    for work in works.values():
        for _ in range(WARM_UP):
            work()
    seconds = dict.fromkeys(works, math.inf if rounds else math.nan)
    for _ in range(rounds):
        for name, work in works.items():
            began = time.process_time()
            work()
            seconds[name] = min(seconds[name], time.process_time() - began)
    counted = {}
    for name, work in works.items():
        with Sent() as sent:
            work()
        counted[name] = HostWork(seconds[name], python_calls(work), sum(sent.dispatches.values()))
    return counted


HOST_CONFIG = {"n_heads": 4, "d_head": 8, "text_len": 8, "grid": 4, "vocab_size": 64, "n_codes": 32, "conv_kernel": 3}
"""A model so small that the host's work dominates all computation."""


@dataclass(frozen=True)
class HostTime:
    """The host's work for one layer.

    `micro_step`: forward and backward of a micro-step after the first, under the engine. `plain`: the same in the plain model,
    with the same fp16 branches, gradient scales and activation checkpointing, but without DeepSpeed. `update`: an update
    without its micro-step.
    """

    micro_step: HostWork
    plain: HostWork
    update: HostWork

    @property
    def ratio(self) -> float:
        """CPU time of the engine's micro-step divided by the plain model's."""
        return self.micro_step.seconds / self.plain.seconds


def host_time(
    ranks: Ranks,
    deepspeed_json: Mapping[str, Any],
    d_model: int,
    rounds: int = 5,
    recompute_every: int = 1,
    depths: tuple[int, int] = (8, 12),
) -> HostTime:
    """Measure the host's work per layer, as the difference between models of two depths and between updates of one and two
    micro-steps. The models gather and reduce as a model of width `d_model` does, see `miniature`.

    Call through `in_fake_world`. The JSON must use per-resblock scaling. With 0 rounds only counts are taken, which are
    reproducible; seconds are NaN.
    """
    works: dict[str, Callable[[], object]] = {}
    for n_layers in depths:
        config = PriorConfig(n_layers=n_layers, **HOST_CONFIG)
        tree = miniature(deepspeed_json, config, d_model)
        for n in (1, 2):
            engine = make_engine(ranks, config, tree, accumulation=n, recompute_every=recompute_every)
            works[f"engine {n_layers} {n}"] = partial(engine.update, random_batches(config, 1, n), 1e-4)
        works[f"plain {n_layers}"] = _plain_micro_step(config, recompute_every)
    found = host_work(works, rounds)
    fewer, more = depths
    one, two = ((found[f"engine {more} {n}"] - found[f"engine {fewer} {n}"]) / (more - fewer) for n in (1, 2))
    micro_step, plain = two - one, (found[f"plain {more}"] - found[f"plain {fewer}"]) / (more - fewer)
    return HostTime(micro_step, plain, one - micro_step)


def _plain_micro_step(config: PriorConfig, recompute_every: int) -> Callable[[], None]:
    prior = Prior(config)
    initialise(prior, torch.Generator().manual_seed(0))
    ResblockGradScaler(prior, ResblockScalingConfig())
    use_attention(prior, "dense", torch.device("cpu"))
    if recompute_every:
        recompute_layers(prior, recompute_every)
    [batch] = random_batches(config, 1)

    def micro_step() -> None:
        nll = prior(*batch)
        (nll.text_sum + nll.image_sum).backward()
        prior.zero_grad()

    return micro_step
