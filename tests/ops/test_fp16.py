"""fp16 products are summed in fp32 and rounded once, with the same results on devices with and without fp16 units."""

import pytest
import torch

from dalle_ds.ops import fp16


@pytest.fixture
def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((5, 7, 96), (33, 96), (33,)))
    return x.half(), weight, bias


def test_linear_is_the_exact_product_rounded_once(operands: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias = operands
    exact = x.double() @ weight.half().double().T + bias.double()
    result = fp16.linear_fp16(x, weight, bias)
    assert result.dtype is torch.float16
    # tolerance: half a unit in fp16's last place, plus a little for the order of the fp32 sum
    torch.testing.assert_close(result.double(), exact, rtol=2**-11 * 1.01, atol=1e-3)


def test_native_and_emulated_products_agree(operands: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = operands
    results = []
    for native in (True, False):
        monkeypatch.setattr(fp16, "_cpu_has_fp16", lambda native=native: native)
        results.append(fp16.linear_fp16(x, weight, bias))
    torch.testing.assert_close(*results, rtol=2**-9, atol=4e-3)


def test_range_is_fp16s() -> None:
    x = torch.full((1, 2), 300.0, dtype=torch.float16)
    assert fp16.linear_fp16(x, torch.full((1, 2), 200.0), None).isinf().all()


def test_accumulators_keep_what_fp16_cannot_hold() -> None:
    tiny = torch.full((4, 8), 2.0**-14, dtype=torch.float16)
    assert fp16.matmul_to_fp32(tiny, tiny.T).eq(8 * 2.0**-28).all()


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_of_a_linear_layer_are_exact_products(operands: tuple[torch.Tensor, ...], has_bias: bool) -> None:
    x, weight, _ = operands
    grad = torch.randn(5, 7, 33, generator=torch.Generator().manual_seed(1)).half()
    grad_x, grad_weight, grad_bias = fp16.linear_fp16_backward(grad, x, weight, has_bias)
    rows, inputs = grad.flatten(0, 1).double(), x.flatten(0, 1).double()
    torch.testing.assert_close(grad_x.double(), grad.double() @ weight.half().double(), rtol=2**-11 * 1.01, atol=1e-3)
    torch.testing.assert_close(grad_weight.double(), rows.T @ inputs, rtol=1e-5, atol=1e-5)
    assert grad_x.dtype is torch.float16 and grad_weight.dtype is torch.float32
    if has_bias:
        torch.testing.assert_close(grad_bias.double(), rows.sum(0), rtol=1e-5, atol=1e-5)
    else:
        assert grad_bias is None
