"""AdamW for fp16 weights without masters, compared with `ClippedAdamW` on fp32 weights that are rounded after each step."""

import zlib
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dalle_ds.ops.low_bit import FORMAT_0_6_10, FORMAT_1_6_9, decode, encode
from dalle_ds.optim.adamw import ClippedAdamW, moment_bytes
from dalle_ds.optim.masterless import MasterlessAdamW, Stretch

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.045}
NAME, N, SEED = "layers.0.mlp.branch.expand.weight", 40_000, 3


def start() -> Tensor:
    return (torch.randn(N, generator=torch.Generator().manual_seed(7)) * 0.02).half()


def gradients(step: int) -> Tensor:
    """Codes of gradients with very different magnitudes."""
    generator = torch.Generator().manual_seed(step)
    sizes = torch.randn(N, generator=generator).mul(8).exp2().clamp_max(4)
    return encode(torch.randn(N, generator=generator) * sizes * 1e-3, FORMAT_1_6_9)


def plainly_rounded(values: Tensor, name: str, step: int) -> Tensor:
    """Reference of the stochastic rounding in 64-bit NumPy: round up if the part below fp16's last place exceeds the noise."""
    x = np.arange(len(values), dtype=np.uint64) * 0x9E3779B1 % 2**32
    x ^= np.uint64((zlib.crc32(f"{name} {step} {SEED}".encode()) - 2**31) % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) % 2**32
    share = (x >> np.uint64(19)).astype(np.float64) / 2**13
    v = values.double().numpy()
    with np.errstate(divide="ignore"):
        unit = np.exp2(np.maximum(np.floor(np.log2(np.abs(v))), -14.0) - 10.0)
    low = np.floor(v / unit)
    return torch.from_numpy((low + (v / unit - low > share)) * unit).half()


def test_a_step_is_low_bit_adamws_rounded() -> None:
    ours, theirs = start(), nn.Parameter(start().float())
    a = MasterlessAdamW(**SETTINGS, seed=SEED)
    b = ClippedAdamW([theirs], **SETTINGS)
    for step in range(1, 6):
        codes, factor = gradients(step), torch.tensor(0.7)
        a.step([Stretch(NAME, ours, partial(gradients, step))], factor)
        theirs.grad = decode(codes, FORMAT_1_6_9) * factor
        b.step()
        with torch.no_grad():
            theirs.copy_(plainly_rounded(theirs, NAME, step).float())
        assert torch.equal(ours.float(), theirs)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(a.state[ours][key], b.state[theirs][key])
    assert moment_bytes(a) == 4 * N


def test_a_stretch_is_stepped_as_it_is_within_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a parameter are updated like the whole, for any number of ranks and any chunk size."""
    monkeypatch.setattr("dalle_ds.optim.masterless._CPU_CHUNK", 1000)
    whole, parts = start(), [part.clone() for part in start().split([17, 20_000, N - 20_017])]
    a, b = MasterlessAdamW(**SETTINGS, seed=SEED), MasterlessAdamW(**SETTINGS, seed=SEED)
    for step in range(3):
        a.step([Stretch(NAME, whole, partial(gradients, step))], torch.tensor(1.0))
        codes = gradients(step).split([17, 20_000, N - 20_017])
        stretches = zip(parts, codes, (0, 17, 20_017), strict=True)
        b.step([Stretch(NAME, part, partial(torch.clone, own), at) for part, own, at in stretches], torch.tensor(1.0))
    assert torch.equal(whole, torch.cat(parts))


def test_noise_differs_by_name_step_and_seed() -> None:
    def rounded(name: str, seed: int, before: int = 0) -> Tensor:
        weights, optimizer = start(), MasterlessAdamW(**SETTINGS, seed=seed)
        optimizer.state[weights] = {"step": torch.tensor(float(before))}
        optimizer.step([Stretch(name, weights, partial(torch.zeros, N, dtype=torch.int16))], torch.tensor(1.0))
        return weights  # only weight decay moves it, by a twentieth of the unit in the last place

    first = rounded(NAME, 0)
    assert torch.equal(first, rounded(NAME, 0))
    for other in (rounded("another", 0), rounded(NAME, 1), rounded(NAME, 0, before=1)):
        assert not torch.equal(first, other)


def test_variance_is_the_formats_too() -> None:
    weights, optimizer = start(), MasterlessAdamW(**SETTINGS, seed=0, variance_clip=1e-6)
    optimizer.step([Stretch(NAME, weights, partial(gradients, 0))], torch.tensor(1.0))
    assert decode(optimizer.state[weights]["exp_avg_sq"], FORMAT_0_6_10).max() == pytest.approx(1e-6, rel=1e-3)


def test_fp32_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float32, expected fp16 weights"):
        stretch = Stretch(NAME, torch.zeros(3), partial(torch.zeros, 3, dtype=torch.int16))
        MasterlessAdamW(**SETTINGS, seed=0).step([stretch], torch.tensor(1.0))
