"""fp32 products on CPUs, by MKL and by oneDNN: against fp64, in both layouts of the weight; who chooses which library."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.ops import products
from dalle_ds.ops.products import add_product, fastest_cpu_format, linear, onednn_is_faster, product

AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Force one of the two libraries."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    return request.param


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    onednn_is_faster.cache_clear()
    yield
    onednn_is_faster.cache_clear()


def results(x: Tensor, weight: Tensor, bias: Tensor | None, inputs_first: bool, grad: Tensor) -> list[Tensor]:
    """Output and gradients of a linear layer, in fp64 by torch if x is fp64."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    x, weight, bias = (*leaves, None)[:3]
    if x.dtype is torch.float64:
        out = F.linear(x, weight.t() if inputs_first else weight, bias)
    else:
        out = linear(x, weight, bias, inputs_first=inputs_first)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("grad_is_expanded", [False, True])
@pytest.mark.parametrize("rows", [(40,), (3, 17), (1, 1), (0,)])
def test_values_and_gradients_are_those_of_fp64(
    rows: tuple[int, ...], grad_is_expanded: bool, has_bias: bool, inputs_first: bool, by_onednn: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(*rows, 33, generator=generator)
    weight = torch.rand((33, 70) if inputs_first else (70, 33), generator=generator)
    bias = torch.rand(70, generator=generator) if has_bias else None
    grad = torch.ones(()).expand(*rows, 70) if grad_is_expanded else torch.rand(*rows, 70, generator=generator)
    exact = results(x.double(), weight.double(), bias.double() if has_bias else None, inputs_first, grad)
    for ours, right in zip(results(x, weight, bias, inputs_first, grad), exact, strict=True):
        torch.testing.assert_close(ours, right.float(), rtol=3e-6, atol=0)


def test_a_frozen_weight_gets_no_gradient(by_onednn: bool) -> None:
    x, weight = torch.rand(40, 32, requires_grad=True), torch.rand(64, 32)
    linear(x, weight, None).sum().backward()
    assert x.grad is not None and weight.grad is None
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight, None), F.linear(x, weight))


def test_a_vector(by_onednn: bool) -> None:
    x, weight, bias = torch.rand(32), torch.rand(64, 32), torch.rand(64)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("inputs_first", [False, True])
def test_autocast_and_16_bits_are_left_to_torch(by_onednn: bool, inputs_first: bool) -> None:
    x, weight_OI = torch.rand(40, 32), torch.rand(64, 32)
    weight = weight_OI.t().contiguous() if inputs_first else weight_OI
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None, inputs_first=inputs_first).dtype is torch.bfloat16
    ours = linear(x.bfloat16(), weight.bfloat16(), None, inputs_first=inputs_first)
    torch.testing.assert_close(ours, F.linear(x.bfloat16(), weight_OI.bfloat16()))


@pytest.mark.parametrize("a_is_transposed", [False, True])
@pytest.mark.parametrize("b_is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(40, 33, 70), (5, 64, 3), (1, 1, 1), (0, 8, 8)])
def test_products_and_sums_of_products(
    shape: tuple[int, int, int], a_is_transposed: bool, b_is_transposed: bool, by_onednn: bool
) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(k, m, generator=generator).t() if a_is_transposed else torch.rand(m, k, generator=generator)
    b = torch.rand(n, k, generator=generator).t() if b_is_transposed else torch.rand(k, n, generator=generator)
    bias, total = torch.rand(n, generator=generator), torch.rand(m, n, generator=generator)
    exact = (a.double() @ b.double()).float()
    lent = torch.empty(m, n)
    for ours, right in [
        (product(a, b), exact),
        (product(a, b, bias), exact + bias),
        (product(a, b, bias, out=lent), exact + bias),
    ]:
        torch.testing.assert_close(ours, right, rtol=3e-6, atol=0)
    expected = total + exact
    add_product(total, a, b)
    torch.testing.assert_close(total, expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize(
    ("facts", "units", "expected"),
    [(AMD, "AVX512", True), (INTEL, "AVX512", False), (AMD, "AVX2", False), (None, "AVX512", False)],  # None: not Linux
)
@pytest.mark.usefixtures("fresh_choice")
def test_onednn_is_for_amd_with_avx512(
    facts: str | None, units: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if facts is not None:
        (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr(products, "_CPU_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: units)
    assert onednn_is_faster() is expected


@pytest.mark.parametrize(
    ("supported", "bf16_seconds", "expected"), [(True, 1.0, "bf16"), (True, 3.0, "fp32"), (False, 1.0, "fp32")]
)
def test_bf16_is_chosen_where_it_is_faster(
    supported: bool, bf16_seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(0 < products._product_seconds(dtype) < 1 for dtype in (torch.float32, torch.bfloat16))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(products, "_product_seconds", {torch.bfloat16: bf16_seconds, torch.float32: 2.0}.get)
    assert fastest_cpu_format() == expected
