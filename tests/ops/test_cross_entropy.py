"""Chunked linear cross-entropy, compared with torch's on all logits."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_ds.ops import cross_entropy
from dalle_ds.ops.cross_entropy import linear_cross_entropy, linear_nll

N_ROWS, WIDTH, VOCAB, CHUNK = 37, 6, 50, 8  # the last chunk has 5 rows
IGNORED = -7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", CHUNK * VOCAB + VOCAB - 1)


def inputs(n_rows: int = N_ROWS, ignored: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight and bias as leaf tensors, and targets, some of which are ignored."""
    generator = torch.Generator().manual_seed(n_rows)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((n_rows, WIDTH), (VOCAB, WIDTH), (VOCAB,)))
    targets = torch.randint(0, VOCAB, (n_rows,), generator=generator)
    targets[torch.randperm(n_rows, generator=generator)[:ignored]] = IGNORED
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def plain(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), targets, ignore_index=IGNORED, reduction=reduction)


class Watch(TorchDispatchMode):
    """Counts operators, and records the largest number of rows of any result that has one column per token."""

    def __init__(self) -> None:
        super().__init__()
        self.most_rows, self.calls = 0, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == VOCAB:
                self.most_rows = max(self.most_rows, tensor.shape[0])
        return result

    @property
    def n_products(self) -> int:
        return sum(self.calls[name] for name in ("mm", "addmm", "addmm_", "_linear_pointwise"))


