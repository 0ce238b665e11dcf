"""Exponential moving average (EMA) of the weights."""

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
    """Decay and start of the EMA. In the paper, the dVAE's decay is 0.999 at every update.
    The prior's is 0.99 every 25 updates, on the CPU."""

    decay: float = Field(0.999, ge=0, lt=1, description="decay of the EMA at each update")
    start: Literal["plain", "warm"] = Field(
        "plain", description="plain: start from the initial weights; warm: also use a smaller decay at first, for short runs"
    )


class PriorEMAConfig(EMAConfig):
    """EMA of the prior. The defaults are the paper's, with a horizon of about 2,500 updates (appendix B.2)."""

    every: int = Field(25, ge=1, description="updates between two updates of the EMA")
    decay: float = Field(0.99, ge=0, lt=1, description="decay of the EMA, every `every` updates")


class EMA:
    """EMA of named tensors: average <- d * average + (1 - d) * weights.

    The tensors are a model's parameters or one rank's shards of them. With start "warm", the n-th update uses
    d = min(decay, n / (n + 9)), so that early weights, which are still near the initial ones, decay quickly.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: EMAConfig,
        device: torch.device | str | None = None,
        background: bool = False,
    ) -> None:
        """Start the averages from `weights`.

        Args:
            device: device of the fp32 averages. None is the device of the weights.
            background: `update` only copies the weights, and a thread averages them.
        """
        self.config = config
        self.n_updates = 0
        self._worker = ThreadPoolExecutor(1, "average") if background else None
        self._under_way: Future[None] | None = None
        self._averages = {
            name: weight.detach().to(device or weight.device, torch.float32, copy=True) for name, weight in weights.items()
        }

    @property
    def averages(self) -> dict[str, Tensor]:
        """Averages by name. Waits for a pending background update."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None
        return self._averages

    @torch.no_grad()
    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Start again from these weights."""
        self.n_updates = 0
        _fill(self.averages, weights)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Update the averages with the current weights."""
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
        """Within this context, `weights` hold the averages. When it ends, their previous values are restored bit for bit.

        `refresh` is called after both exchanges, for engines that hold other copies of the weights.
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
        """Everything that a resume needs. It references the averages, so save it before the next update."""
        return {"n_updates": self.n_updates, "average": self.averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the EMA. Raises ValueError if the saved EMA has other tensor names."""
        averages: Mapping[str, Tensor] = state["average"]
        if averages.keys() != self.averages.keys():
            different = sorted(averages.keys() ^ self.averages.keys())
            raise ValueError(f"the saved EMA belongs to another model: only one of the two has {different[:5]}")
        self.n_updates = int(state["n_updates"])
        _fill(self.averages, averages)


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)
