"""Matrices of residual branches as fp16 shards without fp32 masters. ZeRO-3's optimizer owns all other parameters.

As in the paper (section 2.4, appendix E.2), a parameter takes 2 bytes for the weight, 4 for the moments and 2 for the gradient,
instead of 16 with an fp32 master. ZeRO-3 shards, gathers and frees these matrices like others. But its optimizer never sees
them, since it requires one dtype for everything it owns. So their gradients are reduced here, as soon as the backward pass has
made them: in fp32, un-scaled on the resulting shard, and accumulated as 1-6-9 codes. The range of 1-6-9 holds un-scaled
gradients; fp16's does not.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_ds.models.resblock import BranchLinear
from dalle_ds.ops.low_bit import FORMAT_1_6_9, added_to_codes, decode, encode, encode_wide, squares_of_codes
from dalle_ds.optim.masterless import MasterlessAdamW, Stretch
from dalle_ds.parallel.deepspeed_api import is_zero_param
from dalle_ds.parallel.replicas.power_sgd import Factors, PowerSGD
from dalle_ds.parallel.zero_shards import Fragment, shard_start
from dalle_ds.precision.resblock_scaling import ResblockGradScaler


class MasterlessMatrices:
    """One rank's shards of the matrices: weights, gradients and their optimizer, by parameter name."""

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
        """Gradient shards as 1-6-9 codes."""
        self._is_first: dict[str, bool] = {}
        self._power_sgd: PowerSGD | None = None
        self.factors: dict[str, Factors] = {}
        """Low-rank factors of the averaged gradients, from `ReplicaGradients.average` to the step. Empty without PowerSGD."""
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
        """From now on, add gradients to PowerSGD's carried errors instead of to separate buffers (paper, appendix E.2).

        Gradients of a skipped update stay in the errors. Non-finite gradients are never added.
        """
        self._power_sgd, self._gradients = power_sgd, power_sgd.errors

    def begin(self) -> None:
        """Call before the forward passes of an update. Its first gradients then replace
        those of the previous update, or with PowerSGD are added to the carried errors."""
        self._is_first = dict.fromkeys(self.parameters, self._power_sgd is None)
        self.factors = {}

    def forget(self) -> None:
        """Discard the gradients. Call it after calibration trials."""
        for codes in self._gradients.values():
            codes.zero_()

    def finish(self) -> None:
        """Wait for pending reductions. Call it after the backward passes: then all gradients are accumulated, and
        `ResblockGradScaler.found_nonfinite` is complete for these matrices."""
        if self._under_way is not None:
            self._under_way()
            self._under_way = None

    def gradient(self, name: str) -> Tensor:
        """This rank's shard of a gradient: fp32, un-scaled, averaged over the
        ranks that shard the parameter, and over replicas once `factors` is set."""
        if name in self.factors:
            assert self._power_sgd is not None
            return self._power_sgd.average_of(name, self.factors[name])
        return decode(self._gradients[name], FORMAT_1_6_9)

    def set_gradient(self, name: str, values: Tensor) -> None:
        self._gradients[name].copy_(encode(values, FORMAT_1_6_9))

    def squared_norm(self) -> Tensor:
        """Sum of the squares of all gradient shards of this rank, 0-d fp32."""
        if self.factors:
            return torch.stack([self.gradient(name).square().sum() for name in self.parameters]).sum()
        return torch.stack([squares_of_codes(codes) for codes in self._gradients.values()]).sum()

    def _reduce_soon(self, name: str) -> Callable[[nn.Parameter], None]:
        @torch.no_grad()
        def hook(parameter: nn.Parameter) -> None:
            if parameter.grad is None:  # the hook of a recomputed layer runs twice; the second time there is no gradient
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
            self.finish()  # the previous gradient: so at most two whole gradients exist at a time

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
        found_here = torch.zeros_like(found)
        torch._amp_foreach_non_finite_check_and_unscale_([shard], found_here, inverse.view(1))
        found.add_(found_here).clamp_(max=1.0)
        if self._power_sgd is not None:
            shard = torch.where(found_here > 0, 0.0, shard)
        if not self._is_first[name]:
            self._gradients[name].copy_(added_to_codes(self._gradients[name], shard))
        else:
            self._gradients[name].copy_(encode_wide(shard, FORMAT_1_6_9))
        self._is_first[name] = False

    # ---- the update ------------------------------------------------------------------------------------------------------

    def step(self, lr: float, factor: Tensor, but: set[str]) -> None:
        """Update all matrices except `but`. Gradients are multiplied by `factor`, 0-d."""
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
