"""AdamW of fp16 weights that have no fp32 master: eight bytes a parameter with its gradient and moments.

Arithmetic is `LowBitAdamW`'s, fp32 within a step. Gradients come as 1-6-9 codes, and weights are rounded stochastically.
"""

import zlib

import torch
from torch import Tensor

from dalle_ds.ops.fused import fused
from dalle_ds.ops.low_bit import FORMAT_0_6_10, FORMAT_1_6_9, decode, encode_wide
from dalle_ds.ops.stochastic_rounding import noise, round_to_half
from dalle_ds.optim.adamw import VARIANCE_CLIP, moved_by_adamw, scalars_of

_CPU_CHUNK, _GPU_CHUNK = 1 << 15, 1 << 24  # a chunk and its temporaries stay in a core's caches; a GPU needs more to be busy


class MasterlessAdamW:
    """Steps on named fp16 tensors. `state` is as that of a torch optimizer, by tensor: step, exp_avg, exp_avg_sq.

    No `torch.optim.Optimizer`: that one steps on `grad`, which must have its parameter's format.
    """

    def __init__(
        self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, seed: int,
        variance_clip: float = VARIANCE_CLIP,
    ) -> None:  # fmt: skip
        self.settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "variance_clip": variance_clip}
        self.seed = seed
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, name: str, weights: Tensor, gradients: Tensor, factor: Tensor, start: int = 0) -> None:
        """One update of a stretch of a parameter, which begins at value `start` of it.

        Args:
            weights: (n,) fp16, written to.
            gradients: (n,) int16, codes of 1-6-9.
            factor: 0-d fp32, by which gradients are multiplied.
        """
        if weights.dtype is not torch.float16:
            raise ValueError(f"{name} is {weights.dtype}: expected fp16 weights, others need no rounding")
        state = self.state.setdefault(weights, {})
        if "step" not in state:
            state["step"] = torch.zeros(())
            for key in ("exp_avg", "exp_avg_sq"):  # code 0 is the number 0
                state.setdefault(key, torch.zeros_like(weights, dtype=torch.int16))
        state["step"] = state["step"].cpu() + 1  # there it can be read without waiting for the device
        step = int(state["step"])
        scalars = scalars_of(step, self.settings).to(weights.device)
        key = zlib.crc32(f"{name} {step} {self.seed}".encode()) - 2**31
        size = _CPU_CHUNK * torch.get_num_threads() if weights.device.type == "cpu" else _GPU_CHUNK
        tensors = (weights, gradients, state["exp_avg"], state["exp_avg_sq"])
        for number, pieces in enumerate(zip(*(t.split(size) for t in tensors), strict=True)):
            place_and_key = torch.tensor([start + number * size, key], dtype=torch.int32).to(weights.device)
            update_half(*pieces, factor, scalars, place_and_key)


@fused(kernels=1)
def update_half(
    weights: Tensor, gradients: Tensor, stored_mean: Tensor, stored_variance: Tensor, factor: Tensor, scalars: Tensor,
    place_and_key: Tensor,
) -> None:  # fmt: skip
    """One update in place; `place_and_key` (2,) int32: where the first value lies, and the key of its noise."""
    place, key = place_and_key.unbind()
    moved, mean, variance = moved_by_adamw(
        weights.float(), decode(gradients, FORMAT_1_6_9) * factor,
        decode(stored_mean, FORMAT_1_6_9), decode(stored_variance, FORMAT_0_6_10), scalars,
    )  # fmt: skip
    places = torch.arange(weights.numel(), dtype=torch.int32, device=weights.device) + place
    weights.copy_(round_to_half(moved, noise(places, key)))
    stored_mean.copy_(encode_wide(mean, FORMAT_1_6_9))
    stored_variance.copy_(encode_wide(variance, FORMAT_0_6_10))
