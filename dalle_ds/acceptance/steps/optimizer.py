"""AdamW with a clipped variance: the compiled loop against the same operations in eager mode, and against memory bandwidth."""

import math

import torch

from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.optim.adamw import ClippedAdamW, Moments

BYTES: dict[Moments, int] = {"low_bit": 20, "fp32": 28}
"""Bytes that an update moves per value: weight read and written, gradient read, two moments read and written."""
CODES_APART = 1e-5
"""Fraction of codes that may differ. Both sides compute in fp32. A compiler may fuse a product and a sum, which changes the
last bit, and a code if the value lies on the boundary between two codes."""


def run(record: Record, is_rehearsal: bool) -> None:
    for moments in BYTES:
        _compare(record, Place(is_rehearsal), is_rehearsal, moments)


def _compare(record: Record, place: Place, is_rehearsal: bool, moments: Moments) -> None:
    n = place.pick(1 << 26, 1 << 14)
    plain, compiled = (_optimizer(place, n, compile_from, moments) for compile_from in (n + 1, place.pick(1, n + 1)))
    for seed in range(3):  # gradients of ordinary size in the first update
        gradient = _gradient(place, n, seed)
        for weight, optimizer in (plain, compiled):
            weight.grad = gradient
            optimizer.step()
    states = [optimizer.state[weight] for weight, optimizer in (plain, compiled)]
    why = "both must give the same numbers, because a GPU resumes from checkpoints of CPU runs"
    for key in ("exp_avg", "exp_avg_sq") if moments == "low_bit" else ():
        apart = float((states[0][key] != states[1][key]).float().mean())
        record.at_most(f"{key}: fraction of codes that differ", apart, CODES_APART, why)
    ours, theirs = (one[0].detach() for one in (compiled, plain))
    difference = float(((ours - theirs).abs() / theirs.abs().clamp(min=1e-6)).max())
    record.at_most(f"{moments}: largest relative difference of weights", difference, 1e-5, why)
    is_finite = bool(torch.isfinite(ours).all())
    why_finite = "the whole range of the formats"
    record.equal(f"{moments}: weights are finite after gradients of 2^-60 to 2^20", is_finite, True, why_finite)
    seconds = {name: place.seconds(one[1].step, 3) for name, one in (("plain", plain), ("compiled", compiled))}
    for name, spent in seconds.items():
        record.tell(f"{moments}, {name}: G values/s", n / spent / 1e9)
    why = "one loop over memory; if far below, it was not compiled (the log of this step has the reason)"
    hoped = None if is_rehearsal else place.copied_gbps()
    record.rate(f"{moments}, compiled: GB/s moved", BYTES[moments] * n / seconds["compiled"] / 1e9, hoped, 0.4, why)


def _optimizer(place: Place, n: int, compile_from: int, moments: Moments) -> tuple[torch.nn.Parameter, ClippedAdamW]:
    weight = torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(0)).to(place.device))
    return weight, ClippedAdamW([weight], lr=1e-3, weight_decay=0.045, moments=moments, compile_from=compile_from)


def _gradient(place: Place, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.linspace(-60, 20, n)) if seed else torch.full((n,), math.e)
    return (torch.randn(n, generator=generator) * sizes).to(place.device)
