"""AdamW for fp16 weights without fp32 masters: eight bytes per parameter, including its gradient and moments.

Within a step, the arithmetic is that of `ClippedAdamW`, in fp32. Gradients may be 1-6-9 codes. Weights are rounded
stochastically.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dalle_ds.ops.fused import fused
from dalle_ds.ops.low_bit import FORMAT_0_6_10, FORMAT_1_6_9, decode, encode_wide
from dalle_ds.ops.stochastic_rounding import noise, round_to_half
from dalle_ds.optim.adamw import VARIANCE_CLIP, moved_by_adamw, scalars_of

_CPU_CHUNK, _GPU_CHUNK = 1 << 15, 1 << 24  # on CPUs, a chunk and its temporaries fit a core's caches


class Stretch(NamedTuple):
    """A contiguous part of a flat parameter."""

    name: str
    """Name of the parameter."""
    weights: Tensor
    """(n,) fp16, updated in place."""
    gradients: Callable[[], Tensor]
    """Returns the gradients, (n,) fp32 or int16 codes of 1-6-9.
    It is called when they are needed, so that not all gradients need to exist at once."""
    start: int = 0
    """Index in the flat parameter at which this part begins."""


class MasterlessAdamW:
    """AdamW on parts of named fp16 parameters.

    `state` is that of a torch optimizer with the keys step, exp_avg and exp_avg_sq, by the weights of each `Stretch`. This
    class is not a `torch.optim.Optimizer`, which steps on `grad`: that must have the dtype of its parameter.
    """

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
        variance_clip: float = VARIANCE_CLIP,
    ) -> None:
        self.settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "variance_clip": variance_clip}
        self.seed = seed
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, stretches: Sequence[Stretch], factor: Tensor) -> None:
        """Update all `stretches`, which must be on one device. Gradients are multiplied by `factor`, 0-d fp32.

        Raises:
            ValueError: weights are not fp16.
        """
        counts, device = [self._count(stretch) for stretch in stretches], factor.device
        # copy all values that differ between chunks to the device in one transfer, instead of a few bytes per chunk
        scalars = {count: scalars_of(count, self.settings).to(device) for count in set(counts)}
        size = _CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else _GPU_CHUNK
        places_and_keys = [
            (stretch.start + first, zlib.crc32(f"{stretch.name} {count} {self.seed}".encode()) - 2**31)
            for stretch, count in zip(stretches, counts, strict=True)
            for first in range(0, stretch.weights.numel(), size)
        ]
        rows = iter(torch.tensor(places_and_keys, dtype=torch.int32).to(device))
        for stretch, count in zip(stretches, counts, strict=True):
            state = self.state[stretch.weights]
            tensors = (stretch.weights, stretch.gradients(), state["exp_avg"], state["exp_avg_sq"])
            for pieces in zip(*(t.split(size) for t in tensors), strict=True):
                weights, _, *moments = pieces
                new = updated_half(*pieces, factor, scalars[count], next(rows))
                for held, value in zip((weights, *moments), new, strict=True):
                    held.copy_(value)

    def _count(self, stretch: Stretch) -> int:
        """Initialise the state if needed and increment the step count. Returns the step count."""
        if stretch.weights.dtype is not torch.float16:
            raise ValueError(f"{stretch.name} is {stretch.weights.dtype}, expected fp16 weights")
        state = self.state.setdefault(stretch.weights, {})
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:  # zeros are right for both formats: code 0 is the number 0
                state[key] = torch.zeros_like(stretch.weights, dtype=torch.int16)
        state["step"] = state.get("step", torch.zeros(())).cpu() + 1  # on the CPU, reading it does not wait for the device
        return int(state["step"])


@fused(kernels=1)
def updated_half(
    weights: Tensor,
    gradients: Tensor,
    stored_mean: Tensor,
    stored_variance: Tensor,
    factor: Tensor,
    scalars: Tensor,
    place_and_key: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights and the codes of the moments after one update.

    `place_and_key` (2,) int32 holds the index of the first value in its parameter and the key of the rounding noise.
    """
    place, key = place_and_key.unbind()
    moved, mean, variance = moved_by_adamw(
        weights.float(),
        (gradients if gradients.dtype is torch.float32 else decode(gradients, FORMAT_1_6_9)) * factor,
        decode(stored_mean, FORMAT_1_6_9),
        decode(stored_variance, FORMAT_0_6_10),
        scalars,
    )
    places = torch.arange(weights.numel(), dtype=torch.int32, device=weights.device) + place
    codes = encode_wide(mean, FORMAT_1_6_9).to(torch.int16), encode_wide(variance, FORMAT_0_6_10).to(torch.int16)
    return round_to_half(moved, noise(places, key)), *codes
