"""Fused functions: compiled for this GPU, they match their eager forms and use no more kernels than they declare.

B samples, L slots, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.ops.fused import Fused
from dalle_ds.ops.low_bit import FORMAT_0_6_10, FORMAT_1_6_9, added_to_codes, encode, squares_of_codes
from dalle_ds.ops.split import high_and_low
from dalle_ds.optim.adamw import scalars_of
from dalle_ds.optim.masterless import updated_half
from dalle_ds.precision.resblock_scaling import add_half, norm_to_half, norm_to_half_backward, scale_to_half

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-4, torch.int16: 2e-4}
"""Relative tolerance by dtype of the result. Both sides compute in fp32, in a different order. A result on the boundary between
two fp16 numbers may round to either; if all results did, the difference would be 2e-4. The same holds for 16-bit codes
(int16)."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    for function, args in arguments(place).items():
        _compare(record, place, function, args)


def arguments(place: Place) -> dict[Fused, tuple[Any, ...]]:
    """Returns the arguments of each fused function: 8 samples, width 2048. Some entries of gradients are Inf or NaN."""
    generator = torch.Generator().manual_seed(0)
    shape = place.pick((8, 1280, 2048), (2, 5, 64))

    def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator).to(place.device, dtype)

    def gradient(dtype: torch.dtype = torch.float32) -> Tensor:
        grad_BLD = random(*shape, dtype=dtype)
        grad_BLD[0, 0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
        return grad_BLD

    x_BLD, y_BLD = random(*shape), random(*shape, dtype=torch.float16)
    weight_D, bias_D, scale = random(shape[-1]), random(shape[-1]), torch.tensor(2.0**13, device=place.device)
    _, mean, inverse = torch.native_layer_norm(x_BLD, weight_D.shape, weight_D, bias_D, 1e-5)
    # no Inf in the backward pass of the norm: a single Inf makes the sums over all rows Inf, which leaves nothing to compare
    half_BLD = random(*shape, dtype=torch.float16)
    flat = 1e-3 * random(place.pick(1 << 24, 640))
    codes, squares = encode(flat, FORMAT_1_6_9), encode(flat.square(), FORMAT_0_6_10)
    settings = {"lr": 1e-3, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.045, "variance_clip": 5.0}
    scalars, place_and_key = scalars_of(7, settings).to(place.device), torch.tensor([64, 12345]).to(place.device, torch.int32)
    return {
        norm_to_half: (x_BLD, weight_D, bias_D, 1e-5),
        norm_to_half_backward: (half_BLD, random(*shape), scale, x_BLD, mean, inverse, weight_D, bias_D),
        add_half: (x_BLD, y_BLD),
        scale_to_half: (gradient(), scale),
        high_and_low: (random(*shape),),
        added_to_codes: (codes, flat.flip(0)),
        squares_of_codes: (codes,),
        updated_half: (flat.half(), codes, codes.flip(0), squares, torch.ones((), device=place.device), scalars, place_and_key),
    }


def _compare(record: Record, place: Place, function: Fused, args: tuple[Any, ...]) -> None:
    ours, plain = (_tuple(f(*args)) for f in (function, function.plain))
    error = max(_error(a, b) / TOLERANCE[b.dtype] for a, b in zip(ours, plain, strict=True))
    in_fp32, in_fp16 = TOLERANCE[torch.float32], TOLERANCE[torch.float16]
    why = f"against the same operations in eager mode; tolerances {in_fp32:g} in fp32, {in_fp16:g} in fp16"
    record.at_most(f"{function.name}: difference, in tolerances", error, 1.0, why)
    finite = all(torch.equal(torch.isfinite(a), torch.isfinite(b)) for a, b in zip(ours, plain, strict=True))
    record.equal(f"{function.name}: Inf and NaN where the eager form has them", finite, True, "filters must not change")
    if not place.is_rehearsal:
        why = "the number of kernels that Inductor is expected to generate; more kernels only cost time"
        n = _kernels(lambda: function(*args))
        record.should(f"{function.name}: kernels", n, n <= function.kernels, f"at most {function.kernels}", why)
    times = place.seconds(lambda: function.plain(*args), 3) / place.seconds(lambda: function(*args), 3)
    record.tell(f"{function.name}: times faster than its eager form", times)


def _kernels(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    rows = (row for row in profiler.key_averages() if row.device_type is DeviceType.CUDA and not row.key.startswith("Mem"))
    return sum(row.count for row in rows)


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _error(ours: Tensor, plain: Tensor) -> float:
    """Returns the relative error over finite entries."""
    both = torch.isfinite(ours) & torch.isfinite(plain)
    a, b = ours[both].double(), plain[both].double()
    return float((a - b).norm() / b.norm())
