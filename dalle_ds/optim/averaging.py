"""Iterate averaging: an exponential moving average of the parameters, taken after every update."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn


class ParameterAverage:
    """average <- d * average + (1 - d) * parameters, on the parameters' own device, in their own dtype.

    The paper averages its dVAE with decay 0.999 at every update, over millions of updates. In a run of thousands the first
    iterates would still weigh in at the end, so `start` says how the average begins:

    - "plain": as the paper; the average starts as the initial parameters.
    - "warm": update n uses min(decay, n / (n + 9)): short memory at first, longer as the run grows.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, start: Literal["plain", "warm"] = "plain") -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}, expected at least 0 and below 1")
        if start not in ("plain", "warm"):
            raise ValueError(f"start is {start!r}, expected 'plain' or 'warm'")
        self.decay, self.start, self.n_updates = decay, start, 0
        self.average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the parameters as they are now: call once after each optimizer step that was taken."""
        self.n_updates += 1
        decay = self.decay
        if self.start == "warm":
            decay = min(decay, self.n_updates / (self.n_updates + 9))
        torch._foreach_lerp_(list(self.average.values()), self._matching(model), 1.0 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has the averaged parameters; after it, its own to the last bit."""
        own = [parameter.detach().clone() for parameter in self._matching(model)]
        try:
            self._copy_into(model, list(self.average.values()))
            yield
        finally:
            self._copy_into(model, own)

    def state_dict(self) -> dict[str, object]:
        """Everything a resume needs; holds references, so save it before the next update."""
        return {"n_updates": self.n_updates, "average": self.average}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Refuses an average of other parameters."""
        average: dict[str, Tensor] = state["average"]  # type: ignore[assignment]
        if average.keys() != self.average.keys():
            different = sorted(average.keys() ^ self.average.keys())
            raise ValueError(f"the saved average belongs to another model: only one of them has {different[:5]}")
        self.n_updates = int(state["n_updates"])  # type: ignore[call-overload]
        for name, value in average.items():
            self.average[name].copy_(value)

    def _matching(self, model: nn.Module) -> list[Tensor]:
        parameters = dict(model.named_parameters())
        return [parameters[name] for name in self.average]

    @torch.no_grad()
    def _copy_into(self, model: nn.Module, values: list[Tensor]) -> None:
        for parameter, value in zip(self._matching(model), values, strict=True):
            parameter.copy_(value)
