"""Iterate averaging of the prior on the CPU: a copy every few updates, averaged exponentially (paper appendix B.2)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor

from dalle_ds.recipes import Config


class WeightAverageConfig(Config):
    """The paper copies every 25 updates and averages with decay 0.99 a COPY, a horizon of about 2,500 updates."""

    every: int = Field(25, ge=1, description="updates between copies")
    decay: float = Field(0.99, ge=0, lt=1, description="weight of the past at each copy")


class WeightAverage:
    """Averages of named tensors, which may be one rank's shards. Kept in fp32 on the CPU.

    The decay of the n-th copy is min(decay, (1 + n) / (10 + n)): early copies, still near the initial weights, fade quickly.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: WeightAverageConfig) -> None:
        self.config = config
        self.n_copies = 0
        self.averages = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in tensors.items()}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Take one copy of the weights into the average."""
        self.n_copies += 1
        decay = min(self.config.decay, (1 + self.n_copies) / (10 + self.n_copies))
        for name, tensor in tensors.items():
            self.averages[name].lerp_(tensor.detach().to("cpu", torch.float32), 1 - decay)

    @contextmanager
    def in_place_of(self, tensors: Mapping[str, Tensor], refresh: Callable[[], None]) -> Iterator[None]:
        """While the context lasts, `tensors` hold the averages; afterwards exactly what they held before.

        `refresh` is called after each exchange, for engines that keep other copies of the weights.
        """
        weights = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._fill(tensors, self.averages, refresh)
        try:
            yield
        finally:
            self._fill(tensors, weights, refresh)

    @staticmethod
    @torch.no_grad()
    def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], refresh: Callable[[], None]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
        refresh()
