"""This rank's shards of the gradients that ZeRO-3 has reduced, read and written where they lie."""

import torch
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
from torch import Tensor, nn


class GradientShards:
    """By parameter, flat, in fp32; from the last backward pass of an update to its step.

    DeepSpeed's functions of the same purpose wait for its reduction at every call, a thousand times an update of the paper's
    model, where the end of the backward pass has waited for all of it. They stay for offloaded gradients, which are copies.
    """

    def __init__(self, zero_optimizer: torch.optim.Optimizer) -> None:
        self._zero = zero_optimizer
        self._shards: dict[nn.Parameter, Tensor] = {}

    @property
    def are_copies(self) -> bool:
        """What `read` gives must be written back to count: the gradients themselves are in the host's memory."""
        return bool(self._zero.offload_optimizer)

    def refresh(self) -> None:
        """After the last backward pass: its gradients are there now."""
        self._shards = {}
        if not self.are_copies:
            for i, parameters in enumerate(self._zero.fp16_groups):
                self._shards.update(zip(parameters, self._zero.averaged_gradients[i], strict=True))

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The gradient itself, or a copy of it on the device (`are_copies`)."""
        return safe_get_local_grad(parameter) if self.are_copies else self._shards[parameter]

    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Replace a gradient; of offloaded ones DeepSpeed renews the norm as well."""
        if self.are_copies:
            safe_set_local_grad(parameter, values)
        else:
            self._shards[parameter].copy_(values.view(-1))
