"""AdamW of fp16 weights that have no fp32 master: eight bytes a parameter with its gradient and moments.

Arithmetic is `LowBitAdamW`'s, fp32 within a step. Gradients come as 1-6-9 codes, and weights are rounded stochastically.
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

_CPU_CHUNK, _GPU_CHUNK = 1 << 15, 1 << 24  # a chunk and its temporaries stay in a core's caches; a GPU needs more to be busy


class Stretch(NamedTuple):
    """A part of a flat parameter."""

    name: str
    """Of the parameter."""
    weights: Tensor
    """(n,) fp16, written to."""
    gradients: Callable[[], Tensor]
    """Gives (n,) fp32, or int16 codes of 1-6-9; called when they are needed, so that not all need be there together."""
    start: int = 0
    """Where it begins in the parameter."""


class MasterlessAdamW:
    """Steps on stretches of named fp16 parameters. `state` is as that of a torch optimizer, by the stretch's weights: step,
    exp_avg, exp_avg_sq.

    No `torch.optim.Optimizer`: that one steps on `grad`, which must have its parameter's format.
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
        """One update of each, all on one device, with gradients times `factor`, 0-d fp32.

        Raises:
            ValueError: weights that are not fp16.
        """
        counts, device = [self._count(stretch) for stretch in stretches], factor.device
        # what differs from one call to the next goes to the device at once, not a few bytes each time
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
        """Its number of steps, this one included."""
        if stretch.weights.dtype is not torch.float16:
            raise ValueError(f"{stretch.name} is {stretch.weights.dtype}: expected fp16 weights, others need no rounding")
        state = self.state.setdefault(stretch.weights, {})
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:  # code 0 is the number 0
                state[key] = torch.zeros_like(stretch.weights, dtype=torch.int16)
        state["step"] = state.get("step", torch.zeros(())).cpu() + 1  # there it is read without waiting for the device
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
    """Weights and codes of the moments after one update; `place_and_key` (2,) int32: where the first value lies, and the key of
    its noise."""
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
