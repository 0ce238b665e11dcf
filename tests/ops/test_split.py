"""Products of split factors are as exact as fp32 products, measured against fp64."""

import pytest
import torch
from torch import Tensor

from dalle_ds.ops.split import SHIFT, Split, split_matmul


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def normal(*shape: int, std: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


PROBABILITIES = torch.softmax(normal(96, 512, std=4, seed=3), 1)

CASES = {
    "logits: normed states and weights near 0.02": (normal(96, 1024), normal(1024, 200, std=0.02, seed=1)),
    "states with outliers": (
        normal(96, 1024) * 10 ** normal(96, 1024, seed=2).clamp(-3, 3),
        normal(1024, 200, std=0.02, seed=1),
    ),
    "gradient of states: probabilities down to 1e-9": (PROBABILITIES, normal(512, 256, std=0.02, seed=1)),
    "gradient of weights: over rows": (PROBABILITIES.t(), normal(96, 256, seed=1)),
    "small weights": (normal(96, 1024), normal(1024, 200, std=1e-3, seed=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_error_is_that_of_fp32(name: str) -> None:
    a, b = CASES[name]
    true = a.double() @ b.double()
    ours, fp32 = error(split_matmul(Split.of(a), Split.of(b)), true), error(a @ b, true)
    tf32 = error((a.half().double() @ b.half().double()), true)  # TF32 rounds factors to 11 bits too
    # The errors of fp32 sums of a few hundred terms are 1e-7 here, and several times that on GPUs, which add terms one by one.
    assert ours <= 1.5 * fp32 + 1e-7, f"{name}: {ours:.1e}, fp32 {fp32:.1e}"
    assert ours < tf32 / 100, f"{name}: {ours:.1e}, factors of 11 bits {tf32:.1e}"


def test_parts_add_up_to_22_bits() -> None:
    x = normal(10_000) * 2.0 ** torch.randint(-10, 10, (10_000,), generator=torch.Generator().manual_seed(1))
    split = Split.of(x)
    found = split.high.double() + split.low.double() / SHIFT
    assert ((found - x.double()).abs() <= x.abs().double() * 2.0**-22 + 2.0**-36).all()


def test_transposed_and_cut() -> None:
    a, b = normal(8, 16), normal(4, 16, seed=1)
    whole = split_matmul(Split.of(a), Split.of(b).t())
    assert torch.equal(split_matmul(Split.of(a)[2:5], Split.of(b).t()), whole[2:5])
