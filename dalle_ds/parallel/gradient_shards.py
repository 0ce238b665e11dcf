"""Read and write this rank's shards of the gradients that ZeRO-3 has reduced, in place."""

import torch
from torch import Tensor, nn

from dalle_ds.parallel.deepspeed_api import safe_get_local_grad, safe_set_local_grad


class GradientShards:
    """This rank's gradient shard of each parameter: flat, fp32, valid from an update's last backward pass to its step.

    DeepSpeed's `safe_get_local_grad` waits for the reduction at every call, a thousand times per update of the paper's model,
    although the end of the backward pass has waited for all reductions. It is only used for offloaded gradients, which it
    copies.
    """

    def __init__(self, zero_optimizer: torch.optim.Optimizer) -> None:
        self._zero = zero_optimizer
        self._shards: dict[nn.Parameter, Tensor] = {}

    @property
    def are_copies(self) -> bool:
        """Whether `read` returns copies, which must be written back. True if the gradients are offloaded to host memory."""
        return bool(self._zero.offload_optimizer)

    def refresh(self) -> None:
        """Find the current gradients. Call it after the last backward pass of an update."""
        self._shards = {}
        if not self.are_copies:
            for i, parameters in enumerate(self._zero.fp16_groups):
                self._shards.update(zip(parameters, self._zero.averaged_gradients[i], strict=True))

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Return this rank's shard of a gradient, or if `are_copies`, a copy of it on the device."""
        return safe_get_local_grad(parameter) if self.are_copies else self._shards[parameter]

    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Replace this rank's shard of a gradient. For offloaded gradients, DeepSpeed also updates the norm."""
        if self.are_copies:
            safe_set_local_grad(parameter, values)
        else:
            self._shards[parameter].copy_(values.view(-1))
