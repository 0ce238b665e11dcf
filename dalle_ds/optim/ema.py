"""Iterate averaging: an exponential moving average of named tensors."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dalle_ds.recipes import Config


class EMAConfig(Config):
    """How an average moves. The paper: dVAE 0.999 at every update; prior 0.99 at a copy every 25 updates, on the CPU."""

    decay: float = Field(0.999, ge=0, lt=1, description="weight of the past each time")
    start: Literal["plain", "warm"] = Field(
        "plain", description="plain: the average starts as the initial weights; warm: short memory at first, for short runs"
    )


class PriorEMAConfig(EMAConfig):
    """The paper's for the prior: a horizon of about 2,500 updates (appendix B.2)."""

    every: int = Field(25, ge=1, description="updates between copies")
    decay: float = Field(0.99, ge=0, lt=1, description="weight of the past at each copy")


class EMA:
    """average <- d * average + (1 - d) * weights, for a model's parameters or one rank's shards of them.

    With start "warm" the n-th time uses d = min(decay, n / (n + 9)): early weights, still near the initial ones, fade quickly.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: EMAConfig,
        device: torch.device | str | None = None,
        background: bool = False,
    ) -> None:
        """`device` holds the averages, in fp32; None: where the weights are. In the background, `update` only copies
        the weights and a thread averages them."""
        self.config = config
        self.n_updates = 0
        self._worker = ThreadPoolExecutor(1, "average") if background else None
        self._under_way: Future[None] | None = None
        self._averages = {
            name: weight.detach().to(device or weight.device, torch.float32, copy=True) for name, weight in weights.items()
        }

    @property
    def averages(self) -> dict[str, Tensor]:
        """By name, all updates taken in."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None
        return self._averages

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights as they are now."""
        self.n_updates += 1
        decay = self.config.decay
        if self.config.start == "warm":
            decay = min(decay, self.n_updates / (self.n_updates + 9))
        averages, is_copied = self.averages, self._worker is not None
        values = [weights[name].detach().to(a.device, torch.float32, copy=is_copied) for name, a in averages.items()]
        work = partial(torch._foreach_lerp_, list(averages.values()), values, 1.0 - decay)
        if self._worker is None:
            work()
        else:
            self._under_way = self._worker.submit(work)

    @contextmanager
    def in_place_of(self, weights: Mapping[str, Tensor], refresh: Callable[[], None] = lambda: None) -> Iterator[None]:
        """While the context lasts, `weights` hold the averages; after it, what they held before, to the last bit.

        `refresh` is called after each exchange, for engines that keep other copies of the weights.
        """
        own = {name: weights[name].detach().clone() for name in self.averages}
        try:
            _fill(weights, self.averages)
            refresh()
            yield
        finally:
            _fill(weights, own)
            refresh()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs; holds references, so save it before the next update."""
        return {"n_updates": self.n_updates, "average": self.averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the average is of other tensors."""
        averages: Mapping[str, Tensor] = state["average"]
        if averages.keys() != self.averages.keys():
            different = sorted(averages.keys() ^ self.averages.keys())
            raise ValueError(f"the saved average belongs to another model: only one of them has {different[:5]}")
        self.n_updates = int(state["n_updates"])
        _fill(self.averages, averages)


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)
