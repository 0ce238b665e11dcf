"""Matrices of residual branches as fp16 shards without fp32 masters, beside a ZeRO-3 that owns all other parameters.

The paper's memory (section 2.4, appendix E.2): 2 bytes a parameter for the weight, 4 for the moments and 2 for the gradient,
where fp32 masters take 16. ZeRO-3 shards, gathers and frees these matrices as it does others, but its optimizer never sees
them: it wants one format for all it owns. So their gradients are reduced here, as soon as the backward pass has made them: in
fp32, un-scaled on the shard that arrives, and added up as codes of 1-6-9, whose range holds un-scaled gradients where fp16's
does not.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from torch import Tensor, nn

from dalle_ds.models.resblock import BranchLinear
from dalle_ds.ops.low_bit import FORMAT_1_6_9, added_to_codes, decode, encode, encode_wide, squares_of_codes
from dalle_ds.optim.masterless import MasterlessAdamW, Stretch
from dalle_ds.parallel.replicas.power_sgd import Factors, PowerSGD
from dalle_ds.parallel.zero_shards import Fragment, shard_start
from dalle_ds.precision.resblock_scaling import ResblockGradScaler


class MasterlessMatrices:
    """One rank's shards of the matrices, by name of the parameter: weights, gradients, and their optimizer."""

    def __init__(self, module: nn.Module, scaler: ResblockGradScaler, optimizer: MasterlessAdamW) -> None:
        """Call after `zero.Init` and before `deepspeed.initialize`, whose optimizer must not be given these parameters."""
        self.optimizer, self._scaler = optimizer, scaler
        self.parameters = {
            f"{name}.weight": part.weight for name, part in module.named_modules() if isinstance(part, BranchLinear)
        }
        self._blocks = {
            name: i for i, block in enumerate(scaler.names) for name in self.parameters if name.startswith(f"{block}.")
        }
        self._gradients: dict[str, Tensor] = {}
        """Codes of 1-6-9."""
        self._is_first: dict[str, bool] = {}
        self._power_sgd: PowerSGD | None = None
        self.factors: dict[str, Factors] = {}
        """Where gradients are compressed between replicas: of their averages, until the step."""
        self._under_way: Callable[[], None] | None = None
        for name, parameter in self.parameters.items():
            assert is_zero_param(parameter), f"{name} is not sharded by zero.Init"
            shard = parameter.ds_tensor
            shard.data = shard.data.to(torch.float16)
            self._gradients[name] = torch.zeros_like(shard, dtype=torch.int16)
            parameter.register_post_accumulate_grad_hook(self._reduce_soon(name))

    def __contains__(self, name: str) -> bool:
        return name in self.parameters

    # ---- gradients -------------------------------------------------------------------------------------------------------

    def carry(self, power_sgd: PowerSGD) -> None:
        """From now on gradients are added to the errors that PowerSGD carries on, and have no buffers of their own (paper,
        appendix E.2). Those of an update that is then skipped stay there; non-finite ones are never added."""
        self._power_sgd, self._gradients = power_sgd, power_sgd.errors

    def begin(self) -> None:
        """Call before the forward passes of an update: its first gradients replace those of the last one, or join what it
        carried on."""
        self._is_first = dict.fromkeys(self.parameters, self._power_sgd is None)
        self.factors = {}

    def forget(self) -> None:
        """Of updates that were only tried."""
        for codes in self._gradients.values():
            codes.zero_()

    def finish(self) -> None:
        """Call after the backward passes: all gradients are there, and the scaler knows which blocks hold Inf or NaN."""
        if self._under_way is not None:
            self._under_way()
            self._under_way = None

    def gradient(self, name: str) -> Tensor:
        """fp32, un-scaled, averaged over the ranks that share the parameter, and over replicas where it has been."""
        if name in self.factors:
            assert self._power_sgd is not None
            return self._power_sgd.average_of(name, self.factors[name])
        return decode(self._gradients[name], FORMAT_1_6_9)

    def set_gradient(self, name: str, values: Tensor) -> None:
        self._gradients[name].copy_(encode(values, FORMAT_1_6_9))

    def squared_norm(self) -> Tensor:
        """0-d fp32, of this rank's shards together."""
        if self.factors:
            return torch.stack([self.gradient(name).square().sum() for name in self.parameters]).sum()
        return torch.stack([squares_of_codes(codes) for codes in self._gradients.values()]).sum()

    def _reduce_soon(self, name: str) -> Callable[[nn.Parameter], None]:
        @torch.no_grad()
        def hook(parameter: nn.Parameter) -> None:
            if parameter.grad is None:  # a recomputed layer's came before; of its first graph autograd has none
                return
            gradient, parameter.grad = parameter.grad.view(-1), None
            n_ranks, n = parameter.ds_zero_partition_world_size, parameter.ds_tensor.numel()
            if n_ranks == 1:
                self._add(name, gradient, 1)
                return
            if gradient.numel() < n_ranks * n:
                gradient = torch.cat([gradient, gradient.new_zeros(n_ranks * n - gradient.numel())])
            shard = torch.empty(n, dtype=torch.float32, device=gradient.device)
            work = dist.reduce_scatter_tensor(shard, gradient, group=parameter.ds_process_group, async_op=True)
            self.finish()  # the one before: there are never more than two whole gradients

            def arrived() -> None:
                nonlocal gradient
                work.wait()
                del gradient
                self._add(name, shard, n_ranks)

            self._under_way = arrived

        return hook

    def _add(self, name: str, shard: Tensor, n_ranks: int) -> None:
        block = self._blocks[name]
        inverse, found = self._scaler.in_use[block].reciprocal() / n_ranks, self._scaler.found_nonfinite[block : block + 1]
        torch._amp_foreach_non_finite_check_and_unscale_([shard], found, inverse.view(1))
        if self._power_sgd is not None:
            shard = torch.where(found > 0, 0.0, shard)
        if not self._is_first[name]:
            self._gradients[name].copy_(added_to_codes(self._gradients[name], shard))
        else:
            self._gradients[name].copy_(encode_wide(shard, FORMAT_1_6_9))
        self._is_first[name] = False

    # ---- the update ------------------------------------------------------------------------------------------------------

    def step(self, lr: float, factor: Tensor, but: set[str]) -> None:
        """Update all matrices but some, with gradients times `factor`, 0-d."""
        self.optimizer.settings["lr"] = lr
        self.optimizer.step(
            [
                Stretch(name, parameter.ds_tensor, partial(self._take, name), shard_start(parameter))
                for name, parameter in self.parameters.items()
                if name not in but
            ],
            factor,
        )

    def _take(self, name: str) -> Tensor:
        if not self.factors:
            return self._gradients[name]
        assert self._power_sgd is not None
        average = self.gradient(name)
        self._power_sgd.take(name, average)
        return average

    # ---- checkpoints -----------------------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self.parameters.items():
            shard = parameter.ds_tensor
            yield Fragment(name, shard_start(parameter), shard, shard, 0, self.optimizer.state)
