"""Packed products equal plain ones, and are not used if they would be wrong."""

import pytest
import torch
import torch.nn.functional as F

from dalle_ds.ops import packed


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_plain_product(rows: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(70, 48, generator=generator), torch.randn(70, generator=generator) if with_bias else None
    linear = packed.packed_linear(weight, 16)
    assert linear is not None
    for shape in ((rows, 48), (rows, 1, 48), (2, rows, 48)):
        x = torch.randn(shape, generator=generator)
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_there_is_none_for_other_numbers_or_devices_or_without_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed.packed_linear(torch.ones(4, 4, dtype=torch.float16), 1) is None
    assert packed.packed_linear(torch.ones(4, 4, device="meta"), 1) is None
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert packed.packed_linear(torch.ones(4, 4), 1) is None