@pytest.mark.parametrize("products", ["_PlainProducts", "_SplitProducts"])
@pytest.mark.parametrize("ignored", [0, 1, N_ROWS - 1])
@pytest.mark.parametrize("n_rows", [N_ROWS, 2 * CHUNK])
def test_value_and_gradients_are_torchs(n_rows: int, ignored: int, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also tests the products that are used on GPUs."""
    monkeypatch.setattr(cross_entropy, "_products_on", lambda device: getattr(cross_entropy, products))
    x, weight, bias, targets = inputs(n_rows, min(ignored, n_rows - 1))
    leaves = x, weight, bias
    loss, expected = linear_cross_entropy(x, weight, bias, targets, IGNORED), plain(x, weight, bias, targets)
    assert loss.shape == () and loss.dtype is torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    scale = -0.3  # factors that the trainer multiplies into the loss must reach the gradients
    for found, wanted in zip(
        torch.autograd.grad(loss * scale, leaves), torch.autograd.grad(expected * scale, leaves), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())


def test_a_count_that_the_caller_knows_changes_nothing() -> None:
    found = []
    for n_kept in (None, N_ROWS - 5):
        x, weight, bias, targets = inputs(ignored=5)
        loss = linear_cross_entropy(x, weight, bias, targets, IGNORED, n_kept)
        found.append([loss, *torch.autograd.grad(loss, (x, weight, bias))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_row_and_no_marker() -> None:
    x, weight, bias, targets = inputs(1)
    loss = linear_cross_entropy(x, weight, bias, targets)
    torch.testing.assert_close(loss, plain(x, weight, bias, targets), rtol=1e-6, atol=0)


def test_nothing_but_ignored_rows_is_zero_with_zero_gradients() -> None:
    x, weight, bias, targets = inputs(ignored=N_ROWS)
    loss = linear_cross_entropy(x, weight, bias, targets, IGNORED)
    assert loss.item() == 0
    loss.backward()
    assert all(leaf.grad is not None and leaf.grad.eq(0).all() for leaf in (x, weight, bias))


def test_gradients_only_where_asked_for() -> None:
    x, weight, bias, targets = inputs()
    weight.requires_grad_(False)
    with Watch() as watch:
        linear_cross_entropy(x, weight, bias, targets).backward()
    n_chunks = -(-N_ROWS // CHUNK)
    assert watch.n_products == 2 * n_chunks  # for the logits, and for x's gradient
    assert weight.grad is None
    expected = torch.autograd.grad(plain(x, weight, bias, targets), (x, bias))
    torch.testing.assert_close((x.grad, bias.grad), expected, rtol=1e-6, atol=1e-5)


def test_without_gradients_none_are_made() -> None:
    x, weight, bias, targets = inputs()
    with torch.no_grad(), Watch() as watch:
        loss = linear_cross_entropy(x, weight, bias, targets)
    assert not loss.requires_grad
    assert watch.n_products == -(-N_ROWS // CHUNK)
    torch.testing.assert_close(loss, plain(x, weight, bias, targets).detach(), rtol=1e-6, atol=0)


def test_no_more_logits_than_a_chunk_at_a_time() -> None:
    x, weight, bias, targets = inputs()
    with Watch() as watch:
        linear_cross_entropy(x, weight, bias, targets).backward()
    assert watch.most_rows == CHUNK
    with Watch() as watch, torch.no_grad():
        linear_nll(x, weight, bias, targets)
    assert watch.most_rows == CHUNK
    with Watch() as watch:
        plain(x, weight, bias, targets)
    assert watch.most_rows == N_ROWS


def test_a_vocabulary_larger_than_a_chunk_goes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", VOCAB - 1)
    x, weight, bias, targets = inputs()
    torch.testing.assert_close(linear_cross_entropy(x, weight, bias, targets), plain(x, weight, bias, targets))


def test_logits_are_fp32_under_autocast() -> None:
    x, weight, bias, targets = inputs()
    expected = plain(x, weight, bias, targets)
    per_row = plain(x, weight, bias, targets, "none")
    with torch.autocast("cpu", torch.bfloat16):
        loss, rows = linear_cross_entropy(x, weight, bias, targets), linear_nll(x, weight, bias, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows, per_row, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, weight)[0], rtol=1e-6, atol=1e-5)


def test_16_bit_inputs_get_16_bit_gradients_of_an_fp32_loss() -> None:
    wide = inputs()
    narrow = [leaf.detach().bfloat16().requires_grad_() for leaf in wide[:3]]
    loss = linear_cross_entropy(*narrow, wide[3])
    assert loss.dtype is torch.float32
    rounded = [leaf.detach().float().requires_grad_() for leaf in narrow]
    for found, wanted in zip(
        torch.autograd.grad(loss, narrow), torch.autograd.grad(plain(*rounded, wide[3]), rounded), strict=True
    ):
        torch.testing.assert_close(found, wanted.bfloat16(), rtol=2**-7, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    x, weight, bias, targets = inputs()
    loss = linear_cross_entropy(x * 1e4, weight, bias, targets)
    assert loss.isfinite()
    torch.testing.assert_close(loss, plain(x * 1e4, weight, bias, targets), rtol=1e-6, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, weight, bias)))


def test_a_second_backward_pass_is_refused() -> None:
    x, weight, bias, targets = inputs()
    loss = linear_cross_entropy(x, weight, bias, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize("target", [VOCAB, -1])
def test_a_target_outside_the_vocabulary_is_an_error(target: int) -> None:
    x, weight, bias, targets = inputs()
    targets[3] = target
    for function in (linear_cross_entropy, linear_nll):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            function(x, weight, bias, targets)


@pytest.mark.parametrize("n_rows", [0, 1, N_ROWS])
def test_terms_of_every_row(n_rows: int) -> None:
    x, weight, bias, targets = inputs(n_rows, ignored=n_rows // 3)
    rows, expected = linear_nll(x, weight, bias, targets, IGNORED), plain(x, weight, bias, targets, "none")
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    assert rows[targets == IGNORED].eq(0).all()
    gradients = [torch.autograd.grad(terms.square().sum(), (x, weight, bias)) for terms in (rows, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


def test_rows_of_the_weights_gradient_that_are_made_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_products_on", lambda device: cross_entropy._SplitProducts)
    found = []
    for n_rows in (cross_entropy.MAX_WEIGHT_ROWS, 7):
        monkeypatch.setattr(cross_entropy, "MAX_WEIGHT_ROWS", n_rows)
        x, weight, bias, targets = inputs(ignored=5)
        found.append(torch.autograd.grad(linear_cross_entropy(x, weight, bias, targets, IGNORED), weight)[0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6 * found[0].abs().max().item())
